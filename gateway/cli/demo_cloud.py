"""A broker on loopback that is as strict as cloud brokers, for the demo and the tests, in a separate process.

In: `Rules` as JSON, the only argument; it stops at the end of standard input.
Out: `ready PORT`, then one JSON object per line for each connection that got CONNACK and each that was ended.

It shares no code with the gateway, so that they do not share bugs.  It implements what a sensor needs: MQTT 3.1.1 and
5.0, QoS 0 and 1, subscriptions for the life of the connection.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import signal
import ssl
import struct
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote

_CONNECT, _CONNACK, _PUBLISH, _PUBACK, _SUBSCRIBE, _SUBACK = 1, 2, 3, 4, 8, 9
_UNSUBSCRIBE, _UNSUBACK, _PINGREQ, _PINGRESP, _DISCONNECT = 10, 11, 12, 13, 14


@dataclass
class Rules:
    """The requirements on a connection.

    `cert`, `key`: the broker's own (PEM).  `client_ca`: the CA of the devices' certificates; "" asks for none.
    `alpn`, `sni`: what the client must offer; "" for anything.  `bound`: the Client Identifier must be the
    common name of the certificate.  `keep_alive`: the range in seconds, both ends included.  `quiet`: seconds before
    CONNACK in which nothing may follow CONNECT.  `hub`, `keys`: with `keys` (Client Identifier: base64), username and
    password must be those of Azure IoT Hub.  `credentials`: username: password.
    """

    cert: str
    key: str
    client_ca: str = ""
    alpn: str = ""
    sni: str = ""
    bound: bool = True
    keep_alive: tuple[int, int] = (0, 65_535)
    quiet: float = 0.05
    hub: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    credentials: dict[str, str] = field(default_factory=dict)


class Ended(Exception):
    """The broker ends a connection; the argument says why."""


@dataclass
class _Device:
    """An accepted connection."""

    client_identifier: str
    is_5: bool
    writer: asyncio.StreamWriter
    filters: list[str] = field(default_factory=list)

    def send(self, packet_type: int, body: bytes, flags: int = 0) -> None:
        if not self.writer.is_closing():
            self.writer.write(bytes((packet_type << 4 | flags,)) + _length(len(body)) + body)


class CloudBroker:
    """A broker that enforces `rules`."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._devices: dict[str, _Device] = {}
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(rules.cert, rules.key)
        if rules.client_ca:
            self._context.load_verify_locations(rules.client_ca)
            self._context.verify_mode = ssl.CERT_REQUIRED
        if rules.alpn:
            self._context.set_alpn_protocols([rules.alpn])
        if rules.sni:
            self._context.sni_callback = self._judge_name

    async def listen(self) -> asyncio.Server:
        """Listen on a free port of 127.0.0.1."""
        return await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._context)

    def _judge_name(self, _connection: Any, name: str | None, _context: ssl.SSLContext) -> int | None:
        return None if name == self._rules.sni else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        facts: dict[str, Any] = {}
        try:
            await self._serve(reader, writer, facts)
        except Ended as end:
            _tell("ended", why=str(end), **facts)
        except (asyncio.IncompleteReadError, OSError):
            _tell("left", **facts)
        except asyncio.CancelledError:
            # The broker is stopping: do not wait.
            writer.transport.abort()
        finally:
            device = self._devices.get(facts.get("client_identifier", ""))
            if device is not None and device.writer is writer:
                del self._devices[device.client_identifier]
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, facts: dict[str, Any]) -> None:
        channel = writer.get_extra_info("ssl_object")
        certificate = channel.getpeercert() or {}
        names = dict(pair for group in certificate.get("subject", ()) for pair in group)
        facts["certificate"] = names.get("commonName", "")
        facts["resumed"] = bool(channel.session_reused)
        if self._rules.alpn and channel.selected_alpn_protocol() != self._rules.alpn:
            raise Ended("wrong ALPN")
        device = await self._admit(reader, writer, facts)
        before = self._devices.pop(device.client_identifier, None)
        if before is not None:
            before.writer.transport.abort()  # as cloud brokers do: the new connection wins
        self._devices[device.client_identifier] = device
        _tell("connected", **facts)
        while True:
            packet_type, flags, body = await _packet(reader)
            if packet_type == _DISCONNECT:
                return
            self._handle(device, packet_type, flags, body)
            await writer.drain()

    async def _admit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, facts: dict[str, Any]
    ) -> _Device:
        packet_type, _, body = await _packet(reader)
        if packet_type != _CONNECT:
            raise Ended("no CONNECT")
        protocol, rest = _binary(body)
        level, flags, keep_alive = rest[0], rest[1], int.from_bytes(rest[2:4])
        rest = rest[4:]
        is_5 = level == 5
        if protocol != b"MQTT" or level not in {4, 5}:
            raise Ended(f"protocol {protocol!r} level {level}")
        if is_5:
            rest = _skip_properties(rest)
        client_identifier, rest = _text(rest)
        if flags & 0b0000_0100:  # the Will
            if is_5:
                rest = _skip_properties(rest)
            _, rest = _binary(rest)
            _, rest = _binary(rest)
        username = ""
        password = b""
        if flags & 0b1000_0000:
            username, rest = _text(rest)
        if flags & 0b0100_0000:
            password, rest = _binary(rest)
        facts |= {"client_identifier": client_identifier, "username": username, "keep_alive": keep_alive}
        facts |= {"level": level, "clean": bool(flags & 0b10)}
        device = _Device(client_identifier, is_5, writer)
        try:
            self._judge(facts, password)
        except Ended:
            code = 0x87 if is_5 else 5
            device.send(_CONNACK, bytes((0, code)) + (b"\0" if is_5 else b""))
            raise
        with contextlib.suppress(TimeoutError):
            if await asyncio.wait_for(reader.read(1), self._rules.quiet):
                raise Ended("a byte between CONNECT and CONNACK")
            raise Ended("closed before CONNACK")
        device.send(_CONNACK, b"\0\0" + (b"\0" if is_5 else b""))
        return device

    def _judge(self, facts: dict[str, Any], password: bytes) -> None:
        rules = self._rules
        client_identifier, username = facts["client_identifier"], facts["username"]
        if rules.client_ca and rules.bound and client_identifier != facts["certificate"]:
            raise Ended("Client Identifier is not the certificate's")
        low, high = rules.keep_alive
        if not low <= facts["keep_alive"] <= high:
            raise Ended("Keep Alive out of range")
        if rules.keys:
            key = rules.keys.get(client_identifier)
            if key is None or not username.startswith(f"{rules.hub}/{client_identifier}/?api-version="):
                raise Ended("unknown device or wrong username")
            _judge_sas(password.decode("utf-8", "replace"), f"{rules.hub}/devices/{client_identifier}", key)
        if rules.credentials:
            wanted = rules.credentials.get(username)
            if wanted is None or not hmac.compare_digest(wanted.encode(), password):
                raise Ended("wrong username or password")

    def _handle(self, device: _Device, packet_type: int, flags: int, body: bytes) -> None:
        if packet_type == _PUBLISH:
            self._publish(device, flags, body)
        elif packet_type == _SUBSCRIBE:
            identifier, rest = body[:2], body[2:]
            if device.is_5:
                rest = _skip_properties(rest)
            granted = bytearray()
            while rest:
                name, rest = _text(rest)
                granted.append(min(rest[0] & 0b11, 1))
                rest = rest[1:]
                device.filters.append(name)
            device.send(_SUBACK, identifier + (b"\0" if device.is_5 else b"") + bytes(granted))
        elif packet_type == _UNSUBSCRIBE:
            identifier, rest = body[:2], body[2:]
            if device.is_5:
                rest = _skip_properties(rest)
            codes = bytearray()
            while rest:
                name, rest = _text(rest)
                codes.append(0)
                device.filters = [kept for kept in device.filters if kept != name]
            device.send(_UNSUBACK, identifier + (b"\0" + bytes(codes) if device.is_5 else b""))
        elif packet_type == _PINGREQ:
            device.send(_PINGRESP, b"")
        elif packet_type != _PUBACK:
            raise Ended(f"packet type {packet_type}")

    def _publish(self, device: _Device, flags: int, body: bytes) -> None:
        qos = flags >> 1 & 0b11
        if qos == 2:
            raise Ended("QoS 2")
        topic, rest = _text(body)
        identifier = rest[:2] if qos else b""
        rest = rest[2:] if qos else rest
        if device.is_5:
            rest = _skip_properties(rest)
        _tell("published", client_identifier=device.client_identifier, topic=topic, retain=bool(flags & 1))
        if qos:
            device.send(_PUBACK, identifier)
        raw = topic.encode()
        for other in self._devices.values():
            if any(_matches(name, topic) for name in other.filters):
                body = struct.pack("!H", len(raw)) + raw + (b"\0" if other.is_5 else b"") + rest
                other.send(_PUBLISH, body)


def _judge_sas(token: str, resource: str, key: str) -> None:
    """Check a shared access signature as Microsoft's documentation of IoT Hub describes it."""
    kind, _, fields = token.partition(" ")
    values = {name: value[0] for name, value in parse_qs(fields).items()}
    if kind != "SharedAccessSignature" or not {"sr", "sig", "se"} <= set(values):
        raise Ended("no SAS token")
    if unquote(values["sr"]) != resource:
        raise Ended("SAS token of another device")
    signed = f"{quote(resource, safe='')}\n{values['se']}".encode()
    signature = hmac.new(base64.b64decode(key), signed, hashlib.sha256).digest()
    if not hmac.compare_digest(base64.b64encode(signature).decode(), values["sig"]):
        raise Ended("SAS token with a wrong signature")
    if int(values["se"]) <= time.time():
        raise Ended("expired SAS token")


def _matches(name: str, topic: str) -> bool:
    """Say whether a Topic Filter matches a Topic Name (MQTT 3.1.1 §4.7)."""
    wanted, levels = name.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in {"+", "#"}:
        return False
    for index, part in enumerate(wanted):
        if part == "#":
            return True
        if index >= len(levels) or part not in {"+", levels[index]}:
            return False
    return len(wanted) == len(levels)


async def _packet(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    first = (await reader.readexactly(1))[0]
    length = 0
    for shift in (0, 7, 14, 21):
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return first >> 4, first & 0x0F, await reader.readexactly(length)


def _length(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _binary(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:2])
    return data[2 : 2 + size], data[2 + size :]


def _text(data: bytes) -> tuple[str, bytes]:
    raw, rest = _binary(data)
    return raw.decode("utf-8", "replace"), rest


def _skip_properties(data: bytes) -> bytes:
    size = shift = index = 0
    while True:
        byte = data[index]
        size |= (byte & 0x7F) << shift
        index, shift = index + 1, shift + 7
        if byte < 0x80:
            return data[index + size :]


def _tell(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event} | facts), flush=True)


async def _main(rules: Rules) -> None:
    server = await CloudBroker(rules).listen()
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    server.close()


if __name__ == "__main__":
    # Ctrl-C reaches all processes of the terminal; the parent stops this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_main(Rules(**json.loads(sys.argv[1]))))
