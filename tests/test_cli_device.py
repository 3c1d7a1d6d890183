"""`mqtts-gateway device`: the directory of rules, its keys and certificates, kept by commands."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from attrs import evolve
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli import device_files
from gateway.cli.device_change import change
from gateway.cli.device_files import exact_pattern, rule_text, stem_of, toml
from gateway.cli.device_rules import Rules
from gateway.cli.main import console
from gateway.cli.service_view import ServiceView
from gateway.config import DeviceRule, load_file
from gateway.config.passwords import parse_hash
from gateway.errors import ConfigError
from gateway.tls.trust import read_private_key
from tests.pki import CLIENT, Certified, certify, certify_ca
from tests.tools import require_tool


class Site:
    """A configuration with a directory of rules, and a CA for devices; `do` runs the command on it."""

    def __init__(self, directory: Path, profile: str = "") -> None:
        self.directory = directory / "devices"
        self.directory.mkdir()
        self.config = directory / "gateway.toml"
        self.config.write_text(
            '[[listen]]\nendpoint = "1883"\nname = "hall"\n'
            f'[[upstream]]\nhost = "b.example"\n[devices]\ndirectory = "devices"\nprofile = "{profile}"\n'
        )
        self.ca = certify_ca()
        self.ca_cert, self.ca_key = directory / "ca.pem", directory / "ca-key.pem"
        self.ca_cert.write_bytes(self.ca.pem)
        self.ca_key.write_bytes(self.ca.key_pem)

    def do(self, action: str, *arguments: str) -> int:
        return console(["device", action, "--config", str(self.config), *arguments])

    @property
    def issuing(self) -> tuple[str, ...]:
        return "--ca-cert", str(self.ca_cert), "--ca-key", str(self.ca_key), "--days", "20"

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def rule(self, name: str) -> DeviceRule:
        (rule,) = [device for device in load_file(self.config).device if device.match_client_id == (name,)]
        return rule


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def common_name(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    (attribute,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(attribute.value)


def test_a_device_gets_a_certificate_of_its_own(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Issued by the CA, for TLS clients alone, with the Client Identifier as common name; the key is nobody else's."""
    assert site.do("add", "sensor-1", *site.issuing, "--set", "max_qos=1") == 0
    assert site.files() == ["sensor-1-key.pem", "sensor-1.pem", "sensor-1.toml"]
    rule = site.rule("sensor-1")
    assert (rule.client_cert, rule.client_key) == (
        site.directory / "sensor-1.pem",
        site.directory / "sensor-1-key.pem",
    )
    assert rule.max_qos == 1
    certificate = x509.load_pem_x509_certificate((site.directory / "sensor-1.pem").read_bytes())
    certificate.verify_directly_issued_by(site.ca.certificate)
    assert common_name(certificate) == "sensor-1"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.public_key() == read_private_key(site.directory / "sensor-1-key.pem").public_key()
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=19) < left <= timedelta(days=20)
    assert stat.S_IMODE((site.directory / "sensor-1-key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((site.directory / "sensor-1.toml").stat().st_mode) == 0o644
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("wrote ")] == [
        f"wrote {site.directory / name}" for name in ("sensor-1-key.pem", "sensor-1.pem", "sensor-1.toml")
    ]
    assert f"mqtts-gateway check --files --config {site.config}" in out


def test_openssl_accepts_the_certificate(site: Site) -> None:
    """Strictly, for the purpose of a TLS client."""
    assert site.do("add", "sensor-1", *site.issuing) == 0
    command = [require_tool("openssl"), "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", str(site.ca_cert)]
    subprocess.run([*command, str(site.directory / "sensor-1.pem")], check=True, capture_output=True)


def test_a_pending_request_is_named_and_can_be_removed(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """With its key, and only if that is asked for; what a rule uses stays."""
    assert site.do("add", "d1", "--csr") == 0
    assert f"have {site.directory / 'd1.csr.pem'} signed" in capfd.readouterr().out
    assert site.do("add", "d1", "--csr") == 1
    assert "`device remove ID --keys`" in capfd.readouterr().err
    assert site.do("list") == 0
    assert "requests without a rule: d1.csr.pem\n" in capfd.readouterr().err
    assert site.do("remove", "d1") == 1
    assert "--keys: d1-key.pem, d1.csr.pem" in capfd.readouterr().err
    assert site.files() == ["d1-key.pem", "d1.csr.pem"]
    assert site.do("remove", "d1", "--keys") == 0
    assert site.files() == []
    assert site.do("remove", "d1", "--keys") == 1
    assert f'there is no rule for "d1" in {site.directory}\n' in capfd.readouterr().err
    site.do("add", "d2", *site.issuing)
    (site.directory / "d2.toml").rename(site.directory / "many.toml")
    rule = (site.directory / "many.toml").read_text()
    (site.directory / "many.toml").write_text(rule.replace('"d2"', '["d2", "d3"]', 1))
    before = site.files()
    assert site.do("remove", "d2", "--keys") == 1
    assert site.files() == before


@pytest.mark.parametrize("key_type", ["p256", "rsa2048"])
def test_a_request_is_signed_elsewhere(site: Site, tmp_path: Path, key_type: str) -> None:
    """Until its certificate has come there is no rule, so that the device never goes by another's identity."""
    assert site.do("add", "sensor-1", "--csr", "--key-type", key_type) == 0
    assert site.files() == ["sensor-1-key.pem", "sensor-1.csr.pem"]
    request = x509.load_pem_x509_csr((site.directory / "sensor-1.csr.pem").read_bytes())
    assert request.is_signature_valid
    assert common_name(request) == "sensor-1"
    key = read_private_key(site.directory / "sensor-1-key.pem")
    assert isinstance(key, rsa.RSAPrivateKey) == (key_type == "rsa2048")
    issued = tmp_path / "issued.pem"
    issued.write_bytes(certify(site.ca, subject="sensor-1", names=(), purposes=(CLIENT,), key=key).pem)
    assert site.do("add", "sensor-1", "--cert", str(issued)) == 0
    assert site.rule("sensor-1").client_key == site.directory / "sensor-1-key.pem"


def test_a_certificate_for_another_key_is_refused(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two devices' certificates are easily confused."""
    assert site.do("add", "sensor-1", "--csr") == 0
    assert "then run: mqtts-gateway device add sensor-1 --config" in capfd.readouterr().out
    issued = tmp_path / "issued.pem"
    issued.write_bytes(certify(site.ca, subject="sensor-1", names=(), purposes=(CLIENT,)).pem)
    assert site.do("add", "sensor-1", "--cert", str(issued)) == 1
    assert str(site.directory / "sensor-1-key.pem") in capfd.readouterr().err
    assert site.files() == ["sensor-1-key.pem", "sensor-1.csr.pem"]


CONDITIONS = ["match_network=10.0.0.0/8", "match_username=u", "match_listener=hall", "match_pattern=(?P<x>.*)"]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_rule_is_for_its_device_whatever_else_it_asks_for(site: Site, condition: str) -> None:
    """And it can be shown, listed and removed; without the name it would give everybody the device's certificate."""
    assert site.do("add", "sensor-1", *site.issuing, "--set", condition) == 0
    assert site.rule("sensor-1").match_client_id == ("sensor-1",)
    assert site.do("show", "sensor-1") == 0
    assert site.do("add", "sensor-2", *site.issuing, "--set", condition) == 0
    assert site.do("list") == 0
    assert site.do("remove", "sensor-1", "--keys") == 0
    assert site.files() == ["sensor-2-key.pem", "sensor-2.pem", "sensor-2.toml"]


@pytest.mark.parametrize("way", [["--csr"], []])
@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("d1", "match_client_id=sensor-*", "match_client_id"),
        ("d1", "match_pattern=sensor-.*", "match_pattern"),
        ("*" * 257, "max_qos=1", "257"),
    ],
)
def test_a_rule_that_would_not_be_for_its_device_is_not_written(
    site: Site, capfd: pytest.CaptureFixture[str], way: list[str], name: str, value: str, word: str
) -> None:
    """Neither one for others, nor one for nobody."""
    assert site.do("add", name, *way, "--set", value) == 1
    assert word in capfd.readouterr().err
    assert site.files() == []


def test_a_key_is_set_once(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """The second value would take the place of the first without a word."""
    assert site.do("add", "d1", "--set", "max_qos=1", "--set", "max_qos = 0") == 1
    assert "--set max_qos: give it once" in capfd.readouterr().err
    assert site.files() == []


@pytest.mark.parametrize("value", ["upstream=nowhere", "match_listener=nowhere", "client_key=k.pem"])
def test_a_rule_that_the_gateway_would_refuse_is_not_written(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str], value: str
) -> None:
    """The configuration can be loaded after each command."""
    assert site.do("add", "d1", "--set", value) == 1
    assert value.partition("=")[0] in capfd.readouterr().err
    key, _, text = value.partition("=")
    table = tmp_path / "devices.csv"
    table.write_text(f"id,{key}\nd1,\nd2,{text}\n")
    assert site.do("import", str(table)) == 1
    assert site.files() == []
    assert site.do("list") == 0


def test_a_rule_that_was_edited_is_found_by_its_file(site: Site) -> None:
    """So that what is there can be shown and removed."""
    (site.directory / "d1.toml").write_text('match_network = "10.0.0.0/8"\n')
    assert site.do("show", "d1") == 0
    assert site.do("remove", "d1") == 0
    assert site.files() == []


def test_what_moves_text_in_a_terminal_is_escaped_in_a_rule() -> None:
    """As controls are: U+202E, for one, would show the rest of the name in reverse; letters stay as they are."""
    text = toml("a\u202eb\u2028\x1b\x7f\U000e0001ü日")
    assert text == '"a\\u202Eb\\u2028\\u001b\\u007F\\U000E0001ü日"'
    assert tomllib.loads(f"a = {text}")["a"] == "a\u202eb\u2028\x1b\x7f\U000e0001ü日"


def test_a_rule_is_shown_in_columns_with_the_values_of_toml(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where a key is long."""
    (site.directory / "d1.toml").write_text('enabled = false\nsubscribe_prefix = "hall/"\nmax_qos = 1\n')
    assert site.do("show", "d1") == 0
    lines = capfd.readouterr().out.splitlines()
    assert {"enabled           false", "subscribe_prefix  hall/", "max_qos           1"} < set(lines)
    assert f"rule              {site.directory / 'd1.toml'}" in lines


def test_conditions_can_be_imported(site: Site, tmp_path: Path) -> None:
    """Each rule is for its device, however alike the conditions are."""
    table = tmp_path / "devices.csv"
    table.write_text("id,match_network\nd1,10.0.0.0/8\nd2,10.0.0.0/8\n")
    assert site.do("import", str(table)) == 0
    assert [site.rule(name).match_client_id for name in ("d1", "d2")] == [("d1",), ("d2",)]
    assert site.do("remove", "d2") == 0


def test_nothing_is_written_over(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither a rule nor a key that lies there without one."""
    assert site.do("add", "sensor-1") == 0
    assert site.do("add", "sensor-1") == 1
    assert f'"sensor-1" already has a rule: {site.directory / "sensor-1.toml"}' in capfd.readouterr().err
    (site.directory / "sensor-2-key.pem").write_text("mine")
    assert site.do("add", "sensor-2", *site.issuing) == 1
    assert (site.directory / "sensor-2-key.pem").read_text() == "mine"
    assert site.files() == ["sensor-1.toml", "sensor-2-key.pem"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "max_qos=3"], "max_qos: 3 is out of range"),
        (["--set", "color=red"], "color: unknown key"),
        (["--set", "max_qos"], "KEY=VALUE"),
        (["--csr", "--cert", "x"], "--csr, --ca-cert and --cert"),
        (["--ca-cert", "x"], "--ca-cert and --ca-key"),
        (["--csr", "--common-name", "x" * 65], "1 to 64 characters"),
    ],
)
def test_a_device_that_cannot_be_leaves_nothing_behind(
    site: Site, capfd: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    """No half of its files, and the reason in words."""
    assert site.do("add", "sensor-1", *options) == 1
    assert words in capfd.readouterr().err
    assert site.files() == []


def test_the_ca_must_be_one_and_outlive_the_device(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Brokers would refuse what it issues."""
    leaf = certify(site.ca)
    site.ca_cert.write_bytes(leaf.pem)
    assert site.do("add", "a", *site.issuing) == 1
    site.ca_key.write_bytes(leaf.key_pem)
    assert site.do("add", "a", *site.issuing) == 1
    ca: Certified = certify_ca()
    site.ca_cert.write_bytes(ca.pem)
    site.ca_key.write_bytes(ca.key_pem)
    assert site.do("add", "a", *site.issuing[:4], "--days", "91") == 1
    errors = capfd.readouterr().err.splitlines()
    assert [words in line for words, line in zip(("not the key of", "is no CA's", "--days"), errors, strict=True)]
    assert site.files() == []


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", ".hidden", "*", "a-key", "x" * 300, "é\u202e", "a\nb", "a.csr"])
def test_no_client_identifier_leads_out_of_the_directory(site: Site, name: str) -> None:
    """Nor is it lost: the rule is for that Client Identifier, and for no other."""
    assert site.do("add", name, "--set", "max_qos=0") == 0
    (file,) = site.files()
    assert file.endswith(".toml")
    assert file[0] != "."
    (rule,) = load_file(site.config).device
    assert rule.match_client_id == (exact_pattern(name),)
    assert site.do("remove", name) == 0
    assert site.files() == []


@given(st.text(min_size=1, max_size=400).filter(lambda text: not any("\ud800" <= each <= "\udfff" for each in text)))
def test_a_file_name_and_a_rule_can_be_made_of_any_client_identifier(name: str) -> None:
    """The name is one of a file in the directory; the rule reads back as what it is for."""
    stem = stem_of(name)
    assert stem == Path(stem).name
    assert len(stem.encode()) <= 200
    assert tomllib.loads(rule_text(name, {}))["match_client_id"] == exact_pattern(name)


@given(st.sets(st.text(max_size=120), min_size=2, max_size=2))
def test_two_client_identifiers_never_share_files(names: set[str]) -> None:
    """Also where one is made to look like the other's file."""
    first, second = names
    ends = (".toml", "-key.pem", ".csr.pem", ".pem", ".password")
    assert {stem_of(first) + end for end in ends}.isdisjoint({stem_of(second) + end for end in ends})


def test_a_lan_password_is_read_and_only_its_hash_is_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """From standard input where there is no terminal; never from the command line, which all can see."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("s3cret\n"))
    assert site.do("add", "sensor-1", "--lan-password") == 0
    assert "s3cret" not in (site.directory / "sensor-1.toml").read_text()
    assert parse_hash(site.rule("sensor-1").lan_password).verify(b"s3cret")


def test_devices_are_listed_and_shown(
    site: Site, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what each proves itself by, and no secret."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("s3cret\n"))
    site.do("add", "sensor-1", *site.issuing, "--lan-password")
    site.do("add", "sensor-2", "--set", "password_file=p", "--set", "publish=['a/#', 'b']")
    capfd.readouterr()
    assert site.do("list") == 0
    shown = capfd.readouterr()
    assert "sensor-1  certificate CN=sensor-1, 19 days left" in shown.out
    assert "sensor-2  a password from a file" in shown.out
    assert shown.err.endswith(f"2 devices in {site.directory}\n")
    assert 'endpoint = "127.0.0.1:9883" under [status]' in shown.err
    assert site.do("list", "--json") == 0
    assert [each["client_id"] for each in json.loads(capfd.readouterr().out)] == [["sensor-1"], ["sensor-2"]]
    assert site.do("show", "sensor-1") == 0
    out = capfd.readouterr().out
    assert re.search("^lan_password +set$", out, re.MULTILINE)
    assert "scrypt" not in out
    assert site.do("show", "sensor-2") == 0
    assert re.search("^publish +a/#, b$", capfd.readouterr().out, re.MULTILINE)
    assert site.do("show", "sensor-3") == 1
    assert '"sensor-3"' in capfd.readouterr().err


def test_what_does_not_reach_the_broker_is_not_listed_as_credentials(
    site: Site, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the device pass only through a rule that neither checks nor drops them."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("s3cret\n"))
    site.do("add", "passes", "--set", "max_qos=1")
    site.do("add", "drops", "--set", "credentials=drop")
    site.do("add", "checks", "--lan-password")
    capfd.readouterr()
    assert site.do("list") == 0
    assert [line.split("  ")[:2] for line in capfd.readouterr().out.splitlines()] == [
        ["checks", "no credentials of its own"],
        ["drops", "no credentials of its own"],
        ["passes", "the device's own credentials"],
    ]


def test_the_list_shows_client_identifiers(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Not the patterns that match them; patterns for several devices are told apart."""
    for name in ("*", "a[b]?", "[x]"):
        assert site.do("add", name) == 0
    (site.directory / "many.toml").write_text('match_client_id = ["pump-*", "[a-c]", "[*]s"]\n')
    capfd.readouterr()
    assert site.do("list") == 0
    shown = {line.partition("  ")[0] for line in capfd.readouterr().out.splitlines()}
    assert shown == {"*", "a[b]?", "[x]", "every pump-*, every [a-c], *s"}


def test_only_a_certificate_can_be_revoked(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """One of this device's: not one that other rules still use, and none where there is none."""
    assert site.do("add", "own", *site.issuing) == 0
    assert site.do("add", "none", "--set", "password_file=p") == 0
    (site.directory / "kept.pem").write_text("")
    assert site.do("add", "kept", "--set", "max_qos=1") == 0
    for name in ("shares-1", "shares-2"):
        assert site.do("add", name, "--set", "client_cert=fleet.pem", "--set", "client_key=fleet-key.pem") == 0
    revoke = {}
    for name in ("own", "none", "kept", "shares-1", "shares-2"):
        capfd.readouterr()
        assert site.do("remove", name) == 0
        out = capfd.readouterr().out
        assert "reload" in out
        revoke[name] = "revoke" in out
    assert revoke == {"own": True, "none": False, "kept": True, "shares-1": False, "shares-2": True}


def test_a_device_is_removed(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Its rule; its key only if asked for, since that is for good."""
    site.do("add", "sensor-1", *site.issuing)
    assert site.do("remove", "sensor-1") == 0
    told = capfd.readouterr().out
    assert "kept" in told
    assert "can still connect" in told
    assert site.files() == ["sensor-1-key.pem", "sensor-1.pem"]
    assert site.do("remove", "sensor-1") == 1
    site.do("add", "sensor-2", *site.issuing)
    assert site.do("remove", "sensor-2", "--keys") == 0
    assert site.files() == ["sensor-1-key.pem", "sensor-1.pem"]


@pytest.mark.parametrize("unknown", ["pass", "refuse"])
def test_the_session_of_a_removed_device_is_ended_by_the_command_that_is_named(
    site: Site, capfd: pytest.CaptureFixture[str], unknown: str
) -> None:
    """It works after the rule has gone, and warns of no certificate."""
    site.config.write_text(site.config.read_text() + f'unknown = "{unknown}"\n')
    for name in ("d1", "d2"):
        site.do("add", name, *site.issuing)
    capfd.readouterr()
    assert site.do("remove", "d1") == 0
    told = capfd.readouterr().out
    assert ("an established session goes on" in told) == (unknown == "refuse")
    command = told.partition(": mqtts-gateway device ")[2].partition(", then reload")[0]
    assert console(["device", *shlex.split(command)]) == 0
    assert not site.rule("d1").enabled
    assert capfd.readouterr().err == ""
    assert site.do("remove", "d1") == 0
    assert "an established session goes on" not in capfd.readouterr().out


RULE = """# the boiler in hall 7
match_client_id = "d1"
publish = [
    "a/#",  # measurements
]
"""


@pytest.mark.parametrize(
    ("state", "command"), [("active", "reload"), ("reloading", "reload"), ("inactive", "enable --now"), ("", "reload")]
)
def test_the_next_step_starts_a_service_that_does_not_run(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, command: str
) -> None:
    """Only what runs can be reloaded; where systemd cannot be asked, it is the step for one that runs."""
    monkeypatch.setattr(ServiceView, "of", lambda config: ServiceView("mqtts-gateway.service"))
    monkeypatch.setattr("gateway.cli.service_view.systemd_runs", lambda: bool(state))
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(
        '#!/bin/sh\n[ "$*" = "is-active --quiet mqtts-gateway.service" ] || exit 9\n'
        f"case {state or 'none'} in active|reloading) exit 0;; *) exit 3;; esac\n"
    )
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert Rules.of(site.config).next_step == f"systemctl {command} mqtts-gateway"


@pytest.mark.parametrize("before", ["", "enabled = true  # always\n"])
def test_a_device_is_disabled_and_enabled_again(
    site: Site, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Nothing else in its rule changes, and the file keeps its mode; each command names the next."""
    file = site.directory / "d1.toml"
    file.write_text(RULE + before)
    file.chmod(0o640)
    monkeypatch.setattr(ServiceView, "of", lambda config: ServiceView("mqtts-gateway.service"))
    monkeypatch.setattr(ServiceView, "is_active", True)
    for _ in range(2):
        assert site.do("disable", "d1") == 0
        assert not site.rule("d1").enabled
        assert "next: systemctl reload mqtts-gateway; this ends" in capfd.readouterr().out
    assert file.read_text() == RULE + "enabled = false\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    for _ in range(2):
        assert site.do("enable", "d1") == 0
        assert "next: systemctl reload mqtts-gateway" in capfd.readouterr().out or site.rule("d1").enabled
    assert file.read_text() == RULE
    assert site.files() == ["d1.toml"]


def test_passwords_are_set_and_never_shown(
    site: Site, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's as a hash in its rule; the broker's in a file that the service's group can read."""

    def given(password: str, *options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{password}\n"))
        status = site.do("set-password", "d1", *options)
        shown = "".join(capfd.readouterr())
        assert "s3cret" not in shown
        return status, shown

    site.do("add", "d1")
    capfd.readouterr()
    for password in ("s3cret-1", "s3cret-2"):
        assert "next: " in given(password)[1]
        assert parse_hash(site.rule("d1").lan_password).verify(password.encode())
    assert given("") == (1, "mqtts-gateway: the password is empty\n")
    group = ServiceView("mqtts-gateway.service", groups=frozenset({os.getgid()}))
    monkeypatch.setattr(ServiceView, "of", lambda config: group)
    monkeypatch.setattr(ServiceView, "is_active", True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "next: systemctl reload" in given("s3cret-3", "--broker")[1]
    assert site.rule("d1").password_file == site.directory / "d1.password"
    assert "no reload is needed" in given("s3cret-4", "--broker")[1]
    assert (site.directory / "d1.password").read_text() == "s3cret-4\n"
    monkeypatch.setattr(ServiceView, "of", lambda config: evolve(group, credentials=(site.directory,)))
    assert "next: systemctl restart mqtts-gateway" in given("s3cret-4", "--broker")[1]
    named = site.directory / ".." / site.directory.name / "d1.password"
    assert "next: systemctl restart mqtts-gateway" in Rules.of(site.config).after_replacing(named)
    assert stat.S_IMODE((site.directory / "d1.password").stat().st_mode) == 0o640
    assert site.do("remove", "d1", "--keys") == 0
    assert site.files() == []
    site.do("add", "d1", "--set", "sas_key_file=d1.key", "--set", "sas_resource=r")
    capfd.readouterr()
    status, shown = given("s3cret-5", "--broker")
    assert (status, "sas_key_file" in shown, site.files()) == (1, True, ["d1.toml"])


def test_a_certificate_is_renewed_without_a_renew_command(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the CA, or with one issued elsewhere for the same key and subject; the key and the modes stay."""
    site.do("add", "d1", *site.issuing, "--common-name", "boiler 1")
    file = site.directory / "d1.pem"
    file.chmod(0o640)
    key = (site.directory / "d1-key.pem").read_bytes()
    assert site.do("renew", "d1") == 1
    assert "--ca-cert" in capfd.readouterr().err
    assert site.do("renew", "d1", *site.issuing[:5], "30") == 0
    assert "next: mqtts-gateway check --device d1" in capfd.readouterr().out
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    certificate.verify_directly_issued_by(site.ca.certificate)
    assert common_name(certificate) == "boiler 1"
    assert (certificate.not_valid_after_utc - datetime.now(UTC)).days == 29
    private = read_private_key(site.directory / "d1-key.pem")
    issued = tmp_path / "issued.pem"
    for subject, own, words in (
        ("boiler 2", private, "boiler 2"),
        ("boiler 1", None, "not for the key"),
        ("boiler 1", private, ""),
        ("boiler 1", private, "no later"),
    ):
        if words != "no later":
            made = certify(site.ca, subject=subject, names=(), purposes=(CLIENT,), **({"key": own} if own else {}))
            issued.write_bytes(made.pem)
        before = file.read_bytes()
        assert site.do("renew", "d1", "--cert", str(issued)) == (1 if words else 0)
        assert words in capfd.readouterr().err
        assert (file.read_bytes() == before) == bool(words)
    assert (site.directory / "d1-key.pem").read_bytes() == key
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    for options in (["--cert", "x", "--due"], ["--ca-cert", "x"], [*site.issuing, "--cert", "x"]):
        assert site.do("renew", "d1", *options) == 1


def test_a_rule_without_a_certificate_gets_its_first_one_from_renew(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command that `add` prints where other rules have a certificate; elsewhere `add` prints nothing of it."""
    assert site.do("add", "d1") == 0
    assert site.do("add", "d2", *site.issuing) == 0
    assert "warning" not in capfd.readouterr().err
    assert site.do("add", "d3", "--set", "max_qos=1") == 0
    warning = capfd.readouterr().err
    assert "--csr" in warning
    words = shlex.split(warning.partition("mqtts-gateway device ")[2].partition(". For")[0])
    files = {"ca.pem": str(site.ca_cert), "ca-key.pem": str(site.ca_key)}
    assert site.do("renew", "d3", "--cert", str(site.ca_cert)) == 1
    assert "`device remove d3`" in capfd.readouterr().err
    assert console(["device", *(files.get(word, word) for word in words), "--days", "20"]) == 0
    assert "next: mqtts-gateway reload" in capfd.readouterr().out
    rule = site.rule("d3")
    assert (rule.client_cert, rule.max_qos) == (site.directory / "d3.pem", 1)
    assert stat.S_IMODE((site.directory / "d3-key.pem").stat().st_mode) == 0o600
    x509.load_pem_x509_certificate((site.directory / "d3.pem").read_bytes()).verify_directly_issued_by(
        site.ca.certificate
    )
    assert site.do("add", "d" * 65) == 0
    capfd.readouterr()
    assert site.do("renew", "d" * 65, *site.issuing) == 1
    assert "--common-name" in capfd.readouterr().err.partition("`device add")[2]
    assert not list(site.directory.glob("d" * 65 + "*.pem"))
    assert site.do("add", "d4", "--set", "password_file=p") == 0
    assert site.do("add", "d5", "--set", "enabled=false") == 0
    assert "warning" not in capfd.readouterr().err


def test_files_that_a_new_rule_does_not_use_are_named(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """With commands that make it use them."""
    site.do("add", "d1", *site.issuing)
    site.do("remove", "d1")
    capfd.readouterr()
    assert site.do("add", "d1") == 0
    remove, add = capfd.readouterr().err.partition("To use them: ")[2].split(", then ")
    for command in (remove, add):
        assert console(shlex.split(command)[1:]) == 0
    rule = site.rule("d1")
    assert (rule.client_cert, rule.client_key) == (site.directory / "d1.pem", site.directory / "d1-key.pem")


def test_a_table_without_certificates_is_warned_of_once(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where other rules have one."""
    site.do("add", "d1", *site.issuing)
    (tmp_path / "devices.csv").write_text("id\nd2\nd3\n")
    assert site.do("import", str(tmp_path / "devices.csv")) == 0
    assert capfd.readouterr().err.count("device renew ID --ca-cert") == 1


def test_a_device_is_moved(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """To another broker and address, and back; not to a broker that does not exist."""
    text = site.config.read_text()
    site.config.write_text(text.replace("[devices]", '[[upstream]]\nhost = "c.example"\nname = "c"\n[devices]'))
    site.do("add", "d1", "--set", "bound_to=10.0.0.1")
    capfd.readouterr()
    assert site.do("move", "d1", "--upstream", "c", "--bound-to", "10.0.0.2", "10.0.0.3") == 0
    assert "next: mqtts-gateway check --device d1" in capfd.readouterr().out
    rule = site.rule("d1")
    assert (rule.upstream, [str(each) for each in rule.bound_to]) == (("c",), ["10.0.0.2/32", "10.0.0.3/32"])
    before = (site.directory / "d1.toml").read_text()
    assert site.do("move", "d1", "--upstream", "d") == 1
    assert "no upstream has the name" in capfd.readouterr().err
    assert site.do("move", "d1") == 1
    assert (site.directory / "d1.toml").read_text() == before
    assert site.do("move", "d1", "--upstream", "--bound-to") == 0
    assert (site.rule("d1").upstream, site.rule("d1").bound_to) == ((), ())


def test_a_device_without_a_rule_of_its_own_is_disabled_by_the_command_that_is_named(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    """It may be covered by a rule for many, which stays as it is."""
    assert site.do("disable", "d 1") == 1
    command = capfd.readouterr().err.partition("mqtts-gateway device ")[2]
    assert site.do(*shlex.split(command)) == 0
    assert not site.rule("d 1").enabled


@pytest.mark.parametrize(
    ("pattern", "only"), [('"pump-*"', True), ('["pump-1", "pump-2"]', False), ('"pump-1"', False)]
)
def test_a_rule_that_would_win_is_named_in_place_of_a_command(
    site: Site, capfd: pytest.CaptureFixture[str], pattern: str, only: bool
) -> None:
    """A rule beside it could come too late, or be refused."""
    with site.config.open("a") as file:
        file.write(f'[[device]]\nname = "pumps"\nmatch_client_id = {pattern}\n')
    assert site.do("disable", "pump-1") == 1
    said = capfd.readouterr().err
    assert "The rule pumps matches it: set enabled = false there" in said
    assert ("before that one" in said) == only
    assert "device add" not in said


@pytest.mark.parametrize("name", ["a\\b", "x" * 300, "it's"])
def test_a_name_in_a_command_is_the_devices(site: Site, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """Neither escaped nor cut."""
    assert site.do("disable", name) == 1
    words = shlex.split(capfd.readouterr().err.partition("mqtts-gateway device ")[2])
    assert words[1] == name
    assert words[-1] == str(site.config)


def test_a_new_password_is_written_where_no_other_is(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that an earlier device has left is named with a remedy that works."""
    assert site.do("add", "d1") == 0
    left = site.directory / "d1.password"
    left.write_text("old\n")
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("new\n"))
        assert site.do("set-password", "d1", "--broker") == 1
    assert f"{left} already exists. If no device uses it any more, delete it" in capfd.readouterr().err


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_other_lines_of_a_rule_stay_as_they_are(site: Site, end: str) -> None:
    """With their ends, and with characters that end a line elsewhere, but not in TOML."""
    file = site.directory / "d1.toml"
    lines = ['match_client_id = "a\u2028b\x85"', "# a comment\u2029of two lines", "max_qos = 1", ""]
    file.write_bytes(end.join(lines).encode())
    change(Rules.of(site.config), file, {"enabled": False, "max_qos": None})
    lines[2] = "enabled = false"
    assert file.read_bytes() == end.join(lines).encode()


def test_a_rule_that_cannot_be_edited_is_left_as_it_is(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Where the key is not on a line of its own, or the result would be refused."""
    file = site.directory / "d1.toml"
    file.write_text('"enabled" = true\n')
    assert site.do("disable", "d1") == 1
    assert "by hand" in capfd.readouterr().err
    assert file.read_text() == '"enabled" = true\n'


def test_a_change_that_the_gateway_would_refuse_is_undone(site: Site) -> None:
    """The file is as it was, to the byte."""
    file = site.directory / "d1.toml"
    file.write_text("max_qos = 1")
    rules = Rules.of(site.config)
    with pytest.raises(ConfigError, match="nowhere"):
        change(rules, file, {"upstream": "nowhere"})
    assert file.read_text() == "max_qos = 1"


def test_a_table_of_devices_is_imported(site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each with a key and a certificate of its own, and the keys of its row."""
    table = tmp_path / "devices.csv"
    table.write_text('id,password,bound_to,publish\nd1,pw,10.0.0.1,"a/#"\nd2,,"[""10.0.0.2"", ""10.0.0.3""]",\n')
    assert site.do("import", str(table), *site.issuing) == 0
    assert "2 devices added" in capfd.readouterr().out
    first, second = site.rule("d1"), site.rule("d2")
    assert parse_hash(first.lan_password).verify(b"pw")
    assert second.lan_password == ""
    assert [str(network) for network in second.bound_to] == ["10.0.0.2/32", "10.0.0.3/32"]
    assert (first.publish, second.publish) == (("a/#",), None)
    assert first.client_cert != second.client_cert


@pytest.mark.parametrize(
    "text",
    ["\ufeffID;Bound_To;password\r\nd1;10.0.0.2;a,b\r\n", "Id\tbound_to\tPassword\nd1\t10.0.0.2\tx\n"],
    ids=["semicolons", "tabs"],
)
def test_a_table_is_read_as_excel_writes_it(site: Site, tmp_path: Path, text: str) -> None:
    """With a byte order mark, semicolons or tabs, and headers in any case."""
    (tmp_path / "devices.csv").write_text(text, newline="")
    assert site.do("import", str(tmp_path / "devices.csv")) == 0
    assert [str(network) for network in site.rule("d1").bound_to] == ["10.0.0.2/32"]
    assert site.rule("d1").lan_password


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_umlauts_come_through_in_every_encoding_of_excel(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str], encoding: str
) -> None:
    """A guess is told, with the values that depend on it, except passwords."""
    table = tmp_path / "devices.csv"
    table.write_bytes("ID;Password;Bound_To;Username\r\nKessel-Süd;geheim-ß;10.0.0.2;Müller & 5 €\r\n".encode(encoding))
    before = site.files()
    assert site.do("import", str(table), "--dry-run") == 0
    shown = capfd.readouterr()
    assert 'would add "Kessel-Süd"' in shown.out
    assert "username = Müller & 5 €" in shown.out
    assert "lan_password = set" in shown.out
    assert site.files() == before
    assert site.do("import", str(table)) == 0
    rule = site.rule("Kessel-Süd")
    assert rule.username == "Müller & 5 €"
    assert parse_hash(rule.lan_password).verify("geheim-ß".encode())
    told = capfd.readouterr().err
    assert ("Windows-1252" in told) == (encoding == "cp1252")
    assert ("line 2: id Kessel-Süd" in told) == (encoding == "cp1252")
    assert "geheim" not in told + shown.out + shown.err


def test_a_dry_run_finds_what_an_import_would(site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Problems of single rules, with each other, and with what is there."""
    table = tmp_path / "devices.csv"
    assert site.do("add", "there") == 0
    for text, words in (
        ("id,max_qos\nd1,3\n", "line 2: max_qos"),
        ("id\nthere\n", "already has a rule"),
        ("id,upstream\nd1,none\n", "no upstream has the name"),
        (f"id\n{'x' * 65}\n", "a common name has"),
    ):
        table.write_text(text)
        capfd.readouterr()
        errors = []
        for option in ((), ("--dry-run",)):
            assert site.do("import", str(table), *site.issuing, *option) == 1
            errors.append(capfd.readouterr().err)
            assert words in errors[-1]
    assert len([name for name in site.files() if name.endswith(".toml")]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,max_qos\nd1,1\nd2,3\nd3,9\n", ["line 3: max_qos: 3 is out of range", "line 4: max_qos: 9 is"]),
        ("id\nd1\nd1\n", ['line 3: "d1" is in line 2 already']),
        ("id,color\nd1,red\n", ["unknown column color\n"]),
        ("id,color,,color\nd1,red,,blue\n", ["unknown columns color, (without a name)\n"]),
        (f"id,{','.join(f'c{number}' for number in range(500))}\nd1\n", ["c8, c9 and 490 more\n"]),
        ("id,bound_to,Bound_To\nd1,10.0.0.1,10.0.0.2\n", ["column bound_to occurs 2 times"]),
        ("id,id\nd1,d2\n", ["column id occurs 2 times"]),
        ("sep=;\nid;max_qos\nd1;1\n", ["remove the first line, sep="]),
        ("name\nd1\n", ["column id"]),
        ("id,max_qos\nd1\n", ["line 2: "]),
        ("id\n\x81\n", ["is neither UTF-8 nor Windows-1252"]),
        ("i\0d\0\n\0\xe4\0\n\0", ["is neither UTF-8 nor Windows-1252"]),
        ("\xff\xfei", ["is not valid UTF-16"]),
    ],
)
def test_all_devices_of_a_table_are_imported_or_none(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    """Each problem is told with its line."""
    table = tmp_path / "devices.csv"
    table.write_bytes(text.encode("latin-1"))
    assert site.do("import", str(table), *site.issuing) == 1
    errors = capfd.readouterr().err
    assert [word for word in words if word not in errors] == []
    assert site.files() == []


def test_the_profile_counts_when_a_rule_is_checked(tmp_path: Path) -> None:
    """A SAS key needs no resource beside it where the profile gives one."""
    site = Site(tmp_path, "azure-iot-hub")
    assert site.do("add", "d1", "--set", "sas_key_file=d1.key") == 0
    assert site.rule("d1").sas_resource == "b.example/devices/{client_id}"
    assert "sas_resource" not in (site.directory / "d1.toml").read_text()


def test_without_a_directory_there_is_nothing_to_keep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The message says what to write."""
    config = tmp_path / "gateway.toml"
    config.write_text('[[upstream]]\nhost = "b.example"\n')
    assert console(["device", "list", "--config", str(config)]) == 1
    assert 'directory = "devices" under [devices]' in capfd.readouterr().err


def test_a_failure_in_between_takes_back_what_was_written(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second device: the first is gone again."""
    table = tmp_path / "devices.csv"
    table.write_text("id\nd1\nd2\n")
    real = os.fsync
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert site.do("import", str(table), *site.issuing) == 1
    assert site.files() == []


def test_devices_are_on_disk_when_a_command_says_so(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their names, too, or that they are gone: a directory is synced when all is written, once for a whole table."""
    synced: list[list[str]] = []

    def sync(directory: Path) -> None:
        assert directory == site.directory
        synced.append(site.files())

    monkeypatch.setattr(device_files, "sync_directory", sync)
    table = tmp_path / "devices.csv"
    table.write_text("id\nd1\nd2\n")
    assert site.do("import", str(table), *site.issuing) == 0
    assert synced == [site.files()]
    assert site.do("disable", "d1") == 0
    assert len(synced) == 2
    assert site.do("remove", "d1", "--keys") == 0
    assert synced[2:] == [site.files()]
    capfd.readouterr()

    def fails(directory: Path) -> None:
        raise OSError(5, "Input/output error")

    before = site.files()
    monkeypatch.setattr(device_files, "sync_directory", fails)
    assert site.do("add", "d3", *site.issuing) == 1
    assert f"{site.directory} cannot be written: Input/output error" in capfd.readouterr().err
    assert site.files() == before


def test_the_documented_table_can_be_imported(site: Site, tmp_path: Path) -> None:
    """As it stands in docs/devices.md."""
    document = (Path(__file__).resolve().parent.parent / "docs" / "devices.md").read_text()
    table = tmp_path / "devices.csv"
    table.write_text("id," + document.partition("```text\nid,")[2].partition("```")[0])
    assert site.do("import", str(table), "--csr") == 0
    assert [name for name in site.files() if name.endswith("-key.pem")] == ["boiler-1-key.pem", "boiler-2-key.pem"]
    assert site.do("add", "boiler-3", "--set", "publish=sensors/{client_id}/#") == 0
    assert site.rule("boiler-3").publish == ("sensors/{client_id}/#",)
