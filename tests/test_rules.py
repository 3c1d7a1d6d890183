"""Which rule is for a device, and what it makes of a CONNECT; who stands in whose way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Devices, from_mapping
from gateway.errors import EndReason, Refusal
from gateway.mqtt.connect import Connect
from gateway.mqtt.framer import Framer
from gateway.mqtt.inspector import BrokerInspector, DeviceInspector
from gateway.mqtt.packets import ProtocolVersion
from gateway.mqtt.rewrite import KEPT
from gateway.pieces import at_once
from gateway.rules import presence as presence_module
from gateway.rules.names import Brokers
from gateway.rules.presence import Holder, Presence
from gateway.rules.rules import Caller, Rules, treat
from gateway.session.treatment import Treatment
from tests.mqtt_packets import connect as connect_bytes
from tests.mqtt_packets import string, variable_byte_integer
from tests.test_mqtt_rewrite import read

HERE = Caller("192.168.7.17", "hall")
AT: Brokers = frozenset({("b", 8883, "b")})


def rules_of(*rules: dict[str, Any], unknown: str = "pass") -> Rules:
    listen = [{"endpoint": "1883", "name": "hall"}, {"endpoint": "1884", "name": "yard"}]
    return Rules(
        from_mapping(
            {"upstream": [{"host": "b"}], "listen": listen, "device": list(rules), "devices": {"unknown": unknown}}
        )
    )


def parsed(client_identifier: str = "sensor-1", **more: Any) -> Connect:
    return read(connect_bytes(client_identifier, **more))[1]


def first(rules: Rules, name: str = "sensor-1", caller: Caller = HERE, **more: Any) -> str | None:
    matched = rules.match(parsed(name, **more), caller)
    return None if matched is None else matched.rule.device.name


# ---- which rule


@pytest.mark.parametrize(
    ("match", "matching", "others"),
    [
        ({"match_client_id": "a"}, ["a"], ["A", "ab", "", "a\n"]),
        ({"match_client_id": ["a", "b-*"]}, ["a", "b-", "b-1"], ["b", "c", "xb-1"]),
        ({"match_client_id": "s[0-9]?"}, ["s1x", "s99"], ["s1", "sxx"]),
        ({"match_pattern": "a(?P<n>[0-9]+)"}, ["a1", "a99"], ["a", "a1b", "xa1", "a1\n"]),
        ({"match_client_id": "a*", "match_pattern": ".*z"}, ["az", "abz"], ["a", "z"]),
        ({"match_client_id": "*"}, ["", "a", "x" * 256], []),
        ({"match_pattern": ".*"}, ["", "a", "x" * 256], []),
        ({"match_client_id": "x" * 300}, ["x" * 300], ["x" * 299, "x" * 301]),
        ({"match_client_id": ["a*", "x" * 300]}, ["a", "x" * 300], ["x"]),
        ({}, ["", "a", "x" * 60_000], []),
    ],
)
def test_a_client_identifier_is_matched_whole(match: dict[str, Any], matching: list[str], others: list[str]) -> None:
    """Exactly, by a shell pattern, or by a regular expression."""
    rules = rules_of({**match, "name": "it"})
    for name in matching:
        assert first(rules, name) == "it", name
    for name in others:
        assert first(rules, name) is None, name


@pytest.mark.parametrize("unknown", ["pass", "refuse"])
@pytest.mark.parametrize(
    "match",
    [{"match_client_id": "*"}, {"match_pattern": ".*"}, {"match_client_id": ["x", "y*"]}, {"match_pattern": "y"}],
)
def test_a_name_too_long_for_a_pattern_is_refused(match: dict[str, Any], unknown: str) -> None:
    """Neither the rule's `bound_to` nor a later rule nor `unknown = "pass"` may be reached around the pattern."""
    rules = rules_of({**match, "bound_to": "10.0.0.1"}, {"name": "later"}, unknown=unknown)
    with pytest.raises(Refusal) as caught:
        first(rules, "x" * 257)
    assert (caught.value.reason, caught.value.code_3, caught.value.code_5) == (EndReason.DEVICE_NAME_UNUSABLE, 2, 0x85)


def test_a_long_name_is_judged_by_the_rules_before_a_pattern() -> None:
    """And by those whose other conditions the device does not meet."""
    long = "x" * 300
    rules = rules_of({"match_client_id": long, "name": "exact"}, {"match_client_id": "*", "match_username": "u"})
    assert first(rules, long) == "exact"
    assert first(rules, "y" * 300) is None
    assert first(rules, long, username="u") == "exact"
    with pytest.raises(Refusal):
        first(rules, "y" * 300, username="u")


def test_where_a_device_is_and_what_it_says_can_be_asked_for() -> None:
    """All that a rule names must be so."""
    rules = rules_of(
        {"match_network": ["192.168.7.0/24", "fd00::/8"], "match_username": "u", "match_listener": "hall", "name": "it"}
    )
    assert first(rules, username="u") == "it"
    assert first(rules, username="u", caller=Caller("fd00::1", "hall")) == "it"
    assert first(rules, username="U") is None
    assert first(rules) is None
    for caller in (Caller("192.168.8.1", "hall"), Caller("192.168.7.1", "yard"), Caller("", "hall")):
        assert first(rules, username="u", caller=caller) is None


@settings(max_examples=300)
@given(
    made=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", "a*", "*", "?"]), st.sampled_from(["", "10.0.0.0/8", "192.168.0.0/16"])
        ),
        max_size=12,
        unique=True,
    ),
    name=st.sampled_from(["a", "b", "ab", "zz", ""]),
)
def test_the_first_rule_counts_however_it_is_found(made: list[tuple[str, str]], name: str) -> None:
    """Exact names are looked up and others are gone through: together they keep the order of the configuration."""
    import fnmatch

    rules = rules_of(
        *(
            {"name": str(index), "match_client_id": text, **({"match_network": network} if network else {})}
            for index, (text, network) in enumerate(made)
        )
    )
    expected = next(
        (
            str(index)
            for index, (text, network) in enumerate(made)
            if fnmatch.fnmatchcase(name, text) and network in {"", "192.168.0.0/16"}
        ),
        None,
    )
    assert first(rules, name) == expected


def test_rules_for_exact_names_are_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten thousand rules, those for another name are not even looked at."""
    rules = rules_of(*({"match_client_id": f"d{number}", "max_qos": 1} for number in range(10_000)))
    looked_at: list[Any] = []
    from gateway.rules.rules import Rule

    groups = Rule.groups
    monkeypatch.setattr(Rule, "groups", lambda rule, *rest: looked_at.append(rule) or groups(rule, *rest))
    assert first(rules, "d7777") == "device[7777]"
    assert first(rules, "d10001") is None
    assert len(looked_at) == 1


def test_an_unknown_device_is_refused_where_that_is_set() -> None:
    """Not authorized."""
    with pytest.raises(Refusal) as caught:
        first(rules_of({"match_client_id": "a"}, unknown="refuse"), "b")
    assert (caught.value.reason, caught.value.code_3, caught.value.code_5) == (EndReason.DEVICE_UNKNOWN, 5, 0x87)


@pytest.mark.parametrize("address", ["192.168.7.18", "192.168.7.1", "fe80::1", ""])
def test_a_bound_name_from_elsewhere_is_refused_not_passed_by(address: str) -> None:
    """A later rule does not count for it."""
    rules = rules_of({"match_client_id": "a", "bound_to": ["192.168.7.17", "fd00::/8"]}, {"match_client_id": "*"})
    assert first(rules, "a") == "device[0]"
    assert first(rules, "a", caller=Caller("fd00::1", "")) == "device[0]"
    with pytest.raises(Refusal) as caught:
        first(rules, "a", caller=Caller(address, ""))
    assert caught.value.reason is EndReason.SPOOFED


# ---- what a rule makes of a CONNECT


def treated(rule: dict[str, Any], *, given: Any = KEPT, lives: float | None = None, **connect: Any) -> Treatment:
    packet, parsed_connect = read(connect_bytes(**connect))
    matched = rules_of(rule).match(parsed_connect, HERE)
    assert matched is not None
    return treat(matched, packet, parsed_connect, given, lives, 65_536)


def test_names_are_filled_in() -> None:
    """What the device says, where it is, and what the pattern takes out of its name."""
    rule = {
        "match_pattern": "hall(?P<hall>[0-9]+)-(?P<unit>.*)",
        "client_id": "{unit}.{hall}",
        "username": "{username}@{address}/{client_id}",
        "publish_prefix": "h/{hall}/",
    }
    connect = {"client_identifier": "hall7-boiler", "username": "u", "will_topic": "gone"}
    treatment = treated(rule, **connect)
    assert treatment.connect == connect_bytes("boiler.7", username="u@192.168.7.17/hall7-boiler", will_topic="h/7/gone")
    assert treatment.topics.publish_prefix == "h/7/"


def test_a_group_that_took_no_part_is_not_known() -> None:
    """An optional group is None in Python, and must not become a name."""
    with pytest.raises(Refusal) as caught:
        treated({"match_pattern": "sensor(?P<hall>x)?-1", "client_id": "{hall}"})
    assert caught.value.reason is EndReason.DEVICE_NAME_UNUSABLE


@pytest.mark.parametrize(
    ("own", "low", "high", "told", "pings"),
    [
        (60, 0, 65_535, 60, 0),
        (0, 0, 65_535, 0, 0),
        (0, 30, 65_535, 0, 0),
        (5, 30, 1200, 30, 0),
        (60, 30, 1200, 60, 0),
        (1200, 30, 1200, 1200, 0),
        (1201, 30, 1200, 1200, 600),
        (0, 30, 1200, 1200, 600),
        (0, 0, 1, 1, 0.5),
    ],
)
def test_keep_alive_is_brought_into_its_range(own: int, low: int, high: int, told: int, pings: float) -> None:
    """Where that is shorter than the device's own, the gateway pings; none at all is longer than any."""
    treatment = treated({"keep_alive_min": low, "keep_alive_max": high}, keep_alive=own)
    assert treatment.connect == connect_bytes(keep_alive=told)
    assert treatment.ping_interval == pings


@pytest.mark.parametrize("version", [3, 4, 5])
def test_what_is_dropped_and_what_takes_its_place(version: int) -> None:
    """The device's own user name and password, and those of the rule."""
    own = {"username": "u", "password": b"p", "version": version}
    assert treated({}, **own).connect == connect_bytes(**own)
    assert treated({"credentials": "drop"}, given=None, **own).connect == connect_bytes(version=version)
    assert treated({"credentials": "drop", "username": "x"}, given=b"y", **own).connect == connect_bytes(
        username="x", password=b"y", version=version
    )
    assert treated({"clean_start": False}, **own).connect == connect_bytes(clean_start=False, **own)


def test_a_treatment_keeps_its_secrets() -> None:
    """It may come to stand in a traceback."""
    assert "hunter2" not in repr(treated({}, given=b"hunter2", username="hunter2"))


# ---- which path


@pytest.mark.parametrize(
    ("rule", "up", "down"),
    [
        ({"keep_alive_min": 30, "client_id": "x", "max_packet_size": 1000}, Framer, Framer),
        ({"packets_per_second": 5}, DeviceInspector, BrokerInspector),
        ({"publish": "a"}, DeviceInspector, BrokerInspector),
        ({"max_qos": 1}, DeviceInspector, BrokerInspector),
        ({"retain": "strip"}, DeviceInspector, BrokerInspector),
        ({"publish_prefix": "p/"}, DeviceInspector, BrokerInspector),
        ({"keep_alive_max": 30}, Framer, BrokerInspector),
    ],
)
def test_the_fast_path_is_left_only_where_a_rule_needs_it(rule: dict[str, Any], up: type, down: type) -> None:
    """Names, credentials and sizes need no look at packets; where some may wait, PINGRESPs must be counted."""
    treatment = treated(rule)
    version = ProtocolVersion.MQTT_3_1_1
    assert type(treatment.from_device(version, 10_000)) is up
    assert type(treatment.from_broker(version, 10_000)) is down


@pytest.mark.parametrize("rule", [{"max_qos": 1}, {"publish_prefix": "p/"}, {}])
def test_rules_do_not_limit_the_size_of_a_packet(rule: dict[str, Any]) -> None:
    """Payloads are not held, so the general limit applies, unless the rule has one."""
    version, general = ProtocolVersion.MQTT_3_1_1, 100_000_000
    start = b"\x30" + variable_byte_integer(50_000_000) + string("a")
    for limits, passes in ({}, True), ({"max_packet_size": 5_000_000}, False):
        for make in (treated({**rule, **limits}).from_device, treated({**rule, **limits}).from_broker):
            checker = make(version, general)
            checker.feed(start)
            assert (checker.error is None) == passes


def test_a_device_without_a_name_is_told_the_one_it_gets() -> None:
    """Nobody else is."""
    assert treated({"client_id": "x"}, client_identifier="").assigned == "x"
    assert treated({"client_id": "x"}).assigned is None
    assert treated({}, client_identifier="").assigned is None


# ---- who is there


class World:
    """A clock, and sessions that are numbers; those in `over` have ended."""

    def __init__(self, **devices: Any) -> None:
        self.now = 1000.0
        self.over: set[int] = set()
        self.presence: Presence[int] = Presence(lambda: self.now, self.over.__contains__)
        self.devices = Devices(**devices)

    def enter(
        self, session: int, name: str = "a", address: str = "10.0.0.1", at: Brokers = AT
    ) -> list[int] | EndReason:
        try:
            return self.presence.enter(session, Holder(name, address, at), self.devices)
        except Refusal as refusal:
            return refusal.reason


def test_a_name_is_its_first_holders_until_that_is_gone() -> None:
    """From another address, that is; a session that has ended but is not closed yet holds nothing."""
    world = World()
    assert world.enter(1) == []
    assert world.enter(2, address="10.0.0.2") is EndReason.CLIENT_ID_IN_USE
    assert world.enter(3, name="b", address="10.0.0.2") == []
    assert world.enter(4) == []
    world.over |= {1, 4}
    assert world.enter(5, address="10.0.0.2") == []
    for session in (1, 2, 3, 4, 5, 5):
        world.presence.leave(session)
    assert not world.presence.holders


def test_a_session_has_one_name() -> None:
    """Also one that is judged again after a reload, or that the broker gives another name."""
    world = World()
    assert world.enter(1) == []
    world.presence.assign(1, Holder("b", "10.0.0.1", AT))
    assert world.enter(2, name="b", address="10.0.0.2") is EndReason.CLIENT_ID_IN_USE
    assert world.enter(2, address="10.0.0.2") == []
    for session in (1, 2):
        world.presence.leave(session)
    assert not world.presence.holders


def test_who_has_a_name_at_a_broker_is_known() -> None:
    """A backlog waits for them; sessions that have ended do not count."""
    world = World()
    there = frozenset({("b", 1, "b")})
    assert world.enter(1) == world.enter(2) == world.enter(3, at=there) == world.enter(4, name="b") == []
    world.over.add(2)
    assert list(world.presence.established(Holder("a", "", AT))) == [1]
    assert list(world.presence.established(Holder("a", "", AT | there))) == [1, 3]


def test_names_at_different_brokers_are_different_names() -> None:
    """A broker that both could be led to counts."""
    world = World(connects_per_minute=1)
    here, there = (frozenset({("b", port, "b")}) for port in (1, 2))
    assert world.enter(1, at=here) == []
    assert world.enter(2, address="10.0.0.2", at=there) == []
    assert world.enter(3, address="10.0.0.3", at=here | there) is EndReason.CLIENT_ID_IN_USE
    world.over |= {1, 2}
    assert world.enter(4, at=here) is EndReason.CLIENT_ID_PACED


def test_the_newcomer_takes_over_where_that_is_set() -> None:
    """The sessions from other addresses are to end; one from the same address is the broker's to end."""
    world = World(same_client_id="take-over")
    assert world.enter(1) == []
    assert world.enter(2) == []
    assert sorted(world.enter(3, address="10.0.0.2")) == [1, 2]


def test_both_pass_where_that_is_set() -> None:
    """As without a gateway."""
    world = World(same_client_id="pass")
    assert world.enter(1) == []
    assert world.enter(2, address="10.0.0.2") == []


def test_a_name_comes_back_only_so_often() -> None:
    """A minute's worth at once, and then by the rate; what is refused does not count."""
    world = World(connects_per_minute=6)
    session = iter(range(1000))

    def come() -> Any:
        number = next(session)
        outcome = world.enter(number)
        world.presence.leave(number)
        return outcome

    assert [come() for _ in range(7)] == [[]] * 6 + [EndReason.CLIENT_ID_PACED]
    world.now += 9.9
    assert come() is EndReason.CLIENT_ID_PACED
    world.now += 0.2
    assert [come(), come()] == [[], EndReason.CLIENT_ID_PACED]
    world.now += 3600
    assert [come() for _ in range(7)] == [[]] * 6 + [EndReason.CLIENT_ID_PACED]


def test_to_end_a_session_costs_more() -> None:
    """Ten times: so the session that stands does so for longer and longer, until the bucket is empty."""
    world = World(connects_per_minute=20, same_client_id="take-over")
    assert world.enter(1) == []
    assert world.enter(2, address="10.0.0.2") == [1]
    world.over.add(1)
    assert world.enter(3) is EndReason.CLIENT_ID_PACED
    world.now += 3 * 10
    assert world.enter(4) == [2]


def test_a_sensor_that_wakes_every_five_seconds_without_a_word_is_served() -> None:
    """From its own address: twelve a minute are not sixty.  Two devices with one name behind one address are slowed."""
    world = World(connects_per_minute=60)
    for number in range(120):
        assert world.enter(number) == []
        world.now += 5
    outcomes = [world.enter(number) for number in range(1000, 1050)]
    assert outcomes.count(EndReason.CLIENT_ID_PACED) == 20
    with pytest.raises(Refusal, match="counts as 2"):
        world.presence.enter(2000, Holder("a", "10.0.0.1", AT), world.devices)


@pytest.mark.parametrize("rate", [0.5, 1, 5, 9.9])
def test_however_slow_the_rate_a_session_can_be_replaced_at_some_time(rate: float) -> None:
    """A device that lost its power comes back while its old session stands."""
    world = World(connects_per_minute=rate)
    assert world.enter(1) == []
    world.now += 121
    assert world.enter(2) == []


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that came long ago are forgotten, long ones are known by a digest, and recovered rates are swept."""
    monkeypatch.setattr(presence_module, "_MAX_NAMES", 100)
    world = World()
    for number in range(1000):
        world.enter(number, name=f"{number}" + "x" * 50_000)
        world.presence.leave(number)
        assert len(world.presence._buckets) <= 100
    assert max(len(name) for name, _ in world.presence._buckets) <= 64
    world.now += 1.5
    at_once(world.presence.sweep(world.devices))
    assert not world.presence._buckets
    assert not world.presence.holders


def test_a_sweep_looks_at_some_names_and_the_next_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names there are, a sweep takes little time; all of them have their turn."""
    monkeypatch.setattr(presence_module, "_CHECKED_AT_A_TIME", 10)
    world = World()
    for number in range(35):
        world.enter(number, name=f"n{number}")
    world.now += 1.5
    for left in (25, 15, 5, 0, 0):
        at_once(world.presence.sweep(world.devices))
        assert len(world.presence._buckets) == left


def test_judging_counts_nothing() -> None:
    """It is asked before a password is looked at, and again when that was right."""
    world = World(connects_per_minute=1)
    for _ in range(5):
        world.presence.judge(Holder("a", "10.0.0.1", AT), world.devices)
    assert world.enter(1) == []
    world.presence.leave(1)
    with pytest.raises(Refusal):
        world.presence.judge(Holder("a", "10.0.0.1", AT), world.devices)
    world.presence.judge(Holder("", "10.0.0.1", AT), world.devices)


def test_attempts_at_a_password_are_counted_where_they_come_from() -> None:
    """A stranger who guesses runs out of attempts, and takes none from the device that knows."""
    world = World(connects_per_minute=2)
    for _ in range(2):
        world.presence.attempt("a", "10.0.0.66", world.devices)
    with pytest.raises(Refusal) as caught:
        world.presence.attempt("a", "10.0.0.66", world.devices)
    assert caught.value.reason is EndReason.CLIENT_ID_PACED
    world.presence.attempt("a", "10.0.0.1", world.devices)
    assert world.enter(1) == []
    world.now += 31
    world.presence.attempt("a", "10.0.0.66", world.devices)


def test_wrong_passwords_are_counted_for_all_names_together() -> None:
    """Or a stranger would have as many guesses as there are names; others of its address wait with it, for a while."""
    world = World(connects_per_minute=3)
    for name in "abc":
        world.presence.attempt(name, "10.0.0.66", world.devices)
        world.presence.wrong("10.0.0.66", world.devices)
    for call in (
        lambda: world.presence.attempt("d", "10.0.0.66", world.devices),
        lambda: world.presence.check_guesses("10.0.0.66", world.devices),
    ):
        with pytest.raises(Refusal) as caught:
            call()
        assert caught.value.reason is EndReason.CLIENT_ID_PACED
    world.presence.attempt("a", "10.0.0.1", world.devices)
    world.now += 20.1
    world.presence.attempt("d", "10.0.0.66", world.devices)
    world.now += 3600
    at_once(world.presence.sweep(world.devices))
    assert not world.presence._attempts


def test_names_do_not_push_out_the_count_of_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has used up its guesses cannot make the gateway forget them."""
    monkeypatch.setattr(presence_module, "_MAX_NAMES", 10)
    world = World(connects_per_minute=1)
    world.presence.attempt("a", "10.0.0.66", world.devices)
    world.presence.wrong("10.0.0.66", world.devices)
    for number in range(100):
        world.enter(number, name=f"n{number}")
        with pytest.raises(Refusal):
            world.presence.attempt(f"n{number}", "10.0.0.66", world.devices)


def test_without_a_rate_attempts_are_not_counted() -> None:
    """0 is no limit."""
    world = World(connects_per_minute=0)
    for _ in range(100):
        world.presence.attempt("a", "10.0.0.66", world.devices)
        world.presence.wrong("10.0.0.66", world.devices)
    assert not world.presence._attempts


def test_a_name_that_comes_often_is_not_the_first_to_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a flood of other names would give it a full bucket."""
    monkeypatch.setattr(presence_module, "_MAX_NAMES", 3)
    world = World()
    for number, name in enumerate("abcad"):
        world.enter(number, name=name)
    assert {name for name, _ in world.presence._buckets} == {"c", "a", "d"}
