"""Lists what differs between two configurations.

In: two `Config`s.  Out: dotted keys; no values, since those may be secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from gateway.config.schema import Config


def changed_keys(before: Config, after: Config) -> list[str]:
    """Return the keys whose values differ; a list of tables whose length changed is named as a whole."""
    return list(_changed("", before, after))


def _changed(key: str, before: Any, after: Any) -> Iterator[str]:
    if before == after:
        return
    if type(before) is not type(after):  # a key that may be absent: `None` on one side
        yield key
    elif attrs.has(type(before)):
        for field in attrs.fields(type(before)):
            dotted = f"{key}.{field.name}" if key else field.name
            yield from _changed(dotted, getattr(before, field.name), getattr(after, field.name))
    elif isinstance(before, tuple) and len(before) == len(after) and all(attrs.has(type(each)) for each in before):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _changed(f"{key}[{index}]", *pair)
    else:
        yield key
