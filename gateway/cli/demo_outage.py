"""The demo with `--profile outage`: a sensor publishes through an outage and sees nothing of it.

In: a reactor, the port to listen on.  Out: lines on standard output, an exit status.

The gateway reaches the broker through a link that the demo cuts and opens again; the subscriber does not.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from paho.mqtt.reasoncodes import ReasonCode
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import connectionDone
from twisted.protocols.portforward import ProxyFactory, ProxyServer
from twisted.python.failure import Failure

from gateway.cli.demo_show import BROKER_NAMES, Show
from gateway.cli.demo_stage import LOOPBACK, Client, DemoFailed, Journal, awaited, port_of, shown

SENSOR, TOPIC = "demo-sensor", "demo/temperature"
# The readings before, in and after the outage.
BEFORE = ("21.1", "21.2")
DURING = ("21.3", "21.4", "21.5", "21.6", "21.7")
AFTER = ("21.8",)


class OutageShow(Show):
    """One run of the demo."""

    async def steps(self, stack: AsyncExitStack) -> None:
        """Show messages that are stored in an outage and delivered after it."""
        say = self.say
        say("demo", "a plain-MQTT sensor publishes through an outage of its broker, all on this machine")
        directory, ca, ca_file = self.make_ca(stack)
        broker = await self._start_amqtt(stack, ca, directory)
        say("broker", f"amqtt listens on {LOOPBACK}:{broker.port}, TLS only (process {broker.pid})")
        link = Link(self._reactor, broker.port)
        link.open()
        stack.push_async_callback(awaited, link.cut)
        say("link", f"forwards {LOOPBACK}:{link.port} to the broker; the gateway has no other way to it")
        port, journal = self.start_gateway(stack, "gateway", _through(link.port, ca_file, directory), self._port)

        subscriber = await self.connect(stack, "demo-subscriber", broker.port, ca_file)
        await self.next(subscriber, "CONNACK")
        subscriber.paho.subscribe("demo/#", qos=1)
        await self.next(subscriber, "SUBACK")
        say("subscriber", "connected to the broker itself, subscribed to demo/#")
        sensor = await self.connect(stack, SENSOR, port)
        code: ReasonCode = await self.next(sensor, "CONNACK")
        say("sensor", f"got {shown(code)}")
        if code.is_failure:
            raise DemoFailed("the sensor was refused, see above")

        await self._publish(sensor, BEFORE, "the broker acknowledged it")
        await self._receive(subscriber, BEFORE)
        await awaited(link.cut)
        say("link", "cut: the gateway cannot reach the broker any more")
        await self._publish(sensor, DURING, "the gateway stored and acknowledged it")
        if subscriber.events.pending:
            raise DemoFailed("no message should have passed the link while it was cut")
        say("subscriber", "received nothing meanwhile")
        link.open()
        say("link", "open again")
        await self._receive(subscriber, DURING)
        await self._publish(sensor, AFTER, "PUBACK")
        await self._receive(subscriber, AFTER)
        self._check(journal)
        self._all_shown = True
        if not self._once:
            say("demo", f"{SENSOR} stays connected; try your own clients on {LOOPBACK}:{port}; Ctrl-C ends the demo")
            subscriber.on_publish = lambda topic, payload: say("subscriber", f"received {payload} on {topic}")
            await Deferred()  # until interrupted

    async def _publish(self, sensor: Client, readings: tuple[str, ...], then: str) -> None:
        for reading in readings:
            sensor.paho.publish(TOPIC, reading, qos=1)
            await self.next(sensor, "PUBACK")
            self.say("sensor", f"published {reading}, QoS 1: {then}")

    async def _receive(self, subscriber: Client, readings: tuple[str, ...]) -> None:
        for reading in readings:
            _, payload = await self.next(subscriber, "PUBLISH")
            self.say("subscriber", f"received {payload}")
            if payload != reading:
                raise DemoFailed(f"the subscriber should have received {reading}")

    def _check(self, journal: Journal) -> None:
        if journal.ended.called:
            raise DemoFailed("the sensor's session should have outlived the outage")
        self.say("sensor", f"was connected all the time; {len(DURING)} readings of the outage arrived, in order")


def _through(port: int, ca_file: Path, directory: Path) -> dict[str, Any]:
    """Return the configuration of a gateway that stores what the sensor sends."""
    return {
        "upstream": [{"host": LOOPBACK, "port": port, "server_name": BROKER_NAMES[0]}],
        "tls": {"ca_file": [str(ca_file)]},
        "store": {"directory": str(directory / "store")},
        "device": [{"match_client_id": SENSOR, "bound_to": [LOOPBACK], "store": True}],
        "failover": {"retry_first": 0.5, "retry_max": 1.0},
    }


class _LinkServer(ProxyServer):
    factory: _LinkFactory
    transport: Any

    def connectionMade(self) -> None:
        self.factory.connections.add(self)
        super().connectionMade()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.connections.discard(self)
        super().connectionLost(reason)


class _LinkFactory(ProxyFactory):
    protocol = _LinkServer
    noisy = False

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.connections: set[_LinkServer] = set()


class Link:
    """A TCP port that leads to the broker and can be cut; `port` is its number, the same each time it is opened."""

    def __init__(self, reactor: Any, port: int) -> None:
        self.port = 0
        self._reactor = reactor
        self._factory = _LinkFactory(LOOPBACK, port)
        self._listening: IListeningPort | None = None

    def open(self) -> None:
        """Let connections through."""
        self._listening = self._reactor.listenTCP(self.port, self._factory, interface=LOOPBACK)
        self.port = port_of(self._listening)

    def cut(self) -> Any:
        """End all connections and refuse new ones; return a Deferred, or None."""
        listening, self._listening = self._listening, None
        for connection in list(self._factory.connections):
            connection.transport.abortConnection()
        return None if listening is None else listening.stopListening()
