"""`mqtts-gateway setup`: a configuration that works, from answers or flags; on failure nothing has changed."""

from __future__ import annotations

import io
import os
import ssl
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.hazmat.primitives.serialization.pkcs12 import serialize_key_and_certificates

from gateway.cli import setup
from gateway.cli.main import console
from gateway.cli.report import Status, Step
from gateway.config import load_file, template_text
from gateway.tls.trust import read_certificates, read_chain, read_client_key
from tests.harness import Broker, accept_session
from tests.pki import CLIENT, Certified, certify, certify_ca

StartBroker = Callable[..., Broker]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The directory of the configuration, which is not there yet."""
    return tmp_path / "etc" / "mqtts-gateway"


def answer(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let standard input have these lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def written(place: Path) -> list[str]:
    """Return what there is, with modes."""
    paths = sorted(place.rglob("*")) if place.exists() else []
    return [f"{path.relative_to(place)} {stat.S_IMODE(path.stat().st_mode):o}" for path in paths]


@pytest.mark.slow
def test_answers_on_standard_input_make_a_gateway_that_can_take_devices(
    place: Path,
    start_broker: StartBroker,
    ca_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each answer is tested at once, against a real broker; the next commands work."""
    broker = start_broker(serve=accept_session)
    config = str(place / "gateway.toml")
    answer(monkeypatch, f"localhost:{broker.port}", "", "")
    assert console(["setup", "--config", config, "--ca-file", str(ca_file)]) == 0
    out = capfd.readouterr().out
    for step in ("tcp", "chain", "identity", "connack"):
        assert out.count(f"PASS  {step}") == 1
    assert f"mqtts-gateway run --config {config}" in out
    assert written(place) == ["ca.pem 644", "devices 755", "gateway.toml 644"]
    made = load_file(place / "gateway.toml")
    assert (made.upstream[0].host, made.upstream[0].port, made.tls.ca_file) == (
        "localhost",
        broker.port,
        (place / "ca.pem",),
    )
    assert console(["device", "add", "d1", "--config", config]) == 0
    assert console(["setup", "--config", config]) == 1
    assert "already exists" in capfd.readouterr().err


def test_a_broker_that_is_not_verified_changes_nothing(
    place: Path, start_broker: StartBroker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The step that failed is shown; no MQTT has left."""
    broker = start_broker()
    other = certify_ca().write(tmp_path / "other.pem")
    flags = ["--upstream", f"localhost:{broker.port}", "--ca-file", str(other)]
    assert console(["setup", "--config", str(place / "gateway.toml"), *flags]) == 1
    shown = capfd.readouterr()
    assert "FAIL  chain" in shown.out
    assert "nothing was changed" in shown.err
    assert not place.parent.exists()
    assert broker.received == b""


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The failures that a test of an answer finds; none unless the test adds one."""
    steps: list[Step] = []
    monkeypatch.setattr(setup, "_checked", lambda flags: iter(steps))
    return steps


def test_the_key_is_put_where_the_service_is_handed_it(
    place: Path, tmp_path: Path, untested: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the package's own configuration lies there untouched; the package has installed the service."""
    del untested
    monkeypatch.setattr(setup, "is_debian_package", lambda: True)
    place.mkdir(parents=True)
    (place / "gateway.toml").write_text(template_text())
    client = certify(certify_ca(), subject="gateway", names=(), purposes=(CLIENT,))
    (tmp_path / "me.pem").write_bytes(client.pem)
    (tmp_path / "me.key").write_bytes(client.key_pem)
    files = ["--client-cert", str(tmp_path / "me.pem"), "--client-key", str(tmp_path / "me.key"), "--install"]
    assert (
        console(["setup", "--config", str(place / "gateway.toml"), "--upstream", "b", "--server-name", "c", *files])
        == 0
    )
    assert written(place) == [
        "client.pem 644",
        "credentials 700",
        "credentials/client.key 600",
        "devices 755",
        "gateway.toml 644",
    ]
    made = load_file(place / "gateway.toml")
    assert (made.upstream[0].server_name, made.tls.client_key) == ("c", place / "credentials/client.key")


@pytest.mark.parametrize("there", [True, False])
def test_a_failure_at_the_end_takes_everything_back(
    place: Path, ca_file: Path, monkeypatch: pytest.MonkeyPatch, untested: list[Step], *, there: bool
) -> None:
    """A file that the gateway cannot use, or a disk that is full: what was there is there again, and nothing else."""
    if there:
        place.mkdir(parents=True)
        (place / "gateway.toml").write_text(template_text())
    before = written(place)
    command = ["setup", "--config", str(place / "gateway.toml"), "--upstream", "b", "--ca-file", str(ca_file)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert console(command) == 1
    assert written(place) == before
    untested.append(Step("file", Status.FAIL, "unreadable"))
    monkeypatch.setattr(setup, "_SERVED", ())
    assert console(command) == 1
    assert written(place) == before
    assert not there or (place / "gateway.toml").read_text() == template_text()
    assert place.parent.exists() == there


def test_answers_that_are_missing_are_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, untested: list[Step], capfd: pytest.CaptureFixture[str]
) -> None:
    """Standard input ends: the message says which flag gives the answer."""
    del untested
    answer(monkeypatch, "broker.example.com")
    assert console(["setup", "--config", str(place / "gateway.toml")]) == 1
    assert "--ca-file" in capfd.readouterr().err
    assert not place.exists()


def test_an_answer_is_tested_before_the_next_is_asked_for(
    place: Path, monkeypatch: pytest.MonkeyPatch, untested: list[Step], capfd: pytest.CaptureFixture[str]
) -> None:
    """Of all steps, the first answer decides those up to the broker's port."""
    untested += [Step("tcp", Status.FAIL, "refused", "Check the port."), Step("chain", Status.FAIL, "unknown CA")]
    answer(monkeypatch, "broker.example.com", "", "")
    assert console(["setup", "--config", str(place / "gateway.toml")]) == 1
    shown = capfd.readouterr().out
    assert "Check the port." in shown
    assert shown.index("broker's log") < shown.index("host name")
    assert "unknown CA" not in shown
    assert "CA that issued" not in shown
    assert not place.exists()


@pytest.mark.parametrize("together", [True, False])
def test_no_private_key_gets_where_everyone_can_read_it(
    place: Path, tmp_path: Path, untested: list[Step], together: bool
) -> None:
    """Neither from a file with certificate and key, nor from a CA's file that has the CA's key in it."""
    del untested
    ca = certify_ca()
    client = certify(ca, subject="gateway", names=(), purposes=(CLIENT,))
    both, key, roots = tmp_path / "both.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    both.write_bytes(client.key_pem + client.pem)
    key.write_bytes(client.key_pem)
    roots.write_bytes(ca.pem + ca.key_pem)
    files = ["--client-cert", str(both), "--client-key", str(both if together else key), "--ca-file", str(roots)]
    assert console(["setup", "--config", str(place / "gateway.toml"), "--upstream", "b", *files]) == 0
    for path in place.rglob("*"):
        is_public = path.is_file() and path.stat().st_mode & stat.S_IROTH
        assert not is_public or b"PRIVATE" not in path.read_bytes(), path
    made = load_file(place / "gateway.toml").tls
    assert made.client_cert is not None
    assert (made.client_cert.parent.name == "credentials") == together
    assert [read_certificates(made.ca_file[0])[0], read_certificates(made.client_cert)[0]] == [
        ca.certificate,
        client.certificate,
    ]


def encrypted(client: Certified, directory: Path, kind: str) -> list[Path]:
    """Write a certificate and its key, encrypted with the passphrase "secret"; return the files that name them."""
    how = BestAvailableEncryption(b"secret")
    if kind == "PKCS #12":
        files = {"me.p12": serialize_key_and_certificates(None, client.key, client.certificate, None, how)}
    else:
        key = client.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)
        files = {"me.pem": client.pem, "me.key": key}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    (directory / "passphrase").write_text("secret\n")
    for name in (*files, "passphrase"):
        (directory / name).chmod(0o600)
    return [directory / name for name in files]


@pytest.mark.parametrize("kind", ["PKCS #12", "PEM"])
def test_the_passphrase_of_an_encrypted_key_is_asked_for_and_handed_to_the_service(
    place: Path, tmp_path: Path, untested: list[Step], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By answers and by flags; without one the key could not be used."""
    del untested
    client = certify(certify_ca(), subject="gateway", names=(), purposes=(CLIENT,))
    paths = [str(path) for path in encrypted(client, tmp_path, kind)]
    answer(monkeypatch, "b", "", paths[0], "".join(paths[1:]), str(tmp_path / "passphrase"))
    assert console(["setup", "--config", str(place / "gateway.toml")]) == 0
    made = load_file(place / "gateway.toml").tls
    assert made.client_key_password_file == place / "credentials" / "client.passphrase"
    assert made.client_cert is not None
    passphrase = made.passphrase.read()
    assert read_chain(made.client_cert, passphrase) == [client.certificate]
    read_client_key(made.client_key or made.client_cert, passphrase)
    assert "credentials/client.passphrase 600" in written(place)
    flags = [word for pair in zip(("--client-cert", "--client-key"), paths, strict=False) for word in pair]
    flags += ["--client-key-password-file", str(tmp_path / "passphrase")]
    assert console(["setup", "--config", str(tmp_path / "other" / "gateway.toml"), "--upstream", "b", *flags]) == 0
    assert written(tmp_path / "other") == written(place)


@pytest.mark.slow
def test_a_broker_is_shown_a_certificate_whose_key_is_encrypted(
    place: Path, tmp_path: Path, start_broker: StartBroker, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are tested with the passphrase."""
    ca = certify_ca()
    paths = encrypted(certify(ca, subject="gateway", names=(), purposes=(CLIENT,)), tmp_path, "PEM")
    broker = start_broker(serve=accept_session)
    answers = [f"localhost:{broker.port}", str(ca_file), *map(str, paths)]
    answer(monkeypatch, *answers, "")
    assert console(["setup", "--config", str(place / "gateway.toml")]) == 1
    assert not place.exists()
    answer(monkeypatch, *answers, str(tmp_path / "passphrase"))
    assert console(["setup", "--config", str(place / "gateway.toml")]) == 0


@pytest.fixture
def wants_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the broker of the answers refuse sessions without a client certificate."""
    refused = Step("tls", Status.FAIL, "alert", facts={"reason": "tls-client-certificate-refused"})
    monkeypatch.setattr(
        setup, "_checked", lambda flags: iter([] if {"--files", "--client-cert"} & set(flags) else [refused])
    )


@pytest.mark.usefixtures("wants_certificates")
@pytest.mark.parametrize("by_flag", [True, False])
def test_a_broker_may_want_a_certificate_of_each_device(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *, by_flag: bool
) -> None:
    """The gateway then needs none: devices without a rule are refused, and the command that adds one is shown."""
    flags = ["--upstream", "b", "--device-certificates"] if by_flag else []
    answer(monkeypatch, "b", "", "", "y")
    assert console(["setup", "--config", str(place / "gateway.toml"), *flags]) == 0
    made = load_file(place / "gateway.toml")
    assert (made.devices.unknown, made.devices.directory) == ("refuse", place / "devices")
    assert "  mqtts-gateway device add ID " in capfd.readouterr().out


@pytest.mark.usefixtures("wants_certificates")
def test_without_any_certificate_setup_says_what_to_do(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether nothing is asked, or the answer is no."""
    command = ["setup", "--config", str(place / "gateway.toml")]
    assert console([*command, "--upstream", "b"]) == 1
    assert "--device-certificates" in capfd.readouterr().err
    answer(monkeypatch, "b", "", "", "n")
    assert console(command) == 1
    assert not place.exists()


@pytest.mark.usefixtures("wants_certificates")
@pytest.mark.parametrize("refuse", [True, False])
def test_the_gateways_own_certificate_is_for_devices_without_a_rule(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], *, refuse: bool
) -> None:
    """Setup says so, and how to refuse them; if they are refused already, it does not."""
    own = certify(certify_ca(), subject="gateway", names=(), purposes=(CLIENT,)).write(tmp_path / "me.pem")
    flags = ["--upstream", "b", "--client-cert", str(own), *(["--device-certificates"] if refuse else [])]
    assert console(["setup", "--config", str(place / "gateway.toml"), *flags]) == 0
    assert load_file(place / "gateway.toml").devices.unknown == ("refuse" if refuse else "pass")
    assert ('unknown = "refuse"' in capfd.readouterr().out) == (not refuse)


def test_answers_on_standard_input_are_in_the_output(
    place: Path, monkeypatch: pytest.MonkeyPatch, untested: list[Step], capfd: pytest.CaptureFixture[str]
) -> None:
    """So that it shows what was chosen."""
    del untested
    answer(monkeypatch, "broker.example.com:8884", "", "")
    assert console(["setup", "--config", str(place / "gateway.toml")]) == 0
    assert ": broker.example.com:8884\n" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_real_broker_that_wants_certificates_is_told_apart(
    place: Path, start_broker: StartBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: ssl.TLSVersion
) -> None:
    """In TLS 1.2 the handshake fails, in TLS 1.3 what follows it."""
    root = certify_ca()
    (tmp_path / "root.pem").write_bytes(root.pem)
    context = certify(root).server().context()
    context.maximum_version = version
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(tmp_path / "root.pem")
    broker = start_broker(tls=context)
    answer(monkeypatch, f"localhost:{broker.port}", str(tmp_path / "root.pem"), "", "y")
    assert console(["setup", "--config", str(place / "gateway.toml")]) == 0
    assert load_file(place / "gateway.toml").devices.unknown == "refuse"


def test_the_service_has_one_configuration(
    place: Path, untested: list[Step], capfd: pytest.CaptureFixture[str]
) -> None:
    """With another one, --install is refused: the service would not use it."""
    del untested
    assert console(["setup", "--config", str(place / "gateway.toml"), "--upstream", "b", "--install"]) == 1
    assert "leave out --config" in capfd.readouterr().err
    assert not place.exists()


def test_what_is_written_stays_if_only_the_service_cannot_be_installed(
    place: Path, untested: list[Step], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What `install` did is not taken back, so the configuration that it uses is not either."""
    del untested
    config = place / "gateway.toml"
    monkeypatch.setattr(setup, "_CONFIG", config)
    monkeypatch.setattr(setup.install, "run", lambda _: 1)
    assert console(["setup", "--config", str(config), "--upstream", "b", "--install"]) == 1
    assert config.exists()
    said = capfd.readouterr().err
    assert "mqtts-gateway install" in said
    assert "nothing was changed" not in said


def test_a_new_directory_that_was_put_to_use_stays(
    place: Path, untested: list[Step], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The cause of the failure is still told."""
    untested.append(Step("file", Status.FAIL, "unreadable", "Try chmod."))
    monkeypatch.setattr(setup, "_SERVED", ())
    show = setup.TextView.show

    def put_to_use(view: setup.TextView, step: Step) -> None:
        (place / "devices" / "somebody-elses").touch()
        show(view, step)

    monkeypatch.setattr(setup.TextView, "show", put_to_use)
    assert console(["setup", "--config", str(place / "gateway.toml"), "--upstream", "b"]) == 1
    assert "Try chmod." in capfd.readouterr().out
    assert written(place) == ["devices 755", "devices/somebody-elses 644"]
