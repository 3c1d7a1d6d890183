"""Profiles of clouds: which keys they stand in for, and that every key that is written counts for itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from gateway.config import Config, from_mapping
from gateway.config.devices import DeviceRule
from gateway.config.profiles import Name
from gateway.errors import ConfigError

NAMES = [name for name in get_args(Name) if name]
DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "devices.md").read_text()
HOST = "plant.azure-devices.example"


def configured(profile: str, **sections: Any) -> Config:
    upstream = sections.pop("upstream", [{"host": HOST}])
    devices = {"profile": profile} | sections.pop("devices", {})
    return from_mapping({"upstream": upstream, "devices": devices} | sections)


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_gives_what_the_document_says(name: str) -> None:
    """The table in docs/devices.md, row by row, and nothing but what stands there."""
    row = re.search(rf"(?m)^\| `{name}` (\|.*\|.*\|.*) \|$", DOCUMENT)
    assert row is not None
    cells = row[1].split("|")[1:]
    upstream, tls, device = ([tomllib.loads(key) for key in re.findall(r"`(\w+ = [^`]*)`", cell)] for cell in cells)
    plain = configured("", devices={"unknown": "refuse"}, device=[{"sas_key_file": "k", "sas_resource": "x"}])
    config = configured(name, devices={"unknown": "refuse"}, device=[{"sas_key_file": "k"} | _resource(name)])
    assert [vars_of(each) for each in config.upstream] == [vars_of(plain.upstream[0]) | merged(upstream)]
    expected = vars_of(plain.device[0]) | {key: _filled(value) for key, value in merged(device).items()}
    assert vars_of(config.device[0]) == expected
    at_443 = configured(name, upstream=[{"host": HOST, "port": 443}])
    assert list(at_443.tls.alpn) == merged(tls).get("alpn", [])
    assert config.tls == plain.tls


def _resource(name: str) -> dict[str, str]:
    return {} if name == "azure-iot-hub" else {"sas_resource": "x"}


def _filled(value: Any) -> Any:
    return value.replace("HOST", HOST) if isinstance(value, str) else value


def merged(tables: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for table in tables for key, value in table.items()}


def vars_of(thing: Any) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in type(thing).__match_args__}


def test_what_is_written_counts_for_itself() -> None:
    """Key by key: the others are still the profile's."""
    config = configured(
        "aws-iot",
        upstream=[{"host": "a", "port": 443}],
        tls={"alpn": ["mqtt"]},
        device=[{"keep_alive_max": 600, "credentials": "pass", "client_cert": "c.pem"}],
    )
    rule = config.device[0]
    assert (config.upstream[0].port, config.tls.alpn) == (443, ("mqtt",))
    assert (rule.keep_alive_min, rule.keep_alive_max, rule.credentials) == (30, 600, "pass")


def test_a_certificate_takes_the_place_of_the_devices_credentials() -> None:
    """They are for nobody else; without a certificate they are all there is."""
    rules = configured(
        "aws-iot", device=[{"match_client_id": "a", "client_cert": "c.pem"}, {"match_client_id": "b"}]
    ).device
    assert [rule.credentials for rule in rules[:2]] == ["drop", "pass"]


def test_rules_in_files_have_the_profile_too(tmp_path: Path) -> None:
    """They are read apart from the configuration."""
    (tmp_path / "d1.toml").write_text('sas_key_file = "d1.key"\n')
    rule = configured("azure-iot-hub", devices={"directory": str(tmp_path)}).device[0]
    assert rule.sas_resource == f"{HOST}/devices/{{client_id}}"
    assert rule.username == f"{HOST}/{{client_id}}/?api-version=2021-04-12"


@pytest.mark.parametrize(
    ("unknown", "rules", "expected"),
    [
        ("pass", [], ["devices.profile aws-iot"]),
        ("pass", [{"match_client_id": "a"}], ["device[0]", "devices.profile aws-iot"]),
        ("pass", [{"name": "all"}], ["all"]),
        ("refuse", [], []),
    ],
)
def test_devices_without_a_rule_are_held_to_the_profile(unknown: str, rules: list[Any], expected: list[str]) -> None:
    """Unless they are refused, or a rule is for everybody."""
    config = configured("aws-iot", devices={"unknown": unknown}, device=rules)
    assert [rule.name for rule in config.device] == expected
    assert all(rule.max_qos == 1 for rule in config.device)


def test_without_a_profile_nothing_is_added() -> None:
    """No rule comes from nowhere."""
    config = configured("")
    assert (config.device, config.upstream[0].port) == ((), 8883)


def test_mistakes_are_found_beside_a_profile() -> None:
    """It hides none, and makes none of its own."""
    with pytest.raises(ConfigError) as caught:
        configured("aws-iot", upstream="a", device=[{"max_qos": 3}, {"sas_resource": "x"}], tls=[])
    assert sorted(problem.partition(":")[0] for problem in caught.value.problems) == [
        "device[0].max_qos",
        "device[1].sas_resource",
        "tls",
        "upstream",
    ]
    with pytest.raises(ConfigError, match=r'devices\.profile: expected "" or "aws-iot" or .*got the text "aws"'):
        configured("aws")


def test_a_host_with_braces_is_no_template() -> None:
    """What is no host is refused as that, not as an unknown placeholder."""
    with pytest.raises(ConfigError) as caught:
        configured("azure-iot-hub", upstream=[{"host": "{x}"}], device=[{"name": "a"}])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["upstream[0].host"]


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_is_made_of_keys_that_exist(name: str) -> None:
    """A rule with nothing of its own is a rule."""
    assert isinstance(configured(name, device=[{}]).device[0], DeviceRule)


@pytest.mark.parametrize(
    ("name", "port", "path"),
    [
        ("aws-iot", 443, "/mqtt"),
        ("azure-iot-hub", 443, "/$iothub/websocket?iothub-no-client-cert=true"),
        ("azure-event-grid", 443, "/mqtt"),
        ("hivemq-cloud", 8884, "/mqtt"),
        ("emqx-cloud", 8084, "/mqtt"),
    ],
)
def test_profiles_know_where_the_websocket_is(name: str, port: int, path: str) -> None:
    """Port and path; a WebSocket on 443 needs no ALPN."""
    config = configured(name, upstream=[{"host": HOST, "transport": "websocket"}])
    assert (config.upstream[0].port, config.upstream[0].path) == (port, path)
    assert config.tls.alpn == ()
