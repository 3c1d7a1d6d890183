from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.mqtt.topics import TopicFilters, add_prefix, check_filter, check_name, covers, remove_prefix, split_shared

LEVEL = st.sampled_from(["", "a", "b", "$SYS"])
NAMES = st.lists(LEVEL, min_size=1, max_size=4).map("/".join).filter(bool)


@st.composite
def topic_filters(draw: st.DrawFn) -> str:
    levels = draw(st.lists(LEVEL | st.just("+"), max_size=4)) + draw(st.sampled_from([[], ["#"]]))
    return "/".join(levels) or "+"


def plainly_matches(text: str, name: str) -> bool:
    """The rules of §4.7 once more, by recursion over levels."""

    def go(levels: list[str], names: list[str]) -> bool:
        if not levels:
            return not names
        if levels == ["#"]:
            return True
        return bool(names) and levels[0] in ("+", names[0]) and go(levels[1:], names[1:])

    return not (name.startswith("$") and text[0] in "+#") and go(text.split("/"), name.split("/"))


@settings(max_examples=300)
@given(text=topic_filters(), name=NAMES)
@example(text="sport/#", name="sport")
@example(text="+", name="/finance")
@example(text="#", name="$SYS/x")
@example(text="$SYS/#", name="$SYS")
def test_a_filter_covers_the_names_that_it_matches(text, name):
    """As the standard has it, `$` and the parent of `#` included."""
    assert covers(text, name) == plainly_matches(text, name)


@settings(max_examples=400)
@given(allowed=topic_filters(), wanted=topic_filters(), name=NAMES)
def test_what_a_covered_filter_matches_is_matched_by_what_covers_it(allowed, wanted, name):
    """So that no subscription reaches beyond the list."""
    if covers(allowed, wanted) and plainly_matches(wanted, name):
        assert plainly_matches(allowed, name)


@settings(max_examples=400)
@given(allowed=st.lists(topic_filters() | NAMES, max_size=5), wanted=topic_filters() | NAMES)
def test_a_list_covers_what_one_of_its_filters_covers(allowed, wanted):
    """The tree answers as the filters would one by one."""
    assert TopicFilters(tuple(allowed)).permits_name(wanted) == any(covers(text, wanted) for text in allowed)


@pytest.mark.parametrize(
    ("allowed", "wanted"),
    [
        ("#", "#"),
        ("#", "+/a"),
        ("a/#", "a/#"),
        ("a/#", "a/+/#"),
        ("a/#", "a"),
        ("+/a", "b/a"),
        ("+/+", "+/+"),
        ("a/+", "a/+"),
    ],
)
def test_filters_that_are_covered(allowed, wanted):
    """A list of permitted filters is of use to devices that subscribe with wildcards."""
    assert covers(allowed, wanted)


@pytest.mark.parametrize(
    ("allowed", "wanted"),
    [
        ("+", "#"),
        ("a/+", "a/#"),
        ("a/+", "a"),
        ("a/b", "a/+"),
        ("+/a", "+/+"),
        ("#", "$SYS/#"),
        ("+/x", "$SYS/x"),
        ("a", "a/b"),
    ],
)
def test_filters_that_are_not_covered(allowed, wanted):
    """They match topics that the permitted one does not."""
    assert not covers(allowed, wanted)


def test_a_list_permits_what_one_of_it_covers():
    """Of a shared subscription the filter counts, and nothing is permitted by an empty list."""
    permitted = TopicFilters(("sensors/a", "commands/a/#", "$aws/things/a/#"))
    assert permitted.permits("sensors/a")
    assert permitted.permits("commands/a/+/now")
    assert permitted.permits("$share/group/commands/a/#")
    assert permitted.permits("$aws/things/a/shadow")
    for refused in (
        "sensors/b",
        "sensors/a/x",
        "#",
        "$share/group/#",
        "$share/commands/a/x",
        "$SYS/x",
        "$aws/things/+/x",
    ):
        assert not permitted.permits(refused), refused
    assert not TopicFilters(()).permits("a")


def test_a_shared_subscription_is_no_topic_name():
    """What is published to `$share/group/a` goes there, and not to `a`."""
    permitted = TopicFilters(("a", "b/#", "$aws/#"))
    assert permitted.permits_name("a")
    assert permitted.permits_name("b/c")
    assert permitted.permits_name("$aws/c")
    assert not permitted.permits_name("$share/group/a")
    assert not permitted.permits_name("$share/group/b/c")


@pytest.mark.parametrize("text", ["", "a#", "#/a", "a/#/b", "a+", "+a/b", "\0", "##"])
def test_what_is_no_topic_filter(text):
    """MQTT 5.0 §4.7.1: a wildcard stands for whole levels."""
    with pytest.raises(ValueError, match=r"a Topic|whole level"):
        check_filter(text)


@pytest.mark.parametrize("text", ["", "a/+", "#", "\0"])
def test_what_is_no_topic_name(text):
    """MQTT 5.0 §3.3.2.1: no wildcards."""
    with pytest.raises(ValueError, match="a Topic Name"):
        check_name(text)


@pytest.mark.parametrize("text", ["a", "a/b", "/", "$SYS/x", " ", "é"])
def test_topic_names_that_are_right_pass(text):
    check_name(text)


@given(text=topic_filters())
def test_filters_that_are_right_pass(text):
    """Whatever the levels."""
    check_filter(text)


@given(name=NAMES.filter(lambda name: not name.startswith("$")), prefix=st.sampled_from(["p/", "p", "a/b/"]))
def test_a_prefix_that_was_added_can_be_removed(name, prefix):
    """And nothing else comes off."""
    assert remove_prefix(add_prefix(name, prefix), prefix) == name


@pytest.mark.parametrize(
    ("text", "with_prefix"),
    [
        ("a/#", "p/a/#"),
        ("#", "p/#"),
        ("$share/group/a/+", "$share/group/p/a/+"),
        ("$SYS/broker/#", "$SYS/broker/#"),
        ("$share/group/$SYS/#", "$share/group/$SYS/#"),
        ("$share/group", "$share/group"),
        ("$share/group/", "$share/group/p/"),
        ("$share//a", "$share//p/a"),
        ("$share//a/#", "$share//p/a/#"),
        ("$share///a", "$share//p//a"),
        ("/a", "p//a"),
    ],
)
def test_where_a_prefix_goes(text, with_prefix):
    """Before the filter of a shared subscription; nowhere in what begins with `$`."""
    assert add_prefix(text, "p/") == with_prefix


def test_what_is_not_under_the_prefix():
    """Nor is what would have no name left."""
    assert remove_prefix("q/a", "p/") is None
    assert remove_prefix("p/", "p/") is None
    assert split_shared("$share/g/a/b") == ("$share/g/", "a/b")
