"""A visit: one session of a stored device with this gateway.

In: the device's CONNECT and what its rule says.  Out: what is the device's alone, and ends with it; its answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import attrs

from gateway.errors import EndReason, PacketError
from gateway.mqtt.connect import Connect, parse_connect
from gateway.mqtt.message import Message, acknowledgement
from gateway.mqtt.packets import PacketType, ProtocolVersion, ReasonCode
from gateway.mqtt.reader import Packet
from gateway.mqtt.whole import WholePackets
from gateway.session.drain_pace import DrainPace
from gateway.session.pace import Pace
from gateway.session.record import Dial, Peer
from gateway.session.treatment import Treatment

LARGEST_HELD = 1_048_576
"""The largest packet that is held until it is whole, in bytes, unless the rule says otherwise."""


class Device(Protocol):
    """The device's session, as far as it is one of a stored device."""

    @property
    def unread(self) -> bool:
        """Whether bytes have arrived that have not been read yet."""

    def admit(self, connack: bytes, *, offline: bool) -> bytes:
        """Send the CONNACK that accepts, and count the session in; return what waits behind CONNECT.

        `offline` says that no broker has accepted the device.
        """

    def send(self, data: bytes) -> None:
        """Send a packet."""

    def count_up(self) -> None:
        """Count a packet of the device."""

    def hold(self) -> None:
        """Stop reading."""

    def release(self) -> None:
        """Read again."""

    def go_on_later(self) -> None:
        """Call `device_received` with nothing in a later turn, and read nothing until then."""

    def finish(
        self, reason: EndReason, detail: str = "", *, answer: bytes | None = None, code: int | None = None
    ) -> None:
        """End the session."""

    def dials(self, dial: Dial) -> None:
        """This broker is dialled."""

    def verified(self, peer: Peer) -> None:
        """This broker is verified."""


@attrs.frozen(eq=False)
class World:
    """What a stored session needs besides packets: clocks, random numbers from 0 to 1, limits."""

    seconds: Callable[[], float]
    now: Callable[[], float]
    is_plausible: Callable[[], bool]
    uniform: Callable[[], float]
    max_packet_size: int
    max_connect_size: int
    check_bodies: bool
    connack: float
    drain_pace: DrainPace = attrs.field(factory=DrainPace)


class Visit:
    """One device's session with this gateway: what is the device's alone, and ends with it."""

    def __init__(self, device: Device, packet: Packet, treatment: Treatment, treated: Connect, world: World) -> None:
        connect = parse_connect(packet)
        self.device = device
        self.packet = packet
        self.connect = connect
        self.version = connect.version
        self.treatment = treatment
        self.treated = treated
        self.is_admitted = False
        self.since = world.seconds()
        self.heard = world.seconds()
        self.keep_alive = connect.keep_alive
        self.told_session_present = False
        self.is_first_upstream = True
        # What CONNACK told the device; MQTT 3.x cannot be told.
        self.max_qos = 2
        self.may_retain = True
        self.pace: Pace | None = treatment.pace(world.seconds)
        self.largest = treatment.max_packet_size or min(world.max_packet_size, LARGEST_HELD)
        checker = treatment.from_device(connect.version, self.largest, check_bodies=world.check_bodies)
        self.packets = WholePackets(checker)
        # What was read and waits until earlier SUBSCRIBEs and UNSUBSCRIBEs are answered; `requests` counts them.
        self.waiting: deque[bytes] = deque()
        self.requests = 0
        self.releases = 0
        self.is_held = True
        self.is_saved = self.is_being_saved = False
        self.gone = False

    def check_limits(self, message: Message) -> None:
        """Raise PacketError for a message that CONNACK had excluded: it could never be delivered."""
        if self.version is not ProtocolVersion.MQTT_5_0:
            return
        if message.qos > self.max_qos:
            raise PacketError(EndReason.PROTOCOL_ERROR, ReasonCode.QOS_NOT_SUPPORTED, f"QoS {message.qos} in PUBLISH")
        if message.retain and not self.may_retain:
            raise PacketError(EndReason.PROTOCOL_ERROR, ReasonCode.RETAIN_NOT_SUPPORTED, "Retain in PUBLISH")

    def acknowledge(self, packet_type: PacketType, identifier: int, code: int = 0) -> None:
        """See `gateway.session.outgoing.Owner`."""
        if not self.gone:
            self.device.send(
                acknowledgement(packet_type, identifier, code if self.version is ProtocolVersion.MQTT_5_0 else 0)
            )

    def not_stored(self, why: str) -> None:
        """See `gateway.session.outgoing.Owner`."""
        if not self.gone:
            self.device.finish(EndReason.STORE_UNAVAILABLE, why, code=0x97)
