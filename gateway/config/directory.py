"""A directory of rules, one small TOML file for each device.

In: a directory.  Out: a `DeviceRule` for each `*.toml` in it, ordered by name, and the problems in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from gateway.config.anchor import Anchor
from gateway.config.devices import DeviceRule, anchored
from gateway.config.structure import structure_device
from gateway.config.tables import read_table
from gateway.config.value_words import quoted
from gateway.errors import ConfigError

_WILDCARDS = frozenset("*?[")


def read_directory(
    directory: Path, anchor: Anchor, filled: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[list[tuple[Path, DeviceRule]], list[str]]:
    """Return the rules, each after its file, and all problems.

    `anchor` is that of the configuration; relative paths in a rule file start at this directory.
    `filled` adds default values to a file's table.

    A file without a `match_…` key is for the Client Identifier that is its name without `.toml`. Hidden files are
    skipped: editors and copy programs use them for unfinished files.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".toml" and path.name[0] != ".")
    except OSError as error:
        return [], [f"devices.directory: {quoted(str(directory), 4096)} cannot be read: {error.strerror}"]
    rules: list[tuple[Path, DeviceRule]] = []
    problems: list[str] = []
    for path in paths:
        try:
            rules.append((path, _read(path, anchor, filled)))
        except ConfigError as error:
            problems += _labelled(file_label(path), error)
    return rules, problems


def file_label(path: Path) -> str:
    """Return a file's name for messages."""
    return quoted(str(path), 4096)


def _read(path: Path, anchor: Anchor, filled: Callable[[dict[str, Any]], dict[str, Any]]) -> DeviceRule:
    # Most likely an unfinished copy; as a rule, it would take the device's identity away.
    table = read_table(path, "write at least which device the rule is for")
    name = path.stem
    if not any(key.startswith("match_") for key in table):
        if _WILDCARDS & set(name):
            raise ConfigError(["match_client_id: missing, and the file's name contains wildcards: set it explicitly"])
        table["match_client_id"] = name
    device = structure_device(filled(table))
    return anchored(attrs.evolve(device, name=device.name or name[:64]), anchor.moved(path.absolute().parent))


def _labelled(label: str, error: ConfigError) -> Iterator[str]:
    for problem in error.problems:
        yield problem if problem.startswith(label) else f"{label}: {problem}"
