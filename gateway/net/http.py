"""Tells HTTP from other protocols by the first bytes of an answer.

In: the first bytes that a server sent.  Out: whether they can be HTTP.

h11 waits for the end of an answer's head before it judges its first line, so a server that speaks another protocol,
and waits in turn, would be taken for a silent one.
"""

from __future__ import annotations

_BEGINS = b"HTTP/"
LONGEST = len(_BEGINS)


def may_be_http(first: bytes) -> bool:
    """Tell whether an answer that begins with these bytes, as many as there are yet, can be HTTP/1 (RFC 9112 §4)."""
    return _BEGINS.startswith(first[:LONGEST])
