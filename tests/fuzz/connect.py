"""CONNECT and its rewrite: what is written says what the rule asked for, and nothing else is different."""

from __future__ import annotations

from typing import Any

import attrs

from gateway.errors import EndReason, PacketError
from gateway.mqtt import connect as connect_module
from gateway.mqtt import rewrite as rewrite_module
from gateway.mqtt.connect import Connect, parse_connect
from gateway.mqtt.packets import PacketType, ProtocolVersion
from gateway.mqtt.properties import PropertyId
from gateway.mqtt.reader import Packet, PacketReader
from gateway.mqtt.rewrite import KEPT, ConnectChanges, rewrite_connect
from tests import mqtt_packets as mqtt
from tests.fuzz.tools import Choices, calls, cut_in_three, single_bytes

_MOST = 65_536
_WILL_5 = mqtt.text(0x08, "answers") + mqtt.user_property() + mqtt.number(0x18, 5, size=4)

SEEDS = tuple(
    bytes(head) + packet
    for head in ((90, 0, 0, 0, 0, 0, 0, 0, 0), (90, 1, 1, 1, 1, 1, 1, 1, 1), (90, 2, 2, 2, 2, 2, 1, 2, 1))
    for packet in (
        mqtt.connect("sensor-1", version=3),
        mqtt.connect("sensor-1", version=4, username="user", password=b"secret", will_topic="will"),
        mqtt.connect(
            "sensor-1", version=5, username="user", password=b"secret", will_topic="w", will_properties=_WILL_5
        ),
        mqtt.connect("", version=5, properties=mqtt.user_property() * 3 + mqtt.number(0x21, 9, size=2)),
        mqtt.connect("x", version=5, password=b"token", properties=mqtt.text(0x15, "SCRAM")),
        mqtt.connect("bridge", version=4, level=0x84),
    )
)


def _read(parts: Any) -> tuple[Packet | None, Connect | None, tuple[Any, ...] | None]:
    reader = PacketReader(frozenset({PacketType.CONNECT}), _MOST, EndReason.NOT_MQTT)
    try:
        for part in parts:
            reader.feed(part)
        packet = reader.next_packet()
        return packet, None if packet is None else parse_connect(packet), None
    except PacketError as error:
        return None, None, (type(error), error.reason, error.reason_code, error.detail)


def _changes(choices: Choices) -> ConnectChanges:
    return ConnectChanges(
        client_identifier=choices.of((KEPT, "other", "")),
        username=choices.of((KEPT, "name", None)),
        password=choices.of((KEPT, b"\0\xff", None)),
        keep_alive=choices.of((KEPT, 30, 0)),
        clean_start=choices.of((KEPT, True, False)),
        version=choices.of((KEPT, ProtocolVersion.MQTT_3_1_1)),
        will_topic=choices.of((KEPT, "plant/will", "w")),
        will_retain=KEPT,
        will_response_topic=choices.of((KEPT, "plant/answers")),
    )


def _fields(body: bytes, version: int) -> list[bytes]:
    """Read Client Identifier, Will Topic, Will Payload, user name and password, apart from the gateway's code."""
    at = 2 + int.from_bytes(body[:2], "big") + 1
    flags = body[at]
    at += 3
    found = []

    def skip_properties() -> None:
        nonlocal at
        size = shift = 0
        while True:
            byte, at = body[at], at + 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        at += size

    def field() -> None:
        nonlocal at
        size = int.from_bytes(body[at : at + 2], "big")
        found.append(body[at + 2 : at + 2 + size])
        at += 2 + size

    if version == 5:
        skip_properties()
    field()
    if flags & 0b100:
        if version == 5:
            skip_properties()
        field()
        field()
    for flag in (0x80, 0x40):
        # In 3.1 both may be set for nothing.
        if flags & flag and (version != 3 or at < len(body)):
            field()
    assert at == len(body), "CONNECT was accepted with bytes behind its last field"
    return found


def _said(connect: Connect) -> list[bytes]:
    will = [] if connect.will is None else [connect.will.topic.encode(), connect.will.payload]
    username = [] if connect.username is None else [connect.username.encode()]
    return [
        connect.client_identifier.encode(),
        *will,
        *username,
        *([] if connect.password is None else [connect.password]),
    ]


def _expected(connect: Connect, changes: ConnectChanges) -> Connect:
    """Say what the rewritten CONNECT must say, by the fields alone."""
    kept = {
        name: value
        for name in ("client_identifier", "username", "password", "keep_alive", "clean_start", "version")
        if (value := getattr(changes, name)) is not KEPT
    }
    will = connect.will
    if will is not None:
        if changes.will_topic is not KEPT:
            will = attrs.evolve(will, topic=changes.will_topic)
        properties = will.properties
        if properties is not None and changes.will_response_topic is not KEPT:
            values = dict(properties.values)
            if PropertyId.RESPONSE_TOPIC in values:
                values[PropertyId.RESPONSE_TOPIC] = changes.will_response_topic
            will = attrs.evolve(will, properties=attrs.evolve(properties, values=values))
    return attrs.evolve(connect, will=will, **kept)


def check(data: bytes) -> None:
    """Read a CONNECT cut in different ways, rewrite it, and read what was written."""
    choices = Choices(data)
    where, changes = choices.number(256), _changes(choices)
    stream = choices.rest()
    whole = _read([stream])
    assert _read(cut_in_three(stream, where)) == whole
    if len(stream) <= 300:
        # What is certain is said at once; a fault that is seen early is the same as one that is seen late.
        assert _read(single_bytes(stream)) == whole
    packet, connect, _ = whole
    if packet is None or connect is None:
        return
    assert stream.startswith(packet.raw)
    assert _said(connect) == _fields(packet.body, connect.version)
    if connect.password is not None and len(connect.password) > 8:
        assert repr(connect.password) not in repr(connect), "repr() shows a password"
    assert calls(lambda: parse_connect(packet)) <= 200 + 5 * len(packet.body)
    assert rewrite_connect(packet, connect, ConnectChanges(), _MOST) == packet.raw
    try:
        written = rewrite_connect(packet, connect, changes, _MOST)
    except ValueError:
        wanted = _expected(connect, changes)
        upgraded = changes.version is not KEPT and connect.version is not ProtocolVersion.MQTT_3_1
        nameless = wanted.password is not None and wanted.username is None
        assert upgraded or nameless or len(packet.raw) > _MOST - 100, "a rewrite that can be made is refused"
        return
    again, said, fault = _read([written])
    assert again is not None, f"what was written is no CONNECT: {fault}"
    assert again.raw == written
    assert said == _expected(connect, changes)


def writes_the_old_keep_alive() -> None:
    """A rule's Keep Alive is not written."""
    rewrite = rewrite_module.rewrite_connect

    def faulty(packet: Packet, connect: Connect, changes: ConnectChanges, max_size: int) -> bytes:
        if changes.will_topic is not KEPT and connect.will is not None:
            changes = attrs.evolve(changes, keep_alive=KEPT)
        return rewrite(packet, connect, changes, max_size)

    globals()["rewrite_connect"] = faulty


def reads_what_is_behind_the_last_field() -> None:
    """Bytes after the last field are taken for a part of the password."""
    decode = connect_module.decode_binary

    def faulty(data: bytes, offset: int, what: str) -> tuple[bytes, int]:
        value, end = decode(data, offset, what)
        return (value + data[end:], len(data)) if "password" in what else (value, end)

    connect_module.decode_binary = faulty


def costs_a_call_for_each_byte() -> None:
    """Strings are looked at character by character, several times."""
    decode = connect_module.decode_string

    def faulty(data: bytes, offset: int, what: str) -> tuple[str, int]:
        text, end = decode(data, offset, what)
        for _ in range(20):
            [ord(character) for character in text]
        return text, end

    connect_module.decode_string = faulty


FAULTS = (writes_the_old_keep_alive, reads_what_is_behind_the_last_field, costs_a_call_for_each_byte)
