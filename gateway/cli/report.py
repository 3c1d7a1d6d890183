"""What a check found, step by step, and how it is shown.

In: `Step`s as they are taken.  Out: a line for each, at once; or one JSON document at the end; and the exit status.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, TextIO

from attrs import field, frozen

from gateway import __version__
from gateway.text import unprintable_escaped


class Status(StrEnum):
    """How a step went."""

    PASS = "PASS"  # noqa: S105  a word, not a password
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


_COLOURS = {Status.PASS: "32", Status.WARN: "33", Status.FAIL: "31", Status.SKIP: "2"}  # SGR codes (ECMA-48 §8.3.117)
_WORST_FIRST = (Status.FAIL, Status.WARN, Status.PASS)
_STEP_WIDTH = len("configuration")


@frozen
class Step:
    """One step: which, how it went, what was seen, and what to do about it.

    `upstream` is the broker's `HOST:PORT`, empty for what concerns the gateway itself.  `facts` are particulars for
    programs, as JSON knows them.
    """

    name: str
    status: Status
    message: str
    remedy: str = ""
    upstream: str = ""
    facts: Mapping[str, Any] = field(factory=dict)


class Report:
    """All steps so far; `show` is called with each as it comes."""

    def __init__(self, show: Callable[[Step], None]) -> None:
        self.steps: list[Step] = []
        self.commands: list[str] = []
        self._show = show

    def add(self, step: Step) -> None:
        """Take a step."""
        self.steps.append(step)
        self._show(step)

    @property
    def result(self) -> Status:
        """The worst that was seen; what was skipped does not count."""
        seen = {step.status for step in self.steps}
        return next((status for status in _WORST_FIRST if status in seen), Status.PASS)

    def exit_status(self, *, strict: bool) -> int:
        """Return 0, 1 if anything failed, 2 for warnings if they count."""
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
    """Shows steps as lines, in colours if the stream is a terminal and NO_COLOR is not set (no-color.org)."""

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._stream = stream
        self._quiet = quiet
        self._coloured = stream.isatty() and not os.environ.get("NO_COLOR")

    def show(self, step: Step) -> None:
        """Print a step, and under it what to do about it."""
        if not is_shown(step, quiet=self._quiet):
            return
        status = f"\033[{_COLOURS[step.status]}m{step.status}\033[0m" if self._coloured else step.status
        upstream = f"[{step.upstream}] " if step.upstream else ""
        lines = [f"{status}  {step.name:<{_STEP_WIDTH}}  {upstream}{unprintable_escaped(step.message)}"]
        if step.remedy:
            lines.append(f"      -> {unprintable_escaped(step.remedy)}")
        print("\n".join(lines), file=self._stream, flush=True)


def is_shown(step: Step, *, quiet: bool) -> bool:
    """Say whether a step is shown."""
    return not quiet or step.status in {Status.WARN, Status.FAIL}


def complain(words: str) -> None:
    """Say on stderr why a command cannot do what it should."""
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
