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


def unprintable_escaped(text: str) -> str:
    """Return `text` with unprintable characters escaped, backslashes unchanged.

    The last line of defence before output: most untrusted text has been through `printable` already.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
