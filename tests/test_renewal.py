"""Client certificates that renew themselves: requests, checks, files, times, and a real CA by openssl."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, frozen
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from twisted.internet.defer import Deferred

from gateway.cli.main import console
from gateway.cli.service_view import ServiceView
from gateway.config import TLS, from_mapping
from gateway.errors import ConfigError
from gateway.ops.renewal import Renewals, whose
from gateway.ops.status_words import Level, renewal_lines, verdict
from gateway.pieces import at_once
from gateway.tls.renewal import (
    RenewalFailed,
    check_clock,
    checked_chain,
    due_at,
    key_for,
    read_held,
    replace,
    request_for,
)
from gateway.tls.trust import ClientIdentity, read_client_identity
from tests import mqtt_packets as mqtt
from tests.est import EST
from tests.harness import PATIENCE, Broker, Device, RunningGateway, eventually
from tests.pages import files_of
from tests.pki import CLIENT, Certified, certify, certify_ca, rsa_key
from tests.tools import require_tool

CA = certify_ca(subject="plant CA")
OTHER_CA = certify_ca(subject="another CA")
BROKER = certify(CA)
NAMES = ("DNS:gateway.plant.example", "URI:urn:plant:7")
# Two thirds of 90 days are over, and the jitter too.
OLD = certify(CA, subject="gateway", names=NAMES, valid_from=-80, valid_for=90, purposes=(CLIENT,))
NOW = datetime.now(UTC)


def renewed(**changes: Any) -> Certified:
    """What the CA should give back for `OLD`, but for `changes`."""
    arguments: dict[str, Any] = {"issuer": CA, "subject": "gateway", "names": NAMES, "purposes": (CLIENT,)}
    return certify(**{**arguments, "key": OLD.key, **changes})


def test_the_request_has_the_names_and_the_key_of_the_certificate() -> None:
    """The CA sees who asks; the old certificate's names are asked for, no others."""
    request = x509.load_pem_x509_csr(request_for(OLD.certificate, OLD.key))
    assert request.is_signature_valid
    assert request.subject == OLD.certificate.subject
    assert request.public_key() == OLD.key.public_key()
    before = OLD.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value == before


@pytest.mark.parametrize(
    "key", [rsa_key(), ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()]
)
def test_a_rotated_key_is_new_and_of_the_same_kind(key: Any) -> None:
    """Only with rotate_key."""
    identity = ClientIdentity((OLD.certificate,), key)
    assert key_for(identity, rotate=False) is key
    new: Any = key_for(identity, rotate=True)
    assert new.public_key() != key.public_key()
    assert type(new) is type(key)
    if isinstance(key, rsa.RSAPrivateKey):
        assert new.key_size == key.key_size
    if isinstance(key, ec.EllipticCurvePrivateKey):
        assert new.curve.name == key.curve.name
    assert x509.load_pem_x509_csr(request_for(OLD.certificate, new)).is_signature_valid


def test_what_the_ca_should_give_back_is_accepted() -> None:
    """With its intermediates, in order."""
    between = certify_ca(CA, subject="intermediate")
    good = renewed(issuer=between)
    chain = checked_chain(good.pem + between.pem, OLD.key, OLD.certificate, NOW)
    assert chain == [good.certificate, between.certificate]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (b"", "no usable certificate"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no usable certificate"),
        (renewed().pem + renewed().key_pem, "private key"),
        (renewed(key=ec.generate_private_key(ec.SECP256R1())).pem, "key of the request"),
        (renewed(subject="somebody").pem, "another subject"),
        (renewed(names=NAMES[:1]).pem, "subjectAltNames"),
        (renewed(names=(*NAMES, "DNS:more.example")).pem, "subjectAltNames"),
        (renewed(names=()).pem, "subjectAltNames"),
        (renewed(valid_from=1).pem, "is valid from"),
        (renewed(valid_from=-90, valid_for=89).pem, "is valid from"),
        (renewed(valid_from=-1, valid_for=10).pem, "no later than the old one"),
        (renewed().pem + OTHER_CA.pem, "not issued by"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_may_not_replace_the_certificate(output: bytes, words: str) -> None:
    """Another key, another name, another time: the old certificate stays."""
    with pytest.raises(RenewalFailed, match=words):
        checked_chain(output, OLD.key, OLD.certificate, NOW)


@pytest.mark.parametrize("now", [datetime(2020, 1, 1, tzinfo=UTC), OLD.certificate.not_valid_before_utc - timedelta(1)])
def test_a_clock_that_cannot_be_right(now: datetime) -> None:
    """Before this version was made, or before the certificate was."""
    with pytest.raises(RenewalFailed, match="clock"):
        check_clock(OLD.certificate, now)
    check_clock(OLD.certificate, NOW)


def held_in(directory: Path, *, one_file: bool) -> TLS:
    """Write `OLD`, and return the table that names it."""
    certificate, key = directory / "client.pem", directory / "client.key"
    if one_file:
        OLD.write(certificate).chmod(0o640)
        return TLS(client_cert=certificate)
    certificate.write_bytes(OLD.pem)
    key.write_bytes(OLD.key_pem)
    certificate.chmod(0o644)
    return TLS(client_cert=certificate, client_key=key)


def pair_of(table: TLS) -> tuple[list[x509.Certificate], Any]:
    """What the gateway reads."""
    identity, problems = read_client_identity(table)
    assert identity is not None, problems
    key: Any = identity.key
    return list(identity.chain), key.private_numbers()


@pytest.mark.parametrize("one_file", [True, False])
@pytest.mark.parametrize("linked", [True, False])
def test_the_file_is_replaced_and_the_last_one_kept(tmp_path: Path, one_file: bool, linked: bool) -> None:
    """Its mode stays; a symbolic link still leads to it; the key stays where it is."""
    table = held_in(tmp_path, one_file=one_file)
    file = tmp_path / "client.pem"
    before, mode = file.read_bytes(), file.stat().st_mode
    if linked:
        (tmp_path / "links").mkdir()
        link = tmp_path / "links" / "current.pem"
        link.symlink_to(file)
        table = evolve(table, client_cert=link)
    new = renewed()
    replace(read_held(table), [new.certificate], None)
    assert pair_of(table) == ([new.certificate], OLD.key.private_numbers())
    assert file.stat().st_mode == mode
    assert (tmp_path / "client.pem.old").read_bytes() == before
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_the_file_of_another_user_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the service does with a file that root has put into its directory: it can neither link to it nor own it."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("os.fchown", refuse)
    table = held_in(tmp_path, one_file=False)
    new = renewed()
    replace(read_held(table), [new.certificate], None)
    assert pair_of(table)[0] == [new.certificate]
    assert (tmp_path / "client.pem.old").read_bytes() == OLD.pem


def test_a_file_keeps_its_owner_and_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is given back separately: a process may be allowed the one and not the other."""
    table = held_in(tmp_path, one_file=True)
    held = read_held(table)
    given: list[tuple[int, int]] = []
    real = os.fstat
    with monkeypatch.context() as patch:
        patch.setattr("os.fstat", lambda each: os.stat_result((*real(each)[:4], -7, -7, *real(each)[6:])))
        patch.setattr("os.fchown", lambda _, uid, gid: given.append((uid, gid)))
        replace(held, [renewed().certificate], None)
    like = held.file.stat()
    assert given == [(like.st_uid, -1), (-1, like.st_gid)] * 2


def test_a_replacement_that_fails_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt would leave another private key in the directory."""
    table = held_in(tmp_path, one_file=True)
    held = read_held(table)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(RenewalFailed, match="cannot be replaced: Input/output error"):
        replace(held, [renewed().certificate], None)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_a_rotated_key_replaces_the_old_one_in_the_same_moment(tmp_path: Path) -> None:
    """One file has both."""
    table = held_in(tmp_path, one_file=True)
    new = renewed(key=ec.generate_private_key(ec.SECP256R1()))
    replace(read_held(table), [new.certificate], new.key)
    assert pair_of(table) == ([new.certificate], new.key.private_numbers())
    assert OLD.key_pem not in (tmp_path / "client.pem").read_bytes()
    assert OLD.key_pem in (tmp_path / "client.pem.old").read_bytes()
    assert stat.S_IMODE((tmp_path / "client.pem").stat().st_mode) == 0o640


def test_a_file_that_somebody_else_has_replaced_is_left_alone(tmp_path: Path) -> None:
    """A renewal by hand meanwhile wins."""
    table = held_in(tmp_path, one_file=False)
    held = read_held(table)
    (tmp_path / "client.pem").write_bytes(renewed().pem)
    with pytest.raises(RenewalFailed, match="changed meanwhile"):
        replace(held, [renewed().certificate], None)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"renew_command": "/bin/x"}, "renew_command"),
        ({"client_cert": "a.pem", "renew_command": "x"}, "renew_command"),
        ({"client_cert": "a.pem", "rotate_key": True}, "rotate_key"),
        ({"client_cert": "a.pem", "client_key": "b.pem", "renew_command": "/bin/x", "rotate_key": True}, "rotate_key"),
        (
            {
                "client_cert": "a.pem",
                "client_key_password_file": "c",
                "renew_command": "/bin/x",
                "rotate_key": True,
            },
            "rotate_key",
        ),
    ],
)
def test_keys_that_contradict_each_other(table: dict[str, Any], key: str) -> None:
    """In [tls] and in rules."""
    upstream = [{"host": "broker"}]
    with pytest.raises(ConfigError, match=rf"tls\.{key}"):
        from_mapping({"upstream": upstream, "tls": table})
    with pytest.raises(ConfigError, match=rf"device\[0\]\.{key}"):
        from_mapping({"upstream": upstream, "device": [{"match_client_id": "x", **table}]})


# ---- when


class _Renewer:
    """Notes what it is asked for."""

    def __init__(self, now: datetime) -> None:
        self.time = now
        self.asked: list[Deferred[Any]] = []

    def now(self) -> datetime:
        return self.time

    async def renew(self, table: Any) -> Any:
        self.asked.append(Deferred())
        return await self.asked[-1]


@frozen(eq=False)
class _Keys:
    client: ClientIdentity | None


@frozen(eq=False)
class _Prepared:
    config: Any
    policy: Any
    keys: Any


def renewals_of(directory: Path, count: int = 1, now: datetime = NOW) -> tuple[Renewals, _Renewer, list[float]]:
    """The renewals of so many rules, each with `OLD`; a clock."""
    certificate = OLD.write(directory / "client.pem")
    rules = [
        {
            "name": f"d{number}",
            "match_client_id": f"d{number}",
            "client_cert": str(certificate),
            "renew_command": "/bin/x",
        }
        for number in range(count)
    ]
    config = from_mapping({"upstream": [{"host": "broker"}], "device": rules})
    identity = ClientIdentity((OLD.certificate,), OLD.key)
    prepared: Any = _Prepared(config, _Keys(None), {device: _Keys(identity) for device in config.device})
    renewer: Any = _Renewer(now)
    clock = [0.0]
    return Renewals(renewer, lambda: prepared, lambda: clock[0], lambda: 1.0), renewer, clock


def sweep(renewals: Renewals, clock: list[float], seconds: int) -> None:
    for _ in range(seconds):
        clock[0] += 1.0
        renewals.sweep()


def test_a_certificate_is_renewed_after_two_thirds_of_its_lifetime(tmp_path: Path) -> None:
    """Not before, and with jitter: 1/24 of the lifetime with the highest random number."""
    due = due_at(OLD.certificate) + timedelta(days=90) / 24
    renewals, renewer, clock = renewals_of(tmp_path, now=due - timedelta(minutes=1))
    sweep(renewals, clock, 30)
    assert not renewer.asked
    renewer.time = due
    sweep(renewals, clock, 30)
    assert len(renewer.asked) == 1


def test_nothing_is_renewed_while_the_clock_cannot_be_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that has lost its time may say anything before this version was made."""
    monkeypatch.setattr("gateway.tls.renewal.MADE", NOW + timedelta(days=1))
    renewals, renewer, clock = renewals_of(tmp_path)
    sweep(renewals, clock, 30)
    assert not renewer.asked
    assert not renewals.failing


def test_few_are_renewed_at_a_time_and_all_in_the_end(tmp_path: Path) -> None:
    """The first two are waited for."""
    renewals, renewer, clock = renewals_of(tmp_path, count=5)
    done = 0
    while done < 5:
        sweep(renewals, clock, 30)
        waiting = [each for each in renewer.asked if not each.called]
        assert len(waiting) == min(2, 5 - done)
        waiting[0].callback(renewed().certificate)
        done += 1
    sweep(renewals, clock, 30)
    assert len(renewer.asked) == renewals.done == 5


def test_failures_are_told_and_tried_again_less_and_less_often(
    tmp_path: Path, logged_errors: list[dict[str, Any]]
) -> None:
    """Each attempt doubles the delay; a success ends the complaint."""
    renewals, renewer, clock = renewals_of(tmp_path)
    began = []
    while len(began) < 4:
        before = len(renewer.asked)
        sweep(renewals, clock, 1)
        if len(renewer.asked) > before:
            began.append(clock[0])
            renewer.asked[-1].errback(RenewalFailed("no CA"))
            assert "no CA" in renewals.failing["d0"]
    delays = [later - earlier for earlier, later in pairwise(began)]
    assert delays[0] >= 60
    assert all(later > 1.5 * earlier for earlier, later in pairwise(delays))
    sweep(renewals, clock, 3600)
    renewer.asked[-1].callback(renewed().certificate)
    assert not renewals.failing
    assert (renewals.done, renewals.failed) == (1, 4)
    assert [event["event"] for event in logged_errors] == ["renewal-failed"] * 4
    logged_errors.clear()


def test_where_the_gateway_cannot_write_it_leaves_time_to_a_timer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it says so."""
    monkeypatch.setattr("gateway.ops.renewal.obstacle", lambda _: "read-only")
    due = due_at(OLD.certificate) + timedelta(days=90) / 24
    renewals, renewer, clock = renewals_of(tmp_path, now=due)
    sweep(renewals, clock, 120)
    assert not renewer.asked
    renewer.time = due_at(OLD.certificate, 3 / 4)
    sweep(renewals, clock, 120)
    assert len(renewer.asked) == 1


# ---- with openssl, a broker and a gateway


FILES = files_of("renewal.md")


def signing_program(directory: Path, ca: Certified = CA) -> list[str]:
    """The CA by openssl that docs/renewal.md has, word for word but for its directory; what it reads is kept."""
    require_tool("openssl")
    directory.mkdir(exist_ok=True)
    (directory / "ca.pem").write_bytes(ca.pem)
    (directory / "ca-key.pem").write_bytes(ca.key_pem)
    for name in ("client.ext", "sign"):
        (directory / name).write_text(FILES[name].replace("/etc/plant-ca", str(directory)))
    (directory / "sign").chmod(0o755)
    return ["/bin/sh", "-c", f"tee {shlex.quote(str(directory / 'read'))} | {shlex.quote(str(directory / 'sign'))}"]


def broker_of_ca(ca: Certified = CA) -> ssl.SSLContext:
    """A broker that wants a client certificate of the CA."""
    context = BROKER.server().context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=ca.pem.decode())
    return context


def serial_of(broker: Broker, index: int) -> int:
    """The serial number of the client certificate of a connection."""
    return int(broker.connection(index).socket.getpeercert()["serialNumber"], 16)


def established(gateway: RunningGateway, name: str = "d1") -> Device:
    device = Device(gateway.port)
    device.send(mqtt.connect(client_identifier=name))
    assert device.read(4) == mqtt.connack()
    return device


@pytest.fixture
def ca_pem(tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    path.write_bytes(CA.pem)
    return path


def status_of(gateway: RunningGateway) -> dict[str, Any]:
    document: dict[str, Any] = gateway.call(lambda: at_once(gateway.service.sight.document()))
    return document


@pytest.mark.usefixtures("reaping")
@pytest.mark.parametrize("rotate", [False, True])
def test_the_gateway_renews_its_certificate_and_no_session_notices(
    start_gateway: Callable[..., RunningGateway],
    start_broker: Callable[..., Broker],
    tmp_path: Path,
    ca_pem: Path,
    monkeypatch: pytest.MonkeyPatch,
    rotate: bool,
) -> None:
    """An established session stays under the old certificate; the next one is opened under the new one."""
    monkeypatch.setattr("gateway.dial.dialler._REFUSED_WITHIN", 0.05)
    monkeypatch.setattr("gateway.gateway.SWEEP_INTERVAL", 0.1)
    broker = start_broker(tls=broker_of_ca())
    file = OLD.write(tmp_path / "client.pem")
    command = signing_program(tmp_path / "ca")
    gateway = start_gateway(
        upstream=broker.port,
        ca_file=ca_pem,
        tls={"client_cert": str(file), "renew_command": command, "rotate_key": rotate},
    )
    with established(gateway) as before:
        eventually(lambda: gateway.service.renewals.done, "a renewal")
        eventually(lambda: gateway.service.ledger.reloads, "the reload of the new file")
        received = len(broker.received)
        before.send(mqtt.pingreq())
        eventually(lambda: len(broker.received) > received, "bytes of the old session")
        with established(gateway, "d2"):
            index = len(broker.connections) - 1
            new = x509.load_pem_x509_certificate(file.read_bytes())
            assert serial_of(broker, index) == new.serial_number != OLD.certificate.serial_number
    assert (new.public_key() == OLD.key.public_key()) is not rotate
    # The program was given a request, and nothing of a key.
    assert b"PRIVATE KEY" not in (tmp_path / "ca" / "read").read_bytes()
    # The proof was a connection without an MQTT byte.
    assert len(broker.connections) == 3
    assert sorted(map(len, (each.received for each in broker.connections)))[0] == 0
    document = status_of(gateway)
    assert (document["renewals"]["done"], document["renewals"]["failing"]) == (1, 0)


def enrolling_program(directory: Path, est: EST) -> list[str]:
    """The program for EST that docs/renewal.md has, word for word but for the server's name and the directories."""
    for tool in ("curl", "openssl"):
        require_tool(tool)
    program = directory / "reenroll"
    text = FILES["reenroll"].replace("https://est.plant.example/.well-known/est/simplereenroll", est.url)
    text = text.replace("/etc/mqtts-gateway/est-ca.pem", str(directory / "ca.pem"))
    program.write_text(text.replace("/var/lib/mqtts-gateway", str(directory)))
    program.chmod(0o755)
    return [str(program)]


@pytest.fixture
def est() -> Iterator[EST]:
    """An EST server of the CA's."""
    est = EST(CA)
    yield est
    est.stop()


@pytest.mark.usefixtures("reaping")
@pytest.mark.parametrize("status", [200, 202, 403])
def test_the_certificate_is_renewed_by_curl_from_an_est_server(
    start_gateway: Callable[..., RunningGateway],
    start_broker: Callable[..., Broker],
    tmp_path: Path,
    ca_pem: Path,
    est: EST,
    monkeypatch: pytest.MonkeyPatch,
    logged_errors: list[dict[str, Any]],
    status: int,
) -> None:
    """The server knows the gateway by its certificate; a request that waits for approval, or is refused, has failed."""
    monkeypatch.setattr("gateway.dial.dialler._REFUSED_WITHIN", 0.05)
    # systemd gives the program this directory, as it does the gateway.
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    est.status = status
    broker = start_broker(tls=broker_of_ca())
    certificate, key = tmp_path / "client.pem", tmp_path / "credentials_client.key"
    certificate.write_bytes(OLD.pem)
    key.write_bytes(OLD.key_pem)
    gateway = start_gateway(
        upstream=broker.port,
        ca_file=ca_pem,
        tls={
            "client_cert": str(certificate),
            "client_key": str(key),
            "renew_command": enrolling_program(tmp_path, est),
        },
    )
    eventually(lambda: gateway.service.renewals.done or logged_errors, "a renewal, or its failure")
    assert len(est.requests) == 1
    new = x509.load_pem_x509_certificate(certificate.read_bytes())
    if status == 200:
        assert new.serial_number != OLD.certificate.serial_number
        assert new.public_key() == OLD.key.public_key()
    else:
        assert new == OLD.certificate
        assert [event["event"] for event in logged_errors] == ["renewal-failed"]
        logged_errors.clear()


@pytest.mark.usefixtures("reaping")
def test_a_certificate_that_the_broker_refuses_replaces_nothing(
    start_gateway: Callable[..., RunningGateway],
    start_broker: Callable[..., Broker],
    tmp_path: Path,
    ca_pem: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged_errors: list[dict[str, Any]],
) -> None:
    """With TLS 1.3 the refusal comes after the handshake. Status, verdict and metrics say what failed."""
    monkeypatch.setattr("gateway.dial.dialler._REFUSED_WITHIN", 30.0)
    broker = start_broker(tls=broker_of_ca())
    file = OLD.write(tmp_path / "client.pem")
    before = file.read_bytes()
    gateway = start_gateway(
        upstream=broker.port,
        ca_file=ca_pem,
        device=[
            {
                "name": "pump",
                "match_client_id": "d1",
                "client_cert": str(file),
                "renew_command": signing_program(tmp_path / "ca", OTHER_CA),
            }
        ],
    )
    eventually(lambda: gateway.service.renewals.failing, "a failure")
    assert file.read_bytes() == before
    assert not (tmp_path / "client.pem.old").exists()
    assert broker.received == b""
    document = status_of(gateway)
    assert document["renewals"]["failing"] == 1
    assert "tls-client-certificate-refused" in document["renewals"]["first"][0]["problem"]
    found = verdict(document)
    assert found.level is Level.ATTENTION
    assert any("pump" in reason and "renew" in reason for reason in found.reasons)
    assert [event["event"] for event in logged_errors] == ["renewal-failed"]
    logged_errors.clear()


def configured(tmp_path: Path, port: int, command: list[str], old: Certified = OLD) -> Path:
    """A configuration file with the gateway's own certificate and a device's."""
    (tmp_path / "roots.pem").write_bytes(CA.pem)
    old.write(tmp_path / "own.pem").chmod(0o600)
    old.write(tmp_path / "pump.pem").chmod(0o600)
    words = ", ".join(f"'{word}'" for word in command)
    config = tmp_path / "gateway.toml"
    config.write_text(
        f"""
        [[upstream]]
        host = "localhost"
        port = {port}
        [tls]
        ca_file = "roots.pem"
        client_cert = "own.pem"
        renew_command = [{words}]
        [[device]]
        match_client_id = "pump"
        client_cert = "pump.pem"
        renew_command = [{words}]
        """
    )
    return config


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `mqtts-gateway`: it needs a reactor of its own."""
    command = [
        sys.executable,
        "-c",
        "import sys; from gateway.cli.main import console; sys.exit(console())",
        *arguments,
    ]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
def test_the_command_renews_what_is_asked_for_and_what_is_due(
    start_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    """One device; then only the gateway's own is due; then nothing."""
    broker = start_broker(tls=broker_of_ca())
    config = configured(tmp_path, broker.port, signing_program(tmp_path / "ca"))
    own, pump = (tmp_path / "own.pem", tmp_path / "pump.pem")
    before = own.read_bytes()
    told = run_command("device", "renew", "pump", "--config", str(config))
    assert told.returncode == 0, told.stderr
    assert "renewed" in told.stdout
    assert own.read_bytes() == before != pump.read_bytes()
    renewed_pump = pump.read_bytes()
    told = run_command("device", "renew", "--due", "--config", str(config))
    assert told.returncode == 0, told.stderr
    assert own.read_bytes() != before
    assert pump.read_bytes() == renewed_pump
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    assert broker.received == b""
    assert console(["device", "renew", "--due", "--config", str(config)]) == 0


@pytest.mark.slow
def test_the_command_says_what_failed(start_broker: Callable[..., Broker], tmp_path: Path) -> None:
    """The program's own words reach the terminal."""
    config = configured(tmp_path, start_broker().port, ["/bin/sh", "-c", "echo the CA is closed >&2; exit 7"])
    before = (tmp_path / "own.pem").read_bytes()
    told = run_command("device", "renew", "--config", str(config))
    assert told.returncode == 1
    assert "the CA is closed" in told.stderr
    assert "status 7" in told.stderr
    assert (tmp_path / "own.pem").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nobody"], "no rule"), (["quiet"], "no renew_command"), (["pump", "--due"], "cannot be used together")],
)
def test_the_command_refuses(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A device without a rule, a rule without a command."""
    config = configured(tmp_path, 8883, ["/bin/false"])
    config.write_text(config.read_text() + '[[device]]\nmatch_client_id = "quiet"\n')
    assert console(["device", "renew", *arguments, "--config", str(config)]) == 1
    assert words in capsys.readouterr().err


def test_check_says_what_keeps_a_certificate_from_being_renewed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is missing; the directory is read-only, as for the service in /etc; the file is PKCS #12."""
    config = configured(tmp_path, 8883, ["/nowhere/sign"])
    console(["check", "--files", "--config", str(config)])
    assert "/nowhere/sign: renew_command: does not exist" in capsys.readouterr().out
    monkeypatch.setattr("gateway.cli.files.obstacle", lambda _: "it is read-only")
    console(["check", "--files", "--config", str(config)])
    shown = capsys.readouterr().out
    assert "own.pem: the gateway cannot replace it when it is renewed: it is read-only" in shown
    assert "pump.pem: the gateway cannot replace it when it is renewed: it is read-only" in shown
    view = ServiceView("mqtts-gateway.service")
    assert "read-only" in view.unwritable(tmp_path / "own.pem")
    assert view.unwritable(Path("/var/lib/mqtts-gateway/own.pem")) == ""


@pytest.mark.slow
@pytest.mark.usefixtures("reaping")
def test_no_session_of_a_hundred_is_lost(
    start_gateway: Callable[..., RunningGateway],
    start_broker: Callable[..., Broker],
    tmp_path: Path,
    ca_pem: Path,
) -> None:
    """A hundred devices are connected while openssl renews; each still reaches the broker afterwards."""
    broker = start_broker(tls=broker_of_ca())
    file = OLD.write(tmp_path / "client.pem")
    gateway = start_gateway(upstream=broker.port, ca_file=ca_pem, tls={"client_cert": str(file)})
    with contextlib.ExitStack() as stack:
        devices = [stack.enter_context(established(gateway, f"d{number}")) for number in range(100)]
        gateway.change(
            tls={
                "ca_file": str(ca_pem),
                "client_cert": str(file),
                "renew_command": signing_program(tmp_path / "ca"),
            }
        )
        eventually(lambda: gateway.service.renewals.done, "a renewal")
        eventually(lambda: gateway.service.ledger.reloads, "the reload of the new file")
        received = [bytes(each.received) for each in broker.connections[:100]]
        for device in devices:
            device.send(mqtt.pingreq())
        for connection, before in zip(broker.connections[:100], received, strict=True):
            eventually(lambda c=connection, b=before: bytes(c.received) == b + mqtt.pingreq(), "a PINGREQ")
        assert not gateway.ended
        with established(gateway, "new"):
            new = x509.load_pem_x509_certificate(file.read_bytes())
            assert serial_of(broker, len(broker.connections) - 1) == new.serial_number != OLD.certificate.serial_number


def test_a_name_is_shown_as_it_is() -> None:
    """Only the first letter of the sentence is made a capital."""
    first = [{"whose": whose("Pump-3 CA"), "problem": "no answer"}]
    (line,) = renewal_lines({"renewals": {"failing": 1, "first": first}})
    assert line.startswith("The certificate of rule Pump-3 CA cannot be renewed: no answer. ")
