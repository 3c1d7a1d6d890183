"""Texts with placeholders that are filled with what is known of a device: `{client_id}`, `{username}`, `{address}`.

In: a text of the configuration, values from the LAN.  Out: the text with the values in it; `ValueError` for a
placeholder that there is not, and for a value that might mean something where it comes to stand.

What a device calls itself is data.  Only letters, digits and `. _ : @ -` get into a text: nothing that ends a field of
a user name, escapes in a token, makes a wildcard or another level of a topic.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Mapping

from gateway.config.value_words import quoted

FROM_DEVICE = ("client_id", "username", "address")
"""The placeholders that every rule knows; the named groups of its pattern come to them."""

_SAFE = re.compile(r"[A-Za-z0-9._:@-]{1,128}")


class UnusableValueError(ValueError):
    """A value from the LAN cannot stand in a template; the message names the placeholder, never the value."""


def placeholders(template: str) -> set[str]:
    """Give the names that stand in braces; a doubled brace stands for itself.  Raises ValueError."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{quoted(template)} is no template: {error}") from None
    for _, name, form, conversion in pieces:
        if name is not None and (form or conversion):
            raise ValueError(f"{quoted(template)} is no template: a placeholder is a name alone, as in {{client_id}}")
    return {name for _, name, _, _ in pieces if name is not None}


def check_template(template: str, known: Collection[str]) -> None:
    """Raise ValueError for a text with placeholders other than those `known`."""
    for name in sorted(placeholders(template)):
        if name not in known:
            shown = ", ".join(f"{{{each}}}" for each in known)
            raise ValueError(f"{quoted(template)} has the unknown placeholder {{{name}}}: those known here are {shown}")


def expand(template: str, values: Mapping[str, str | None]) -> str:
    """Fill a template that has been checked; None stands for a value that is not known of this device.

    Raises UnusableValueError.
    """
    if "{" not in template and "}" not in template:
        return template
    for name in placeholders(template):
        value = values.get(name)
        if value is None:
            raise UnusableValueError(f"{{{name}}} is not known of this device")
        if not _SAFE.fullmatch(value):
            raise UnusableValueError(f"{{{name}}} holds characters that no template takes, none at all, or too many")
    return template.format_map(values)
