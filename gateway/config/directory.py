"""A directory of rules, one small TOML file for each device.

In: a directory.  Out: a `DeviceRule` for each `*.toml` in it, ordered by name, and the problems in the others.
"""

from __future__ import annotations

import os
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from gateway.config.anchor import Anchor
from gateway.config.devices import BrokenRule, DeviceRule, anchored
from gateway.config.profiles import with_profile
from gateway.config.structure import structure_device
from gateway.config.tables import read_table
from gateway.config.value_words import quoted
from gateway.disk import read_file
from gateway.errors import ConfigError
from gateway.pieces import Pause, in_order, no_pause

_WILDCARDS = frozenset("*?[")
_RULE_FILE = re.compile(r"[^.].*\.toml", re.DOTALL)
# Seconds; file systems' times are more precise than that.
_UNSETTLED = 2.0

Profile: TypeAlias = tuple[str, str]
"""A profile's name, and the first broker's host; see `profiles.with_profile`."""


def read_directory(
    directory: Path, anchor: Anchor, profile: Profile, known: RuleFiles, *, lenient: bool = False
) -> tuple[list[tuple[Path, DeviceRule]], list[str]]:
    """Return the rules, each after its file, and all problems.

    `anchor` is that of the configuration; relative paths in a rule file start at this directory.
    `known` has the files that were read before; those that did not change are not read again.

    A file without a `match_…` key is for the Client Identifier that is its name without `.toml`. Hidden files are
    skipped: editors and copy programs use them for unfinished files.

    If `lenient`, a file that cannot be used gives a `BrokenRule` instead of problems.
    """
    try:
        with os.scandir(directory) as entries:
            names = in_order(_names(entries, known.pause), known.pause)
    except OSError as error:
        remedy = "; create it (it may be empty)" if isinstance(error, FileNotFoundError) else ""
        return [], [f"devices.directory: {quoted(str(directory), 4096)} cannot be read: {error.strerror}{remedy}"]
    rules: list[tuple[Path, DeviceRule]] = []
    for_anybody: list[tuple[Path, DeviceRule]] = []
    problems: list[str] = []
    known.begin((directory, anchor, profile), names)
    for name in names:
        known.pause()
        path = known.path(directory, name)
        try:
            rules.append((path, known.rule(path, lambda path: _read(path, anchor, profile))))
        except ConfigError as error:
            found = list(_labelled(file_label(path), error))
            if not lenient:
                problems += found
                continue
            broken = _broken(path, "; ".join(found), known.last(path))
            # It may concern any device that no other file names; those are refused, too.
            (for_anybody if broken.is_for_everybody else rules).append((path, broken))
    return rules + for_anybody, problems


def _names(entries: Iterable[os.DirEntry[str]], pause: Pause) -> Iterator[str]:
    for entry in entries:
        pause()
        if _RULE_FILE.fullmatch(entry.name):
            yield entry.name


class RuleFiles:
    """The rules that were read, by file, so that a file that did not change is not read again.

    `pause` is called between two files.
    """

    def __init__(self, pause: Pause = no_pause) -> None:
        self.pause = pause
        self._basis: object = None
        # By the names of the files.
        self._known: dict[str, _Known] = {}

    def begin(self, basis: object, names: Iterable[str]) -> None:
        """Begin to read the files of these names; the rules depend on them and on `basis`."""
        before = self._known if basis == self._basis else {}
        self._basis = basis
        self._known = {}
        for name in names:
            self.pause()
            if name in before:
                self._known[name] = before[name]

    def path(self, directory: Path, name: str) -> Path:
        """Return the path of a file."""
        known = self._known.get(name)
        return directory / name if known is None else known.path

    def rule(self, path: Path, read: Callable[[Path], DeviceRule]) -> DeviceRule:
        """Return the rule in a file, with `read` if it is not known.  Raises ConfigError."""
        state = _settled_state(path)
        known = self._known.get(path.name)
        if known is None or not state or known.state != state:
            self._known[path.name] = known = _Known(path, state, read(path))
        return known.rule

    def last(self, path: Path) -> DeviceRule | None:
        """Return the rule that a file had when it could last be read."""
        known = self._known.get(path.name)
        return None if known is None else known.rule


@attrs.frozen(eq=False)
class _Known:
    """A file, its state when it was read ("" if it must be read again), and the rule in it."""

    path: Path
    state: str
    rule: DeviceRule


def _settled_state(path: Path) -> str:
    """Return what changes with the file's content; "" if it may change again within the precision of its times."""
    try:
        found = os.stat(path)  # noqa: PTH116  Path.stat is slower
    except (OSError, ValueError):
        return ""
    if abs(time.time() - found.st_ctime) < _UNSETTLED:
        return ""
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def file_label(path: Path) -> str:
    """Return a file's name for messages."""
    return quoted(str(path), 4096)


def _read(path: Path, anchor: Anchor, profile: Profile) -> DeviceRule:
    # Most likely an unfinished copy; as a rule, it would take the device's identity away.
    table = read_table(path, "write at least which device the rule is for")
    name = path.stem
    if not any(key.startswith("match_") for key in table):
        if _WILDCARDS & set(name):
            raise ConfigError(["match_client_id: missing, and the file's name contains wildcards: set it explicitly"])
        table["match_client_id"] = name
    device = structure_device(with_profile(*profile, table))
    return anchored(attrs.evolve(device, name=device.name or name[:64]), anchor.moved(path.absolute().parent))


def _broken(path: Path, problem: str, before: DeviceRule | None) -> BrokenRule:
    """Return a rule that refuses the devices that a broken file is for; all, if the file does not say.

    The names that it gives at the broker stay reserved; `before` is the rule that the file had before, if it is known.
    """
    # Escaped where it is shown, as other names are; only what no label may contain is replaced.
    name = "".join(each if each.isprintable() else "\ufffd" for each in path.stem)[:64]
    broken = BrokenRule(name=name, problem=problem)
    for keys in (("match_", "client_id"), ("match_",)):
        with suppress(ConfigError, ValueError, OSError):
            broken = BrokenRule.of(attrs.evolve(structure_device(_part(path, keys)), name=name), problem)
            break
    if broken.client_id:
        return broken
    if before is not None:
        return attrs.evolve(broken, before=BrokenRule.of(before, problem))
    return attrs.evolve(broken, names_begin=_beginning(path))


def _beginning(path: Path) -> str | None:
    """Return the text before the first placeholder of a broken file's `client_id`, "" if that cannot be read.

    None if the file has no such key.
    """
    try:
        text = _part(path, ("client_id",)).get("client_id")
    except (ValueError, OSError):
        return ""
    return text if text is None else text.partition("{")[0] if isinstance(text, str) else ""


def _part(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the keys of a broken file that begin with one of `keys`, `match_` among them, which says for whom it is.

    Raises OSError, and ValueError if they cannot be read.
    """
    text = read_file(path).decode("utf-8-sig")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        lines = [line for line in text.splitlines() if line.lstrip().startswith(keys)]
        table = tomllib.loads("\n".join(lines))
    part = {key: value for key, value in table.items() if key.startswith(keys)}
    if not any(key.startswith("match_") for key in part) and not _WILDCARDS & set(path.stem):
        part["match_client_id"] = path.stem
    return part


def _labelled(label: str, error: ConfigError) -> Iterator[str]:
    for problem in error.problems:
        yield problem if problem.startswith(label) else f"{label}: {problem}"
