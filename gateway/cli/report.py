"""The result of a check, step by step, and its output.

In: `Step`s as they happen.  Out: a line for each at once, or one JSON document at the end; and the exit status.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, TextIO

from attrs import evolve, field, frozen

from gateway import __version__
from gateway.text import unprintable_escaped


class Status(StrEnum):
    """The result of a step."""

    PASS = "PASS"  # noqa: S105  a word, not a password
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


_COLOURS = {Status.PASS: "32", Status.WARN: "33", Status.FAIL: "31", Status.SKIP: "2"}  # SGR codes (ECMA-48 §8.3.117)
_WORST_FIRST = (Status.FAIL, Status.WARN, Status.PASS)
_STEP_WIDTH = len("configuration")


@frozen
class Step:
    """One step: its name, its result, what was found, and what to do about it.

    `upstream` is the broker's `HOST:PORT`, empty for steps of the gateway itself.  `facts` are JSON values.
    """

    name: str
    status: Status
    message: str
    remedy: str = ""
    upstream: str = ""
    facts: Mapping[str, Any] = field(factory=dict)


class Report:
    """All steps so far; calls `show` with each new one."""

    def __init__(self, show: Callable[[Step], None]) -> None:
        self.steps: list[Step] = []
        self.commands: list[str] = []
        self._show = show

    def add(self, step: Step) -> None:
        """Add a step."""
        self.steps.append(step)
        self._show(step)

    @property
    def result(self) -> Status:
        """The worst result so far; skipped steps do not count."""
        seen = {step.status for step in self.steps}
        return next((status for status in _WORST_FIRST if status in seen), Status.PASS)

    def exit_status(self, *, strict: bool) -> int:
        """Return 0, 1 if a step failed, 2 for warnings if `strict`."""
        if self.result is Status.FAIL:
            return 1
        return 2 if strict and self.result is Status.WARN else 0

    def as_json(self, *, quiet: bool, strict: bool) -> str:
        """Return the report as one JSON document."""
        document = {
            "version": __version__,
            "result": self.result,
            "exit_status": self.exit_status(strict=strict),
            "steps": [_as_mapping(step) for step in self.steps if is_shown(step, quiet=quiet)],
            "openssl": self.commands,
        }
        return json.dumps(document, indent=2)


class TextView:
    """Prints steps as lines, in colours if the stream is a terminal and NO_COLOR is not set (no-color.org).

    Steps in a row that are skipped for one reason share a line, which `end` prints if no other step follows.
    """

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._stream = stream
        self._quiet = quiet
        self._coloured = stream.isatty() and not os.environ.get("NO_COLOR")
        self._skipped: list[Step] = []

    def show(self, step: Step) -> None:
        """Print a step, and below it the remedy."""
        if not is_shown(step, quiet=self._quiet):
            return
        if self._skipped and step.status is Status.SKIP and step.message == self._skipped[0].message:
            self._skipped.append(step)
            return
        self.end()
        if step.status is Status.SKIP:
            self._skipped = [step]
        else:
            self._print(step)

    def end(self) -> None:
        """Print what is left."""
        if self._skipped:
            names = ", ".join(dict.fromkeys(step.name for step in self._skipped))
            upstreams = ", ".join(dict.fromkeys(filter(None, (step.upstream for step in self._skipped))))
            self._print(evolve(self._skipped[0], name=names, upstream=upstreams))
            self._skipped = []

    def _print(self, step: Step) -> None:
        status = f"\033[{_COLOURS[step.status]}m{step.status}\033[0m" if self._coloured else step.status
        upstream = f"[{step.upstream}] " if step.upstream else ""
        lines = [f"{status}  {step.name:<{_STEP_WIDTH}}  {upstream}{unprintable_escaped(step.message)}"]
        if step.remedy:
            lines.append(f"      -> {unprintable_escaped(step.remedy)}")
        print("\n".join(lines), file=self._stream, flush=True)


def is_shown(step: Step, *, quiet: bool) -> bool:
    """Return whether a step is shown."""
    return not quiet or step.status in {Status.WARN, Status.FAIL}


def complain(words: str) -> None:
    """Print on stderr why a command failed."""
    print(f"mqtts-gateway: {words}", file=sys.stderr)


def _as_mapping(step: Step) -> dict[str, Any]:
    return {
        "step": step.name,
        "upstream": step.upstream or None,
        "status": step.status,
        "message": unprintable_escaped(step.message),
        "remedy": unprintable_escaped(step.remedy) or None,
        **({"facts": step.facts} if step.facts else {}),
    }
