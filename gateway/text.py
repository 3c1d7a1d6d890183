"""Makes untrusted text safe to show.

In: Client Identifiers, certificate names, reason strings, alerts: any text that a peer chose.  Out: one line of
printable characters that cannot move a cursor, start a new log line or reverse the reading order.
"""

from __future__ import annotations


def printable(text: str, limit: int = 256) -> str:
    r"""Return `text` with unprintable characters escaped, cut after `limit` characters.

    `str.isprintable` leaves out controls, line separators, surrogates and the bidirectional overrides.  The backslash
    is doubled, so an escape in the result always comes from here.
    """
    if len(text) <= limit and text.isprintable() and "\\" not in text:
        return text
    shown = "".join(
        character if character.isprintable() and character != "\\" else _escape(character) for character in text[:limit]
    )
    return shown + "…" if len(text) > limit else shown


def capitalized(words: str) -> str:
    """Begin with a capital letter; unlike `str.capitalize`, leave the others, which may be those of a name."""
    return words[:1].upper() + words[1:]


def unprintable_escaped(text: str, limit: int | None = None) -> str:
    """Return `text` with unprintable characters escaped, backslashes unchanged, cut after `limit` characters.

    For sentences of the gateway, in which untrusted text has been through `printable` already: details of an end
    reason, problems of a configuration.  `printable` would escape that a second time.
    """
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(character if character.isprintable() else _escape(character) for character in shown)
    return shown + "…" if limit is not None and len(text) > limit else shown


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # a byte that is not UTF-8 (PEP 383)
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
