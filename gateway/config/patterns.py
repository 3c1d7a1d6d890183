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
# The parts of a pattern that `_needed` understands.  In the first, no character is repeated or optional.  A set that
# begins with "]" is none: its end is not the first "]".
_PART = re.compile(
    r"(?P<literal>[A-Za-z0-9_/:@ -]+(?![*+?{]))"
    r"|(?P<open>\((?!\?)|\(\?(?:P?<\w+>|:))|(?P<close>\))|(?P<or>\|)"
    r"|[A-Za-z0-9_/:@ .^$-]|[*+?]|\{[0-9]+,?[0-9]*\}|\\[dDsSwW.^$*+?()|{}\[\]/-]|\[(?!\^?\])[^]\[\\]+\]"
)


@frozen(eq=False)
class Pattern:
    """A compiled pattern.  `groups` are the names of its named groups."""

    groups: tuple[str, ...]
    _compiled: Any = field(repr=False)
    # To look for these first is ten times as quick, and rules with patterns are tried in turn.
    _beginning: str = field(repr=False)
    _needed: str = field(repr=False)

    def match(self, name: str) -> dict[str, str | None] | None:
        """Return the named groups if the whole name matches, otherwise None.  A group without a part in it is None."""
        if not name.startswith(self._beginning) or self._needed not in name:
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
    return Pattern(tuple(compiled.groupindex), compiled, *_needed(text))


def _too_large(text: str, cause: str) -> ValueError:
    return ValueError(
        f"{quoted(text)} is too large a pattern: {cause}. Repeat without a number (+ in place of {{1,64}}), or write "
        "several rules"
    )


def _needed(text: str) -> tuple[str, str]:
    """Return what every name that matches begins with, or else a text that it contains; "" if it is hard to find."""
    beginning, longest, depth, position = "", "", 0, 0
    while position < len(text):
        part = _PART.match(text, position)
        if part is None or (part["or"] and not depth):
            return "", ""
        depth += bool(part["open"]) - bool(part["close"])
        if part["literal"] and not depth:
            longest = max(longest, part["literal"], key=len)
            beginning = beginning if position else longest
        position = part.end()
    return (beginning, "") if beginning else ("", longest)
