"""Lists what differs between two configurations.

In: two `Config`s.  Out: dotted keys, and words such as `device "pump-3" removed`; no values, since those may be secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from gateway.config.schema import Config
from gateway.pieces import Pause, no_pause
from gateway.text import printable

_MOST_NAMED = 10  # tables of a list that were added, and as many that were removed


def changed_keys(before: Config, after: Config, pause: Pause = no_pause) -> list[str]:
    """Return the keys whose values differ; of tables with names, also which were added and removed.

    A list of tables without names whose length changed is named as a whole.  `pause` is called between two tables.
    """
    return list(_changed("", before, after, pause))


def _changed(key: str, before: Any, after: Any, pause: Pause) -> Iterator[str]:
    pause()
    if (_are_tables(before) or _are_tables(after)) and (named := _by_names(key, before, after, pause)) is not None:
        yield from _changed_by_name(key, *named, pause)
    elif _are_tables(before) and _are_tables(after) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _changed(_label(f"{key}[{index}]", *pair), *pair, pause)
    elif not isinstance(before, Config) and before == after:
        return
    elif type(before) is not type(after):  # a key that may be absent: `None` on one side
        yield key
    elif attrs.has(type(before)):
        for field in attrs.fields(type(before)):
            dotted = f"{key}.{field.name}" if key else field.name
            if field.name == "enabled" and before.enabled != after.enabled:
                yield f"{key} {'enabled' if after.enabled else 'disabled'}"
                continue
            yield from _changed(dotted, getattr(before, field.name), getattr(after, field.name), pause)
    else:
        yield key


def _by_names(key: str, before: Any, after: Any, pause: Pause) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the tables by name, if tables came, went or moved and all have names of their own."""
    found = []
    for tables in (before, after):
        names: dict[str, Any] = {}
        for index, table in enumerate(tables):
            pause()
            name = getattr(table, "name", "")
            # A rule without a name has its position as one.
            if not name or name in names or name == f"{key}[{index}]":
                return None
            names[name] = table
        found.append(names)
    return None if list(found[0]) == list(found[1]) else (found[0], found[1])


def _changed_by_name(key: str, before: dict[str, Any], after: dict[str, Any], pause: Pause) -> Iterator[str]:
    kept, gone = _split(before, after, pause)
    still, come = _split(after, before, pause)
    for what, names in (("removed", gone), ("added", come)):
        yield from (f'{key} "{printable(name)}" {what}' for name in names[:_MOST_NAMED])
        if len(names) > _MOST_NAMED:
            yield f"{key}: {len(names) - _MOST_NAMED} more {what}"
    if kept != still:
        yield key  # in another order
    for name in kept:
        yield from _changed(f'{key} "{printable(name)}"', before[name], after[name], pause)


def _split(names: dict[str, Any], others: dict[str, Any], pause: Pause) -> tuple[list[str], list[str]]:
    """Return the names that the others have too, and those that they do not have."""
    common: list[str] = []
    own: list[str] = []
    for name in names:
        pause()
        (common if name in others else own).append(name)
    return common, own


def _label(key: str, before: object, after: object) -> str:
    """Name a table of a list: by its `name`, which people know, or by its position, as in `key`."""
    name = getattr(before, "name", "")
    # A rule without a name has its position as one.
    if not name or name == key or name != getattr(after, "name", ""):
        return key
    return f'{key.partition("[")[0]} "{printable(name)}"'


def _are_tables(value: Any) -> bool:
    # To compare a tuple of thousands in one go would hold up other threads.
    return isinstance(value, tuple) and bool(value) and attrs.has(type(value[0]))
