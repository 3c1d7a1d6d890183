"""HTML and SVG, escaped by construction.

In: element names, attributes, texts.  Out: `Markup`.  Everything that is not `Markup` is escaped when it is added, so
no caller can forget to.
"""

from __future__ import annotations

from html import escape

from gateway.text import unprintable_escaped

_EMPTY = frozenset({"input", "link", "meta", "polyline", "polygon", "line", "br"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | int | None
"""A part of an element: `Markup`, or a text that becomes one; `None` is nothing."""


def element(name: str, /, *children: Child, **attributes: str | int | bool | None) -> Markup:
    """Make an element.

    An attribute's underscores are hyphens, one at its end is dropped (`class_`).  `True` is an attribute without a
    value, `False` and `None` are none.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _EMPTY:
        # Within SVG, unlike HTML, the slash is what ends it.
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{together(*children)}</{name}>")


def together(*children: Child) -> Markup:
    """Put parts side by side."""
    return Markup("".join(child if isinstance(child, Markup) else _escaped(child) for child in children))


def _escaped(child: Child) -> str:
    # What reverses the reading order is no markup, and a lone surrogate no character: neither has a place in a page.
    return "" if child is None else escape(unprintable_escaped(str(child)))


def _attribute(key: str, value: str | int | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.removesuffix("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{_escaped(value)}"'
