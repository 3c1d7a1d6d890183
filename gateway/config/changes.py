"""Lists what differs between two configurations.

In: two `Config`s.  Out: dotted keys; no values, since those may be secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from gateway.config.schema import Config
from gateway.pieces import Pause, no_pause
from gateway.text import printable


def changed_keys(before: Config, after: Config, pause: Pause = no_pause) -> list[str]:
    """Return the keys whose values differ; a list of tables whose length changed is named as a whole.

    `pause` is called between two tables.
    """
    return list(_changed("", before, after, pause))


def _changed(key: str, before: Any, after: Any, pause: Pause) -> Iterator[str]:
    pause()
    if _are_tables(before) and _are_tables(after) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _changed(_label(f"{key}[{index}]", *pair), *pair, pause)
    elif not isinstance(before, Config) and before == after:
        return
    elif type(before) is not type(after):  # a key that may be absent: `None` on one side
        yield key
    elif attrs.has(type(before)):
        for field in attrs.fields(type(before)):
            dotted = f"{key}.{field.name}" if key else field.name
            yield from _changed(dotted, getattr(before, field.name), getattr(after, field.name), pause)
    else:
        yield key


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
