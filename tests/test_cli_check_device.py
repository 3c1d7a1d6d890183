"""`mqtts-gateway check --device`: the whole way as one device, against a broker as strict as the clouds."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.threads import blockingCallFromThread

from gateway.cli import check as command
from gateway.cli.main import console
from gateway.config.passwords import hash_password
from tests import mqtt_packets as mqtt
from tests.cloud import SERVER_NAME, Cloud
from tests.harness import Device, RunningGateway, eventually
from tests.pki import certify_ca

KEY = base64.b64encode(b"the device's key").decode()


@pytest.fixture
def start_cloud(tmp_path: Path) -> Iterator[Callable[..., Cloud]]:
    """Return a function that starts a strict broker."""
    clouds: list[Cloud] = []

    def start(**rules: Any) -> Cloud:
        clouds.append(Cloud(tmp_path / "cloud", **rules))
        return clouds[-1]

    yield start
    for cloud in clouds:
        cloud.stop()


def configured(
    directory: Path, cloud: Cloud, rules: str, *, devices: str = 'unknown = "refuse"', tls: str = ""
) -> Path:
    """Write a configuration for a gateway before the strict broker."""
    path = directory / "gateway.toml"
    path.write_text(
        f"""
[[listen]]
endpoint = "127.0.0.1:0"
name = "sensors"
[[upstream]]
host = "127.0.0.1"
port = {cloud.port}
server_name = "{SERVER_NAME}"
[tls]
ca_file = "{cloud.ca_file}"
{tls}
[devices]
{devices}
{rules}
"""
    )
    return path


@pytest.fixture(autouse=True)
def shared_reactor(reactor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command in this process, which is much quicker than one of its own."""

    def run(_: Any, coroutine: Coroutine[Deferred[Any], Any, None]) -> None:
        blockingCallFromThread(reactor, Deferred.fromCoroutine, coroutine)

    monkeypatch.setattr(command, "run_in_reactor", run)


def check(path: Path, *arguments: str) -> dict[str, Any]:
    """Run the command; return its report, steps by name."""
    output = io.TextIOWrapper(io.BytesIO(), write_through=True)
    with redirect_stdout(output):
        status = console(["check", "--json", "--config", str(path), *arguments])
    return read(output.buffer.getvalue().decode(), status)


def read(text: str, status: int) -> dict[str, Any]:
    """Return the steps of a report by name."""
    report = json.loads(text)
    assert report["exit_status"] == status
    by_name = {step["step"]: step for step in report["steps"]}
    return {"result": report["result"], "steps": report["steps"], "text": text} | by_name


def test_a_device_is_checked_under_its_own_certificate(tmp_path: Path, start_cloud: Callable[..., Cloud]) -> None:
    """The broker sees that device, with its certificate, its Client Identifier and its Keep Alive in range."""
    cloud = start_cloud(alpn="mqtt", sni=SERVER_NAME, keep_alive=(100, 1200))
    path = configured(
        tmp_path,
        cloud,
        f'[[device]]\nmatch_client_id = "d1"\nclient_cert = "{cloud.device("plant-d1")}"\n'
        'client_id = "plant-{client_id}"\nkeep_alive_min = 100\nbound_to = "10.7.0.0/24"\n',
        tls='alpn = "mqtt"',
    )
    arguments = [sys.executable, "-m", "gateway.cli.main", "check", "--json", "--config", str(path), "--device", "d1"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    report = read(done.stdout, done.returncode)
    assert report["result"] == "PASS", report["text"]
    assert report["rule"]["message"] == "device[0], from 10.7.0.1"
    assert "client certificate CN=plant-d1, " in report["credentials"]["message"]
    assert '"plant-d1"' in report["connect"]["message"]
    event = cloud.wait("connected")
    assert (event["certificate"], event["client_identifier"], event["keep_alive"]) == ("plant-d1", "plant-d1", 100)


def rule_of(cloud: Cloud, name: str) -> dict[str, Any]:
    """Make a rule with a certificate of the device's own."""
    return {"match_client_id": name, "client_cert": str(cloud.device(name)), "bound_to": "127.0.0.0/8"}


def written(rule: dict[str, Any]) -> str:
    """Write a rule as TOML."""
    return "[[device]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rule.items())


def test_the_session_that_the_broker_keeps_for_a_device_is_not_touched(
    tmp_path: Path, start_cloud: Callable[..., Cloud]
) -> None:
    """A clean session would delete what waits in it; one that the check has made is deleted again."""
    cloud = start_cloud()
    report = check(configured(tmp_path, cloud, written(rule_of(cloud, "d1"))), "--device", "d1")
    assert report["result"] == "PASS", report["text"]
    assert "the broker keeps its session" in report["connect"]["message"]
    eventually(lambda: len(cloud.told("connected")) == 2, "both are told")
    assert [event["clean"] for event in cloud.told("connected")] == [False, True]


def test_a_device_that_is_connected_is_not_disturbed(
    tmp_path: Path, start_cloud: Callable[..., Cloud], start_gateway: Callable[..., RunningGateway]
) -> None:
    """The broker would end its session; whoever wants that says so.  The gateway's own ports are no problem."""
    cloud = start_cloud()
    rule = rule_of(cloud, "d1")
    gateway = start_gateway(
        upstream=cloud.port,
        ca_file=cloud.ca_file,
        device=[rule],
        status={"endpoint": "127.0.0.1:0", "password": hash_password(b"page", bytes(16))},
    )
    (password := tmp_path / "page-password").write_text("page")
    password.chmod(0o600)
    port = gateway.service.status_port.port.getHost().port
    path = configured(
        tmp_path, cloud, written(rule), devices=f'unknown = "refuse"\n[status]\nendpoint = "127.0.0.1:{port}"'
    )
    text = path.read_text().replace('endpoint = "127.0.0.1:0"', f'endpoint = "127.0.0.1:{gateway.port}"', 1)
    path.write_text(f'{text}\n[[listen]]\nendpoint = "127.0.0.1:{cloud.port}"\n')
    with Device(gateway.port) as device:
        device.send(mqtt.connect("d1"))
        assert device.read(4) == b"\x20\2\0\0"
        report = check(path, "--device", "d1")
        assert (report["connack"]["status"], report["status"]["status"]) == ("SKIP", "WARN")
        assert "--status-password-file" in report["connack"]["message"]
        report = check(path, "--device", "d1", "--status-password-file", str(password))
        assert report["tls"]["status"] == "PASS"
        assert report["connack"]["status"] == "SKIP"
        assert "connected now" in report["connack"]["message"]
        found = [(step["status"], step["message"]) for step in report["steps"] if step["step"] in {"listen", "status"}]
        assert [status for status, _ in found] == ["PASS", "WARN", "PASS"]
        assert all("the running gateway listens" in words for status, words in found if status == "PASS")
        device.send(b"\xc0\0")
        assert device.read(2) == b"\xd0\0"
        assert len(cloud.told("connected")) == 1
        report = check(path, "--device", "d1", "--connect")
        assert report["connack"]["status"] == "PASS"
        assert len(cloud.told("connected")) > 1


def test_where_each_device_has_a_certificate_the_gateways_own_is_not_missed(
    tmp_path: Path, start_cloud: Callable[..., Cloud]
) -> None:
    """Nobody connects without one: that the broker would refuse the test session is not a fault."""
    cloud = start_cloud()
    rule = written(rule_of(cloud, "d1"))
    report = check(configured(tmp_path, cloud, rule))
    assert report["result"] == "PASS", report["text"]
    assert report["tls"]["status"] == "PASS"
    assert (report["connack"]["status"], "--device" in report["connack"]["message"]) == ("SKIP", True)


def test_a_device_is_checked_with_a_token(tmp_path: Path, start_cloud: Callable[..., Cloud]) -> None:
    """Made for it, of the profile's form, and never shown."""
    cloud = start_cloud(client_ca="", hub="127.0.0.1", keys={"d1": KEY})
    (tmp_path / "d1.key").write_text(KEY)
    (tmp_path / "d1.key").chmod(0o600)
    path = configured(
        tmp_path,
        cloud,
        '[[device]]\nmatch_client_id = "d1"\nsas_key_file = "d1.key"\n',
        devices='profile = "azure-iot-hub"',
    )
    report = check(path, "--device", "d1")
    assert report["result"] == "PASS", report["text"]
    assert "a password (sas_key)" in report["credentials"]["message"]
    assert "SharedAccessSignature" not in report["text"]
    assert KEY not in report["text"]


@pytest.mark.parametrize(
    ("key", "networks", "address"),
    [
        ("bound_to", '"192.168.7.11"', "192.168.7.11"),
        ("bound_to", '"192.168.7.10/31"', "192.168.7.10"),
        ("bound_to", '"192.168.7.0/24"', "192.168.7.1"),
        ("match_network", '["fd12::7", "10.7.0.1"]', "fd12::7"),
    ],
)
def test_a_device_is_taken_to_come_from_where_its_rule_has_it(
    tmp_path: Path, start_cloud: Callable[..., Cloud], key: str, networks: str, address: str
) -> None:
    """Without --from; be it a network or a single address, as `device import` writes it."""
    rule = f'[[device]]\nmatch_client_id = "d1"\n{key} = {networks}\n'
    report = check(configured(tmp_path, start_cloud(), rule), "--device", "d1", "--offline")
    assert report["result"] == "PASS", report["text"]
    assert report["rule"]["message"] == f"device[0], from {address}"


@pytest.mark.parametrize(
    ("arguments", "step", "words"),
    [
        (["--device", "d9"], "rule", "device-unknown"),
        (["--device", "d1", "--from", "10.8.0.1"], "rule", "spoofed: rule device[0]: bound to 10.7.0.0/24"),
        (["--device", "d2", "--listener", "other"], "rule", "device-unknown"),
        (["--device", "d3"], "credentials", "credentials-unavailable"),
    ],
)
def test_what_the_gateway_would_refuse_never_reaches_the_broker(
    tmp_path: Path, start_cloud: Callable[..., Cloud], arguments: list[str], step: str, words: str
) -> None:
    """The step says why, and the rest of the way is skipped."""
    cloud = start_cloud()
    rules = (
        '[[device]]\nmatch_client_id = "d1"\nbound_to = "10.7.0.0/24"\n'
        '[[device]]\nmatch_client_id = "d2"\nmatch_listener = "sensors"\n'
        '[[device]]\nmatch_client_id = "d3"\npassword_file = "missing"\n'
    )
    report = check(configured(tmp_path, cloud, rules), *arguments)
    assert report["result"] == "FAIL"
    assert report[step]["status"] == "FAIL"
    assert words in report[step]["message"]
    assert report[step]["remedy"]
    assert report["connack"]["status"] == "SKIP"
    assert cloud.events == []


def test_what_is_skipped_for_one_reason_is_one_line(tmp_path: Path, start_cloud: Callable[..., Cloud]) -> None:
    """Of a device that is disabled; the remedy is a command for this device."""
    rule = '[[device]]\nmatch_client_id = "pump 1"\nenabled = false\n'
    path = configured(tmp_path, start_cloud(), rule)
    command = [sys.executable, "-m", "gateway.cli.main", "check", "--config", str(path), "--device", "pump 1"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    (skipped,) = (line for line in shown.splitlines() if line.startswith("SKIP"))
    assert "lan-password, credentials, dns, tcp" in skipped
    assert "`mqtts-gateway device enable 'pump 1'`" in shown


def test_the_lan_password_is_tried_if_it_is_given(tmp_path: Path, start_cloud: Callable[..., Cloud]) -> None:
    """Right, wrong or left out; whichever it is, it is not shown, and not passed on."""
    cloud = start_cloud()
    hashed = hash_password(b"right", b"salt" * 4)
    rule = f'[[device]]\nmatch_client_id = "d1"\nlan_password = "{hashed}"\nclient_cert = "{cloud.device("d1")}"\n'
    path = configured(tmp_path, cloud, rule)
    (tmp_path / "password").write_text("right\n")
    (tmp_path / "other").write_text("wrong\n")
    given = ["--device", "d1", "--username", "u", "--password-file"]
    assert check(path, "--device", "d1")["lan-password"]["status"] == "SKIP"
    assert check(path, *given, str(tmp_path / "password"))["lan-password"]["status"] == "PASS"
    report = check(path, *given, str(tmp_path / "other"))
    assert (report["lan-password"]["status"], report["connack"]["status"]) == ("FAIL", "SKIP")
    assert "wrong" not in report["lan-password"]["message"].replace("device-password-wrong", "")


def test_a_certificate_that_the_broker_does_not_know_is_a_failure(
    tmp_path: Path, start_cloud: Callable[..., Cloud]
) -> None:
    """The gateway's own would have been good: it is this device's that is shown."""
    cloud = start_cloud()
    own = cloud.device("d1", root=certify_ca(subject="Other CA"))
    report = check(
        configured(tmp_path, cloud, f'[[device]]\nmatch_client_id = "d1"\nclient_cert = "{own}"\n'), "--device", "d1"
    )
    assert report["result"] == "FAIL"
    assert report["credentials"]["status"] == "PASS"
    assert report["connack"]["status"] != "PASS"
    assert cloud.told("connected") == []


def test_a_name_that_belongs_to_another_rule_is_told(tmp_path: Path, start_cloud: Callable[..., Cloud]) -> None:
    """As the gateway would refuse it; nothing is dialled."""
    cloud = start_cloud(client_ca="")
    rule = '[[device]]\nname = "pumps"\nmatch_client_id = "pump-*"\nclient_id = "plant7-{client_id}"\n'
    report = check(configured(tmp_path, cloud, rule, devices=""), "--device", "plant7-pump-3")
    assert report["rule"]["status"] == "FAIL"
    assert "client-id-reserved" in report["rule"]["message"]
    assert "pumps" in report["rule"]["message"]
    assert cloud.told("connected") == []


def test_without_a_rule_a_device_goes_as_it_is(tmp_path: Path, start_cloud: Callable[..., Cloud]) -> None:
    """Said plainly, since that may be the surprise."""
    cloud = start_cloud(client_ca="")
    report = check(configured(tmp_path, cloud, "", devices=""), "--device", "d1")
    assert report["rule"]["status"] == "PASS"
    assert "no rule matches" in report["rule"]["message"]
    assert cloud.wait("connected")["client_identifier"] == "d1"


def test_offline_the_identity_is_checked_and_nobody_is_dialled(
    tmp_path: Path, start_cloud: Callable[..., Cloud]
) -> None:
    """Its files need no broker."""
    cloud = start_cloud()
    rule = f'[[device]]\nmatch_client_id = "d1"\nclient_cert = "{cloud.device("d1")}"\n'
    report = check(configured(tmp_path, cloud, rule), "--device", "d1", "--offline")
    assert report["credentials"]["status"] == "PASS"
    assert "connack" not in report
    assert cloud.events == []


@pytest.mark.parametrize(
    ("rule", "whose", "status", "words"),
    [
        ("", None, "SKIP", "no rule; the broker gets no client certificate, no user name, no password"),
        ("", "gateway", "SKIP", "no rule; the broker gets the gateway's client certificate {path}, no user name, "),
        ("max_qos = 1", None, "SKIP", "its rule has none; the broker gets no client certificate, no user name, "),
        (
            "max_qos = 1",
            "gateway",
            "SKIP",
            "its rule has none; the broker gets the gateway's client certificate {path}",
        ),
        ('username = "u"', "gateway", "PASS", 'the gateway\'s client certificate {path}; user name "u", no password'),
        ('username = "u"', None, "PASS", 'no client certificate; user name "u", no password'),
    ],
)
def test_a_device_without_credentials_of_its_own_is_told_which_the_broker_gets(
    tmp_path: Path, start_cloud: Callable[..., Cloud], rule: str, whose: str | None, status: str, words: str
) -> None:
    """That nothing was found wrong with what is not there is no pass."""
    cloud = start_cloud()
    path = cloud.device(whose) if whose is not None else None
    tls = "" if path is None else f'client_cert = "{path}"'
    rules = f'[[device]]\nmatch_client_id = "d1"\n{rule}\n' if rule else ""
    report = check(configured(tmp_path, cloud, rules, devices="", tls=tls), "--device", "d1", "--offline")
    assert report["credentials"]["status"] == status
    assert report["credentials"]["message"].startswith(words.format(path=path))


def test_the_devices_own_password_is_told(tmp_path: Path, start_cloud: Callable[..., Cloud]) -> None:
    """It passes through a rule without one, and without a rule."""
    cloud = start_cloud()
    (tmp_path / "password").write_text("secret\n")
    arguments = ("--device", "d1", "--username", "anna", "--password-file", str(tmp_path / "password"), "--offline")
    for rule in ("", '[[device]]\nmatch_client_id = "d1"\n'):
        report = check(configured(tmp_path, cloud, rule, devices=""), *arguments)
        assert report["credentials"]["status"] == "SKIP"
        assert report["credentials"]["message"].endswith('user name "anna", a password (the device\'s own)')


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "d1", "--client-id", "x"], "--client-id cannot be used with --device"),
        (["--from", "10.0.0.1"], "--from and --listener require --device"),
        (["--device", "d1", "--from", "here"], "--from: here is not an IP address"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a line that names them."""
    assert console(["check", "--config", str(tmp_path / "x"), *arguments]) == 1
    assert capfd.readouterr().err == f"mqtts-gateway: {words}\n"
