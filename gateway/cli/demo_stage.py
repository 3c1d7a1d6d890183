"""Common parts of the demos: the reactor, the broker's process, the gateway and the clients.

In: a reactor, the port to listen on.  Out: lines on standard output, an exit status.

Everything that a demo opens is closed when it ends: normally, by Ctrl-C, SIGTERM or SIGHUP, or by a failure.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import trustme
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode
from twisted.internet.defer import CancelledError, Deferred, DeferredQueue, maybeDeferred
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.threads import deferToThread
from twisted.logger import (
    FilteringLogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)
from twisted.python.failure import Failure

from gateway.config import from_mapping
from gateway.errors import EndReason, GatewayError, UpstreamFailure
from gateway.service import GatewayService
from gateway.session.record import SessionRecord
from gateway.text import printable, unprintable_escaped

_T = TypeVar("_T")

LOOPBACK = "127.0.0.1"
PATIENCE = 20.0  # seconds for a step that takes milliseconds: a bound for slow boards
BROKER_PATIENCE = 60.0  # seconds for the broker to start and listen
STOP_PATIENCE = 5.0  # seconds for the broker to close its sessions

# paho-mqtt uses MQTT 5.0's names for the return codes of 3.1.1 (MQTT 3.1.1 §3.2.2.3).
_RETURN_CODES = (
    "Success",
    "Unsupported protocol version",
    "Client identifier not valid",
    "Server unavailable",
    "Bad user name or password",
    "Not authorized",
)


class DemoFailed(GatewayError):
    """A step failed or timed out."""


class Stage:
    """One run of a demo on one reactor; subclasses define `steps`."""

    def __init__(self, reactor: Any, *, port: int, once: bool) -> None:
        self._reactor = reactor
        self._port = port
        self._once = once
        self._all_shown = False
        self._failure: str | None = None
        self._running: Deferred[None] | None = None
        self._ending = False
        self._stopped = False

    def run(self) -> int:
        """Run the reactor until the demo has ended; return the exit status."""
        errors = FilteringLogObserver(
            textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(defaultLogLevel=LogLevel.error)]
        )
        globalLogBeginner.beginLoggingTo([errors], redirectStandardIO=False)
        self._reactor.addSystemEventTrigger("before", "shutdown", self._shut_down)
        self._reactor.callWhenRunning(self._start)
        self._reactor.run()
        if self._failure is not None:
            print(f"mqtts-gateway demo: {self._failure}", file=sys.stderr)
        return 0 if self._all_shown and self._failure is None else 1

    def _start(self) -> None:
        # Replaces the reactor's handlers: SIGHUP counts as Ctrl-C, and a second Ctrl-C has no effect.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: self._reactor.callFromThread(self._stop))
        self._running = Deferred.fromCoroutine(self._main())
        self._running.addErrback(self._failed)
        self._running.addBoth(lambda _: self._ended())

    def _failed(self, failure: Failure) -> None:
        if failure.check(CancelledError):
            return  # ended by the user, or by `_give_up`, which has set the reason
        if failure.check(GatewayError, OSError):
            self._failure = self._failure or str(failure.value)
        else:
            self._failure = f"internal error\n{failure.getTraceback()}"

    def _ended(self) -> None:
        self._running = None
        self._stop()

    def _stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._reactor.stop()

    def _shut_down(self) -> Deferred[None] | None:
        self._cancel()
        return self._running

    def _cancel(self) -> None:
        """Cancel the steps, unless they are closing what they opened."""
        if self._running is not None and not self._ending:
            self._ending = True
            self._running.cancel()

    def _give_up(self, why: str) -> None:
        self._failure = self._failure or why
        self._reactor.callLater(0, self._cancel)  # later: the caller may be one of the steps

    def say(self, who: str, what: str) -> None:
        """Print a line."""
        try:
            print(f"{who:>11}  {what}", flush=True)
        except OSError as error:  # the reader of standard output has gone
            # What is still buffered would fail again when the interpreter exits.
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            self._give_up(f"cannot write to standard output: {error.strerror}")

    async def _main(self) -> None:
        async with AsyncExitStack() as stack:
            try:
                await self.steps(stack)
            finally:
                self._ending = True

    async def steps(self, stack: AsyncExitStack) -> None:
        """Run the demo; `stack` closes what was opened."""
        raise NotImplementedError

    def make_ca(self, stack: AsyncExitStack) -> tuple[Path, trustme.CA, Path]:
        """Create a private temporary directory (mode 0700) and a CA; return both, and the CA's file."""
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="mqtts-gateway-demo-")))
        ca = trustme.CA(organization_name="mqtts-gateway demo", organization_unit_name="CA")
        ca_file = directory / "ca.pem"
        ca.cert_pem.write_to_path(str(ca_file))
        return directory, ca, ca_file

    async def start_broker(
        self, stack: AsyncExitStack, module: str, *arguments: str, told: Callable[[str], None] = lambda _: None
    ) -> BrokerProcess:
        """Start a broker's module as a process; `told` gets the lines that it writes once it listens."""
        broker = BrokerProcess(self._give_up, told)
        command = [sys.executable, "-P", "-m", module, *arguments]
        self._reactor.spawnProcess(broker, sys.executable, command, env=os.environ)
        stack.push_async_callback(broker.stop, self._reactor)
        await self.within(BROKER_PATIENCE, broker.ready, "the broker listens")
        return broker

    def start_gateway(
        self, stack: AsyncExitStack, name: str, sections: Mapping[str, Any], port: int = 0
    ) -> tuple[int, Journal]:
        """Start a gateway with these configuration sections; return its port and its journal."""
        config = from_mapping(
            {
                "listen": [{"endpoint": f"{LOOPBACK}:{port}"}],
                # amqtt does not answer a version of MQTT that it does not know.
                "timeouts": {"close": 1, "connack": 2},
                "drain": {"seconds": 0},
                "status": {"endpoint": f"{LOOPBACK}:0"},
                **sections,
            }
        )
        journal = Journal(lambda what: self.say(name, what))
        service = GatewayService(config, self._reactor, journal)
        service.startService()
        stack.push_async_callback(awaited, service.stopService)
        port = port_of(service.ports[0])
        upstream = config.upstream[0]
        self.say(
            name,
            f"accepts plain MQTT on {LOOPBACK}:{port}; its upstream is {upstream.address}, "
            f"verified as {upstream.verify_name}",
        )
        if service.status_port.port is not None:
            self.say(name, f"status page: http://{LOOPBACK}:{port_of(service.status_port.port)}/")
        return port, journal

    async def connect(
        self, stack: AsyncExitStack, name: str, port: int, ca_file: Path | None = None, source: str = ""
    ) -> Client:
        """Connect a client, with TLS if there is a `ca_file`, from the address `source`.  Raises `DemoFailed`."""
        client = Client(self._reactor, name, ca_file)
        stack.push_async_callback(deferToThread, client.stop)
        try:
            await deferToThread(client.start, port, source)
        except OSError as error:
            raise DemoFailed(f"{name} cannot connect to {LOOPBACK}:{port}: {error}") from None
        return client

    async def next(self, client: Client, kind: str) -> Any:
        """Return the value of the client's next event, which must be a packet of this kind."""
        name, value = await self.within(PATIENCE, client.events.get(), f"{client.name} got {kind}")
        if name != kind:
            raise DemoFailed(f"{client.name} got {name} instead of {kind}")
        return value

    async def within(self, seconds: float, deferred: Deferred[_T], what: str) -> _T:
        """Wait with a timeout.  Raises `DemoFailed`."""
        try:
            return await deferred.addTimeout(seconds, self._reactor)
        except DeferredTimeout:
            raise DemoFailed(f"timed out after {seconds:g} s: {what}") from None


class BrokerProcess(ProcessProtocol):
    """The broker's process.  `ready` fires once `port` is known; `died` is called if it ends unexpectedly later."""

    transport: Any

    def __init__(self, died: Callable[[str], None], told: Callable[[str], None]) -> None:
        self.port = 0
        self.pid = 0
        self.ready: Deferred[None] = Deferred()
        self._died = died
        self._told = told
        self._output = b""
        self._complaints = b""
        self._gone: Deferred[None] = Deferred()
        self._stopping = False

    def connectionMade(self) -> None:
        """See `ProcessProtocol`."""
        self.pid = self.transport.pid

    def outReceived(self, data: bytes) -> None:  # noqa: N802  IProcessProtocol's name
        """See `ProcessProtocol`."""
        *lines, self._output = (self._output + data).split(b"\n")
        for line in lines:
            if self.ready.called:
                self._told(line.decode("utf-8", "replace"))
            elif line.startswith(b"ready "):
                self.port = int(line.split()[1])
                self.ready.callback(None)

    def errReceived(self, data: bytes) -> None:  # noqa: N802  IProcessProtocol's name
        """See `ProcessProtocol`."""
        self._complaints = (self._complaints + data)[-4096:]

    def processEnded(self, reason: Failure) -> None:  # noqa: N802  IProcessProtocol's name
        """See `ProcessProtocol`."""
        ended: Any = reason.value
        status = f"exit status {ended.exitCode}" if ended.signal is None else f"signal {ended.signal}"
        lines = [printable(line) for line in self._complaints.decode("utf-8", "replace").splitlines()[-12:]]
        why = "\n".join([f"({status}); its last lines:", *(f"  {line}" for line in lines)])
        self._gone.callback(None)
        if not self.ready.called:
            self.ready.errback(DemoFailed(f"the broker did not start {why}"))
        elif not self._stopping:
            self._died(f"the broker has ended {why}")

    async def stop(self, reactor: Any) -> None:
        """Stop the process, kill it if it does not stop, and wait for its end."""
        self._stopping = True
        if self._gone.called:
            return
        self.transport.closeStdin()
        kill = reactor.callLater(STOP_PATIENCE, self.transport.signalProcess, "KILL")
        await self._gone
        if kill.active():
            kill.cancel()


class Client:
    """A paho-mqtt client, on its own thread.

    `events` has the received packets in order, as pairs of kind and value.
    """

    def __init__(self, reactor: Any, name: str, ca_file: Path | None) -> None:
        self.name = name
        self.events: DeferredQueue[tuple[str, Any]] = DeferredQueue()
        self.on_publish: Callable[[str, str], None] = lambda topic, payload: self.events.put(
            ("PUBLISH", (topic, payload))
        )
        self.paho = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        self.paho.username_pw_set(name, "a password that only the broker may learn")
        if ca_file is not None:
            self.paho.tls_set(ca_certs=str(ca_file))

        def put(kind: str, value: Any = None) -> None:
            reactor.callFromThread(self.events.put, (kind, value))

        def on_message(_client: paho.Client, _userdata: Any, message: paho.MQTTMessage) -> None:
            payload = printable(message.payload.decode("utf-8", "replace"), 80)
            reactor.callFromThread(lambda: self.on_publish(printable(message.topic, 80), payload))

        self.paho.on_connect = lambda _client, _userdata, _flags, code, _properties: put("CONNACK", code)
        self.paho.on_subscribe = lambda *_: put("SUBACK")
        self.paho.on_publish = lambda *_: put("PUBACK")
        self.paho.on_message = on_message

    @property
    def tls_version(self) -> str:
        """The TLS version of the connection."""
        return str(self.paho.socket().version())  # type: ignore[union-attr]  # used with TLS clients only

    def start(self, port: int, source: str) -> None:
        """Connect; blocks until TCP and TLS are established.  Raises `OSError`."""
        self.paho.connect(LOOPBACK, port, bind_address=source)
        self.paho.loop_start()

    def stop(self) -> None:
        """End the connection and the thread; blocks until both have ended."""
        self.paho.disconnect()
        self.paho.loop_stop()


class Journal:
    """A gateway's journal as demo output.  `ended` fires with the record of the first session that ends."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.ended: Deferred[SessionRecord] = Deferred()
        self._say = say

    def session_started(self, record: SessionRecord) -> None:
        """See `gateway.session.session.Journal`."""
        name, peer = printable(record.client_identifier, 40), record.peer
        self._say(f'session {record.number}: "{name}" from {record.device_address}, MQTT {record.protocol_version}')
        if peer is not None:
            self._say(
                f"session {record.number}: {record.upstream_address} verified as {peer.matched_san}, "
                f"issuer {peer.issuer}, {peer.tls_version} {peer.cipher}"
            )

    def session_ended(self, record: SessionRecord) -> None:
        """See `gateway.session.session.Journal`."""
        detail = f" ({unprintable_escaped(record.detail, 200)})" if record.detail else ""
        counts = f"{record.bytes_up} bytes up, {record.bytes_down} bytes down"
        self._say(f"session {record.number} ended: {record.reason}{detail}; {counts}")
        if not self.ended.called:
            self.ended.callback(record)

    def refused(self, reason: EndReason, device_address: str, detail: str = "") -> None:
        """See `gateway.ops.journal.GatewayJournal`."""
        self._say(
            f"connection from {device_address} refused: {reason}{f' ({detail})' if detail else ''}. {reason.remedy}"
        )

    def passed_over(self, upstream: str, failure: UpstreamFailure) -> None:
        """See `gateway.ops.journal.GatewayJournal`."""
        self._say(f"{upstream} failed, another broker was used: {failure}")

    def left_alone(self, upstream: str, failure: UpstreamFailure, seconds: float) -> None:
        """See `gateway.dial.dialler.DialJournal`."""
        self._say(f"{upstream} failed; next attempt in {seconds:.1f} s: {failure}")

    def serves_again(self, upstream: str) -> None:
        """See `gateway.dial.dialler.DialJournal`."""
        self._say(f"{upstream} is available again")

    def sweep(self) -> None:
        """See `gateway.ops.journal.GatewayJournal`."""

    def flush(self) -> None:
        """See `gateway.ops.journal.GatewayJournal`."""


async def awaited(function: Callable[[], Any]) -> None:
    """Call a function and wait for what it returns."""
    await maybeDeferred(function)


def port_of(listening: IListeningPort) -> int:
    """Return the number of the open port."""
    address: Any = listening.getHost()
    return int(address.port)


def shown(code: ReasonCode) -> str:
    """Return the code on the wire and its meaning."""
    name = str(code)
    return f"CONNACK {_RETURN_CODES.index(name)} ({name})" if name in _RETURN_CODES else f"CONNACK ({name})"
