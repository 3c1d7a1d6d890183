"""Templates: texts with placeholders for a device's own values: `{client_id}`, `{username}`, `{address}`.

In: a text of the configuration, values from the LAN.  Out: the text with the values filled in; `ValueError` for an
unknown placeholder, and for a value with characters that could have a meaning in the result.

Device-supplied values are untrusted data.  Only letters, digits and `. _ : @ -` are accepted: nothing that could end a
field of a user name, escape from a token, act as a wildcard or add a topic level.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Mapping

from gateway.config.value_words import quoted

FROM_DEVICE = ("client_id", "username", "address")
"""The placeholders that every rule knows, besides the named groups of its pattern."""

SAFE = re.compile(r"[A-Za-z0-9._:@-]{1,128}")


class UnusableValueError(ValueError):
    """A value from the LAN cannot be used in a template; the message names the placeholder, never the value."""


def placeholders(template: str) -> set[str]:
    """Return the names in braces; a doubled brace is a literal one.  Raises ValueError."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{quoted(template)} is not a template: {error}") from None
    for _, name, form, conversion in pieces:
        if name is not None and (form or conversion):
            raise ValueError(
                f"{quoted(template)} is not a template: a placeholder is a name alone, as in {{client_id}}"
            )
    return {name for _, name, _, _ in pieces if name is not None}


def check_template(template: str, known: Collection[str]) -> None:
    """Raise ValueError for a text with placeholders other than those `known`."""
    for name in sorted(placeholders(template)):
        if name not in known:
            shown = ", ".join(f"{{{each}}}" for each in known)
            raise ValueError(
                f"{quoted(template)} has the unknown placeholder {{{name}}}: known placeholders are {shown}"
            )


def expand(template: str, values: Mapping[str, str | None]) -> str:
    """Fill in a checked template; None means that this device has no such value.

    Raises UnusableValueError.
    """
    if "{" not in template and "}" not in template:
        return template
    for name in placeholders(template):
        value = values.get(name)
        if value is None:
            raise UnusableValueError(f"{{{name}}} has no value for this device")
        if not SAFE.fullmatch(value):
            raise UnusableValueError(
                f"{{{name}}} is empty, too long, or contains characters that templates do not accept"
            )
    return template.format_map(values)
