"""Topic Names and Topic Filters: what matches, what covers what, and what a prefix makes of them (MQTT 5.0 §4.7).

In: texts from packets and from the configuration.  Out: answers, and other texts.
"""

from __future__ import annotations

_SHARED = "$share/"


def check_filter(text: str) -> None:
    """Raise ValueError that says why `text` is no Topic Filter (MQTT 5.0 §4.7.1, §4.7.3)."""
    if not text:
        raise ValueError("a Topic Filter has at least one character")
    if "\0" in text:
        raise ValueError("a Topic Filter holds no character U+0000")
    levels = text.split("/")
    for index, level in enumerate(levels):
        if "#" in level and (level != "#" or index != len(levels) - 1):
            raise ValueError("# stands for whole levels, and only at the end")
        if "+" in level and level != "+":
            raise ValueError("+ stands for a whole level")


def check_name(text: str) -> None:
    """Raise ValueError that says why `text` is no Topic Name (MQTT 5.0 §3.3.2.1)."""
    if not text:
        raise ValueError("a Topic Name has at least one character")
    if "+" in text or "#" in text or "\0" in text:
        raise ValueError("a Topic Name holds neither + nor # nor U+0000")


def covers(allowed: str, wanted: str) -> bool:
    """Whether every topic that `wanted` matches is matched by `allowed`; a Topic Name matches itself.

    Both are Topic Filters as `check_filter` has them. A wildcard at the beginning matches no topic that begins with `$`
    [MQTT-4.7.2-1], so `#` does not cover `$SYS/#`.
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
    """A list of permitted Topic Filters. Names and filters without wildcards are looked up, not compared."""

    __slots__ = ("_exact", "_wild")

    def __init__(self, filters: tuple[str, ...]) -> None:
        self._exact = frozenset(text for text in filters if not {"+", "#"} & set(text))
        self._wild = tuple(text for text in filters if text not in self._exact)

    def permits(self, wanted: str) -> bool:
        """Whether all that a Topic Filter matches is covered by one of the list.

        Of a shared subscription the filter counts (MQTT 5.0 §4.8.2).
        """
        return self.permits_name(split_shared(wanted)[1])

    def permits_name(self, wanted: str) -> bool:
        """Whether a Topic Name is covered by one of the list; none is a shared subscription's."""
        return wanted in self._exact or any(covers(allowed, wanted) for allowed in self._wild)


def split_shared(text: str) -> tuple[str, str]:
    """Cut `$share/group/filter` into `$share/group/` and `filter`; others have nothing before (MQTT 5.0 §4.8.2).

    A group without a name is none [MQTT-4.8.2-1], but brokers serve it (Mosquitto does). So it is cut, too: its filter
    is not to go past the rules.
    """
    if not text.startswith(_SHARED):
        return "", text
    group, slash, rest = text.removeprefix(_SHARED).partition("/")
    return (f"{_SHARED}{group}/", rest) if slash else ("", text)


def add_prefix(text: str, prefix: str) -> str:
    """Put `prefix` before a Topic Name or Filter, within a shared subscription before its filter.

    What begins with `$` is the broker's own and means nothing elsewhere (MQTT 5.0 §4.7.2), so it stays.
    """
    shared, rest = split_shared(text)
    return text if rest.startswith("$") else shared + prefix + rest


def remove_prefix(text: str, prefix: str) -> str | None:
    """Take `prefix` from a Topic Name; None where it does not begin so, or nothing would be left."""
    return text[len(prefix) :] if text.startswith(prefix) and len(text) > len(prefix) else None
