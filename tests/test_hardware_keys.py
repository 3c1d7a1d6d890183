"""docs/hardware-keys.md: a key in a token (SoftHSM 2) signs through the nginx that the page describes."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key

from gateway.errors import EndReason
from tests import mqtt_packets as mqtt
from tests.balancers import Program
from tests.fleet import Fleet, refused
from tests.harness import Broker, Device, RunningGateway, eventually
from tests.leftovers import Leftovers
from tests.mosquitto import Mosquitto
from tests.pages import files_of
from tests.pki import CLIENT, Certified, certify, certify_ca
from tests.ports import free_port
from tests.tools import require_file, require_tool

FILES = files_of("hardware-keys.md")
PIN = "654321"
ROOT = certify_ca()

pytestmark = pytest.mark.slow


class Site:
    """The machine of the page, in a directory: a token with a key, its certificate, the files, a broker."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.token, self.gateway = directory / "token", directory / "gateway"
        for each in (self.token, self.gateway / "credentials", directory / "tokens"):
            each.mkdir(parents=True)
        (directory / "softhsm2.conf").write_text(f"directories.tokendir = {directory}/tokens\n")
        self.environment = {
            **os.environ,
            "SOFTHSM2_CONF": str(directory / "softhsm2.conf"),
            "OPENSSL_CONF": str(self.token / "openssl.cnf"),
        }
        require_file("/usr/lib/*/engines-3/pkcs11.so", "libengine-pkcs11-openssl")
        require_file("/usr/lib/nginx/modules/ngx_stream_module.so", "libnginx-mod-stream")
        self.nginx = require_tool("nginx")
        self.module = require_file("/usr/lib/softhsm/libsofthsm2.so", "softhsm2")
        self.leaf = self._key()
        (self.token / "client.pem").write_bytes(self.leaf.public_bytes(Encoding.PEM))
        (self.token / "broker-ca.pem").write_bytes(ROOT.pem)
        subprocess.run(["sh", "-ec", self._here(FILES["certificates"])], capture_output=True, check=True)
        self.write_openssl(PIN)

    def _key(self) -> x509.Certificate:
        """Make a key in the token, and have a certificate issued for it."""
        command = [require_tool("softhsm2-util"), "--init-token", "--free", "--label", "plant"]
        self._run(*command, "--so-pin", "12345678", "--pin", PIN)
        tool = [require_tool("pkcs11-tool"), "--module", str(self.module), "--token-label", "plant"]
        key = ["--keypairgen", "--key-type", "EC:prime256v1", "--label", "gateway", "--id", "01"]
        self._run(*tool, "--login", "--pin", PIN, *key)
        public = self.directory / "public.der"
        self._run(*tool, "--read-object", "--type", "pubkey", "--label", "gateway", "--output-file", str(public))
        held = load_der_public_key(public.read_bytes())
        assert isinstance(held, ec.EllipticCurvePublicKey)
        like = certify(ROOT, subject="gateway", names=(), purposes=(CLIENT,)).certificate
        builder = x509.CertificateBuilder(like.issuer, like.subject, held, like.serial_number)
        builder = builder.not_valid_before(like.not_valid_before_utc).not_valid_after(like.not_valid_after_utc)
        return builder.sign(ROOT.key, SHA256())

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"

    def _here(self, text: str) -> str:
        for there, here in (
            ("/etc/mqtts-gateway-token", self.token),
            ("/run/mqtts-gateway-token", self.directory),
            ("/etc/mqtts-gateway", self.gateway),
            ("/usr/lib/softhsm/libsofthsm2.so", self.module),
        ):
            text = text.replace(there, str(here))
        return text

    def write_openssl(self, pin: str) -> None:
        """Write OpenSSL's configuration for nginx."""
        (self.token / "openssl.cnf").write_text(self._here(FILES["openssl.cnf"]).replace("1234", pin))

    def start(self, broker_port: int) -> Program:
        """Start nginx."""
        text = self._here(FILES["nginx.conf"]).replace("8884", str(self.port))
        # IPv4, where the broker of the tests listens; the name that is verified stays.
        text = text.replace("broker.example.com:8883", f"127.0.0.1:{broker_port}")
        text = text.replace("broker.example.com", "localhost")
        path = self.token / "nginx.conf"
        path.write_text(text)
        command = ["env", *(f"{key}={self.environment[key]}" for key in ("SOFTHSM2_CONF", "OPENSSL_CONF"))]
        return Program([*command, self.nginx, "-e", "stderr", "-c", str(path)], self.directory / "nginx.log")

    def settings(self) -> dict[str, object]:
        """Return the gateway's settings of the page."""
        table = tomllib.loads(FILES["gateway.toml"].replace("8884", str(self.port)))
        paths = {key: str(self.gateway / name) for key, name in table["tls"].items()}
        return {"upstream": table["upstream"], "ca_file": Path(paths.pop("ca_file")), "tls": paths}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Return the site, whose token and certificates the tests share."""
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture
def start(site: Site) -> Iterator[Callable[[int], Program]]:
    """Return a function that starts nginx, in front of a broker."""
    programs: list[Program] = []

    def run(broker_port: int) -> Program:
        (site.directory / "nginx.pid").unlink(missing_ok=True)
        programs.append(site.start(broker_port))
        return programs[-1]

    yield run
    for program in programs:
        program.process.kill()
        program.process.wait()


def listens(site: Site, program: Program) -> None:
    """Wait until nginx does."""
    program.wait_until((site.directory / "nginx.pid").exists, "nginx listens")


def demanding(certified: Certified, maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """Return the context of a broker that demands a certificate of `ROOT`."""
    context = certified.server().context()
    context.maximum_version = maximum
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=ROOT.pem.decode())
    return context


@pytest.mark.parametrize("maximum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_token_signs_for_the_session(
    site: Site,
    start: Callable[[int], Program],
    start_broker: Callable[..., Broker],
    start_gateway: Callable[..., RunningGateway],
    maximum: ssl.TLSVersion,
) -> None:
    """The broker gets the token's certificate; a device that vanishes ends there without DISCONNECT."""
    broker = start_broker(tls=demanding(certify(ROOT), maximum))
    listens(site, start(broker.port))
    gateway = start_gateway(**site.settings())
    device = Device(gateway.port)
    device.send(mqtt.connect("d1"))
    assert device.read(4) == mqtt.connack()
    connection = broker.connection()
    assert connection.socket.getpeercert(binary_form=True) == site.leaf.public_bytes(Encoding.DER)
    device.reset()
    assert connection.finished.wait(60)
    assert bytes(connection.received) == mqtt.connect("d1")
    gateway.wait_empty()


@pytest.mark.parametrize(
    "broker",
    [certify(ROOT, names=["DNS:other.test"]), certify(certify_ca()), certify(ROOT, valid_from=-10, valid_for=5)],
    ids=["another name", "an unknown CA", "expired"],
)
def test_a_broker_that_is_not_the_right_one_gets_no_byte(
    site: Site,
    start: Callable[[int], Program],
    start_broker: Callable[..., Broker],
    start_gateway: Callable[..., RunningGateway],
    broker: Certified,
) -> None:
    """Nginx verifies it; the device is told that there is no broker."""
    wrong = start_broker(tls=demanding(broker))
    program = start(wrong.port)
    listens(site, program)
    gateway = start_gateway(**site.settings())
    with Device(gateway.port) as device:
        device.send(mqtt.connect("d1"))
        assert device.read_to_end() == mqtt.connack(code=3)
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_CLOSED
    program.wait_for("upstream SSL certificate ")
    assert (wrong.accepted, wrong.received) == (1, b"")


def test_a_hundred_devices_through_reload_and_outages(
    site: Site, start: Callable[[int], Program], start_gateway: Callable[..., RunningGateway]
) -> None:
    """Mosquitto demands the token's certificate; what ends with nginx or mosquitto comes back with it."""
    chain, key = site.directory / "broker.pem", site.directory / "broker.key"
    own = certify(ROOT)
    chain.write_bytes(own.pem)
    key.write_bytes(own.key_pem)
    port = free_port()

    def start_mosquitto() -> Mosquitto:
        lines = [f"listener {port} 127.0.0.1", "require_certificate true", "use_identity_as_username true"]
        lines += [f"cafile {site.token / 'broker-ca.pem'}", f"certfile {chain}", f"keyfile {key}"]
        return Mosquitto(site.directory, "\n".join([*lines, "allow_anonymous false", ""]), port)

    broker = start_mosquitto()
    try:
        nginx = start(port)
        listens(site, nginx)
        gateway = start_gateway(**site.settings(), failover={"retry_first": 0.1, "retry_max": 0.1})
        leftovers = Leftovers(gateway)
        fleet = Fleet(gateway)
        fleet.connect()
        gateway.change(limits={"max_packet_size": 100_000})
        fleet.publish()
        assert not gateway.ended

        nginx.stop()
        fleet.lose(EndReason.UPSTREAM_LOST)
        eventually(lambda: refused(gateway) is EndReason.TCP_REFUSED, lambda: f"so far {gateway.ended[-1]}")
        listens(site, start(port))
        fleet.connect()
        fleet.publish()

        broker.stop()
        fleet.lose(EndReason.UPSTREAM_LOST)
        eventually(lambda: refused(gateway) is EndReason.UPSTREAM_CLOSED, lambda: f"so far {gateway.ended[-1]}")
        broker = start_mosquitto()
        fleet.connect()
        # For the gateway, nginx is the broker: it was verified in sessions that ended before CONNACK, too.
        gateway.ended.clear()
        fleet.publish()
        fleet.disconnect()
        leftovers.check()
    finally:
        broker.stop()


def test_nobody_else_on_the_machine_can_use_the_token(
    site: Site,
    start: Callable[[int], Program],
    start_broker: Callable[..., Broker],
    start_gateway: Callable[..., RunningGateway],
) -> None:
    """Without the gateway's local certificate, nginx does not even connect to the broker."""
    broker = start_broker(tls=demanding(certify(ROOT)))
    program = start(broker.port)
    listens(site, program)
    context = ssl.create_default_context(cafile=str(site.token / "nginx.pem"))
    with (
        socket.create_connection(("127.0.0.1", site.port), 60) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as stranger,
        contextlib.suppress(ssl.SSLError, ConnectionError),
    ):
        stranger.sendall(mqtt.connect("d1"))
        assert stranger.recv(1) == b""
    settings = site.settings()
    settings["tls"] = {}
    gateway = start_gateway(**settings)
    with Device(gateway.port) as device:
        device.send(mqtt.connect("d1"))
        assert device.read_to_end() == mqtt.connack(code=3)
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_CLOSED
    assert broker.accepted == 0


def test_a_wrong_pin_keeps_nginx_from_starting(
    site: Site, start: Callable[[int], Program], start_gateway: Callable[..., RunningGateway]
) -> None:
    """It ends, and says why; the PIN is in no log."""
    site.write_openssl("999999")
    try:
        program = start(1)
        eventually(lambda: program.process.poll() is not None, "nginx ends")
    finally:
        site.write_openssl(PIN)
    assert "PIN incorrect" in program.log
    assert "999999" not in program.log
    gateway = start_gateway(**site.settings())
    with Device(gateway.port) as device:
        device.send(mqtt.connect("d1"))
        assert device.read_to_end() == mqtt.connack(code=3)
    assert gateway.wait_ended().reason is EndReason.TCP_REFUSED
