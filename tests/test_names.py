"""Client Identifiers at the broker: each belongs to one rule, however a device comes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.config import Config, from_mapping, load_file
from gateway.config.devices import BrokenRule
from gateway.config.directory import RuleFiles
from gateway.errors import EndReason, Refusal
from gateway.rules import names as names_module
from gateway.rules.names import Names, brokers, name_at_broker
from gateway.rules.rules import Caller, Rules
from tests.mqtt_packets import connect
from tests.test_mqtt_rewrite import read

HASHES = [f"scrypt$16384$8$1${salt}$AAAAAAAAAAAAAAAAAAAAAA==" for salt in ("AAAAAAAAAAAAAAAA", "BBBBBBBBBBBBBBBB")]


def configured(*rules: dict[str, Any]) -> Config:
    """Two brokers, of which the second serves only devices whose rules name it."""
    upstream = [{"host": "b"}, {"host": "c", "name": "other", "default": False}]
    listen = [{"endpoint": "1883", "name": "hall"}, {"endpoint": "1884", "name": "yard"}]
    return from_mapping({"upstream": upstream, "listen": listen, "device": list(rules)})


def reserved_by(config: Config, name: str, address: str = "10.0.0.66", listener: str = "hall", **more: Any) -> str:
    """Say which rule a device's name at the broker belongs to, if not to its own; "" if the device may have it."""
    rules = Rules(config)
    caller = Caller(address, listener)
    matched = rules.match(read(connect(name, **more))[1], caller)
    at = brokers(config, () if matched is None else matched.rule.device.upstream)
    refusal: Refusal | None = None
    try:
        Names(config, rules).check(name_at_broker(matched, name), matched, caller, at)
    except Refusal as raised:
        refusal = raised
    if refusal is None:
        return ""
    assert (refusal.reason, refusal.code_3, refusal.code_5) == (EndReason.CLIENT_ID_RESERVED, 2, 0x85)
    return refusal.detail.rpartition(" ")[2]


PUMP: dict[str, Any] = {"name": "pump", "match_client_id": "pump-3", "client_id": "plant7-{client_id}"}
PUMPS: dict[str, Any] = {"name": "pumps", "match_client_id": "pump-*", "client_id": "plant7-{client_id}"}
BY_NUMBER: dict[str, Any] = {"name": "number", "match_pattern": "p(?P<n>[0-9]+)", "client_id": "plant7-pump-{n}"}
BY_USER: dict[str, Any] = {"name": "user", "match_username": ["anna"], "client_id": "plant7-{username}"}
FIXED: dict[str, Any] = {"name": "fixed", "match_client_id": "x", "client_id": "plant7-pump-3"}
BY_TWO: dict[str, Any] = {
    "name": "two",
    "match_client_id": "p*",
    "client_id": "{address}/{client_id}".replace("/", "-"),
}


@pytest.mark.parametrize(
    ("rule", "taken", "free"),
    [
        (PUMP, ["plant7-pump-3"], ["plant7-pump-4", "plant7-", "xplant7-pump-3", "plant7-pump-3x", "x"]),
        (PUMPS, ["plant7-pump-3", "plant7-pump-"], ["plant7-valve", "plant7-pump", "plant7-pump-a b", "plant7"]),
        (BY_NUMBER, ["plant7-pump-3", "plant7-pump-x"], ["plant7-pump-", "plant7-pump-" + "3" * 129]),
        (BY_USER, ["plant7-anna"], ["plant7-otto", "anna"]),
        (FIXED, ["plant7-pump-3"], ["plant7-pump-4"]),
        (BY_TWO, ["10.0.0.1-p1", "a-b-c"], ["10.0.0.1", "-p1", "p1-", "a -b", "-"]),
        ({**PUMP, "match_client_id": ["a*", "b"], "client_id": "{{{client_id}}}"}, ["{ab}", "{b}"], ["{c}", "{}"]),
    ],
)
def test_a_name_that_a_rule_can_give_is_nobody_elses(rule: dict[str, Any], taken: list[str], free: list[str]) -> None:
    """Neither a device's without a rule, nor one's under a rule for everyone, wherever that stands."""
    guests = {"name": "guests", "match_network": "10.0.0.0/8"}
    anyone = {"name": "anyone", "match_client_id": "*"}
    for others in ([rule], [rule, guests], [guests, rule], [rule, anyone], [rule, {"match_pattern": ".*"}]):
        config = configured(*others)
        assert [name for name in taken if reserved_by(config, name) != rule["name"]] == []
        assert [name for name in free if reserved_by(config, name)] == []


def test_a_rules_own_devices_have_its_names() -> None:
    """Also beside rules that match the name that they get, or all names."""
    for others in ([PUMPS], [PUMPS, {"match_client_id": "*"}], [{"match_network": "192.168.0.0/16"}, PUMPS]):
        assert reserved_by(configured(*others), "pump-3") == ""
    assert reserved_by(configured(BY_USER), "whatever", username="anna") == ""


def test_of_two_rules_that_can_give_a_name_it_belongs_to_the_first() -> None:
    """They come by it in different ways, so a device of the one could be taken for one of the other."""
    as_named = {"name": "as-named", "match_client_id": "plant7-*"}
    for first, second in ((PUMPS, as_named), (as_named, PUMPS), (PUMPS, BY_NUMBER), (BY_NUMBER, PUMPS)):
        config = configured(first, second)
        devices = {"pumps": "pump-3", "as-named": "plant7-pump-3", "number": "p3"}
        assert reserved_by(config, devices[first["name"]]) == ""
        assert reserved_by(config, devices[second["name"]]) == first["name"]
    pair = [{**BY_NUMBER, "name": name, "match_pattern": f"{name}(?P<n>[0-9]+)"} for name in ("a", "b")]
    assert (reserved_by(configured(*pair), "a1"), reserved_by(configured(*pair), "b1")) == ("", "a")


def test_rules_that_make_the_name_of_the_same_share_it() -> None:
    """Such as one for each network: which of them is for a device, they have decided between them."""
    rules = [{**PUMPS, "name": name, "match_listener": name} for name in ("hall", "yard")]
    users = [{"client_id": "u-{username}", "match_listener": name} for name in ("hall", "yard")]
    plain = [{"match_client_id": "pump-*", "match_listener": name} for name in ("hall", "yard")]
    for config in (configured(*rules), configured(*users), configured(*plain)):
        for listener in ("hall", "yard"):
            assert reserved_by(config, "pump-3", listener=listener, username="anna") == ""


@pytest.mark.parametrize(
    ("key", "value", "address"),
    [("bound_to", "10.0.0.1", "10.0.0.1"), ("lan_password", HASHES[0], None)],
)
def test_a_bound_name_is_bound_for_those_whom_its_rule_does_not_match(key: str, value: str, address: str) -> None:
    """A device on another listener, or under a rule for everyone, is no way around `bound_to` and `lan_password`."""
    rule = {"name": "pump", "match_client_id": "pump-3", "match_listener": "hall", key: value}
    guests = {"match_listener": "yard"}
    for config in (configured(rule), configured(rule, guests), configured(guests, rule)):
        assert reserved_by(config, "pump-3", listener="yard") == "pump"
        assert reserved_by(config, "pump-4", listener="yard") == ""
        if address is not None:
            assert reserved_by(config, "pump-3", address, "yard") == ""
    for index in (0, 1):
        also = {"match_listener": "yard", "lan_password": HASHES[index]}
        config = configured({**rule, "lan_password": HASHES[0], "bound_to": "10.0.0.0/8"}, also)
        assert reserved_by(config, "pump-3", listener="yard") == ("pump" if index else "")


@pytest.mark.parametrize("condition", [{"match_listener": "hall"}, {"match_username": "anna"}], ids=str)
@pytest.mark.parametrize("template", ["", "plant7-{client_id}"])
def test_a_wider_rule_is_no_way_around_a_bound_one(condition: dict[str, Any], template: str) -> None:
    """Same template, and more names: only devices that meet what the bound rule asks have its name there."""
    bound = {"name": "pump", "match_client_id": "pump-3", "bound_to": "10.0.0.1", "client_id": template, **condition}
    wider = {"name": "wider", "match_client_id": "pump-*", "client_id": template}
    for others in ([bound, wider], [wider | {"match_listener": "yard"}, bound]):
        config = configured(*others)
        assert reserved_by(config, "pump-3", "10.0.0.66", "yard") == "pump"
        assert reserved_by(config, "pump-3", "10.0.0.1", "yard") == ""
        assert reserved_by(config, "pump-4", "10.0.0.66", "yard") == ""
    # Rules that name the device themselves, or bind what they match, say who may have the name there.
    for sure in ({"match_client_id": "pump-3"}, {"bound_to": "10.0.0.66"}, {"lan_password": HASHES[0]}):
        config = configured(bound, {**wider, **sure, "match_listener": "yard"})
        assert reserved_by(config, "pump-3", "10.0.0.66", "yard") == ""


def test_a_name_taken_from_a_user_name_is_no_way_around_a_rule() -> None:
    """A template without any text of its own can give every name, so it owns none."""
    config = configured({"match_network": "10.0.0.66", "client_id": "{username}"}, {**PUMP}, {"match_client_id": "d1"})
    assert reserved_by(config, "x", username="otto") == ""
    assert reserved_by(config, "x", username="plant7-pump-3") == "pump"
    assert reserved_by(config, "x", username="d1") == "device[2]"
    assert reserved_by(config, "otto", address="10.0.0.5") == ""


def test_names_at_different_brokers_have_nothing_to_do_with_each_other() -> None:
    """A name belongs to a rule at the brokers that the rule uses."""
    elsewhere = {**PUMP, "upstream": "other"}
    assert reserved_by(configured(elsewhere), "plant7-pump-3") == ""
    there = {"name": "there", "match_listener": "yard", "upstream": "other"}
    assert reserved_by(configured(elsewhere, there), "plant7-pump-3", listener="yard") == "pump"
    assert reserved_by(configured(PUMP, there), "plant7-pump-3", listener="yard") == ""


@pytest.mark.parametrize("mistake", ['upstream = "nowhere"', "max_qos = 7", "max_qos ="])
def test_a_rule_that_cannot_be_used_keeps_its_names(tmp_path: Path, mistake: str) -> None:
    """A mistake in a file does not give its device's name to others: what else it demands may not be readable."""
    upstream = '[[upstream]]\nhost = "b"\n[[upstream]]\nhost = "c"\nname = "other"\ndefault = false\n'
    main = tmp_path / "gateway.conf"
    main.write_text(f'{upstream}[devices]\ndirectory = "."\n[[device]]\nmatch_username = "x"\nupstream = "other"\n')
    pump = 'match_client_id = "pump-3"\nclient_id = "plant7-{client_id}"\n'
    (tmp_path / "pump.toml").write_text(pump + mistake)
    valve = 'match_client_id = "valve"\nmatch_network = "10.0.0.1"\nbound_to = "10.0.0.1"\n'
    (tmp_path / "valve.toml").write_text(valve + mistake)
    config = load_file(main, known=RuleFiles())
    assert [isinstance(each, BrokenRule) for each in config.device] == [True, True, False]
    for more in ({}, {"username": "x"}):
        assert reserved_by(config, "plant7-pump-3", **more) == "pump"
        assert reserved_by(config, "valve", **more) == "valve"
        assert reserved_by(config, "pump-4", **more) == ""


_MISTAKES = {
    "type": "client_id = 5",
    "placeholder": 'client_id = "plant{number}"',
    "template": 'client_id = "plant7-{client_id"',
    "quote": 'client_id = "plant7-{client_id}',
    "key": 'cleint_id = "plant7-{client_id}"',
    "pattern": 'match_pattern = "("\nclient_id = "plant7-{client_id}"',
}


@pytest.fixture
def broken_plant(tmp_path: Path) -> tuple[Path, Path]:
    """A configuration, and the file of a rule in it, beside a rule for the names v*."""
    main, pump = tmp_path / "gateway.conf", tmp_path / "pump.toml"
    main.write_text('[[upstream]]\nhost = "b"\n[devices]\ndirectory = "."\n')
    (tmp_path / "valves.toml").write_text('match_client_id = "v*"\n')
    (tmp_path / "z.toml").write_text('match_client_id = "*"\nmatch_network = "10.0.0.66"\n')
    pump.write_text('match_client_id = "pump-3"\nclient_id = "plant7-{client_id}"\n')
    return main, pump


@pytest.mark.parametrize("mistake", [*_MISTAKES.values(), "\udcff", ""])
def test_a_mistake_in_client_id_keeps_the_names_of_before(broken_plant: tuple[Path, Path], mistake: str) -> None:
    """They are those of the last usable version, however often the broken file is read; the repair gives others."""
    main, pump = broken_plant
    known = RuleFiles()
    load_file(main, known=known)
    pump.write_text(f'match_client_id = "pump-3"\n{mistake}\n' if mistake else "", "utf-8", "surrogateescape")
    for _ in range(2):
        config = load_file(main, known=known)
        assert reserved_by(config, "plant7-pump-3", listener="yard", address="10.0.0.7") == "pump"
        assert reserved_by(config, "vast") == ""
    pump.write_text('match_client_id = "pump-3"\nclient_id = "other"\n')
    config = load_file(main, known=known)
    assert reserved_by(config, "plant7-pump-3") == ""
    assert reserved_by(config, "other") == "pump"


def judged(config: Config, name: str, address: str) -> tuple[EndReason, str] | None:
    """Return why a device with this name is refused, with the beginning of the detail, or None."""
    rules, caller = Rules(config), Caller(address, "hall")
    try:
        Names(config, rules).check(name, rules.match(read(connect(name))[1], caller), caller, brokers(config, ()))
    except Refusal as refusal:
        return refusal.reason, refusal.detail.partition(":")[0]
    return None


@pytest.mark.parametrize(
    ("mistake", "refused", "served"),
    [
        ("type", "plant7-pump-3", "valve"),
        ("placeholder", "plant7-pump-3", "pla"),
        ("template", "plant7-pump-3", "plant6"),
        ("quote", "plant7-pump-3", "valve"),
        ("pattern", "plant7-pump-3", "valve"),
        ("key", "", "plant7-pump-3"),
    ],
)
def test_at_a_start_a_mistake_in_client_id_reserves_what_it_may_give(
    broken_plant: tuple[Path, Path], mistake: str, refused: str, served: str
) -> None:
    """All names that begin as it does, up to its first placeholder, except those that other rules are for."""
    main, pump = broken_plant
    pump.write_text(f'match_client_id = "pump-3"\n{_MISTAKES[mistake]}\n')
    config = load_file(main, known=RuleFiles())
    for address in ("10.0.0.66", "10.0.0.7"):
        assert judged(config, served, address) is None
        if refused:
            words = "its Client Identifier at the broker may belong to rule pump"
            assert judged(config, refused, address) == (EndReason.DEVICE_RULE_BROKEN, words)
        assert judged(config, "", address) is None
    # It is its own devices that are refused first.
    assert config.device[0 if mistake != "pattern" else -1].name == "pump"


def test_a_long_name_is_judged_too() -> None:
    """Where a pattern would have to, it counts as that rule's; a device without a name has none."""
    bound = {**PUMPS, "client_id": "", "match_network": "192.168.0.0/16", "bound_to": "192.168.0.1"}
    assert reserved_by(configured(bound), "pump-" + "3" * 300) == "pumps"
    away = {**PUMPS, "match_listener": "yard", "client_id": "x{client_id}"}
    assert reserved_by(configured(away), "y" * 60_000) == ""
    assert reserved_by(configured({**away, "client_id": "{address}x{client_id}"}), "ax" * 30_000) == "pumps"
    assert reserved_by(configured(bound), "") == ""


def test_rules_that_name_their_devices_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten thousand, those for other names are not even looked at."""
    config = configured(*({"match_client_id": f"d{number}", "client_id": "p-{client_id}"} for number in range(10_000)))
    rules = Rules(config)
    names = Names(config, rules)
    monkeypatch.setattr(names_module._Claim, "can_give", None)
    names.check("p-d10000", None, Caller("10.0.0.1", ""), brokers(config, ()))
    with pytest.raises(Refusal):
        names.check("p-d9999", None, Caller("10.0.0.1", ""), brokers(config, ()))
