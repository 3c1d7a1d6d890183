"""Text from strangers made fit to be shown.

In: Client Identifiers, certificate names, reason strings, alerts: whatever a peer chose.  Out: one line of printable
characters that cannot move a cursor, start a new log line or reverse the reading order.
"""

from __future__ import annotations


def printable(text: str, limit: int = 256) -> str:
    r"""Return `text` with each character that is not plainly printable as an escape, cut after `limit` characters.

    `str.isprintable` leaves out controls, line separators, surrogates and the bidirectional overrides.  The backslash
    is doubled, so that an escape in the result was always made here.
    """
    if len(text) <= limit and text.isprintable() and "\\" not in text:
        return text
    shown = "".join(
        character if character.isprintable() and character != "\\" else _escape(character) for character in text[:limit]
    )
    return shown + "…" if len(text) > limit else shown


def unprintable_escaped(text: str) -> str:
    """Return `text` with each character that is not plainly printable as an escape.

    For what `printable` was given where it came in, and for all that nobody thought of: it leaves backslashes alone.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
