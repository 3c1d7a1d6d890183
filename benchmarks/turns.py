"""`python -m benchmarks.turns [--tree NAME=PATH …]`: the longest turn of the reactor under hostile input.

In: trees of the gateway; this one by default.  Out: a table in Markdown, one line for each input, one column for each
tree: processor time of the longest turn, and its time on the clock.  While the reactor is in a turn, all other sessions
wait.  To compare with an older version: `git worktree add /tmp/before COMMIT`, then `--tree before=/tmp/before`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import trustme
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from benchmarks.relays import free_ports
from tests import mqtt_packets as mqtt
from tests.pki import CLIENT, certify

_ROOT = Path(__file__).parent.parent
_PROBE = Path(__file__).with_name("turns_probe.py")
_PATIENCE = 400.0


# A message that the broker answers with a flood, and a packet of that flood.
_FLOOD = "flood"
_TINY = mqtt.publish("site/a", b"")


class Broker:
    """A TLS broker that accepts everybody and answers PINGREQ; it reads what it gets and forgets it."""

    def __init__(self, directory: Path) -> None:
        ca = trustme.CA()
        self.ca_file = directory / "ca.pem"
        ca.cert_pem.write_to_path(str(self.ca_file))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("localhost").configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(connection, server_side=True) as secured:
            first = secured.recv(65536)
            version = first[2 + first.index(b"MQ") + 4 - 2] if b"MQTT" in first[:16] else 3
            secured.sendall(mqtt.connack(version=5 if version == 5 else 4))
            while data := secured.recv(1 << 20):
                if data == mqtt.pingreq():
                    secured.sendall(mqtt.pingresp())
                elif _FLOOD.encode() in data:
                    for _ in range(20):
                        secured.sendall(_TINY * (0x4000 // len(_TINY)))


class Gateway:
    """A gateway of a tree, in a process of its own, with the probe in it."""

    def __init__(self, tree: Path, directory: Path, text: str, stdout: int | IO[bytes] = subprocess.DEVNULL) -> None:
        self.config = directory / "gateway.toml"
        self._results = directory / "turns.jsonl"
        self._results.unlink(missing_ok=True)
        self.port, self.status_port = free_ports(2)
        self.config.write_text(
            f'[[listen]]\nendpoint = "tcp:{self.port}:interface=127.0.0.1"\n'
            f'[status]\nendpoint = "127.0.0.1:{self.status_port}"\n{text}'
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROBE), str(self.config), str(self._results)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"},
            stdout=stdout,
            stderr=subprocess.DEVNULL,
        )
        for port in (self.port, self.status_port):
            _wait(lambda port=port: _listens(port))

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def longest(self) -> dict[str, float]:
        """Return the longest turn since this was last asked, when the gateway has nothing left to do."""
        _wait(self._is_idle)
        return self.ask()

    def _is_idle(self) -> bool:
        """Whether it has nothing to do; on a busy machine, a process that only waits for its turn is not idle."""
        before, _ = self._looked_at()
        for _ in range(20):
            time.sleep(0.05)
            used, state = self._looked_at()
            if state == "R" or used - before > 0.05:
                return False
        return True

    def _looked_at(self) -> tuple[float, str]:
        """Return the processor seconds used so far, and the state of the process (proc(5))."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0]

    def ask(self) -> dict[str, float]:
        """Return the longest turn since this was last asked."""
        lines = self._lines()
        self.send(signal.SIGUSR2)
        _wait(lambda: len(self._lines()) > len(lines))
        found: dict[str, float] = json.loads(self._lines()[-1])
        return found

    def _lines(self) -> list[str]:
        return self._results.read_text().splitlines() if self._results.exists() else []

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"waited for {_PATIENCE:.0f} s")
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _session(gateway: Gateway, **packet: Any) -> socket.socket:
    """Open a session, as far as CONNACK."""
    connection = socket.create_connection(("127.0.0.1", gateway.port), _PATIENCE)
    connection.sendall(mqtt.connect(**packet))
    if not connection.recv(64):
        raise ConnectionError("there was no CONNACK")
    return connection


def _send(connection: socket.socket, data: bytes) -> None:
    """Send as much as is taken: the gateway may end the connection in the middle."""
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.settimeout(2)
        while connection.recv(65536):
            pass
    connection.close()


# ---- the inputs: each is given the directory, a broker's part of the configuration, and a function to start a gateway

Start = Callable[..., Gateway]
INPUTS: dict[str, Callable[[Path, Start], dict[str, float]]] = {}


def _input(name: str) -> Callable[[Callable[[Path, Start], dict[str, float]]], Any]:
    def register(function: Callable[[Path, Start], dict[str, float]]) -> Any:
        INPUTS[name] = function
        return function

    return register


def _rules_with_certificates(directory: Path, key: Any, count: int) -> str:
    """Write `count` rules, each with a certificate and a key in files of its own."""
    certified = certify(subject="device", purposes=(CLIENT,), key=key)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    lines = []
    for number in range(count):
        certificate, private = directory / f"d{number}.pem", directory / f"d{number}-key.pem"
        certificate.write_bytes(certified.pem)
        private.write_bytes(secret)
        private.chmod(0o600)
        lines.append(
            f'[[device]]\nmatch_client_id = "d{number}"\nclient_cert = "{certificate}"\nclient_key = "{private}"\n'
        )
    return "".join(lines)


def _reloaded(start: Start, rules: str) -> dict[str, float]:
    gateway = start(rules)
    gateway.longest()
    gateway.config.write_text(gateway.config.read_text() + "[limits]\nmax_packet_size = 100000\n")
    gateway.send(signal.SIGHUP)
    time.sleep(1)
    return gateway.longest()


@_input("reload with 100 rules, each with an RSA certificate")
def _reload_rsa(directory: Path, start: Start) -> dict[str, float]:
    return _reloaded(start, _rules_with_certificates(directory, rsa.generate_private_key(65537, 2048), 100))


@_input("reload with 1,000 rules, each with a P-256 certificate")
def _reload_p256(directory: Path, start: Start) -> dict[str, float]:
    return _reloaded(start, _rules_with_certificates(directory, ec.generate_private_key(ec.SECP256R1()), 1000))


@_input("looking at the files of 1,000 rules")
def _looking(directory: Path, start: Start) -> dict[str, float]:
    gateway = start(_rules_with_certificates(directory, ec.generate_private_key(ec.SECP256R1()), 1000))
    gateway.longest()
    time.sleep(6)
    return gateway.longest()


@_input("CONNECT of 64 KiB with 13,000 User Properties")
def _connect(_: Path, start: Start) -> dict[str, float]:
    gateway = start()
    gateway.longest()
    packet = mqtt.connect(version=5, properties=mqtt.user_property("", "") * 13_000)
    for _ in range(5):
        _send(socket.create_connection(("127.0.0.1", gateway.port), 5), packet)
    return gateway.longest()


_RULE = '[[device]]\npublish_prefix = "site/"\nsubscribe_prefix = "site/"\n'


def _relayed(start: Start, packet: bytes) -> dict[str, float]:
    gateway = start(_RULE)
    connection = _session(gateway, version=5)
    gateway.longest()
    _send(connection, packet)
    return gateway.longest()


@_input("PUBLISH of 1 MiB of User Properties under a rule")
def _publish(_: Path, start: Start) -> dict[str, float]:
    return _relayed(start, mqtt.publish(version=5, properties=mqtt.user_property("", "") * 200_000))


@_input("SUBSCRIBE with 174,000 Topic Filters under a rule")
def _subscribe(_: Path, start: Start) -> dict[str, float]:
    return _relayed(start, mqtt.subscribe(*["abc"] * 174_000, version=5))


@_input("PUBLISHes of 5 bytes as fast as they come, under a rule")
def _tiny(_: Path, start: Start) -> dict[str, float]:
    return _relayed(start, mqtt.publish("a", b"", version=5) * 50_000)


@_input("PUBLISHes of 10 bytes from the broker, 16 KiB of them in a TLS record, under a rule")
def _tiny_down(_: Path, start: Start) -> dict[str, float]:
    return _relayed(start, mqtt.publish(_FLOOD, version=5))


@_input("PINGREQs with padded lengths, without a rule")
def _padded(_: Path, start: Start) -> dict[str, float]:
    gateway = start()
    connection = _session(gateway)
    gateway.longest()
    _send(connection, mqtt.packet(0xC0, length_size=3) * 100_000)
    return gateway.longest()


@_input("SUBSCRIBEs of 8 bytes, without a rule")
def _crowd(_: Path, start: Start) -> dict[str, float]:
    gateway = start()
    connection = _session(gateway)
    gateway.longest()
    _send(connection, mqtt.subscribe("a") * 40_000)
    return gateway.longest()


@_input("SUBSCRIBEs with 1,000 Topic Filters each, without a rule")
def _large_crowd(_: Path, start: Start) -> dict[str, float]:
    gateway = start()
    connection = _session(gateway)
    gateway.longest()
    _send(connection, mqtt.subscribe(*["a"] * 1_000) * 100)
    return gateway.longest()


@_input("40 devices that flood with PUBLISHes of 5 bytes under a rule")
def _many(_: Path, start: Start) -> dict[str, float]:
    gateway = start(_RULE)
    connections = [_session(gateway, client_identifier=f"d{number}") for number in range(40)]
    gateway.longest()
    for connection in connections:
        threading.Thread(target=_send, args=(connection, mqtt.publish("a", b"") * 2_000)).start()
    time.sleep(1)
    return gateway.longest()


@_input("1,500 wrong passwords at once")
def _passwords(_: Path, start: Start) -> dict[str, float]:
    wanted = "$scrypt$ln=15,r=8,p=1$c2FsdHNhbHRzYWx0c2FsdA$" + "A" * 43
    hashed = _hashed() or wanted
    gateway = start(f'[[device]]\nlan_password = "{hashed}"\n')
    gateway.longest()
    connections = []
    for number in range(1500):
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", gateway.port), 5)
            connection.sendall(mqtt.connect(f"d{number}", username="u", password=b"wrong"))
            connections.append(connection)
    time.sleep(5)
    found = gateway.ask()  # not idle: the passwords are still looked at
    for connection in connections:
        connection.close()
    return found


def _hashed() -> str:
    """Return a password's hash as the gateway writes it; its words have moved between versions."""
    from gateway.config.passwords import hash_password

    return hash_password(b"right", bytes(16))


@_input("standard output is a pipe that nobody reads")
def _pipe(_: Path, start: Start) -> dict[str, float]:
    reading, writing = os.pipe()
    try:
        gateway = start(stdout=writing)
        gateway.longest()
        # The gateway shares the description, so it must not be left non-blocking.
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
        # A reactor that is stuck accepts no more than the kernel does in its place.
        with contextlib.suppress(TimeoutError):
            for _ in range(2000):
                with socket.create_connection(("127.0.0.1", gateway.port), 5) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        time.sleep(5)
        # A reactor that is stuck answers when somebody reads at last.
        os.set_blocking(reading, False)
        stop = threading.Event()
        reader = threading.Thread(target=_read, args=(reading, stop))
        reader.start()
        found = gateway.longest()
        stop.set()
        reader.join()
        return found
    finally:
        os.close(reading)
        os.close(writing)


def _read(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(0.01):
        with contextlib.suppress(BlockingIOError):
            os.read(descriptor, 1 << 20)


@_input("50 CONNECTs with a Client Identifier of 64 kB")
def _names(_: Path, start: Start) -> dict[str, float]:
    gateway = start('[log]\nformat = "json"\n')
    gateway.longest()
    for _ in range(50):
        with _session(gateway, client_identifier="n" * 65_000, keep_alive=0) as connection:
            _send(connection, mqtt.disconnect())
    return gateway.longest()


@_input("HTTP: `Accept: \\xff`, 100 times")
def _http(_: Path, start: Start) -> dict[str, float]:
    gateway = start()
    gateway.longest()
    for _ in range(100):
        _send(
            socket.create_connection(("127.0.0.1", gateway.status_port), 5),
            b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: \xff\r\n\r\n",
        )
    return gateway.longest()


@_input("HTTP: 30 connections that send chunks of one byte")
def _chunks(_: Path, start: Start) -> dict[str, float]:
    gateway = start()
    gateway.longest()
    connections = [socket.create_connection(("127.0.0.1", gateway.status_port), 5) for _ in range(30)]
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            connection.send(head)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send(b"1\r\na\r\n" * 10_000)
    for connection in connections:
        connection.close()
    return gateway.longest()


@_input("the process stopped for 5 s, with 200 sessions")
def _stopped(_: Path, start: Start) -> dict[str, float]:
    gateway = start()
    connections = [_session(gateway, client_identifier=f"d{number}", keep_alive=0) for number in range(200)]
    gateway.longest()
    gateway.send(signal.SIGSTOP)
    for connection in connections:
        connection.sendall(mqtt.pingreq() * 50)
    time.sleep(5)
    gateway.send(signal.SIGCONT)
    found = gateway.longest()
    for connection in connections:
        connection.close()
    # The stop itself is no turn.
    return {**found, "wall": float("nan")}


# ---- the table


@contextlib.contextmanager
def _started(tree: Path, directory: Path, broker: Broker) -> Iterator[Start]:
    running: list[Gateway] = []

    def start(text: str = "", stdout: int | IO[bytes] = subprocess.DEVNULL) -> Gateway:
        upstream = f'[[upstream]]\nhost = "localhost"\nport = {broker.port}\n[tls]\nca_file = ["{broker.ca_file}"]\n'
        running.append(Gateway(tree, directory, upstream + text, stdout))
        return running[-1]

    try:
        yield start
    finally:
        for gateway in running:
            gateway.stop()


def _shown(found: dict[str, float] | str) -> str:
    if isinstance(found, str):
        return found
    wall = "" if found["wall"] != found["wall"] else f" ({found['wall']:,.1f})"
    return f"{found['cpu']:,.1f}{wall}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns", description=__doc__)
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=PATH", help="another tree; repeatable")
    parser.add_argument("--only", default="", help="inputs whose name has this in it")
    options = parser.parse_args(arguments)
    trees = {name: Path(path) for name, _, path in (each.partition("=") for each in options.tree)} | {"now": _ROOT}
    print(f"| longest turn, ms of processor time (ms on the clock) | {' | '.join(trees)} |")
    print(f"|---|{'---|' * len(trees)}", flush=True)
    for name, measure in INPUTS.items():
        if options.only not in name:
            continue
        cells = []
        for tree in trees.values():
            with TemporaryDirectory() as directory:
                broker = Broker(Path(directory))
                with _started(tree, Path(directory), broker) as start:
                    try:
                        cells.append(_shown(measure(Path(directory), start)))
                    except (OSError, TimeoutError) as problem:
                        cells.append(f"none: {problem}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
