"""Real parts for tests: a gateway on real sockets, a TLS broker that records every byte, a device.

The reactor runs in a thread of its own; tests are plain functions that use blocking sockets, as a device would.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from typing import Any, Self

import trustme
from twisted.internet import reactor as _reactor
from twisted.internet.defer import maybeDeferred
from twisted.python.failure import Failure
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import AcceptConnection, BytesMessage, Event, Request
from wsproto.utilities import RemoteProtocolError

from benchmarks.blackhole import drop_packets, keep_packets
from gateway.config import from_mapping
from gateway.ops.journal import Journal
from gateway.service import GatewayService
from gateway.session.record import SessionRecord

# How long a test waits for something that should happen at once: it bounds a hang, it measures nothing.
PATIENCE = 60.0
# A proxy's URL: all gateways of the tests then reach their brokers through it.
THROUGH = os.environ.get("TEST_THROUGH_PROXY", "")
# A file's path: all gateways of the tests then use MQTT over WebSocket, and brokers add a line for each WebSocket.
OVER_WEBSOCKET = os.environ.get("TEST_OVER_WEBSOCKET", "")


def start_reactor() -> Any:
    """Run the reactor in a thread that ends with the process."""
    reactor: Any = _reactor
    if not reactor.running:
        thread = threading.Thread(target=reactor.run, kwargs={"installSignalHandlers": False}, daemon=True)
        thread.start()
        eventually(lambda: reactor.running, "the reactor runs")
    return reactor


def eventually(condition: Callable[[], Any], what: str | Callable[[], str]) -> Any:
    """Wait until `condition` is true and return its value; fail, naming `what`, after `PATIENCE`.

    If `what` says how things are, it is a function, which is called when the time is up.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"did not come about within {PATIENCE:g} s: {what() if callable(what) else what}")


class RecordingJournal(Journal):
    """The gateway's journal, which also keeps the records."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        super().__init__(seconds)
        self.started: list[SessionRecord] = []
        self.ended: list[SessionRecord] = []
        self.turned_away: list[tuple[Any, str]] = []
        self.turned_away_details: list[str] = []

    def session_started(self, record: SessionRecord) -> None:
        self.started.append(record)
        super().session_started(record)

    def session_ended(self, record: SessionRecord) -> None:
        self.ended.append(record)
        super().session_ended(record)

    def refused(self, reason: Any, device_address: str, detail: str = "") -> None:
        self.turned_away_details.append(detail)
        self.turned_away.append((reason, device_address))
        super().refused(reason, device_address, detail)


class RunningGateway:
    """A gateway on a free loopback port.

    `upstream` is a port on localhost or a list of `[[upstream]]` tables; further arguments are sections of the
    configuration, merged over defaults that keep tests short (`timeouts={"tls": 1}`).
    """

    def __init__(
        self,
        reactor: Any,
        upstream: int | list[dict[str, Any]],
        *,
        ca_file: Path | None,
        host: str = "localhost",
        tls: dict[str, Any] | None = None,
        **sections: Any,
    ) -> None:
        self.reactor = reactor
        if isinstance(upstream, int):
            upstream = [{"host": host, "port": upstream}]
        if THROUGH:
            upstream = [{"proxy": THROUGH, **table} for table in upstream]
        if OVER_WEBSOCKET:
            upstream = [{"transport": "websocket", **table} for table in upstream]
        trust = {"ca_file": str(ca_file)} if ca_file is not None else {}
        self._mapping = {
            "listen": [{"endpoint": "127.0.0.1:0"}],
            "upstream": upstream,
            "tls": trust | (tls or {}),
            "drain": {"seconds": 0},
            # Tests open sessions by the hundred, of one name.
            "devices": {"connects_per_minute": 0, **sections.pop("devices", {})},
            **sections,
        }
        self.config = from_mapping(self._mapping)
        self.journal = RecordingJournal(reactor.seconds)
        self.service = self.call(GatewayService, self.config, reactor, self.journal)
        self.call(self.service.startService)
        self.port: int = self.service.ports[0].getHost().port

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the reactor's thread, and wait for what it returns, but not for ever."""
        outcomes: Queue[Any] = Queue()
        self.reactor.callFromThread(lambda: maybeDeferred(function, *arguments).addBoth(outcomes.put))
        try:
            outcome = outcomes.get(timeout=PATIENCE)
        except Empty:
            raise AssertionError(f"no answer within {PATIENCE:g} s from {function}") from None
        if isinstance(outcome, Failure):
            outcome.raiseException()
        return outcome

    @property
    def ended(self) -> list[SessionRecord]:
        """Records of sessions that have ended, in order."""
        return self.journal.ended

    def wait_ended(self, count: int = 1) -> SessionRecord:
        """Wait until `count` sessions have ended; return the record of the last."""
        eventually(lambda: len(self.ended) >= count, lambda: f"{count} ended sessions, so far {self.ended}")
        return self.ended[count - 1]

    def wait_empty(self) -> None:
        """Wait until nothing of any session is left: no session, no count."""
        gateway = self.service.gateway
        left = (gateway.sessions, gateway.doorstep.connections)
        eventually(lambda: not any(left), lambda: f"no sessions, but {left}")
        # Asked in the event loop: in this thread, a session may have left the set and not yet the count.
        assert self.call(lambda: gateway.doorkeeper.sessions) == 0

    def change(self, **sections: Any) -> None:
        """Change to a configuration in which these sections are others."""
        self._mapping |= sections
        self.call(self.service.change, from_mapping(self._mapping))

    def stop(self) -> None:
        """Stop the gateway; nothing may be left of it."""
        if self.service.running:
            self.call(self.service.stopService)
        assert not self.service.gateway.sessions


class ServerTLS:
    """A server's certificate chain and key, as PEM; `context()` makes the standard library's server context of it."""

    def __init__(self, chain_pem: bytes, key_pem: bytes) -> None:
        self.chain_pem = chain_pem
        self.key_pem = key_pem

    @classmethod
    def from_trustme(cls, certificate: trustme.LeafCert) -> Self:
        """Take a certificate of trustme's."""
        chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
        return cls(chain, certificate.private_key_pem.bytes())

    def context(self) -> ssl.SSLContext:
        """Make a server context."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Weak certificates must reach the gateway, which is to refuse them.
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        with TemporaryDirectory() as directory:
            chain, key = Path(directory, "chain.pem"), Path(directory, "key.pem")
            chain.write_bytes(self.chain_pem)
            key.write_bytes(self.key_pem)
            context.load_cert_chain(chain, key)
        return context


class Broker:
    """A TLS server on a loopback port, a free one unless told otherwise, that records every application byte it gets.

    `serve` is called in a thread with each connection whose handshake was done, and may answer: by default it accepts
    CONNECT in the device's version and records until the end.  `tls` is a `ServerTLS`, an `ssl.SSLContext`, or `None`
    for a server that speaks no TLS: then the bytes recorded are those on the wire.
    """

    def __init__(
        self,
        *,
        tls: ServerTLS | ssl.SSLContext | None,
        serve: Callable[[BrokerConnection], None] | None = None,
        address: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._context = tls.context() if isinstance(tls, ServerTLS) else tls
        self._serve = serve or accept_session
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, port), family=family)
        self.port: int = self._listener.getsockname()[1]
        self.connections: list[BrokerConnection] = []
        self.handshake_errors: list[Exception] = []
        self.accepted = 0
        self._stopped = False
        # What was accepted and has not become a connection yet; the threads that see to it.
        self._shaking: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def received(self) -> bytes:
        """All application bytes of all connections."""
        return b"".join(bytes(connection.received) for connection in self.connections)

    def connection(self, index: int = 0) -> BrokerConnection:
        """Wait for a connection whose handshake is done, and return it."""
        eventually(lambda: len(self.connections) > index, f"connection {index} at the broker")
        return self.connections[index]

    def blackhole(self) -> None:
        """Let nothing through any more: what comes is dropped, neither refused nor acknowledged."""
        for each in self._sockets():
            drop_packets(each)

    def come_back(self) -> None:
        """Undo `blackhole`."""
        for each in self._sockets():
            keep_packets(each)

    def _sockets(self) -> list[socket.socket]:
        sockets = [self._listener, *(connection.socket for connection in self.connections)]
        return [each for each in sockets if each.fileno() >= 0]

    def stop(self) -> None:
        """Close everything."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for raw in list(self._shaking):
            # A close does not wake a thread that reads; this does.
            with contextlib.suppress(OSError):
                raw.shutdown(socket.SHUT_RDWR)
        for connection in self.connections:
            connection.close()
        for thread in self._threads:
            thread.join(1)

    def _accept(self) -> None:
        while not self._stopped:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._shaking.add(raw)
            thread = threading.Thread(target=self._run, args=(raw,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run(self, raw: socket.socket) -> None:
        raw.settimeout(PATIENCE)
        # As brokers do: otherwise CONNACK waits until the session tickets before it are acknowledged, 40 ms later.
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            wrapped = raw if self._context is None else self._context.wrap_socket(raw, server_side=True)
        except (OSError, ssl.SSLError) as error:
            self.handshake_errors.append(error)
            raw.close()
            return
        finally:
            self._shaking.discard(raw)
        # Without TLS, the bytes recorded are those on the wire.
        over_websocket = OVER_WEBSOCKET and self._context is not None
        connection = WebSocketBrokerConnection(wrapped) if over_websocket else BrokerConnection(wrapped)
        self.connections.append(connection)
        # The far end may go at any time; what was received until then is recorded.
        with contextlib.suppress(OSError, ssl.SSLError, EOFError):
            self._serve(connection)
        connection.close()
        connection.finished.set()


class BrokerConnection:
    """One connection at the broker.  `received` grows with each read; `ended_cleanly` is set at close_notify."""

    def __init__(self, wrapped: Any) -> None:
        self.socket = wrapped
        self.received = bytearray()
        self.ended_cleanly: bool | None = None
        self.finished = threading.Event()

    def read(self, size: int = 65536) -> bytes:
        """Read some bytes; empty at the end."""
        data = self._read_wire(size)
        self.received += data
        return data

    def _read_wire(self, size: int = 65536) -> bytes:
        try:
            data: bytes = self.socket.recv(size)
        except ssl.SSLEOFError:
            self.ended_cleanly = False
            return b""
        if not data:
            self.ended_cleanly = True
        return data

    def read_packet(self) -> bytes:
        """Read one control packet whole.  Raises `EOFError` at the end."""
        head = self._exactly(2)
        while head[-1] & 0x80:
            head += self._exactly(1)
        length = sum((byte & 0x7F) << (7 * index) for index, byte in enumerate(head[1:]))
        return head + self._exactly(length)

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.socket.sendall(data)

    def close(self) -> None:
        """Close the connection without ceremony."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self.socket.close()

    def read_to_end(self) -> None:
        """Read until the far end closes."""
        while self.read():
            pass

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.read(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data


class WebSocketBrokerConnection(BrokerConnection):
    """A connection that carries MQTT in WebSocket frames.

    `received` has the MQTT bytes; until the WebSocket is open, it has every byte.
    """

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        self._server = WSConnection(ConnectionType.SERVER)
        self._buffered = bytearray()

    def read(self, size: int = 65536) -> bytes:
        """Read some MQTT bytes; empty at the end."""
        while not self._buffered:
            data = self._read_wire()
            if not data:
                return b""
            if self._server.state is ConnectionState.CONNECTING:
                self.received += data
            try:
                self._server.receive_data(data)
                self._take(list(self._server.events()))
            except RemoteProtocolError as error:
                raise OSError(error) from None
        taken = bytes(self._buffered[:size])
        del self._buffered[:size]
        self.received += taken
        return taken

    def send(self, data: bytes) -> None:
        """Send MQTT bytes in one frame."""
        self.socket.sendall(self._server.send(BytesMessage(data)))

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Request):
                self.socket.sendall(self._server.send(AcceptConnection(subprotocol="mqtt")))
                self.received.clear()
                with Path(OVER_WEBSOCKET).open("a") as opened:
                    opened.write(f"{event.target}\n")
            elif isinstance(event, BytesMessage):
                self._buffered += event.data


def accept_session(connection: BrokerConnection) -> None:
    """Serve as a broker that accepts CONNECT, in its version, and then only listens."""
    version = connect_version(connection.read_packet())
    connection.send(b"\x20\x03\x00\x00\x00" if version == 5 else b"\x20\x02\x00\x00")
    connection.read_to_end()


def connect_version(packet: bytes) -> int:
    """Return the protocol level of a CONNECT packet whose Remaining Length fits one byte, or two."""
    body = packet[2:] if packet[1] < 0x80 else packet[3:]
    return body[2 + int.from_bytes(body[:2], "big")]


class Device:
    """A device's socket, connected to the gateway."""

    def __init__(self, port: int, *, address: str = "127.0.0.1", source: str = "") -> None:
        self.socket = socket.create_connection((address, port), PATIENCE, (source, 0) if source else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.socket.sendall(data)

    def read(self, size: int) -> bytes:
        """Read exactly `size` bytes; fewer only at the end."""
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                break
            data += part
        return data

    def read_to_end(self) -> bytes:
        """Read until the gateway closes, in order or by reset; return what came."""
        data = b""
        try:
            while part := self.socket.recv(65536):
                data += part
        except ConnectionResetError:
            pass
        return data

    def reset(self) -> None:
        """Close with RST, as a device that lost power and came back would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.socket.close()

    def close(self) -> None:
        """Close in order."""
        self.socket.close()


def open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
