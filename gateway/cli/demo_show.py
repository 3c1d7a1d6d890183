"""The demo: a sensor's message arrives through a verified channel, and nothing is sent without one.

In: a reactor, the port to listen on.  Out: lines on standard output, an exit status.

The steps are in `Show.steps`, in order.  No private key stays on disk after the broker has read its own, so none is
left behind even by SIGKILL.
"""

from __future__ import annotations

import shlex
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import trustme
from OpenSSL import SSL
from paho.mqtt.reasoncodes import ReasonCode
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.cli.demo_stage import (
    LOOPBACK,
    PATIENCE,
    BrokerProcess,
    DemoFailed,
    Journal,
    Stage,
    awaited,
    port_of,
    shown,
)
from gateway.errors import EndReason

# The gateway verifies the first; the address is for other clients, which dial it.
BROKER_NAMES = ("localhost", LOOPBACK)
OTHER_NAME = "elsewhere.example"
TOPIC, PAYLOAD = "demo/temperature", "21.5"


class Show(Stage):
    """One run of the demo."""

    async def steps(self, stack: AsyncExitStack) -> None:
        """Show a message that arrives, and one that is not sent."""
        say = self.say
        say("demo", "a plain-MQTT sensor reaches a TLS broker through the gateway, all on this machine")

        directory, ca, ca_file = self.make_ca(stack)
        say("certificate", f"created a CA and a certificate for {' and '.join(BROKER_NAMES)} in {directory}")

        broker = await self._start_amqtt(stack, ca, directory)
        say(
            "broker",
            f"amqtt {version('amqtt')} listens on {LOOPBACK}:{broker.port}, TLS only (process {broker.pid}); "
            "its key file has been deleted",
        )

        port, journal = self.start_gateway(stack, "gateway", _before(broker.port, ca_file), self._port)
        await self._show_delivery(stack, broker.port, ca_file, port, journal)
        async with AsyncExitStack() as inner:
            await self._show_refusal(inner, ca, ca_file)
        self._all_shown = True
        if self._once:
            return

        say(
            "demo",
            f"point your own client at {LOOPBACK}:{port} (MQTT 3.1.1 only, no TLS); Ctrl-C ends the demo",
        )
        plain = f"-h {LOOPBACK} -p {port}"
        print(
            f"""
  through the gateway:         mosquitto_sub {plain} -t 'demo/#' -v
                               mosquitto_pub {plain} -t demo/hello -m hello
  at the broker, over TLS:     mosquitto_sub -h {LOOPBACK} -p {broker.port} --cafile {shlex.quote(str(ca_file))} \
-t 'demo/#' -v
""",
            flush=True,
        )
        await Deferred()  # until interrupted

    async def _start_amqtt(self, stack: AsyncExitStack, ca: trustme.CA, directory: Path) -> BrokerProcess:
        certificate = ca.issue_cert(*BROKER_NAMES, not_after=datetime.now(UTC) + timedelta(days=7))
        chain, key = directory / "broker.pem", directory / "broker.key"
        for number, pem in enumerate(certificate.cert_chain_pems):
            pem.write_to_path(str(chain), append=number > 0)
        key.touch(mode=0o600)
        certificate.private_key_pem.write_to_path(str(key))
        try:
            return await self.start_broker(stack, "gateway.cli.demo_broker", str(chain), str(key))
        finally:
            key.unlink()  # the broker has loaded it, or has failed

    async def _show_delivery(
        self, stack: AsyncExitStack, broker_port: int, ca_file: Path, port: int, journal: Journal
    ) -> None:
        say = self.say
        subscriber = await self.connect(stack, "demo-subscriber", broker_port, ca_file)
        await self.next(subscriber, "CONNACK")
        subscriber.paho.subscribe("demo/#", qos=1)
        await self.next(subscriber, "SUBACK")
        say("subscriber", f"connected to the broker itself over {subscriber.tls_version}, subscribed to demo/#")

        sensor = await self.connect(stack, "demo-sensor", port)
        code: ReasonCode = await self.next(sensor, "CONNACK")
        say("sensor", f"got {shown(code)}: the broker's own answer, to a client without TLS")
        if code.is_failure:
            raise DemoFailed("the sensor was refused, see above")
        sensor.paho.publish(TOPIC, PAYLOAD, qos=1)
        await self.next(sensor, "PUBACK")
        say("sensor", f"published {PAYLOAD} on {TOPIC}, QoS 1; the broker sent PUBACK")
        topic, payload = await self.next(subscriber, "PUBLISH")
        say("subscriber", f"received {payload} on {topic}")
        if (topic, payload) != (TOPIC, PAYLOAD):
            raise DemoFailed(f"the subscriber should have received {PAYLOAD} on {TOPIC}")
        # From here on, other clients may publish.
        subscriber.on_publish = lambda topic, payload: say("subscriber", f"received {payload} on {topic}")
        sensor.paho.disconnect()
        await self.within(PATIENCE, journal.ended, "the session ended")

    async def _show_refusal(self, stack: AsyncExitStack, ca: trustme.CA, ca_file: Path) -> None:
        say = self.say
        impostor = Impostor(ca.issue_cert(OTHER_NAME))
        listening = self._reactor.listenSSL(0, impostor, impostor, interface=LOOPBACK)
        stack.push_async_callback(awaited, listening.stopListening)
        where = f"{LOOPBACK}:{port_of(listening)}"
        say("impostor", f"listens with TLS on {where}; same CA, but a certificate for {OTHER_NAME}")

        port, journal = self.start_gateway(stack, "2nd gateway", _before(port_of(listening), ca_file))
        sensor = await self.connect(stack, "demo-sensor", port)
        code: ReasonCode = await self.next(sensor, "CONNACK")
        record = await self.within(PATIENCE, journal.ended, "the session ended")
        say("sensor", f"got {shown(code)}, and keeps its message")
        await self.within(PATIENCE, impostor.gone, "the gateway closed its connection to the impostor")
        say("impostor", f"received {impostor.received} bytes of MQTT: neither the sensor's name nor its password")
        if record.reason is not EndReason.TLS_NAME_MISMATCH or not code.is_failure or impostor.received:
            raise DemoFailed("the gateway should have refused the impostor before the first MQTT byte")


def _before(port: int, ca_file: Path) -> dict[str, Any]:
    """Return the configuration of a gateway for a broker."""
    return {
        "upstream": [{"host": LOOPBACK, "port": port, "server_name": BROKER_NAMES[0]}],
        "tls": {"ca_file": [str(ca_file)]},
    }


class _ImpostorConnection(Protocol):
    factory: Impostor

    def dataReceived(self, data: bytes) -> None:
        self.factory.received += len(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: ARG002  IProtocol's signature
        if not self.factory.gone.called:
            self.factory.gone.callback(None)


@implementer(IOpenSSLServerConnectionCreator)
class Impostor(Factory):
    """A TLS server that counts the bytes it receives.  `gone` fires when the first connection has ended."""

    protocol: Any = _ImpostorConnection
    noisy = False

    def __init__(self, certificate: trustme.LeafCert) -> None:
        self.received = 0
        self.gone: Deferred[None] = Deferred()
        self._context = SSL.Context(SSL.TLS_SERVER_METHOD)
        certificate.configure_cert(self._context)

    def serverConnectionForTLS(self, tlsProtocol: object) -> SSL.Connection:  # noqa: ARG002, N802, N803  zope's names
        """See `IOpenSSLServerConnectionCreator`."""
        return SSL.Connection(self._context, None)
