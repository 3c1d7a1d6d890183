"""`mqtts-gateway check`: each kind of failure has its line and its remedy, and nothing leaks to a wrong broker."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.threads import blockingCallFromThread

from gateway.cli import check
from gateway.cli.login import make_login
from gateway.cli.openssl import s_client_command
from gateway.cli.report import Report, Status, Step, TextView
from gateway.config import from_mapping
from tests.harness import PATIENCE, Broker, BrokerConnection, ServerTLS
from tests.pki import CLIENT, Certified, certify, certify_ca, revocation_list, rsa_key
from tests.ports import free_port
from tests.tools import as_from_a_terminal, require_tool

TO_THE_BROKER = ["dns", "tcp", "client-hello", "certificate", "chain", "identity", "tls", "connect", "connack"]


@frozen
class Checked:
    """A finished check."""

    report: Report

    def step(self, name: str) -> Step:
        """Return the only step of this name."""
        (step,) = self.steps(name)
        return step

    def steps(self, name: str) -> list[Step]:
        """Return all steps of this name."""
        return [step for step in self.report.steps if step.name == name]

    def statuses(self, *names: str) -> list[str]:
        """Return how these steps went."""
        return [self.step(name).status for name in names]

    def failed(self, name: str, *words: str, remedy: str) -> None:
        """Assert that this step failed with these words and this remedy, and that the rest of the way was skipped."""
        step = self.step(name)
        assert step.status is Status.FAIL, step
        for each in words:
            assert each in step.message
        assert remedy in step.remedy
        assert self.report.exit_status(strict=False) == 1
        assert self.step("connack").status is Status.SKIP or name == "connack"


@pytest.fixture(scope="module")
def root() -> Certified:
    """Return the CA that is trusted."""
    return certify_ca()


@pytest.fixture
def configuration(tmp_path: Path, root: Certified) -> Callable[..., Path]:
    """Return a function that writes a configuration for a broker on loopback; sections are merged over the default."""
    (tmp_path / "ca.pem").write_bytes(root.pem)

    def write(
        port: int = 1, *, host: str = "localhost", server_name: str = "", listen: str = "127.0.0.1:0", **tls: Any
    ) -> Path:
        lines = [
            "[[listen]]",
            f"endpoint = {json.dumps(listen)}",
            "[[upstream]]",
            f"host = {json.dumps(host)}",
            f"port = {port}",
            f"server_name = {json.dumps(server_name)}",
            "[timeouts]",
            "tls = 0.3",
            "connack = 0.3",
            "close = 0.3",
            "[tls]",
            *(f"{key} = {json.dumps(value)}" for key, value in ({"ca_file": "ca.pem"} | tls).items()),
        ]
        path = tmp_path / "mqtts-gateway.toml"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.fixture
def checked(reactor: Any) -> Callable[..., Checked]:
    """Return a function that checks a configuration in this process."""

    def run(
        path: Path,
        *,
        client_id: str | None = None,
        username: str | None = None,
        password_file: str | None = None,
        offline: bool = False,
    ) -> Checked:
        given = {flag.name: [] for flag in check.FLAGS} | {"config": [str(path)]}
        login = make_login(client_id, username, password_file)
        report = Report(lambda _: None)
        coroutine = check.examine(reactor, given, login, report, offline=offline)
        blockingCallFromThread(reactor, Deferred.fromCoroutine, coroutine)
        return Checked(report)

    return run


@pytest.fixture
def offered(
    configuration: Callable[..., Path], checked: Callable[..., Checked], start_broker: Callable[..., Broker], root: Any
) -> Callable[..., tuple[Checked, Broker]]:
    """Return a function that checks against a broker that shows `certified`, or serves otherwise as it is told."""

    def run(
        certified: Certified | None = None,
        *,
        tls: ServerTLS | ssl.SSLContext | None = None,
        plaintext: bool = False,
        serve: Callable[[BrokerConnection], None] | None = None,
        login: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[Checked, Broker]:
        server = None if plaintext else tls or (certified or certify(root)).server()
        broker = start_broker(tls=server, serve=serve)
        return checked(configuration(broker.port, **settings), **(login or {})), broker

    return run


def plain(connection: BrokerConnection) -> None:
    """Serve as a broker without TLS."""
    connection.read()
    connection.send(b"\x20\x02\x00\x05" * 4)
    connection.read_to_end()


def answer(connack: bytes) -> Callable[[BrokerConnection], None]:
    """Serve as a broker that answers CONNECT so."""

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(connack)
        connection.read_to_end()

    return serve


def command_line(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `mqtts-gateway` in a process of its own."""
    command = [sys.executable, "-m", "gateway.cli.main", *map(str, arguments)]
    return subprocess.run(command, text=True, check=False, timeout=60, **({"capture_output": True} | options))


# ---- the whole way


def test_a_good_broker_passes_every_step(offered: Callable[..., tuple[Checked, Broker]]) -> None:
    """Each step says what was seen; the broker gets CONNECT and DISCONNECT, then an orderly close."""
    done, broker = offered()
    assert [step for step in done.report.steps if step.status is not Status.PASS] == []
    names = [step.name for step in done.report.steps]
    assert names == ["configuration", "file", "listen", "clock", "engine", *TO_THE_BROKER]
    assert f"connected to 127.0.0.1:{broker.port}" in done.step("tcp").message
    assert "SNI localhost, no ALPN, TLS 1.2 or later" in done.step("client-hello").message
    assert "CN=broker; names DNS:localhost; issuer CN=Root CA; 88 days left" in done.step("certificate").message
    assert done.step("identity").message == "DNS:localhost matches localhost"
    assert done.step("tls").message == "TLSv1.3, TLS_AES_256_GCM_SHA384, no ALPN"
    assert done.step("connack").message.startswith("0x00, connection accepted (")
    identifier = re.search(r'"(mqtts-gateway-check-[a-z0-9]{3})"', done.step("connect").message)
    assert identifier is not None
    connection = broker.connection()
    connection.finished.wait(PATIENCE)
    connect = b"\x00\x04MQTT\x04\x02\x00\x3c\x00\x17" + identifier[1].encode()
    assert broker.received == bytes((0x10, len(connect))) + connect + b"\xe0\x00"
    assert connection.ended_cleanly


def test_several_upstreams_have_steps_of_their_own(
    reactor: Any, checked: Callable[..., Checked], configuration: Callable[..., Path], start_broker: Any, root: Any
) -> None:
    """One that fails does not keep the next from being tried."""
    broker = start_broker(tls=certify(root).server())
    path = configuration(broker.port)
    path.write_text('[[upstream]]\nhost = "broker.invalid"\n' + path.read_text())
    done = checked(path)
    dns = done.steps("dns")
    assert [step.upstream for step in dns] == ["broker.invalid:8883", f"localhost:{broker.port}"]
    assert [step.status for step in dns] == [Status.FAIL, Status.PASS]
    assert [step.status for step in done.steps("connack")] == [Status.SKIP, Status.PASS]
    assert "spelling" in dns[0].remedy
    assert done.steps("tcp")[0].message == "not reached: dns failed"
    assert len(done.report.commands) == 2


# ---- on the way


def test_a_name_that_does_not_resolve(checked: Callable[..., Checked], configuration: Callable[..., Path]) -> None:
    """DNS fails, and everything after it is not reached."""
    done = checked(configuration(host="broker.invalid"))
    done.failed("dns", "dns-failed", "broker.invalid", remedy="spelling")
    assert done.statuses(*TO_THE_BROKER[1:]) == [Status.SKIP] * 8


def test_a_port_that_refuses(checked: Callable[..., Checked], configuration: Callable[..., Path]) -> None:
    """TCP fails; the name was resolved."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        done = checked(configuration(bound.getsockname()[1]))
    done.failed("tcp", "tcp-refused", remedy="8883")
    assert done.step("dns").status is Status.PASS


def test_a_port_without_tls(offered: Callable[..., tuple[Checked, Broker]]) -> None:
    """What answers ClientHello is no TLS."""
    done, broker = offered(plaintext=True, serve=plain)
    done.failed("certificate", "tls-not-tls", remedy="8883")
    assert done.step("client-hello").status is Status.PASS
    assert b"MQTT" not in broker.received


def test_a_broker_that_says_nothing(offered: Callable[..., tuple[Checked, Broker]]) -> None:
    """ClientHello was sent, and nothing came."""
    done, _ = offered(plaintext=True, serve=BrokerConnection.read_to_end)
    done.failed("certificate", "tls-timeout", "0.3 s", remedy="Check that the port speaks TLS")


def test_a_broker_that_closes_in_the_handshake(offered: Callable[..., tuple[Checked, Broker]]) -> None:
    """ClientHello was answered by a close."""
    done, _ = offered(plaintext=True, serve=lambda connection: connection.read())
    done.failed("certificate", "tls-closed", remedy="check the broker's log")


# ---- the certificate


def test_an_untrusted_chain_shows_what_was_presented(offered: Callable[..., tuple[Checked, Broker]]) -> None:
    """Also when OpenSSL stops at a CA, before the broker's own certificate."""
    stranger = certify_ca(subject="Stranger")
    leaf = certify(certify_ca(stranger), subject="b")
    for chain in (leaf.chain, [*leaf.chain, stranger], [leaf]):
        done, broker = offered(tls=leaf.server(chain=chain))
        done.failed("chain", "tls-untrusted-chain", remedy="tls.ca_file")
        certificate = done.step("certificate")
        assert certificate.status is Status.PASS
        assert "CN=b; names DNS:localhost; issuer CN=Intermediate CA" in certificate.message
        assert len(certificate.facts["chain"]) == len(chain)
        assert f"the last of {len(chain)} certificate" in done.step("chain").message
        assert done.step("identity").status is Status.PASS
        assert done.statuses("tls", "connect") == [Status.SKIP] * 2
        assert broker.received == b""


@pytest.mark.parametrize("has_identifiers", [True, False])
def test_a_trusted_ca_of_the_same_name_has_another_key(
    offered: Callable[..., tuple[Checked, Broker]], has_identifiers: bool
) -> None:
    """It was made a second time; to trust "the CA that issued it" would be no help."""
    leaf = certify(certify_ca(), authority_key_identifier=has_identifiers)
    done, broker = offered(leaf)
    done.failed("chain", "tls-untrusted-chain", "issued by CN=Root CA", "key does not match", remedy="another key")
    assert broker.received == b""


@pytest.mark.parametrize(
    ("names", "settings", "words", "remedy"),
    [
        (["DNS:other.example"], {}, "is for DNS:other.example; expected localhost", "server_name"),
        ([], {}, "has no subjectAltName", "reissued with the subjectAltName DNS:localhost; the common name"),
        (["email:a@b.example"], {}, "usable subjectAltName (email:a@b.example)", "Have the certificate reissued"),
        (["IP:127.0.0.1"], {}, "is for IP:127.0.0.1; expected localhost, a host name", "DNS:localhost"),
        (["DNS:localhost"], {"host": "127.0.0.1"}, "expected 127.0.0.1, an IP address", "subjectAltName IP:127.0.0.1"),
        (["DNS:*.lan"], {"server_name": "broker.lan"}, "wildcard that is too wide", "leftmost label"),
    ],
    ids=["other name", "no SAN", "no name of a host", "IP for a name", "name for an IP", "wildcard"],
)
def test_an_identity_that_does_not_match(
    offered: Callable[..., tuple[Checked, Broker]],
    root: Certified,
    names: list[str],
    settings: dict[str, Any],
    words: str,
    remedy: str,
) -> None:
    """The chain is trusted, the identity is not the broker's: why, and what would help."""
    done, broker = offered(certify(root, subject="localhost", names=names), **settings)
    done.failed("identity", "tls-name-mismatch", words, remedy=remedy)
    assert done.step("chain").status is Status.PASS
    assert broker.received == b""


def test_a_certificate_out_of_its_time(offered: Callable[..., tuple[Checked, Broker]], root: Certified) -> None:
    """The clock of this machine is shown beside, since it is the other suspect."""
    year = f"clock says {datetime.now(UTC):%Y-}"
    done, _ = offered(certify(root, valid_from=-140))
    done.failed("chain", "tls-expired", year, remedy="Renew")
    assert "expired on" in done.step("certificate").message
    done, _ = offered(certify(root, valid_from=2))
    done.failed("chain", "tls-not-yet-valid", year, remedy="clock")


def test_a_certificate_that_expires_soon_is_a_warning(
    offered: Callable[..., tuple[Checked, Broker]], root: Certified
) -> None:
    """Soon is less than 30 days, as for `status`, its issuer's included; warnings count if asked."""
    done, _ = offered(certify(root, valid_for=29))
    assert done.step("certificate").status is Status.WARN
    assert "Renew" in done.step("certificate").remedy
    assert done.step("connack").status is Status.PASS
    assert [done.report.exit_status(strict=strict) for strict in (False, True)] == [0, 2]
    intermediate = certify_ca(root, valid_from=-80, valid_for=90)
    done, _ = offered(certify(intermediate))
    assert "its CA CN=Intermediate CA" in done.step("certificate").message
    assert done.step("certificate").status is Status.WARN


def test_a_hostile_subject_moves_no_cursor(offered: Callable[..., tuple[Checked, Broker]]) -> None:
    """Escape sequences, line ends and bidirectional overrides from a certificate are shown as escapes."""
    evil = "x\x1b[2J\r\nPASS  chain \u202e"
    done, _ = offered(certify(certify_ca(subject=evil), subject=evil, names=["DNS:a.example"]))
    stream = io.StringIO()
    view = TextView(stream, quiet=False)
    for step in done.report.steps:
        view.show(step)
    shown = stream.getvalue()
    assert all(line.isprintable() for line in shown.splitlines())
    assert len(re.findall(r"^PASS  chain", shown, re.MULTILINE)) == 0
    assert "\\x1b[2J" in shown
    assert "\\u202e" in shown
    document = json.loads(done.report.as_json(quiet=False, strict=False))
    (facts,) = [step["facts"] for step in document["steps"] if step["step"] == "certificate"]
    assert facts["subject"].isprintable()
    assert facts["issuer"].isprintable()


def test_whatever_else_does_not_print_is_escaped() -> None:
    """File names, for instance; a line of the report is one line, whoever wrote what is in it."""
    stream = io.StringIO()
    step = Step("file", Status.FAIL, "/etc/a\x1b[2J\nPASS\\: wrong", "rm /etc/a\x1b[2J")
    TextView(stream, quiet=False).show(step)
    assert stream.getvalue() == "FAIL  file           /etc/a\\x1b[2J\\nPASS\\: wrong\n      -> rm /etc/a\\x1b[2J\n"
    report = Report(lambda _: None)
    report.add(step)
    assert json.loads(report.as_json(quiet=False, strict=False))["steps"][0]["message"].isprintable()


def test_alpn_pins_and_strictness_have_steps(offered: Callable[..., tuple[Checked, Broker]], root: Certified) -> None:
    """Each is told apart from the others, and passes where it should."""
    context = certify(root).server().context()
    context.set_alpn_protocols(["mqtt"])
    pin = "sha256/" + "A" * 43 + "="
    done, _ = offered(tls=context, alpn=["mqtt"])
    assert "ALPN mqtt" in done.step("tls").message
    done, _ = offered(alpn=["mqtt"], pin=[pin])
    done.failed("tls", "tls-alpn-mismatch", remedy="tls.alpn")
    assert done.statuses("chain", "identity", "pin") == [Status.PASS, Status.PASS, Status.SKIP]
    done, broker = offered(pin=[pin], verification="strict")
    done.failed("pin", "tls-pin-mismatch", "sha256/", remedy="tls.pin")
    assert done.statuses("tls", "strict") == [Status.PASS, Status.SKIP]
    assert broker.received == b""
    shown = re.search(r"sha256/\S+", done.step("pin").message)
    assert shown is not None
    done, _ = offered(certify(root, subject="localhost"), verification="strict")
    assert done.statuses("strict", "connack") == [Status.PASS, Status.PASS]
    done, broker = offered(certify(root, names_critical=True), verification="strict")
    done.failed("strict", "tls-strict-refused", remedy='verification = "standard"')
    assert done.statuses("chain", "identity", "tls") == [Status.PASS] * 3
    assert broker.received == b""


def test_a_broker_that_wants_a_client_certificate(
    offered: Callable[..., tuple[Checked, Broker]], root: Certified, tmp_path: Path
) -> None:
    """In TLS 1.2 the handshake fails, in TLS 1.3 what follows it; with the certificate all passes."""
    (tmp_path / "root.pem").write_bytes(root.pem)
    for version, step in ((ssl.TLSVersion.TLSv1_2, "tls"), (ssl.TLSVersion.TLSv1_3, "connack")):
        context = certify(root).server().context()
        context.maximum_version = version
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(tmp_path / "root.pem")
        done, _ = offered(tls=context)
        done.failed(step, "tls-client-certificate-refused", remedy="tls.client_cert")
        assert done.statuses("chain", "identity") == [Status.PASS, Status.PASS]
    client = certify(root, subject="gateway", names=(), purposes=[CLIENT]).write(tmp_path / "client.pem")
    client.chmod(0o600)
    done, _ = offered(tls=context, client_cert="client.pem")
    assert done.step("connack").status is Status.PASS


# ---- MQTT


@pytest.mark.parametrize(
    ("code", "login", "status", "words", "remedy"),
    [
        (1, {}, Status.FAIL, "0x01, unacceptable protocol version", "another version"),
        (2, {}, Status.WARN, "0x02, identifier rejected", "The connection works"),
        (2, {"client_id": "d1"}, Status.FAIL, "0x02, identifier rejected", "--client-id"),
        (3, {}, Status.FAIL, "0x03, server unavailable", "broker's log"),
        (4, {}, Status.WARN, "0x04, bad user name or password", "which devices send"),
        (5, {}, Status.WARN, "0x05, not authorized", "The connection works"),
        (5, {"username": "d1"}, Status.FAIL, "0x05, not authorized", "administrator"),
        (7, {}, Status.FAIL, "0x07, unknown code", "code in the detail"),
    ],
)
def test_a_broker_that_refuses_connect(
    offered: Callable[..., tuple[Checked, Broker]],
    code: int,
    login: dict[str, Any],
    status: Status,
    words: str,
    remedy: str,
) -> None:
    """What the check itself lacks is a warning, what every device would meet a failure."""
    done, _ = offered(serve=answer(bytes((0x20, 2, 0, code))), login=login)
    step = done.step("connack")
    assert step.status is status
    assert words in step.message
    assert remedy in step.remedy
    assert step.facts["code"] == code


def test_a_broker_that_does_not_answer_connect(offered: Callable[..., tuple[Checked, Broker]]) -> None:
    """Silence, a close and another protocol are told apart; CONNECT was sent in each."""
    for serve, words, remedy in (
        (BrokerConnection.read_to_end, "upstream-silent: no CONNACK within 0.3 s", "log and load"),
        (BrokerConnection.read_packet, "upstream-closed", "broker's log"),
        (answer(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "upstream-protocol-error: an HTTP response", "transport"),
    ):
        done, _ = offered(serve=serve)
        done.failed("connack", words, remedy=remedy)
        assert done.step("connect").status is Status.PASS


def test_the_login_is_the_users(offered: Callable[..., tuple[Checked, Broker]], tmp_path: Path) -> None:
    """Client Identifier, user name and password reach the broker, and the password nobody else."""
    (tmp_path / "password").write_bytes(b"s3cret-w0rd\n")
    login = {"client_id": "dev-1", "username": "user-1", "password_file": str(tmp_path / "password")}
    done, broker = offered(login=login)
    body = b"\x00\x04MQTT\x04\xc0\x00\x3c\x00\x05dev-1\x00\x06user-1\x00\x0bs3cret-w0rd"
    assert broker.connection().received.startswith(bytes((0x10, len(body))) + body)
    assert "s3cret" not in done.report.as_json(quiet=False, strict=False)
    assert "s3cret" not in repr(make_login("dev-1", "user-1", str(tmp_path / "password")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, None, "x"), "--password-file: also give --username"),
        ((None, "x", "/nonexistent"), "cannot be read: No such file"),
        ((None, "x" * 70000, None), "--username: a string of 70000 bytes"),
        (("\udcff", None, None), "--client-id: it is not UTF-8"),
        ((None, "x", "/dev/zero"), "larger than 1 MiB"),
    ],
)
def test_a_login_that_no_connect_can_carry(arguments: tuple[Any, ...], words: str) -> None:
    """The option is named."""
    with pytest.raises(ValueError, match=re.escape(words)):
        make_login(*arguments)


def test_a_password_that_no_connect_can_carry(tmp_path: Path) -> None:
    """It is not cut."""
    (tmp_path / "password").write_bytes(bytes(65_536))
    with pytest.raises(ValueError, match="is longer than the 65535 bytes that MQTT can carry"):
        make_login(None, "x", str(tmp_path / "password"))


# ---- what needs no broker


def test_files_are_looked_at_one_by_one(
    checked: Callable[..., Checked], configuration: Callable[..., Path], root: Certified, tmp_path: Path
) -> None:
    """A client certificate in order, its key, a directory of CAs and a CRL pass, each with a line."""
    leaf = certify(certify_ca(root), subject="gateway", names=(), purposes=[CLIENT])
    (tmp_path / "client.pem").write_bytes(b"".join(each.pem for each in leaf.chain))
    key = tmp_path / "key.pem"
    key.write_bytes(leaf.key_pem)
    key.chmod(0o600)
    (tmp_path / "cas").mkdir()
    (tmp_path / "cas" / "one.crt").write_bytes(root.pem)
    (tmp_path / "crl.pem").write_bytes(revocation_list(root))
    settings = {"client_cert": "client.pem", "client_key": "key.pem", "ca_dir": "cas", "crl_file": ["crl.pem"]}
    done = checked(configuration(**settings), offline=True)
    steps = done.steps("file")
    assert {step.status for step in steps} == {Status.PASS}
    assert [step.message.partition(": ")[0] for step in steps] == [
        str(tmp_path / name) for name in ("ca.pem", "cas/one.crt", "client.pem", "key.pem", "crl.pem")
    ]
    assert "2 certificates in the right order; 88 days left" in steps[2].message
    assert "due by" in steps[4].message
    assert [step.name for step in done.report.steps if step.upstream] == []


def file_that(name: str, root: Certified, directory: Path) -> tuple[dict[str, Any], tuple[Status, str, str]]:
    """Make the file of a case of the test below: the settings that name it, and what is to be said about it."""
    ca, client, crl = directory / "a.pem", directory / "c.pem", directory / "l.pem"
    cas, clients, crls = {"ca_file": "a.pem"}, {"client_cert": "c.pem"}, {"crl_file": ["l.pem"]}
    usual = {"subject": "gateway", "names": (), "purposes": [CLIENT]}
    leaf = certify(root, **usual)
    client.write_bytes(leaf.pem + leaf.key_pem)
    client.chmod(0o600)
    match name:
        case "missing":
            return cas, (Status.FAIL, "cannot be read: No such file", "Is ca.pem meant?")
        case "garbage":
            ca.write_text("hello")
            return cas, (Status.FAIL, "contains no PEM", "")
        case "expired CA":
            ca.write_bytes(certify_ca(valid_from=-140).pem)
            return cas, (Status.FAIL, "no CA certificate is valid: CN=Root CA: expired on", "current certificate")
        case "one of two expired":
            ca.write_bytes(certify_ca(valid_from=-140).pem + root.pem)
            return cas, (Status.WARN, "1 of 2 certificates not valid", "Remove")
        case "no CA":
            ca.write_bytes(leaf.pem)
            return cas, (Status.WARN, "CN=gateway is not a CA certificate", "Use the CA's")
        case "writable CA":
            ca.write_bytes(root.pem)
            ca.chmod(0o666)
            return cas, (Status.FAIL, "world-writable (mode 0666)", "chmod o-w")
        case "empty directory":
            (directory / "cas").mkdir()
            return {"ca_dir": "cas"}, (Status.FAIL, "contains no *.pem", "Put the CA's certificate there")
        case "no directory":
            return {"ca_dir": "nowhere"}, (Status.FAIL, "cannot be read: No such file", "Correct the path")
        case "world-readable key":
            client.chmod(0o644)
            return clients, (Status.FAIL, "private key is world-readable", "chmod o=")
        case "group-readable key":
            client.chmod(0o640)
            if os.getuid() == 0:
                os.chown(client, 12345, -1)
            return clients, (Status.WARN, "private key is group-readable", "chmod g=")
        case "key of another":
            client.write_bytes(leaf.pem + root.key_pem)
            return clients, (Status.FAIL, "is not the key of the first certificate", "own certificate first")
        case "no key":
            client.write_bytes(leaf.pem)
            return clients, (Status.FAIL, "contains no PEM private key", "")
        case "chain in disorder":
            intermediate = certify_ca(root)
            leaf = certify(intermediate, **usual)
            client.write_bytes(leaf.pem + root.pem + intermediate.pem + leaf.key_pem)
            return clients, (
                Status.FAIL,
                "CN=gateway was not issued by the certificate after it, CN=Root CA",
                "each issuer",
            )
        case "expired client":
            client.write_bytes((leaf := certify(root, **usual, valid_from=-140)).pem + leaf.key_pem)
            return clients, (Status.FAIL, "expired on", "Renew it")
        case "client that is a server":
            client.write_bytes((leaf := certify(root, names=())).pem + leaf.key_pem)
            return clients, (Status.WARN, "not issued for TLS clients", "clientAuth")
        case "weak client":
            client.write_bytes((leaf := certify(root, **usual, key=rsa_key(1024))).pem + leaf.key_pem)
            return clients, (Status.FAIL, "refused by OpenSSL (ee key too small); use at least", "")
        case "expired CRL":
            crl.write_bytes(revocation_list(root, valid_from=-140))
            return crls, (Status.FAIL, "the CRL of CN=Root CA has expired", "tls-crl-unusable")
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "garbage",
        "expired CA",
        "one of two expired",
        "no CA",
        "writable CA",
        "empty directory",
        "no directory",
        "world-readable key",
        "group-readable key",
        "key of another",
        "no key",
        "chain in disorder",
        "expired client",
        "client that is a server",
        "weak client",
        "expired CRL",
    ],
)
def test_a_file_that_is_not_right(
    checked: Callable[..., Checked], configuration: Callable[..., Path], root: Certified, tmp_path: Path, name: str
) -> None:
    """Its line names the file, what is wrong with it and what to do."""
    settings, (status, words, remedy) = file_that(name, root, tmp_path)
    done = checked(configuration(**settings), offline=True)
    found = [step for step in done.steps("file") if words in step.message]
    assert [step.status for step in found] == [status], done.steps("file")
    assert str(tmp_path) in found[0].message
    assert remedy in found[0].remedy
    assert done.report.result is status


def test_files_that_cannot_be_used_end_the_way(
    checked: Callable[..., Checked], configuration: Callable[..., Path]
) -> None:
    """Without trust there is nothing to go on with."""
    done = checked(configuration(ca_file="none.pem"))
    assert done.statuses(*TO_THE_BROKER) == [Status.SKIP] * 9
    assert done.step("dns").message == "the files cannot be used"


def test_the_platforms_roots_are_named(checked: Callable[..., Checked], configuration: Callable[..., Path]) -> None:
    """Whoever sets no CA learns whom that trusts."""
    done = checked(configuration(ca_file=[]), offline=True)
    assert re.search(r": \d+ certificates \(the platform's", done.step("file").message) or (
        "no bundle of root certificates" in done.step("file").message
    )


def test_a_configuration_that_cannot_be_used(checked: Callable[..., Checked], tmp_path: Path) -> None:
    """Each problem has a line; the clock is looked at all the same."""
    path = tmp_path / "bad.toml"
    path.write_text('[[upstream]]\nhost = "b"\nprot = 1\n[tsl]\n')
    done = checked(path)
    problems = [step.message for step in done.steps("configuration")]
    assert any("upstream[0].prot: unknown key: did you mean `port`?" in problem for problem in problems)
    assert any("tsl: unknown key" in problem for problem in problems)
    assert done.statuses("file", "listen", "clock", *TO_THE_BROKER) == ["SKIP", "SKIP", "PASS", *["SKIP"] * 9]


def test_addresses_are_really_listened_on(
    checked: Callable[..., Checked], configuration: Callable[..., Path], tmp_path: Path
) -> None:
    """In use is a warning, since that may be the gateway; an address of another machine is a failure."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        step = checked(configuration(listen=endpoint), offline=True).step("listen")
    assert (step.status, step.message) == (Status.WARN, f"{endpoint}: Address already in use")
    assert "If the running gateway uses it, ignore this" in step.remedy
    assert checked(configuration(listen=endpoint), offline=True).step("listen").status is Status.PASS
    step = checked(configuration(listen="192.0.2.1:1883"), offline=True).step("listen")
    assert step.status is Status.FAIL
    assert "no interface of this machine" in step.remedy
    step = checked(configuration(listen="systemd:domain=INET:name=mqtt"), offline=True).step("listen")
    assert step.status is Status.SKIP
    step = checked(configuration(listen=f"unix:{tmp_path}/mqtt.sock"), offline=True).step("listen")
    assert step.status is Status.PASS
    assert not (tmp_path / "mqtt.sock").exists()


def test_the_status_endpoint_is_listened_on_too(
    checked: Callable[..., Checked], configuration: Callable[..., Path]
) -> None:
    """If there is one; that it cannot be had is a warning, since the gateway works without."""
    assert checked(configuration(), offline=True).steps("status") == []

    def step(endpoint: str) -> Step:
        path = configuration()
        path.write_text(f'{path.read_text()}\n[status]\nendpoint = "{endpoint}"\n')
        return checked(path, offline=True).step("status")

    assert step("127.0.0.1:0").status is Status.PASS
    missing = step("unix:/nonexistent/status.sock")
    assert missing.status is Status.WARN
    assert "create the directory of the socket first" in missing.remedy


def test_a_clock_before_the_release_is_wrong(
    checked: Callable[..., Checked], configuration: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a battery starts in 1970."""
    monkeypatch.setattr(check, "now", lambda: datetime(1970, 1, 1, 0, 5, tzinfo=UTC))
    step = checked(configuration(), offline=True).step("clock")
    assert step.status is Status.FAIL
    assert "1970-01-01 00:05 UTC" in step.message
    assert "NTP" in step.remedy


# ---- the files alone


def checked_files(path: Path) -> subprocess.CompletedProcess[str]:
    """What a service asks before it reloads."""
    command = [sys.executable, "-m", "gateway.cli.main", "check", "--files", "--quiet", "--config", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)


def test_the_files_alone_are_no_matter_of_the_network(
    configuration: Callable[..., Path], start_broker: Callable[..., Broker]
) -> None:
    """A port that the running gateway holds is no warning, and nobody is called."""
    broker = start_broker()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        path = configuration(broker.port, listen=f"127.0.0.1:{listener.getsockname()[1]}")
        done = checked_files(path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    report = Report(lambda _: None)
    check.examine_files({flag.name: [] for flag in check.FLAGS} | {"config": [str(path)]}, report)
    assert [(step.name, step.status) for step in report.steps] == [("configuration", "PASS"), ("file", "PASS")]
    assert broker.accepted == 0


def test_the_files_alone_name_every_problem(configuration: Callable[..., Path], tmp_path: Path) -> None:
    """With status 1: in the file's keys, or in the files that it names."""
    path = configuration(ca_file=["none.pem"], crl_file=["none.crl"])
    done = checked_files(path)
    assert done.returncode == 1
    assert f"{tmp_path}/none.pem" in done.stdout
    assert f"{tmp_path}/none.crl" in done.stdout
    path.write_text(path.read_text().replace("port = ", "prot = ").replace("close = 0.3", "close = -1"))
    done = checked_files(path)
    assert done.returncode == 1
    assert "upstream[0].prot" in done.stdout
    assert "timeouts.close" in done.stdout


# ---- the openssl command


def test_the_openssl_command_shows_the_same(
    offered: Callable[..., tuple[Checked, Broker]], root: Certified, tmp_path: Path
) -> None:
    """It runs as printed: it verifies a good broker, and it fails with one whose name is another."""
    require_tool("openssl")
    done, _ = offered()
    good = _run_openssl(done.report.commands[-1])
    assert "Verification: OK" in good
    (tmp_path / "crl.pem").write_bytes(revocation_list(root))
    (tmp_path / "second.pem").write_bytes(certify_ca(subject="Second").pem)
    leaf = certify(root, names=(), purposes=[CLIENT])
    leaf.write(tmp_path / "client's.pem").chmod(0o600)
    done, _ = offered(
        certify(root, subject="127.0.0.1", names=["IP:127.0.0.1"]),
        host="127.0.0.1",
        ca_file=["ca.pem", "second.pem"],
        crl_file="crl.pem",
        client_cert="client's.pem",
        min_version="1.3",
        verification="strict",
    )
    assert done.step("connack").status is Status.PASS
    good = _run_openssl(done.report.commands[-1])
    assert "Verification: OK" in good
    assert "TLSv1.3" in good
    done, _ = offered(certify(root, names=["DNS:other.example"]))
    assert "hostname mismatch" in _run_openssl(done.report.commands[-1])


def test_the_openssl_command_fails_with_a_common_name_alone(
    offered: Callable[..., tuple[Checked, Broker]], root: Any
) -> None:
    """Openssl falls back to the common name, which the gateway does not read."""
    require_tool("openssl")
    done, _ = offered(certify(root, subject="localhost", names=[]))
    assert done.step("identity").status is Status.FAIL
    assert subprocess.run(["bash", "-c", done.report.commands[-1]], capture_output=True, check=False).returncode == 1


def _run_openssl(command: str) -> str:
    """Run what was printed in the shell that it is for."""
    done = subprocess.run(
        ["bash", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    return done.stdout + done.stderr


def test_the_openssl_command_has_what_the_configuration_says(tmp_path: Path) -> None:
    """Every setting that a session depends on is an option, and whatever a shell would take apart is quoted."""
    (tmp_path / "cas").mkdir()
    (tmp_path / "cas" / "a b.pem").write_text("")
    tls = {"ca_dir": str(tmp_path / "cas"), "alpn": ["mqtt", "x y"], "min_version": "1.3", "verification": "strict"}
    config = from_mapping(
        {"upstream": [{"host": "fe80::1", "server_name": "b.example"}], "tls": {**tls, "client_cert": "/c.pem"}}
    )
    words = shlex.split(s_client_command(config.upstream[0], config.tls, client_chain=True))
    assert words[:4] == ["openssl", "s_client", "-connect", "[fe80::1]:8883"]
    options = ["-servername", "b.example", "-verify_hostname", "b.example", "-verify_return_error", "-x509_strict"]
    client = ["-cert", "/c.pem", "-key", "/c.pem", "-cert_chain", "/c.pem"]
    trust = ["-CAfile", str(tmp_path / "cas" / "a b.pem")]
    assert words[4:] == [*options, "-tls1_3", "-alpn", "mqtt,x y", *client, *trust]


# ---- a real broker


def test_a_real_broker_that_wants_credentials(
    checked: Callable[..., Checked], configuration: Callable[..., Path], root: Certified, tmp_path: Path
) -> None:
    """Mosquitto: a warning without credentials, a pass with them, a failure with wrong ones."""
    mosquitto, password_tool = require_tool("mosquitto"), require_tool("mosquitto_passwd")
    server = certify(root)
    (tmp_path / "server.pem").write_bytes(server.pem)
    (tmp_path / "server.key").write_bytes(server.key_pem)
    (tmp_path / "right").write_text("pass-1\n")
    (tmp_path / "wrong").write_text("pass-2\n")
    subprocess.run([password_tool, "-b", "-c", tmp_path / "users", "user-1", "pass-1"], check=True, capture_output=True)
    port = free_port()
    (tmp_path / "mosquitto.conf").write_text(
        f"user root\nlistener {port} 127.0.0.1\ncertfile {tmp_path}/server.pem\nkeyfile {tmp_path}/server.key\n"
        f"allow_anonymous false\npassword_file {tmp_path}/users\n"
    )
    broker = subprocess.Popen([mosquitto, "-c", tmp_path / "mosquitto.conf"], stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        path = configuration(port)
        step = checked(path).step("connack")
        assert (step.status, step.message) == (Status.WARN, "0x05, not authorized")
        right = {"username": "user-1", "password_file": str(tmp_path / "right")}
        assert checked(path, **right).step("connack").status is Status.PASS
        assert checked(path, **right | {"password_file": str(tmp_path / "wrong")}).step("connack").status is Status.FAIL
    finally:
        broker.terminate()
        broker.wait(PATIENCE)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(f"nothing listens on port {port}")


# ---- the report


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out for files and pipes, and where NO_COLOR is set."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(stream: io.StringIO) -> str:
        TextView(stream, quiet=False).show(Step("dns", Status.FAIL, "m", "r", upstream="b:1"))
        return stream.getvalue()

    plain = "FAIL  dns            [b:1] m\n      -> r\n"
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(io.StringIO()) == plain
    assert shown(Terminal()) == "\033[31mFAIL\033[0m" + plain[4:]
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(Terminal()) == plain


def test_the_json_document_has_every_step(offered: Callable[..., tuple[Checked, Broker]]) -> None:
    """One document with version, result, exit status, steps and commands; quiet leaves out what needs no attention."""
    done, broker = offered(serve=answer(b"\x20\x02\x00\x05"))
    document = json.loads(done.report.as_json(quiet=False, strict=True))
    assert list(document) == ["version", "result", "exit_status", "steps", "openssl"]
    assert (document["result"], document["exit_status"]) == ("WARN", 2)
    for step in document["steps"]:
        assert {"step", "upstream", "status", "message", "remedy"} <= set(step) <= {*step, "facts"}
        assert step["upstream"] == (f"localhost:{broker.port}" if step["step"] in TO_THE_BROKER else None)
    certificate = next(step["facts"] for step in document["steps"] if step["step"] == "certificate")
    assert certificate["names"] == ["DNS:localhost"]
    assert datetime.fromisoformat(certificate["not_after"]) > datetime.now(UTC)
    quiet = json.loads(done.report.as_json(quiet=True, strict=False))
    assert [step["step"] for step in quiet["steps"]] == ["connack"]
    assert quiet["exit_status"] == 0


# ---- as a process


def test_the_command_line_reports_and_exits(
    configuration: Callable[..., Path], start_broker: Callable[..., Broker], root: Certified
) -> None:
    """Lines and the openssl command, status 0; with --quiet nothing; failures give 1, warnings 2 if strict."""
    broker = start_broker(tls=certify(root).server())
    path = configuration(broker.port)
    done = command_line("check", "--config", path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"PASS  configuration  {path}: 1 listener, 1 upstream"
    assert lines[-2] == "The same by hand:"
    assert lines[-1].startswith("openssl s_client -connect localhost:")
    done = command_line("check", "--config", path, "--quiet")
    assert (done.returncode, done.stdout) == (0, "")
    warned = start_broker(tls=certify(root).server(), serve=answer(b"\x20\x02\x00\x04"))
    path = configuration(warned.port)
    done = command_line("check", "--config", path, "--quiet", "--strict")
    assert (done.returncode, done.stderr) == (2, "")
    assert [line[:4] for line in done.stdout.splitlines()] == ["WARN", "    "]
    done = command_line("check", "--json", "--config", path.with_name("none"))
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["result"] == "FAIL"


def test_an_interrupted_check_says_so(configuration: Callable[..., Path], start_broker: Callable[..., Broker]) -> None:
    """Ctrl-C ends a check that waits, with the status that shells give it and no verdict on what was under way."""
    broker = start_broker(tls=None, serve=BrokerConnection.read_to_end)
    path = configuration(broker.port)
    path.write_text(path.read_text().replace("tls = 0.3", "tls = 60"))
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.cli.main", "check", "--config", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_from_a_terminal,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "client-hello" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, "", "mqtts-gateway: interrupted\n")
