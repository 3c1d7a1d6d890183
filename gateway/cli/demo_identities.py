"""The demo with `--profile aws-like`: plain sensors with certificates of their own at a cloud-like broker.

In: a reactor, the port to listen on.  Out: lines on standard output, an exit status.

The broker requires what AWS IoT Core requires: ALPN, SNI, and a certificate per device whose common name is the Client
Identifier.  Two sensors that know nothing of this are served; a third one, which claims to be one of them, is not.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509
from paho.mqtt.reasoncodes import ReasonCode
from twisted.internet.defer import Deferred, DeferredQueue

from gateway.cli.demo_cloud import Rules
from gateway.cli.demo_stage import LOOPBACK, PATIENCE, DemoFailed, Stage, shown
from gateway.cli.device_files import Authority, Files, certificate_pem, key_pem, make_key, now, rule_text
from gateway.errors import EndReason
from gateway.text import printable
from gateway.tls.trust import read_private_key

BROKER_NAME = "localhost"
ALPN = "x-amzn-mqtt-ca"
SENSORS = ("boiler-1", "boiler-2")
# Linux accepts any address of 127.0.0.0/8.
SPOOFER = "127.0.0.66"
DAYS = 7


class IdentitiesShow(Stage):
    """One run of the demo."""

    async def steps(self, stack: AsyncExitStack) -> None:
        """Show two sensors that are accepted, each with its own certificate, and a spoofer that is refused."""
        say = self.say
        say("demo", "two plain-MQTT sensors reach a broker that requires a certificate of each, all on this machine")
        directory, ca, ca_file = self.make_ca(stack)
        self._write_rules(directory, ca)

        told: DeferredQueue[dict[str, Any]] = DeferredQueue()
        rules = self._broker_rules(directory, ca, ca_file)
        broker = await self.start_broker(
            stack, "gateway.cli.demo_cloud", json.dumps(asdict(rules)), told=lambda line: told.put(json.loads(line))
        )
        say(
            "broker",
            f"listens on {LOOPBACK}:{broker.port} (process {broker.pid}); it requires ALPN {ALPN}, the name "
            f"{BROKER_NAME} and, from each device, a certificate whose common name is the Client Identifier",
        )
        port, journal = self.start_gateway(
            stack,
            "gateway",
            {
                "upstream": [{"host": LOOPBACK, "port": broker.port, "server_name": BROKER_NAME}],
                "tls": {"ca_file": [str(ca_file)], "alpn": [ALPN]},
                "devices": {"profile": "aws-iot", "directory": str(directory / "devices"), "unknown": "refuse"},
            },
            self._port,
        )
        for name in SENSORS:
            await self._show_sensor(stack, name, port, told)
        spoofer = await self.connect(stack, SENSORS[0], port, source=SPOOFER)
        code: ReasonCode = await self.next(spoofer, "CONNACK")
        record = await self.within(PATIENCE, journal.ended, "the spoofer's session ended")
        say(
            "spoofer",
            f"connected from {SPOOFER} as {SENSORS[0]}, and got {shown(code)}; the broker received nothing",
        )
        if record.reason is not EndReason.SPOOFED or not code.is_failure or told.pending:
            raise DemoFailed("the spoofer should have been refused before the broker was dialled")
        self._all_shown = True
        if not self._once:
            say("demo", f"the sensors stay connected; try another client on {LOOPBACK}:{port}; Ctrl-C ends the demo")
            await Deferred()  # until interrupted

    async def _show_sensor(
        self, stack: AsyncExitStack, name: str, port: int, told: DeferredQueue[dict[str, Any]]
    ) -> None:
        sensor = await self.connect(stack, name, port)
        code: ReasonCode = await self.next(sensor, "CONNACK")
        self.say(name, f"got {shown(code)}: the broker's own answer, to a client without TLS")
        if code.is_failure:
            raise DemoFailed(f"{name} was refused, see above")
        topic = f"plant/{name}/temperature"
        sensor.paho.publish(topic, "21.5", qos=1)
        await self.next(sensor, "PUBACK")
        connected, published = [await self.within(PATIENCE, told.get(), "the broker reports it") for _ in range(2)]
        proof, seen = printable(connected["certificate"]), printable(published.get("topic", "nothing"))
        who = printable(connected["client_identifier"])
        self.say("broker", f"{who} authenticated with the certificate CN={proof}, and published on {seen}")
        if (connected["certificate"], published.get("client_identifier"), published.get("topic")) != (
            name,
            name,
            topic,
        ):
            raise DemoFailed(f"{name} should have used its own certificate")

    def _write_rules(self, directory: Path, ca: trustme.CA) -> None:
        """Write a rule, a key and a certificate for each sensor, as `mqtts-gateway device add` does."""
        devices = directory / "devices"
        devices.mkdir()
        ca_key = directory / "ca-key.pem"
        ca_key.touch(mode=0o600)
        ca.private_key_pem.write_to_path(str(ca_key))
        authority = Authority(x509.load_pem_x509_certificate(ca.cert_pem.bytes()), read_private_key(ca_key))
        ca_key.unlink()
        for name in SENSORS:
            files = Files.of(devices, name)
            key = make_key("p256")
            files.key.touch(mode=0o600)
            files.key.write_bytes(key_pem(key))
            files.certificate.write_bytes(certificate_pem(authority.issue(key, name, DAYS, now())))
            table = {"client_cert": files.certificate.name, "client_key": files.key.name, "bound_to": [LOOPBACK]}
            files.rule.write_text(rule_text(name, table))
        self.say(
            "certificate", f"created a CA, and a certificate and a rule for {' and '.join(SENSORS)}, in {directory}"
        )

    def _broker_rules(self, directory: Path, ca: trustme.CA, ca_file: Path) -> Rules:
        certificate = ca.issue_cert(BROKER_NAME, not_after=now() + timedelta(days=DAYS))
        chain, key = directory / "broker.pem", directory / "broker.key"
        chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
        key.touch(mode=0o600)
        certificate.private_key_pem.write_to_path(str(key))
        return Rules(str(chain), str(key), str(ca_file), ALPN, BROKER_NAME, keep_alive=(30, 1200))
