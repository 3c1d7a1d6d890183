"""Patterns for Client Identifiers: what they match, how long that takes at most, and which are refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.config import from_mapping
from gateway.config.patterns import compile_pattern
from gateway.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def matches(pattern: str, name: str) -> bool:
    return compile_pattern(pattern).match(name) is not None


# Each would take years with a matcher that tries one way after another.
SLOW = """
from gateway.config import from_mapping
from gateway.rules.rules import Rules
patterns = ("([a-z0-9]+-?)+[0-9]{4}", "(a|a)*b", "(a|a?)+b", "(.*)*b", "(.?){60}a{30}b")
globs = ("*a" * 100 + "*b", "*" + "[ab]" * 100 + "*" + "a?" * 60 + "*b")
rules = [{"match_pattern": text} for text in patterns] + [{"match_client_id": text} for text in globs]
for rule in Rules(from_mapping({"upstream": [{"host": "b"}], "device": rules})):
    for length in (40, 256):
        assert not rule.matches_name("a" * length), rule
"""


def test_no_name_takes_long_to_match() -> None:
    """In a process of its own, which can be ended: a match that hangs reacts to nothing."""
    subprocess.run([sys.executable, "-c", SLOW], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("(", 'device[0].match_pattern: "(" is not a regular expression of RE2: missing ): (. Look-around and'),
        ("(?=a)a", "invalid perl operator: (?=. Look-around and back-references do not exist in RE2; what does"),
        (r"(a)\1", r"invalid escape sequence: \\1. Look-around and back-references do not exist"),
        ("a\n(", r'"a\n(" is not a regular expression of RE2: missing ): a\n(.'),
        ("a{2000}", "invalid repetition size: {2000}"),
        ("x{1000}" * 3, "is too large a pattern: pattern too large - compile failed. Repeat without a number"),
        ("()" * 17, "is too large a pattern: 17 groups, of at most 16; (?:…) is none. Repeat without a number"),
        ("a{,3}", '"a{,3}" is ambiguous: write {0,3} for {,3}'),
        ("(?P<7>a)", "is not a name for a group: begin it with a letter"),
        ("(?P<n>a)|(?P<n>b)", 'has two groups with the name "n": give each its own'),
    ],
)
def test_what_cannot_be_matched_in_linear_time_is_refused(pattern: str, expected: str) -> None:
    """When the configuration is loaded, with the key, the cause and the remedy."""
    with pytest.raises(ConfigError) as caught:
        from_mapping({"upstream": [{"host": "b"}], "device": [{"match_pattern": pattern}]})
    (problem,) = caught.value.problems
    assert problem.startswith("device[0].match_pattern: ")
    assert expected in problem


def test_without_re2_only_rules_with_a_pattern_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no wheels of it for 32-bit ARM."""
    monkeypatch.setitem(sys.modules, "re2", None)
    table: dict[str, Any] = {"upstream": [{"host": "b"}], "device": [{"match_client_id": "a*"}]}
    assert from_mapping(table).device[0].groups == []
    table["device"][0]["match_pattern"] = "a+"
    with pytest.raises(ConfigError, match="Install the package google-re2"):
        from_mapping(table)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        (".{2}", ["aé", "✓😀"], ["é", "a\n"]),
        (r"\w+", ["a_9"], ["é", ""]),
        (r"\d+", ["09"], ["\N{ARABIC-INDIC DIGIT THREE}"]),
        (r"\pL+", ["aé"], ["9"]),
        ("(?i)hall-é", ["HALL-É", "hall-é"], ["hall-e"]),
        ("[^a]", ["é", "😀"], ["a", "éé"]),
        ("^a$", ["a"], ["a\n"]),
        (".*", [""], []),
    ],
)
def test_classes_are_ascii_and_characters_are_whole(pattern: str, matching: list[str], others: list[str]) -> None:
    """As docs/devices.md says."""
    assert [name for name in matching if not matches(pattern, name)] == []
    assert [name for name in others if matches(pattern, name)] == []


def test_groups_have_the_parts_of_the_name() -> None:
    """None without a part; what is no whole character becomes one that templates refuse."""
    pattern = compile_pattern(r"hall(?P<hall>[0-9]+)-(?P<unit>.*?)(-(?P<more>x))?")
    assert pattern.groups == ("hall", "more", "unit")
    assert pattern.match("hall7-é") == {"hall": "7", "unit": "é", "more": None}
    assert pattern.match("hall7-é-x") == {"hall": "7", "unit": "é", "more": "x"}
    assert compile_pattern(r"(?P<half>\C)\C*").match("é") == {"half": "\ufffd"}


class _Forbidden:
    def fullmatch(self, text: bytes) -> None:
        raise AssertionError(f"{text!r} was matched")


@pytest.mark.parametrize(
    ("pattern", "without"), [("hall7-.*", "xhall7-"), ("hall7-x*", "hall7"), ("halls?-(?P<unit>.*)", "hal")]
)
def test_names_that_cannot_match_are_told_by_the_beginning_of_the_pattern(pattern: str, without: str) -> None:
    """Ten thousand rules with patterns are tried in turn."""
    assert evolve(compile_pattern(pattern), compiled=_Forbidden()).match(without) is None


@given(
    st.lists(st.sampled_from([*"ab01-|().*+?{}[]^$\\", "(?:", "(?P<n>", "(?i)", "{0}", "{1,2}"])), st.text("abAB01-")
)
@example(list("ab|b"), "b")
@example(list("(a|b)b"), "bb")
@example(["a", "b", "{0}"], "a")
@example(["(?i)", "a"], "A")
@example(list("[a(]b"), "ab")
@example(["a", "(?i)", "*"], "")
@example(list("a\\Q\\E*"), "")
@example(list("\\(a|b"), "b")
@example(list("[]a[b]"), "b")
@example(list("[^]a]b"), "1b")
def test_every_name_that_matches_has_the_beginning_of_the_pattern(pieces: list[str], name: str) -> None:
    """Whether RE2 is asked at once or after looking at it, the answer is the same."""
    try:
        pattern = compile_pattern("".join(pieces))
    except ValueError:
        return
    assert pattern.match(name) == evolve(pattern, beginning="").match(name)


def test_patterns_in_the_documents_are_patterns() -> None:
    """And the documents state the limits."""
    texts = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
    found = [text for page in texts.values() for text in re.findall(r'match_pattern = "([^"]+)"', page)]
    assert len(found) > 2
    for text in found:
        compile_pattern(text)
    assert "at most 16 groups" in texts["devices.md"]
