"""Rules for devices: the tables and the directory, what is wrong with them, templates and hashes."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Config, from_mapping, load_file
from gateway.config.devices import BrokenRule
from gateway.config.directory import RuleFiles
from gateway.config.passwords import hash_password, parse_hash
from gateway.config.templates import UnusableValueError, check_template, expand, placeholders
from gateway.errors import ConfigError

UPSTREAM = [{"host": "broker.example.com", "name": "cloud"}]


def made(*rules: dict[str, Any], base: Path | None = None, **sections: Any) -> Config:
    return from_mapping({"upstream": UPSTREAM, "device": list(rules), **sections}, base)


def problems(*rules: dict[str, Any], **sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        made(*rules, **sections)
    return caught.value.problems


# ---- the tables


def test_without_rules_there_are_none() -> None:
    """Unknown devices pass, as they did before there were rules."""
    config = made()
    assert (config.device, config.devices.unknown, config.devices.directory) == ((), "pass", None)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    """Each with its key; values are never built into anything before."""
    found = problems(
        {"match_client_id": 5, "upstream": "clod", "match_listener": ["x"], "colour": "blue"},
        {"match_pattern": "(", "retain": "drop", "max_qos": 3, "keep_alive_min": -1},
        {"password_command": ["token"], "password_credential": "../x", "publish": ["a/#/b", "ok/#", "a+"]},
        {"subscribe": ["a/#", "$share/g/a/#", "$shared/a"]},
        {"publish_prefix": "a/#", "subscribe_prefix": "$share/g/", "max_packet_size": 10, "clean_start": "yes"},
        {"lan_password": "hunter2"},
    )
    for expected in (
        "device[0].match_client_id: expected a text or a list of texts, got the number 5",
        "device[0].colour: unknown key",
        'device[1].match_pattern: "(" is not a regular expression',
        'device[1].retain: expected "pass" or "strip" or "refuse", got the text "drop"',
        "device[1].max_qos: 3 is out of range (0 to 2)",
        "device[1].keep_alive_min: -1 is out of range",
        'device[2].password_command: "token" is not an absolute path',
        'device[2].password_credential: "../x" is not a credential name',
        'device[2].publish[0]: "a/#/b" is not a Topic Filter',
        'device[2].publish[2]: "a+" is not a Topic Filter',
        'device[3].subscribe[1]: "$share/g/a/#" would permit nothing',
        'device[4].publish_prefix: "a/#" is not a prefix',
        'device[4].subscribe_prefix: "$share/g/" is not a prefix',
        "device[4].max_packet_size: 10 is out of range",
        "device[4].clean_start: expected true or false",
        "device[5].lan_password: not a password hash",
    ):
        assert any(line.startswith(expected) for line in found), (expected, found)
    assert not any("hunter2" in line or "$shared/a" in line for line in found)


@pytest.mark.parametrize("prefix", ["plant7", "plant7-", "p/{client_id}", "{address}-"])
@pytest.mark.parametrize("key", ["publish_prefix", "subscribe_prefix"])
def test_a_prefix_ends_with_a_level(key: str, prefix: str) -> None:
    """Otherwise "#" would be "plant7#", and the device "a" could write to the topics of the device "ab"."""
    (problem,) = problems({key: prefix})
    assert problem.startswith(f'device[0].{key}: "{prefix}" ')
    assert made({key: f"{prefix}/"}).device


def test_what_does_not_go_together() -> None:
    """Within one rule: all of it, each under its key."""
    found = problems(
        {"password_file": "a", "sas_key_file": "b", "client_key": "k", "keep_alive_min": 60, "keep_alive_max": 30},
        {"jwt_key_file": "k"},
        {"sas_resource": "r", "sas_policy": "p"},
        {"client_id": "{hall}-{client_id}", "publish": ["a/{nobody}"]},
        {"match_pattern": "(?P<client_id>.*)"},
    )
    assert [line.partition(": ")[0] for line in found] == [
        "device[0].sas_key_file",
        "device[0].sas_resource",
        "device[0].client_key",
        "device[0].keep_alive_min",
        "device[1].jwt_audience",
        "device[2].sas_resource",
        "device[2].sas_policy",
        "device[3].client_id",
        "device[3].publish[0]",
        "device[4].match_pattern",
    ]


def test_names_that_rules_mention_exist() -> None:
    """Upstreams and listeners are known by their names."""
    rule = {"match_client_id": "a", "upstream": ["cloud", "clod"], "match_listener": ["", "hall"]}
    assert problems(rule, listen=[{"endpoint": "1883", "name": "Hall"}]) == [
        'device[0].upstream[1]: no upstream has the name "clod"',
        'device[0].match_listener[0]: no listener has the name ""',
        'device[0].match_listener[1]: no listener has the name "hall"',
    ]


def test_a_rule_that_would_never_be_used() -> None:
    """Another before it is for the same devices."""
    rule = {"match_client_id": "a", "match_network": "10.0.0.0/8"}
    (found,) = problems(rule, {"match_client_id": "a"}, {**rule, "max_qos": 1})
    assert found.startswith("device[2]: device[0] ")
    assert "never be used" in found


def test_a_device_without_an_upstream() -> None:
    """Where no upstream is for all, every rule names one, and nobody is unknown."""
    upstream = [{"host": "a", "name": "a", "default": False}]
    rules = [{"match_client_id": "x", "upstream": "a"}, {"match_client_id": "y"}]
    found = problems(*rules, upstream=upstream)
    assert [line.partition(":")[0] for line in found] == ["device[1]", "devices.unknown"]
    assert made(rules[0], upstream=upstream, devices={"unknown": "refuse"}).device[0].upstream == ("a",)


def test_groups_of_the_pattern_are_placeholders() -> None:
    """They are part of the Client Identifier, which the pattern has taken apart."""
    rule = {"match_pattern": "hall(?P<hall>[0-9]+)-(?P<unit>.*)", "client_id": "{unit}.{hall}"}
    assert made(rule).device[0].groups == ["hall", "unit"]


def test_paths_start_at_the_directory_of_the_file(tmp_path: Path) -> None:
    """As those of the other sections."""
    rule = {"client_cert": "a.pem", "client_key": "/k.pem", "sas_key_file": "s", "sas_resource": "r"}
    (device,) = made(rule, base=tmp_path).device
    assert (device.client_cert, device.client_key) == (tmp_path / "a.pem", Path("/k.pem"))
    assert device.sas_key_file == tmp_path / "s"


# ---- the directory


def test_files_of_the_directory_come_first_and_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Each is for the Client Identifier of its name, unless it says whom it is for; others are not read."""
    directory = tmp_path / "rules" / "devices"
    directory.mkdir(parents=True)
    (directory / "b.toml").write_text('client_cert = "b.pem"')
    (directory / "a.toml").write_text('match_network = "10.0.0.7"\nname = "seven"')
    (directory / "sensor 1.5.toml").write_text("max_qos = 1")
    for other in (".c.toml.swp", ".d.toml", "readme.txt"):
        (directory / other).write_text("rubbish")
    file = tmp_path / "rules" / "gateway.toml"
    file.write_text('[[upstream]]\nhost = "b"\n[devices]\ndirectory = "devices"\n[[device]]\nmatch_client_id = "*"\n')
    config = load_file(file)
    assert [(each.name, each.match_client_id) for each in config.device] == [
        ("seven", ()),
        ("b", ("b",)),
        ("sensor 1.5", ("sensor 1.5",)),
        ("device[0]", ("*",)),
    ]
    assert config.device[1].client_cert == directory / "b.pem"
    assert config.devices.directory == directory


def test_mistakes_in_files_name_the_files(tmp_path: Path) -> None:
    """All of them, together with those of the file itself."""
    for name, text in {
        "a": "max_qos = 7\ncolour = 1",
        "b": "max_qos",
        "c": 'match_client_id = "x"',
        "d": 'match_client_id = "x"',
        "e*": "max_qos = 1",
        "f": " ",
    }.items():
        (tmp_path / f"{name}.toml").write_text(text)
    shown = f'"{tmp_path}/'
    found = problems({"upstream": "nowhere"}, devices={"directory": str(tmp_path)})
    assert sorted(found) == [
        f'{shown}a.toml": colour: {next(line for line in found if "colour" in line).partition("colour: ")[2]}',
        f'{shown}a.toml": max_qos: 7 is out of range (0 to 2)',
        next(line for line in found if line.startswith(f'{shown}b.toml" is not TOML: line 1, ')),
        next(line for line in found if line.startswith(f'{shown}d.toml": {shown}c.toml" ')),
        next(line for line in found if line.startswith(f'{shown}e*.toml": match_client_id: ')),
        next(line for line in found if line.startswith(f'{shown}f.toml" is empty: ')),
        'device[0].upstream[0]: no upstream has the name "nowhere"',
    ]


def test_the_rule_of_a_broken_file_has_the_name_of_the_file(tmp_path: Path) -> None:
    """As others have; it is escaped where it is shown, so not here, and holds nothing that no name may."""
    for name in ("a\\b", "bell\a", os.fsdecode(b"\xff")):
        (tmp_path / f"{name}.toml").write_text("max_qos = 7")
    (tmp_path / "c\\d.toml").write_text("max_qos = 1")
    file = tmp_path / "gateway.conf"
    file.write_text(f'[[upstream]]\nhost = "b"\n[devices]\ndirectory = "{tmp_path}"\n')
    rules = load_file(file, known=RuleFiles()).device
    broken = {rule.name: rule.problem for rule in rules if isinstance(rule, BrokenRule)}
    assert sorted(broken) == ["a\\b", "bell\ufffd", "\ufffd"]
    assert f'"{tmp_path}/a\\\\b.toml": max_qos' in broken["a\\b"]
    assert [rule.name for rule in rules if not isinstance(rule, BrokenRule)] == ["c\\d"]


def test_a_directory_that_is_not_there() -> None:
    """Its name and the reason."""
    assert problems(devices={"directory": "/nowhere"}) == [
        'devices.directory: "/nowhere" cannot be read: No such file or directory; create it (it may be empty)'
    ]


# ---- templates


def test_placeholders_are_names_alone() -> None:
    """Formats and attributes would reach into the values."""
    assert placeholders("a{{b}}-{client_id}{username}") == {"client_id", "username"}
    for wrong in ("{", "}", "{client_id!r}", "{client_id:>9}", "{client_id", "{client_id.x}", "{}", "{0}"):
        with pytest.raises(ValueError, match=r"template|placeholder"):
            check_template(wrong, ["client_id"])


@given(st.text(max_size=200))
def test_only_safe_characters_get_into_a_text(value: str) -> None:
    """Whatever the device calls itself, what comes out has the text's own structure."""
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:@-")
    if 0 < len(value) <= 128 and set(value) <= allowed:
        assert expand("hub/{client_id}/x", {"client_id": value}) == f"hub/{value}/x"
        return
    with pytest.raises(UnusableValueError, match=r"^\{client_id\} "):
        expand("hub/{client_id}/x", {"client_id": value})


@given(st.text("ab.-:@_09AZ", max_size=130))
def test_names_that_are_safe_get_in(value: str) -> None:
    """Up to 128 characters of them."""
    if 0 < len(value) <= 128:
        assert expand("<{client_id}>", {"client_id": value}) == f"<{value}>"


def test_a_line_feed_at_the_end_is_no_safe_character() -> None:
    """As a regular expression with `$` would have it."""
    with pytest.raises(UnusableValueError):
        expand("{client_id}", {"client_id": "sensor\n"})


def test_a_value_that_there_is_not() -> None:
    """A device on a UNIX socket has no address; nobody writes None into a name."""
    with pytest.raises(UnusableValueError, match=r"\{address\} has no value"):
        expand("{address}", {"address": None})
    assert expand("{{}}", {}) == "{}"
    assert expand("as it is", {}) == "as it is"


# ---- hashes


def test_a_hash_is_what_the_standard_library_makes_of_the_password() -> None:
    """RFC 7914, computed by OpenSSL through another door; the text holds all parameters."""
    text = hash_password(b"correct horse", b"0123456789abcdef")
    kind, cost, block_size, parallelism, salt, digest = text.split("$")
    assert (kind, base64.b64decode(salt)) == ("scrypt", b"0123456789abcdef")
    wanted = hashlib.scrypt(
        b"correct horse", salt=b"0123456789abcdef", n=int(cost), r=int(block_size), p=int(parallelism), dklen=32
    )
    assert base64.b64decode(digest) == wanted
    assert parse_hash(text).verify(b"correct horse")
    assert not parse_hash(text).verify(b"correct horse ")
    assert not parse_hash(text).verify(b"")


SALT, HASH = base64.b64encode(bytes(8)).decode(), base64.b64encode(bytes(16)).decode()


@pytest.mark.parametrize(
    "text",
    [
        "hunter2",
        f"scrypt$16384$8$1${SALT}",
        f"scrypt$16383$8$1${SALT}${HASH}",
        f"scrypt$1$8$1${SALT}${HASH}",
        f"scrypt$16384$0$1${SALT}${HASH}",
        f"scrypt$16384$8$0${SALT}${HASH}",
        f"scrypt$16384$8$17${SALT}${HASH}",
        f"scrypt$67108864$8$1${SALT}${HASH}",
        f"scrypt$16384$8$1$AAAA${HASH}",
        f"scrypt$16384$8$1${SALT}$AAAA",
        f"scrypt$16384$8$1$!!!!${HASH}",
        f"bcrypt$16384$8$1${SALT}${HASH}",
    ],
)
def test_what_is_no_hash(text: str) -> None:
    """Nor one that would take too much memory; the message does not show it."""
    with pytest.raises(ValueError, match=r"hash|scrypt") as caught:
        parse_hash(text)
    assert HASH not in str(caught.value)


def test_a_rule_shows_no_hash() -> None:
    """It may come to stand in a traceback."""
    rule = made({"lan_password": hash_password(b"x", bytes(16)), "password_command": ["/bin/x", "secret"]}).device[0]
    assert "scrypt" not in repr(rule)
    assert "secret" not in repr(rule)
