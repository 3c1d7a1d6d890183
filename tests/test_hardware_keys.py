"""docs/hardware-keys.md: a key in a token (SoftHSM 2, or swtpm) signs through the nginx that the page describes."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key

from gateway.errors import EndReason
from tests import mqtt_packets as mqtt
from tests.balancers import Program
from tests.fleet import PUBACK, Fleet, refused
from tests.harness import PATIENCE, Broker, Device, RunningGateway, eventually
from tests.leftovers import Leftovers
from tests.mosquitto import Mosquitto
from tests.pages import files_of
from tests.pki import CLIENT, Certified, certify, certify_ca
from tests.ports import free_port, free_port_pair
from tests.tools import require_file, require_tool

FILES = files_of("hardware-keys.md")
PIN, SO_PIN = "654321", "12345678"
ROOT = certify_ca()
# TPM 2.0 Library, Part 3: TPM2_Shutdown(TPM_SU_CLEAR), and the response header with TPM_RC_SUCCESS.
TPM2_SHUTDOWN = bytes.fromhex("8001 0000000c 00000145 0000")
TPM2_SUCCESS = bytes.fromhex("8001 0000000a 00000000")

pytestmark = pytest.mark.slow


class Token:
    """A token, and how programs get at it."""

    module: Path
    environment: dict[str, str]

    def make_key(self) -> bytes:
        """Make a key in the token, and return its public half in DER."""
        raise NotImplementedError

    def switch_on(self) -> None:
        """Have the token ready, as after a start of its machine; it is, unless a kind of token says otherwise."""

    def switch_off(self) -> None:
        """Have it no longer answer, if this kind of token can."""


class SoftHSM(Token):
    """SoftHSM 2 with an EC key."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.module = require_file("/usr/lib/softhsm/libsofthsm2.so", "softhsm2")
        self.environment = {"SOFTHSM2_CONF": str(directory / "softhsm2.conf")}
        (directory / "tokens").mkdir()
        (directory / "softhsm2.conf").write_text(f"directories.tokendir = {directory}/tokens\n")

    def make_key(self) -> bytes:
        """Make it, with the tools of SoftHSM and OpenSC."""
        command = [require_tool("softhsm2-util"), "--init-token", "--free", "--label", "plant"]
        run([*command, "--so-pin", SO_PIN, "--pin", PIN], self.environment)
        tool = [require_tool("pkcs11-tool"), "--module", str(self.module), "--token-label", "plant"]
        key = ["--keypairgen", "--key-type", "EC:prime256v1", "--label", "gateway", "--id", "01"]
        run([*tool, "--login", "--pin", PIN, *key], self.environment)
        public = self._directory / "public.der"
        read = ["--read-object", "--type", "pubkey", "--label", "gateway", "--output-file", str(public)]
        run([*tool, *read], self.environment)
        return public.read_bytes()


class TPM(Token):
    """A simulated TPM (swtpm), for one program at a time: there is no resource manager, as in /dev/tpmrm0."""

    def __init__(self, directory: Path, key: str = "EC:prime256v1") -> None:
        self._directory = directory
        self._key = key
        self._port = free_port_pair()
        self._program: Program | None = None
        require_tool("pkcs11-tool")
        require_tool("swtpm")
        self.module = require_file("/usr/lib/*/libtpm2_pkcs11.so.1", "libtpm2-pkcs11-1")
        self.environment = {
            "TPM2_PKCS11_STORE": str(directory / "store"),
            "TPM2_PKCS11_TCTI": f"swtpm:host=127.0.0.1,port={self._port}",
        }
        (directory / "tpm").mkdir()

    def make_key(self) -> bytes:
        """Make it, as the page says."""
        self.switch_on()
        commands = FILES["tpm"].replace("/usr/lib/x86_64-linux-gnu/libtpm2_pkcs11.so.1", str(self.module))
        commands = commands.replace("/var/lib/mqtts-gateway-token", self.environment["TPM2_PKCS11_STORE"])
        commands = commands.replace("gateway-public.der", str(self._directory / "public.der"))
        commands = commands.replace("EC:prime256v1", self._key)
        run(["sh", "-ec", commands], {**self.environment, "PIN": PIN, "SO_PIN": SO_PIN})
        return (self._directory / "public.der").read_bytes()

    def switch_on(self) -> None:
        """Start it again, which unloads the keys of programs that were killed."""
        if self._program is not None and self._program.process.poll() is None:
            self._shut_down()
        self.switch_off()
        pid = self._directory / "swtpm.pid"
        pid.unlink(missing_ok=True)
        command = [require_tool("swtpm"), "socket", "--tpm2", "--tpmstate", f"dir={self._directory / 'tpm'}"]
        command += ["--server", f"type=tcp,port={self._port}", "--ctrl", f"type=tcp,port={self._port + 1}"]
        command += ["--flags", "not-need-init,startup-clear", "--pid", f"file={pid}"]
        self._program = Program(command, self._directory / "swtpm.log")
        self._program.wait_until(pid.exists, "swtpm listens")

    def _shut_down(self) -> None:
        """Announce the end: each one without TPM2_Shutdown counts as a wrong PIN, and after three it is locked."""
        with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as connection:
            connection.sendall(TPM2_SHUTDOWN)
            assert connection.recv(len(TPM2_SUCCESS), socket.MSG_WAITALL) == TPM2_SUCCESS

    def switch_off(self) -> None:
        """End it as a power cut does."""
        if self._program is not None:
            self._program.stop()


class TPMWithRSA(TPM):
    """A TPM with an RSA key."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "rsa:2048")


def run(command: list[str], environment: dict[str, str]) -> None:
    """Run a program that must succeed."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


class Site:
    """The machine of the page, in a directory: a token with a key, its certificate, the files, a broker."""

    def __init__(self, directory: Path, hardware: Token) -> None:
        self.directory = directory
        self.port = free_port()
        self.token, self.gateway = directory / "token", directory / "gateway"
        for each in (self.token, self.gateway / "credentials"):
            each.mkdir(parents=True)
        require_file("/usr/lib/*/engines-3/pkcs11.so", "libengine-pkcs11-openssl")
        require_file("/usr/lib/nginx/modules/ngx_stream_module.so", "libnginx-mod-stream")
        self.nginx = require_tool("nginx")
        self.hardware = hardware
        self.leaf = self._certify(self.hardware.make_key())
        (self.token / "client.pem").write_bytes(self.leaf.public_bytes(Encoding.PEM))
        (self.token / "broker-ca.pem").write_bytes(ROOT.pem)
        subprocess.run(["sh", "-ec", self._here(FILES["certificates"])], capture_output=True, check=True)
        self.write_openssl(PIN)

    @staticmethod
    def _certify(public: bytes) -> x509.Certificate:
        """Issue the certificate for the token's key."""
        held = load_der_public_key(public)
        assert isinstance(held, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
        like = certify(ROOT, subject="gateway", names=(), purposes=(CLIENT,)).certificate
        builder = x509.CertificateBuilder(like.issuer, like.subject, held, like.serial_number)
        builder = builder.not_valid_before(like.not_valid_before_utc).not_valid_after(like.not_valid_after_utc)
        return builder.sign(ROOT.key, SHA256())

    def _here(self, text: str) -> str:
        for there, here in (
            ("/etc/mqtts-gateway-token", self.token),
            ("/run/mqtts-gateway-token", self.directory),
            ("/etc/mqtts-gateway", self.gateway),
            ("/usr/lib/softhsm/libsofthsm2.so", self.hardware.module),
        ):
            text = text.replace(there, str(here))
        return text

    def write_openssl(self, pin: str) -> None:
        """Write OpenSSL's configuration for nginx."""
        (self.token / "openssl.cnf").write_text(self._here(FILES["openssl.cnf"]).replace("PIN = 1234", f"PIN = {pin}"))

    def start(self, broker_port: int) -> Program:
        """Start nginx, at a token that nobody has used since it was switched on."""
        self.hardware.switch_on()
        text = self._here(FILES["nginx.conf"]).replace("8884", str(self.port))
        # IPv4, where the broker of the tests listens; the name that is verified stays.
        text = text.replace("broker.example.com:8883", f"127.0.0.1:{broker_port}")
        text = text.replace("broker.example.com", "localhost")
        path = self.token / "nginx.conf"
        path.write_text(text)
        environment = {**self.hardware.environment, "OPENSSL_CONF": str(self.token / "openssl.cnf")}
        command = ["env", *(f"{key}={value}" for key, value in environment.items())]
        return Program([*command, self.nginx, "-e", "stderr", "-c", str(path)], self.directory / "nginx.log")

    def settings(self) -> dict[str, object]:
        """Return the gateway's settings of the page."""
        table = tomllib.loads(FILES["gateway.toml"].replace("8884", str(self.port)))
        paths = {key: str(self.gateway / name) for key, name in table["tls"].items()}
        return {"upstream": table["upstream"], "ca_file": Path(paths.pop("ca_file")), "tls": paths}


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Return the site, whose token and certificates the tests share; with SoftHSM, unless a test names another."""
    directory = tmp_path_factory.mktemp("site")
    hardware = getattr(request, "param", SoftHSM)(directory)
    try:
        yield Site(directory, hardware)
    finally:
        hardware.switch_off()


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
@pytest.mark.parametrize("site", [SoftHSM, TPM, TPMWithRSA], indirect=True)
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


@pytest.mark.parametrize("site", [SoftHSM, TPM, TPMWithRSA], indirect=True)
def test_the_token_signs_a_request_for_its_certificate(site: Site) -> None:
    """As the page says; it is for the token's key."""
    site.hardware.switch_on()
    request = site.directory / "gateway.csr"
    commands = FILES["csr"].replace("/usr/lib/x86_64-linux-gnu/libtpm2_pkcs11.so.1", str(site.hardware.module))
    environment = {**site.hardware.environment, "PIN": PIN}
    run(["sh", "-ec", commands.replace("gateway.csr", str(request))], environment)
    made = x509.load_pem_x509_csr(request.read_bytes())
    assert made.is_signature_valid
    assert made.subject.rfc4514_string() == "CN=gateway"
    assert made.public_key() == site.leaf.public_key()


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


def mosquitto_that_demands(site: Site, port: int) -> Mosquitto:
    """Start a mosquitto that demands TLS 1.3 and a certificate of `ROOT`."""
    chain, key = site.directory / "broker.pem", site.directory / "broker.key"
    own = certify(ROOT)
    chain.write_bytes(own.pem)
    key.write_bytes(own.key_pem)
    lines = [f"listener {port} 127.0.0.1", "tls_version tlsv1.3", "require_certificate true"]
    lines += ["use_identity_as_username true"]
    lines += [f"cafile {site.token / 'broker-ca.pem'}", f"certfile {chain}", f"keyfile {key}"]
    return Mosquitto(site.directory, "\n".join([*lines, "allow_anonymous false", ""]), port)


def test_a_hundred_devices_through_reload_and_outages(
    site: Site, start: Callable[[int], Program], start_gateway: Callable[..., RunningGateway]
) -> None:
    """Mosquitto demands the token's certificate; what ends with nginx or mosquitto comes back with it."""
    port = free_port()
    start_mosquitto = partial(mosquitto_that_demands, site, port)
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


@pytest.mark.parametrize("site", [TPM], indirect=True)
def test_a_message_reaches_mosquitto_only_while_the_tpm_signs(
    site: Site, start: Callable[[int], Program], start_gateway: Callable[..., RunningGateway]
) -> None:
    """It arrives with the certificate of the TPM's key; without the TPM there is no session."""
    port = free_port()
    broker = mosquitto_that_demands(site, port)
    try:
        nginx = start(port)
        listens(site, nginx)
        gateway = start_gateway(**site.settings())
        with Device(gateway.port) as device:
            device.send(mqtt.connect("d1"))
            assert device.read(4) == mqtt.connack()
            device.send(mqtt.publish(qos=1))
            assert device.read(4) == PUBACK
            device.send(mqtt.disconnect())
        gateway.wait_empty()
        site.hardware.switch_off()
        # The new broker has no TLS session that could be resumed without a signature.
        broker.stop()
        broker = mosquitto_that_demands(site, port)
        assert refused(gateway) is EndReason.UPSTREAM_CLOSED
        nginx.wait_for("SSL_do_handshake() failed")
        (admitted,) = (line for line in broker.log.read_text().splitlines() if "New client connected" in line)
        assert "as d1 " in admitted
        assert "u'gateway'" in admitted
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
