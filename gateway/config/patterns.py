r"""Patterns for Client Identifiers (`match_pattern`): regular expressions in the syntax of RE2.

In: a text of the configuration; names that strangers have chosen.  Out: a `Pattern`; ValueError for an unusable text.

RE2 takes time that is linear in the length of the name, whatever the pattern.  Python's `re` tries one way after
another: one name of 40 letters keeps `([a-z0-9]+-?)+[0-9]{4}` busy for ever, and the event loop with it.
"""

from __future__ import annotations

import re
from typing import Any, Final

from attrs import field, frozen

from gateway.config.value_words import quoted
from gateway.text import printable

# With these limits, the slowest pattern that was found takes 2.5 ms for a name of 256 characters; and `\pL` fits.
_MEMORY: Final = 24 * 1024
_MOST_GROUPS: Final = 16
_SYNTAX = "https://github.com/google/re2/wiki/Syntax"
# What follows is known to be no repetition of its last character: in `a(?i)*` and `a\Q\E*`, the `a` is repeated.
_LITERAL = re.compile(r"[A-Za-z0-9_/:@ -]+(?=$|[A-Za-z0-9_/:@ .\[-]|\((?!\?)|\(\?(?:P?<|:)|\\[dDsSwW])")


@frozen(eq=False)
class Pattern:
    """A compiled pattern.  `groups` are the names of its named groups."""

    groups: tuple[str, ...]
    _compiled: Any = field(repr=False)
    # To look at this first is ten times as quick, and rules with patterns are tried in turn.
    _beginning: str = field(repr=False)

    def match(self, name: str) -> dict[str, str | None] | None:
        """Return the named groups if the whole name matches, otherwise None.  A group without a part in it is None."""
        if not name.startswith(self._beginning):
            return None
        found = self._compiled.fullmatch(name.encode("utf-8", "surrogatepass"))
        if found is None:
            return None
        # Half a character (`\C`) becomes one that no template accepts.
        texts = ((group, found[group]) for group in self.groups)
        return {group: None if text is None else text.decode("utf-8", "replace") for group, text in texts}


def compile_pattern(text: str) -> Pattern:
    """Compile a pattern.  Raises ValueError for one that RE2 does not support, or that is too large."""
    try:
        import re2  # not before a rule needs it: 3 MiB of memory
    except ImportError:
        raise ValueError(
            f"{quoted(text)} cannot be used: patterns need RE2, which is not installed. Install the package google-re2 "
            "in the gateway's environment, or write match_client_id instead"
        ) from None
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY
    try:
        compiled = re2.compile(text, options)
    except re2.error as error:
        cause = printable(error.args[0].decode("utf-8", "replace"), 60)
        if "too large" in cause:
            raise _too_large(text, cause) from None
        raise ValueError(
            f"{quoted(text)} is not a regular expression of RE2: {cause}. Look-around and back-references do not "
            f"exist in RE2; what does is in {_SYNTAX}"
        ) from None
    if compiled.groups > _MOST_GROUPS:
        raise _too_large(text, f"{compiled.groups} groups, of at most {_MOST_GROUPS}; (?:…) is none")
    if found := re.search(r"\{,([0-9]+)\}", text):
        # Python's `re` takes it for a repetition, RE2 for these characters themselves.
        raise ValueError(f"{quoted(text)} is ambiguous: write {{0,{found[1]}}} for {found[0]}")
    names = re.findall(r"\(\?P?<(\w+)>", text)
    for group in names:
        if not group.isidentifier():
            raise ValueError(f"{quoted(text)}: {quoted(group)} is not a name for a group: begin it with a letter")
        if names.count(group) > 1:
            raise ValueError(f"{quoted(text)} has two groups with the name {quoted(group)}: give each its own")
    return Pattern(tuple(compiled.groupindex), compiled, _beginning(text))


def _too_large(text: str, cause: str) -> ValueError:
    return ValueError(
        f"{quoted(text)} is too large a pattern: {cause}. Repeat without a number (+ in place of {{1,64}}), or write "
        "several rules"
    )


def _beginning(text: str) -> str:
    """Return what every name that matches begins with, if that is plain to see; otherwise "".

    It is no place for cleverness: a name that does not match because of a mistake here escapes its rule.
    """
    found = _LITERAL.match(text)
    return found[0] if found is not None and "|" not in text else ""
