"""The service under a real systemd: installed, restricted as the unit has it, restarted, reloaded, taken away.

Everything runs in a box (tests/box.py) whose PID 1 is this machine's systemd, and as `mqtts-gateway install` leaves it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.box import ENVIRONMENT, Box, require_box
from tests.harness import PATIENCE, Broker, Device, ServerTLS, eventually
from tests.mqtt_packets import connect, publish
from tests.pages import files_of
from tests.pki import CLIENT, Certified, certify

pytestmark = pytest.mark.slow

PROGRAM = ENVIRONMENT / "bin" / "mqtts-gateway"
SETTINGS = Path("/etc/mqtts-gateway")
CONFIG = SETTINGS / "gateway.toml"
UNIT = "mqtts-gateway.service"
BROKER = "broker.plant.example"
PORT = 1883
ACCEPTED = b"\x20\x02\x00\x00"

# What a service may try: each a call and how it must end under the unit's restrictions.
PROBES = {
    "write to the system": "open('/etc/probe', 'w')",
    "write to the environment": f"open('{ENVIRONMENT}/probe', 'w')",
    "read a key past its credential": f"open('{SETTINGS}/credentials/client.key')",
    "look into /root": "os.listdir('/root')",
    "see PID 1": "os.stat('/proc/1')",
    "see the kernel's settings": "open('/proc/sys/kernel/hostname')",
    "open the memory": "open('/dev/mem', 'rb')",
    "make a namespace": "call(libc.unshare, 0x10000000)",
    "mount": "call(libc.mount, b'none', b'/tmp', b'tmpfs', 0, None)",
    "open a raw socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "open a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "run at real-time priority": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "raise its priority": "os.setpriority(os.PRIO_PROCESS, 0, 0)",
    "change its personality": "call(libc.personality, 0x0040000)",
    # To a time that there is not, so that it changes nothing where it is allowed: EINVAL then.
    "set the clock": "time.clock_settime(time.CLOCK_REALTIME, -1)",
    "set the host's name": "socket.sethostname('probe')",
    "make a setuid file": "os.chmod(os.environ['STATE_DIRECTORY'], 0o4700)",
    "be traced": "call(libc.ptrace, 0, 0, None, None)",
    "open a port below 1024": "socket.create_server(('127.0.0.1', 80))",
    "become root": "os.setuid(0)",
}
ALLOWED = {
    "write to its state": "open(os.environ['STATE_DIRECTORY'] + '/probe', 'w')",
    "write to its runtime directory": "open('/run/mqtts-gateway/probe', 'w')",
    "read the configuration": f"open('{CONFIG}')",
    "read its credential": "open(os.environ['CREDENTIALS_DIRECTORY'] + '/credentials_client.key')",
    "open a socket": "socket.create_server(('127.0.0.1', 0))",
    "start a thread": "threading.Thread(target=print).start()",
}
PROBE_SCRIPT = f"""
import ctypes, errno, json, os, socket, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), 'refused')
def outcome(code):
    # Each in a process of its own: some that go well change what the next ones may do.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            eval(code)
            word = 'done'
        except Exception as error:
            word = errno.errorcode.get(getattr(error, 'errno', None), repr(error))
        os.write(writer, word.encode())
        os._exit(0)
    os.close(writer)
    word = os.read(reader, 99).decode()
    os.close(reader)
    os.waitpid(child, 0)
    return word
print('probes ' + json.dumps({{name: outcome(code) for name, code in {PROBES | ALLOWED!r}.items()}}))
"""


class Resolver:
    """A name server in the box: every name is 127.0.0.1, and has no IPv6 address.  `asked` are the names."""

    def __init__(self, box: Box) -> None:
        self.asked: set[str] = set()
        with box.network():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.bind(("127.0.0.1", 53))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            query, address = self._socket.recvfrom(512)
            if len(query) < 12:
                return
            labels, position = [], 12
            while length := query[position]:
                labels.append(query[position + 1 : position + 1 + length].decode())
                position += 1 + length
            self.asked.add(".".join(labels))
            question = query[12 : position + 5]
            is_a = question[-4:-2] == b"\x00\x01"
            answer = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x00\x00\x04\x7f\x00\x00\x01" if is_a else b""
            header = query[:2] + b"\x81\x80\x00\x01" + bytes([0, int(is_a)]) + b"\x00\x00\x00\x00"
            self._socket.sendto(header + question + answer, address)

    def stop(self) -> None:
        """Answer no more."""
        # A close does not wake a thread that reads; this does.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._socket.close()


class Plant:
    """A box with a broker that demands a client certificate, a name server and, if told so, the service."""

    def __init__(self, box: Box, *, install: bool = True) -> None:
        self.box = box
        self.ca = trustme.CA()
        self._numbers = itertools.count(1)
        self.resolver = Resolver(box)
        context = ServerTLS.from_trustme(self.ca.issue_cert(BROKER)).context()
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.ca.cert_pem.bytes().decode())
        with box.network():
            self.broker = Broker(tls=context)
        if not install:
            return
        # What `install` printed the first time.
        self.installed = box.do(PROGRAM, "install", "--upstream", BROKER)
        box.write(SETTINGS / "ca.pem", self.ca.cert_pem.bytes().decode())
        self.issue("gateway-1")

    def issue(self, name: str) -> None:
        """Have the gateway's certificate issued anew, with this common name."""
        chain, key = self.issued(name)
        self.box.write(SETTINGS / "client.pem", chain)
        self.box.write(SETTINGS / "credentials/client.key", key, 0o600)

    def issued(self, name: str) -> tuple[str, str]:
        """Return a new client certificate with its chain, and its key."""
        issued = self.ca.issue_cert(f"{name}.example", common_name=name)
        return "".join(pem.bytes().decode() for pem in issued.cert_chain_pems), issued.private_key_pem.bytes().decode()

    def stop(self) -> None:
        """Stop what is outside the box."""
        self.resolver.stop()
        self.broker.stop()

    def configure(
        self, endpoint: str = f"127.0.0.1:{PORT}", key: str = "credentials/client.key", more: str = ""
    ) -> None:
        """Write the configuration."""
        text = (
            f'{more}\n[[listen]]\nendpoint = "{endpoint}"\n'
            f'[[upstream]]\nhost = "{BROKER}"\nport = {self.broker.port}\n'
            f'[tls]\nca_file = "ca.pem"\nclient_cert = "client.pem"\nclient_key = "{key}"\n'
        )
        self.box.write(CONFIG, text)

    def drop_in(self, text: str, unit: str = UNIT) -> None:
        """Change a unit as `systemctl edit` does."""
        self.box.write(f"/etc/systemd/system/{unit}.d/override.conf", f"[Service]\n{text}\n")
        self.box.do("systemctl", "daemon-reload")

    def start(self, unit: str = UNIT) -> None:
        """Start a unit; it must say that it is ready."""
        done = self.box.run("systemctl", "start", unit)
        assert done.returncode == 0, f"{done.stderr}{self.box.log(unit)}"

    def device(self) -> Device:
        """Connect a device."""
        with self.box.network():
            return Device(PORT)

    def session(self) -> Device:
        """Connect a device that no other is called like; it says CONNECT and is accepted."""
        device = self.device()
        try:
            device.send(connect(f"sensor-{next(self._numbers)}"))
            got = device.read(len(ACCEPTED))
            assert got == ACCEPTED, f"{got!r}: {self.box.log(UNIT)}"
        except (AssertionError, OSError):
            device.close()
            raise
        return device

    def shown(self) -> dict[str, Any]:
        """Return the certificate that the broker was shown last, as `ssl` has it."""
        certificate: dict[str, Any] = self.broker.connections[-1].socket.getpeercert()
        return certificate

    def shown_name(self) -> str:
        """Return the common name in the certificate that the broker was shown last."""
        return str(dict(pair for pairs in self.shown()["subject"] for pair in pairs)["commonName"])

    def clear(self) -> None:
        """Stop everything, and forget what a test changed."""
        box = self.box
        box.do("systemctl", "stop", "mqtts-gateway*.socket", "mqtts-gateway*.service")
        box.do("sh", "-c", "rm -rf /etc/systemd/system/mqtts-gateway*.d")
        box.do("systemctl", "daemon-reload")
        box.do("systemctl", "reset-failed")
        box.begin_log()
        self.issue("gateway-1")


@pytest.fixture(scope="module")
def whole_plant() -> Iterator[Plant]:
    """Return the plant that the tests of this file share."""
    require_box()
    with Box() as box:
        plant = Plant(box)
        yield plant
        plant.stop()


@pytest.fixture
def plant(whole_plant: Plant) -> Iterator[Plant]:
    """Return the plant, configured and stopped."""
    whole_plant.configure()
    yield whole_plant
    whole_plant.clear()


@pytest.fixture
def box(plant: Plant) -> Box:
    """Return the plant's box."""
    return plant.box


def test_install_puts_everything_in_place(plant: Plant, box: Box) -> None:
    """Units with this environment's paths, directories that only root may enter where keys are, the next command."""
    assert "systemctl daemon-reload" in plant.installed
    assert f"{PROGRAM} check --config {CONFIG}\n  systemctl enable --now mqtts-gateway" in plant.installed
    modes = box.do("stat", "--format=%a %U %n", SETTINGS, SETTINGS / "credentials", f"/etc/systemd/system/{UNIT}")
    assert modes.splitlines() == [
        f"755 root {SETTINGS}",
        f"700 root {SETTINGS}/credentials",
        f"644 root /etc/systemd/system/{UNIT}",
    ]
    assert box.property(UNIT, "LoadState") == "loaded"
    assert f"{ENVIRONMENT}/bin/twistd" in box.property(UNIT, "ExecStart")


def test_install_again_changes_nothing(plant: Plant, box: Box) -> None:
    """The configuration that is there stays, whatever it says."""
    before = box.read(CONFIG)
    said = box.do(PROGRAM, "install", "--upstream", "other.example").splitlines()
    assert [line for line in said if line.startswith(("write", "make", "replace", "close"))] == []
    assert f"keep {CONFIG}, which already exists" in said
    assert box.read(CONFIG) == before


def test_check_goes_well_before_the_first_start(plant: Plant, box: Box) -> None:
    """Root checks the same configuration that the service will use, key included."""
    assert "FAIL" not in box.do(PROGRAM, "check", "--config", CONFIG)


def test_a_session_passes_under_all_restrictions(plant: Plant, box: Box) -> None:
    """DNS, TLS with the verify callback, the client key from its credential; as nobody, filtered, without any right."""
    plant.start()
    received = len(plant.broker.received)
    sent = connect() + publish(payload=b"21.5")
    with plant.device() as device:
        device.send(sent)
        assert device.read(4) == ACCEPTED
        eventually(lambda: plant.broker.received[received:] == sent, "both packets")
        assert plant.shown_name() == "gateway-1"
    assert BROKER in plant.resolver.asked
    process = int(box.property(UNIT, "MainPID"))
    status = dict(re.findall(r"^(\w+):\t(.*)$", box.read(f"/proc/{process}/status"), re.MULTILINE))
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapBnd"], 16) == 0
    # Of the range that systemd takes the users of services from (systemd.exec(5), DynamicUser=).
    assert 61184 <= int(status["Uid"].split()[0]) <= 65519
    # Nothing was refused that the gateway wanted: it had no cause to complain.
    assert not re.search(r"Traceback|\[Errno|Permission|not permitted|cannot be read", box.log(UNIT))


def test_what_the_unit_forbids_is_refused(plant: Plant, box: Box) -> None:
    """A program in the gateway's place tries all of it; what a gateway needs goes well, so it is not just broken."""
    box.write("/usr/local/bin/probe.py", PROBE_SCRIPT)
    plant.drop_in(f"ExecStartPre={ENVIRONMENT}/bin/python /usr/local/bin/probe.py")
    plant.start()
    found = eventually(lambda: re.findall(r"probes (\{.*\})", box.log(UNIT)), "what the program tried")
    outcomes = json.loads(found[-1])
    assert {name: outcomes[name] for name in ALLOWED} == dict.fromkeys(ALLOWED, "done")
    assert [name for name in PROBES if outcomes[name] == "done"] == []
    # Refused, not for a mistake in the probe.
    assert {outcomes[name] for name in PROBES} <= {"EPERM", "EACCES", "EROFS", "ENOENT", "EAFNOSUPPORT"}


def test_without_the_restrictions_the_probes_go_well(plant: Plant, box: Box) -> None:
    """Root outside the unit may do all of it, but for what the whole box may not; so the test above can fail."""
    box.write("/usr/local/bin/probe.py", PROBE_SCRIPT)
    said = box.do("env", "STATE_DIRECTORY=/tmp", f"{ENVIRONMENT}/bin/python", "/usr/local/bin/probe.py")
    outcomes = json.loads(re.findall(r"probes (\{.*\})", said)[-1])
    assert outcomes["set the clock"] in {"EINVAL", "EPERM"}
    # The box has no /dev/mem, and a container may not set clocks or priorities.
    usual = {"set the clock", "open the memory", "run at real-time priority"}
    assert [name for name in PROBES if outcomes[name] != "done" and name not in usual] == []


@pytest.mark.parametrize("calls", ["connect", "epoll_wait epoll_pwait", "clone clone3"])
def test_a_filter_too_narrow_would_be_noticed(plant: Plant, calls: str) -> None:
    """The filter is in force: without one of these no session stands, be it that the gateway does not even start."""
    plant.drop_in(f"SystemCallFilter=~{calls}\nTimeoutStartSec=3s")
    plant.box.run("systemctl", "start", UNIT)
    answer = b""
    with contextlib.suppress(OSError), plant.device() as device:
        device.socket.settimeout(7)
        device.send(connect())
        answer = device.read(4)
    assert answer != ACCEPTED


def test_memory_cannot_be_kept_from_being_written_and_executed(plant: Plant, box: Box) -> None:
    """Why MemoryDenyWriteExecute= is not in the unit; once this fails, it belongs there."""
    plant.drop_in("MemoryDenyWriteExecute=yes")
    assert box.run("systemctl", "start", UNIT).returncode == 1
    eventually(lambda: "Cannot allocate write+execute memory for ffi.callback()" in box.log(UNIT), "the reason")


def test_the_status_is_asked_by_a_socket(plant: Plant, box: Box) -> None:
    """In the runtime directory, by whom the socket's mode lets in; of instances each in its own."""
    more = '[status]\nendpoint = "unix:/run/mqtts-gateway/status.sock:mode=666"\n'
    plant.configure(endpoint="systemd:domain=INET:name=mqtt", more=more)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for name in ("mqtts-gateway", "mqtts-gateway@1"):
        box.do("systemctl", "start", f"{name}.socket", f"{name}.service")
        url = f"unix:/run/{name.replace('@', '-')}/status.sock"
        for who in ([], nobody):
            assert "No device has connected yet" in box.do(*who, PROGRAM, "status", "--url", url)
        box.do("systemctl", "stop", f"{name}.socket", f"{name}.service")


def test_a_configuration_that_cannot_be_used_is_refused_at_reload(plant: Plant, box: Box) -> None:
    """`systemctl reload` fails with the reason in the log, and the gateway goes on as it was; a good one is taken."""
    plant.start()
    process = box.property(UNIT, "MainPID")
    plant.configure(more="[limits]\nmax_packet_sise = 1000\n")
    assert box.run("systemctl", "reload", UNIT).returncode == 1
    problem = "limits.max_packet_sise: unknown key"
    eventually(lambda: problem in box.log(UNIT), "the reason in the log")
    with plant.session():
        plant.configure(more='[admission]\nallow = "192.0.2.0/24"\n')
        box.do("systemctl", "reload", UNIT)
        with plant.device() as stranger:
            eventually(lambda: "network-not-allowed" in box.log(UNIT), "the new rule holds")
            assert stranger.read_to_end() == b""
    assert box.log(UNIT).count(problem) == 1
    assert box.property(UNIT, "MainPID") == process


def test_a_key_changed_in_credentials_is_used_after_a_restart(plant: Plant) -> None:
    """And not before: systemd hands over copies at the start."""
    plant.start()
    with plant.session():
        assert plant.shown_name() == "gateway-1"
    plant.issue("gateway-2")
    plant.box.do("systemctl", "restart", UNIT)
    with plant.session():
        assert plant.shown_name() == "gateway-2"


def test_a_key_that_a_group_may_read_is_renewed_without_a_restart(plant: Plant, box: Box) -> None:
    """The way of docs/operations.md for certificates that are renewed often: no signal, no restart, no open key."""

    def renew(name: str) -> None:
        plant.issue(name)
        box.do(
            "install", "-m", "640", "-g", "mqtts-gateway-keys", SETTINGS / "credentials/client.key", SETTINGS / "new"
        )
        box.do("mv", SETTINGS / "new", SETTINGS / "client.key")

    renew("gateway-1")
    plant.configure(key="client.key")
    plant.start()
    with plant.session():
        assert plant.shown_name() == "gateway-1"
    renew("gateway-2")

    def renewed() -> bool:
        # A device whose CONNECT is at the broker when the reload takes effect is refused once (configuration-changed).
        with plant.device() as device:
            device.send(connect(f"renewed-{next(numbers)}"))
            return device.read(len(ACCEPTED)) == ACCEPTED and plant.shown_name() == "gateway-2"

    numbers = itertools.count()
    eventually(renewed, "the renewed certificate is shown")


def test_a_certificate_is_renewed_under_the_unit_as_documented(plant: Plant, box: Box) -> None:
    """By the CA of docs/renewal.md: placed before the first start, its key passed as a credential; then by root."""
    pages = files_of("renewal.md")
    key = load_pem_private_key(plant.ca.private_key_pem.bytes(), None)
    ca = Certified(x509.load_pem_x509_certificate(plant.ca.cert_pem.bytes()), key, None)
    old = certify(ca, subject="gateway-1", names=["DNS:gateway-1.example"], valid_from=-80, purposes=[CLIENT])
    for name, text, mode in (
        ("ca.pem", ca.pem.decode(), 0o644),
        ("ca-key.pem", ca.key_pem.decode(), 0o600),
        ("client.ext", pages["client.ext"], 0o644),
        ("sign", pages["sign"], 0o755),
    ):
        box.write(f"/etc/plant-ca/{name}", text, mode)
    box.write(SETTINGS / "credentials/client.key", old.key_pem.decode(), 0o600)
    box.write("/root/client.pem", old.pem.decode())
    box.do("rm", "-rf", "/var/lib/mqtts-gateway", "/var/lib/private/mqtts-gateway")
    box.do("sh", "-euc", f"cd /root; {pages['place']}")
    file = "/var/lib/mqtts-gateway/client.pem"
    config = box.read(CONFIG).replace('client_cert = "client.pem"', f'client_cert = "{file}"')
    box.write(CONFIG, f'{config}renew_command = "/etc/plant-ca/sign"\n')
    plant.drop_in(pages["ca-key.conf"])
    plant.start()
    numbers = itertools.count()

    def serial() -> int:
        return x509.load_pem_x509_certificate(box.read(file).encode()).serial_number

    def shown() -> int | None:
        with plant.device() as device:
            device.send(connect(f"renewed-{next(numbers)}"))
            # It is refused once (configuration-changed) if its CONNECT is at the broker when the reload takes effect.
            if device.read(len(ACCEPTED)) != ACCEPTED:
                return None
            return int(plant.shown()["serialNumber"], 16)

    eventually(lambda: shown() == serial() != old.certificate.serial_number, lambda: f"renewed; {box.log(UNIT)}")
    renewed, owner = serial(), box.do("stat", "--format=%u %a", file)
    box.do(PROGRAM, "device", "renew", "--config", CONFIG)
    assert serial() != renewed
    # The service can read it still.
    assert box.do("stat", "--format=%u %a", file) == owner


def test_a_device_added_as_documented_is_served_after_a_reload(plant: Plant, box: Box) -> None:
    """Add, check, reload: the service can read the key that root made, and `check` refuses one that it cannot."""
    plant.configure(more='[devices]\ndirectory = "devices"\n')
    box.do("mkdir", "-p", SETTINGS / "devices")
    plant.start()
    box.write("/root/ca.pem", plant.ca.cert_pem.bytes().decode())
    box.write("/root/ca-key.pem", plant.ca.private_key_pem.bytes().decode(), 0o600)
    box.do(PROGRAM, "device", "add", "d1", "--ca-cert", "/root/ca.pem", "--ca-key", "/root/ca-key.pem", "--days", "60")
    box.do(PROGRAM, "check", "--files", "--config", CONFIG)
    box.do("systemctl", "reload", UNIT)

    def served_as_itself() -> bool:
        with plant.device() as device:
            device.send(connect("d1"))
            return device.read(len(ACCEPTED)) == ACCEPTED and plant.shown_name() == "d1"

    eventually(served_as_itself, "the device is served under its own certificate")
    with plant.device() as device:
        device.send(connect("d1"))
        assert device.read(len(ACCEPTED)) == ACCEPTED
        assert f"next: systemctl reload {UNIT.removesuffix('.service')}" in box.do(PROGRAM, "device", "disable", "d1")
        box.do("systemctl", "reload", UNIT)
        assert device.read_to_end() == b""
    with plant.device() as refused:
        refused.send(connect("d1"))
        assert refused.read(4) == b"\x20\2\0\5"
    box.do(PROGRAM, "device", "renew", "d1", "--ca-cert", "/root/ca.pem", "--ca-key", "/root/ca-key.pem")
    box.do(PROGRAM, "device", "enable", "d1")
    box.do("systemctl", "reload", UNIT)
    eventually(served_as_itself, "the device is served again, with its new certificate")
    for path in ("devices/d1-key.pem", "ca.pem"):
        box.do("chmod", "600", SETTINGS / path)
        checked = box.run(PROGRAM, "check", "--files", "--config", CONFIG)
        assert checked.returncode == 1
        assert f"{SETTINGS / path}: mqtts-gateway.service cannot read it" in checked.stdout
        if path == "ca.pem":
            assert box.run("systemctl", "reload", UNIT).returncode != 0
        box.do("chmod", "640" if "key" in path else "644", SETTINGS / path)
    box.do("rm", "-r", SETTINGS / "devices")


def test_a_missing_directory_of_credentials_is_named(plant: Plant, box: Box) -> None:
    """Without it systemd starts nothing, and says 243/CREDENTIALS, which docs/troubleshooting.md explains."""
    box.do("mv", SETTINGS / "credentials", SETTINGS / "moved")
    try:
        assert box.run("systemctl", "start", UNIT).returncode == 1
        assert box.property(UNIT, "ExecMainStatus") == "243"
    finally:
        box.do("mv", SETTINGS / "moved", SETTINGS / "credentials")


def test_no_connection_is_refused_while_a_gateway_with_a_socket_unit_restarts(plant: Plant, box: Box) -> None:
    """A device that connects in between waits, and is served by the next; also after a start that failed."""
    plant.configure(endpoint="systemd:domain=INET:name=mqtt")
    plant.drop_in("RestartSec=1s")
    box.do("systemctl", "start", "mqtts-gateway.socket")
    # The first device starts the service.
    with plant.session():
        pass
    first = box.property(UNIT, "MainPID")
    box.do("systemctl", "stop", UNIT)
    plant.configure(endpoint="systemd:domain=INET:name=mqtt", more="[limits]\nmax_packet_sise = 1000\n")
    with plant.device() as waiting:
        waiting.send(connect())
        eventually(lambda: int(box.property(UNIT, "NRestarts")) >= 2, "two failed starts")
        plant.configure(endpoint="systemd:domain=INET:name=mqtt")
        assert waiting.read(4) == ACCEPTED, box.log(UNIT)
    assert box.property(UNIT, "MainPID") not in {first, "0"}
    refused = []

    def knock(until: threading.Event) -> None:
        while not until.is_set():
            try:
                plant.session().close()
            except (OSError, AssertionError) as error:
                refused.append(error)

    done = threading.Event()
    knocking = threading.Thread(target=knock, args=(done,))
    knocking.start()
    # A device that was let in just before the stop is told that the gateway ends; none is refused the connection.
    box.do("systemctl", "restart", UNIT)
    done.set()
    knocking.join(PATIENCE)
    assert [error for error in refused if isinstance(error, ConnectionRefusedError)] == []


def test_several_gateways_share_a_port(plant: Plant, box: Box) -> None:
    """Connections are dealt out by the kernel; while one restarts its share waits and is not refused."""
    plant.configure(endpoint="systemd:domain=INET:name=mqtt")
    units = ["mqtts-gateway@1", "mqtts-gateway@2"]
    box.do("systemctl", "start", *(f"{unit}.socket" for unit in units), *(f"{unit}.service" for unit in units))
    devices = [plant.session() for _ in range(40)]

    def served() -> list[int]:
        return [box.log(f"{unit}.service").count("is connected to") for unit in units]

    # What the gateway has written reaches the journal some milliseconds later.
    eventually(lambda: sum(served()) == len(devices), "each session is in a journal")
    assert min(served()) > 0
    # Each has its own runtime directory in the same place.
    assert box.do("ls", "-d", "/run/mqtts-gateway-1", "/run/mqtts-gateway-2")
    process = box.property("mqtts-gateway@1.service", "MainPID")
    assert (
        box.do("ls", "-di", f"/proc/{process}/root/run/mqtts-gateway").split()[0]
        == (box.do("ls", "-di", "/run/mqtts-gateway-1").split()[0])
    )
    for device in devices:
        device.close()
    restart = threading.Thread(target=lambda: box.do("systemctl", "restart", "mqtts-gateway@1"))
    restart.start()
    for _ in range(20):
        plant.device().close()
    restart.join()
    for _ in range(10):
        plant.session().close()


def test_a_gateway_that_got_stuck_is_started_anew(plant: Plant, box: Box) -> None:
    """The watchdog of systemd, with a shorter time."""
    plant.drop_in("WatchdogSec=1s\nRestartSec=100ms")
    plant.start()
    first = box.property(UNIT, "MainPID")
    box.do("kill", "-STOP", first)
    eventually(lambda: box.property(UNIT, "MainPID") not in {first, "0"}, "another process")
    box.wait_active(UNIT)
    plant.session().close()
    eventually(lambda: "Watchdog timeout" in box.log(UNIT), "systemd's words")


@pytest.mark.parametrize("signal", ["TERM", "KILL"])
def test_a_gateway_that_was_killed_is_started_anew(plant: Plant, box: Box, signal: str) -> None:
    """By a signal that means an orderly end, too: only systemctl stops it."""
    plant.drop_in("RestartSec=100ms")
    plant.start()
    first = box.property(UNIT, "MainPID")
    box.do("kill", f"-{signal}", first)
    eventually(lambda: box.property(UNIT, "MainPID") not in {first, "0"}, "another process")
    box.wait_active(UNIT)
    plant.session().close()


def test_stop_tells_the_devices(plant: Plant, box: Box) -> None:
    """A 5.0 device gets DISCONNECT 0x8B (MQTT 5.0 §3.14.2.1), and the service ends without being killed."""
    plant.configure(more="[drain]\nseconds = 0.5\n")
    plant.start()
    with plant.device() as device:
        device.send(connect(version=5))
        assert device.read(5) == b"\x20\x03\x00\x00\x00"
        box.do("systemctl", "stop", UNIT)
        assert device.read_to_end()[:1] == b"\xe0"
    assert box.property(UNIT, "Result") == "success"
    assert box.property(UNIT, "ActiveState") == "inactive"


def test_only_given_addresses(plant: Plant, box: Box) -> None:
    """The drop-in of docs/operations.md: whatever the gateway were made to do, packets go nowhere else."""
    plant.drop_in("IPAddressDeny=any\nIPAddressAllow=localhost")
    plant.start()
    plant.session().close()
    plant.drop_in("IPAddressDeny=any\nIPAddressAllow=192.0.2.1")
    box.do("systemctl", "restart", UNIT)
    with pytest.raises((TimeoutError, OSError)), box.network():
        socket.create_connection(("127.0.0.1", PORT), 2)


def test_uninstall_takes_the_service_away_and_keeps_the_configuration(plant: Plant, box: Box) -> None:
    """What runs is stopped, what is enabled is disabled; --dry-run only tells."""
    plant.configure(endpoint="systemd:domain=INET:name=mqtt")
    units = ["mqtts-gateway.socket", UNIT, "mqtts-gateway@7.service"]
    box.do("systemctl", "enable", "--now", *units[:2])
    box.do("systemctl", "enable", units[2])
    told = box.do(PROGRAM, "uninstall", "--dry-run")
    assert box.property(UNIT, "ActiveState") == "active"
    assert "nothing changed" in told
    done = box.do(PROGRAM, "uninstall")
    assert f"rm -r {SETTINGS}" in done
    assert box.property(UNIT, "LoadState") == "not-found"
    assert box.property(UNIT, "ActiveState") == "inactive"
    assert box.do("find", "/etc/systemd/system", "-name", "mqtts-gateway*") == ""
    assert BROKER in box.read(CONFIG)
    assert box.do(PROGRAM, "uninstall").startswith("nothing to remove")
    box.do(PROGRAM, "install")
    plant.configure()
    plant.start()
    plant.session().close()
