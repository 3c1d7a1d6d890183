"""Topic Names and Topic Filters: syntax, coverage, and prefixes (MQTT 5.0 §4.7).

In: topics from packets and from the configuration.  Out: whether they are valid or covered; topics with a prefix added
or removed.
"""

from __future__ import annotations

import re
from typing import Any

_SHARED = "$share/"
_MISPLACED_PLUS = re.compile(r"[^/]\+|\+[^/]", re.DOTALL)
# Marks the end of a filter in the tree of `TopicFilters`; no level is empty bytes.
_END = b""


def check_filter(text: str) -> None:
    """Raise ValueError with the reason if `text` is not a Topic Filter (MQTT 5.0 §4.7.1, §4.7.3)."""
    if not text:
        raise ValueError("a Topic Filter must not be empty")
    if "\0" in text:
        raise ValueError("a Topic Filter must not contain U+0000")
    # Not level by level: a device may send 65,535 of them.
    if "#" in text.removesuffix("#") or (text.endswith("#") and text != "#" and text[-2] != "/"):
        raise ValueError("# must be a whole level, and the last one")
    if "+" in text and _MISPLACED_PLUS.search(text):
        raise ValueError("+ must be a whole level")


def check_name(text: str) -> None:
    """Raise ValueError with the reason if `text` is not a Topic Name (MQTT 5.0 §3.3.2.1)."""
    if not text:
        raise ValueError("a Topic Name must not be empty")
    if "+" in text or "#" in text or "\0" in text:
        raise ValueError("a Topic Name must not contain +, # or U+0000")


def covers(allowed: str, wanted: str) -> bool:
    """Return whether `allowed` matches every topic that `wanted` matches; a Topic Name matches itself.

    Both must be valid Topic Filters. A leading wildcard does not match topics that begin with `$` [MQTT-4.7.2-1], so
    `#` does not cover `$SYS/#`.
    """
    allowed_levels, wanted_levels = allowed.split("/"), wanted.split("/")
    if wanted.startswith("$") and allowed_levels[0] in {"#", "+"}:
        return False
    for index, level in enumerate(allowed_levels):
        if level == "#":
            return True
        if index == len(wanted_levels):
            return False
        found = wanted_levels[index]
        if found == "#" or (level != found and level != "+"):
            return False
    return len(wanted_levels) == len(allowed_levels)


class TopicFilters:
    """A list of permitted Topic Filters. Those with wildcards form a tree of their levels.

    So a check takes time by the depth of the list's filters, not by the length of the list or of what is checked.
    """

    __slots__ = ("_depth", "_exact", "_tree", "filters")

    def __init__(self, filters: tuple[str, ...]) -> None:
        self.filters = filters
        self._exact = frozenset(text for text in filters if not {"+", "#"} & set(text))
        self._tree: dict[Any, Any] = {}
        self._depth = 0
        for text in filters:
            if text in self._exact:
                continue
            levels = text.split("/")
            self._depth = max(self._depth, len(levels))
            node = self._tree
            for level in levels:
                node = node.setdefault(level, {})
            node[_END] = {}

    def permits(self, wanted: str) -> bool:
        """Return whether one filter of the list covers a Topic Filter.

        For a shared subscription, its filter is checked (MQTT 5.0 §4.8.2).
        """
        return self.permits_name(split_shared(wanted)[1])

    def permits_name(self, wanted: str) -> bool:
        """Return whether one filter of the list covers a Topic Name, which is never read as a shared subscription."""
        return wanted in self._exact or (bool(self._tree) and self._covered(wanted))

    def _covered(self, wanted: str) -> bool:
        """As `covers`, for all filters of the tree at once."""
        nodes = [self._tree]
        # The last part may have many levels; it is deeper than any filter, so only a # before it can cover it.
        for index, level in enumerate(wanted.split("/", self._depth)):
            wild = index or not wanted.startswith("$")
            if wild and any("#" in node for node in nodes):
                return True
            found = [node[level] for node in nodes if level != "#" and level in node]
            if wild and level not in {"#", "+"}:
                found += [node["+"] for node in nodes if "+" in node]
            nodes = found
            if not nodes:
                return False
        # `a/#` covers its parent `a` as well.
        return any(_END in node or "#" in node for node in nodes)


def split_shared(text: str) -> tuple[str, str]:
    """Split `$share/group/filter` into `$share/group/` and `filter`; the first part is empty for other filters.

    An empty group name is invalid [MQTT-4.8.2-1], but some brokers accept it (Mosquitto does), so it is split as well:
    its filter must not escape the rules (MQTT 5.0 §4.8.2).
    """
    if not text.startswith(_SHARED):
        return "", text
    group, slash, rest = text.removeprefix(_SHARED).partition("/")
    return (f"{_SHARED}{group}/", rest) if slash else ("", text)


def add_prefix(text: str, prefix: str) -> str:
    """Put `prefix` before a Topic Name or Filter, or before the filter of a shared subscription.

    Topics that begin with `$` belong to the broker (MQTT 5.0 §4.7.2) and stay as they are.
    """
    shared, rest = split_shared(text)
    return text if rest.startswith("$") else shared + prefix + rest


def remove_prefix(text: str, prefix: str) -> str | None:
    """Remove `prefix` from a Topic Name; return None if it does not begin with it, or nothing would be left."""
    return text[len(prefix) :] if text.startswith(prefix) and len(text) > len(prefix) else None
