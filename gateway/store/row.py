"""One stored message as bytes: what is sent to the broker, with a checksum.

In: a `Message`, and which row of which backlog it is.  Out: bytes for the database, and the message again;
`DamagedRow` for bytes that are not what was written.
"""

from __future__ import annotations

import struct
from zlib import crc32

from attrs import frozen

from gateway.mqtt.message import Message

# Checksum; flags, Packet Identifier, Message Expiry Interval, length of the topic, length of the properties.
_HEADER = struct.Struct("<IBHIHI")
_CRC = struct.Struct("<I")
_PLACE = struct.Struct("<qqq")
_QOS, _RETAIN, _MQTT_5 = 0b0011, 0b0100, 0b1000
_NO_EXPIRY = 0xFFFF_FFFF

OVERHEAD = 48
"""What a row takes on disk beyond its topic, properties and payload, in bytes, rounded up."""


class DamagedRow(Exception):
    """The bytes of a row are not those that were written."""


def size_of(message: Message) -> int:
    """Say what a message takes on disk, in bytes."""
    return OVERHEAD + len(message.topic) + len(message.payload) + len(message.properties or b"")


@frozen(slots=True)
class Row:
    """A message and its place: `number` grows with each row of the store, `stamp` is in seconds since 1970.

    `identifier` is the Packet Identifier that a QoS 2 message has at the broker, 0 for others.
    """

    number: int
    device: int
    stamp: int
    message: Message
    identifier: int = 0


def encode_row(row: Row) -> bytes:
    """Write the column `data` of a row."""
    message = row.message
    flags = message.qos | (_RETAIN if message.retain else 0) | (0 if message.properties is None else _MQTT_5)
    properties = message.properties or b""
    expiry = _NO_EXPIRY if message.expiry is None else min(message.expiry, _NO_EXPIRY - 1)
    header = _HEADER.pack(0, flags, row.identifier, expiry, len(message.topic), len(properties))
    body = header[_CRC.size :] + message.topic + properties + message.payload
    return _CRC.pack(_checksum(row.number, row.device, row.stamp, body)) + body


def decode_row(number: int, device: int, stamp: int, data: bytes) -> Row:
    """Read a row, whatever a damaged file has in its place.  Raises DamagedRow."""
    if not isinstance(data, bytes) or not all(isinstance(each, int) for each in (number, device, stamp)):
        raise DamagedRow(f"row {number} is damaged")
    if len(data) < _HEADER.size or _CRC.unpack_from(data)[0] != _checksum(number, device, stamp, data[_CRC.size :]):
        raise DamagedRow(f"row {number} is damaged")
    _, flags, identifier, expiry, topic_size, properties_size = _HEADER.unpack_from(data)
    start = _HEADER.size
    topic = data[start : start + topic_size]
    start += topic_size
    properties = data[start : start + properties_size]
    message = Message(
        topic,
        data[start + properties_size :],
        flags & _QOS,
        bool(flags & _RETAIN),
        properties if flags & _MQTT_5 else None,
        None if expiry == _NO_EXPIRY else expiry,
    )
    return Row(number, device, stamp, message, identifier)


def _checksum(number: int, device: int, stamp: int, body: bytes) -> int:
    # The place counts, too: a page that belongs elsewhere is intact in itself.
    return crc32(body, crc32(_PLACE.pack(number, device, stamp)))
