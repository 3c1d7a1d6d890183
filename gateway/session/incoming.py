"""What comes down to a stored device, while the broker's connections come and go under it.

In: PUBLISH and PUBREL of the broker, PUBACK, PUBREC and PUBCOMP of the device.  Out: what each of them gets.

The broker's Packet Identifiers pass through.  Acknowledgements for a connection that is gone are dropped: the broker no
longer waits for them, or sends the message again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from attrs import define

from gateway.mqtt.message import acknowledgement, code_of, identifier_of, publish_identifier
from gateway.mqtt.packets import PacketType

# So many packets wait for a device that has not finished with earlier ones; then the broker is not read.
_MOST_WAITING = 50
_FIRST_REFUSAL = 0x80


class _Stage(Enum):
    SENT = auto()  # PUBLISH; the device owes PUBACK or PUBREC
    RECEIVED = auto()  # PUBREC came; the device waits for PUBREL
    RELEASED = auto()  # PUBREL; the device owes PUBCOMP


@define(slots=True)
class _Exchange:
    qos: int
    stage: _Stage
    # It began on a connection that is gone.
    is_old: bool = False


class Incoming:
    """One device session's side of it.  `to_device` and `to_broker` send packets; the latter may drop them."""

    def __init__(
        self, receive_maximum: int, to_device: Callable[[bytes], None], to_broker: Callable[[bytes], None]
    ) -> None:
        self._receive_maximum = receive_maximum
        self._to_device = to_device
        self._to_broker = to_broker
        self._open: dict[int, _Exchange] = {}
        self._waiting: deque[bytes] = deque()
        self._session_present = True

    @property
    def is_congested(self) -> bool:
        """Whether the broker is not to be read, since too much waits for the device."""
        return len(self._waiting) >= _MOST_WAITING

    def connected(self, *, session_present: bool) -> None:
        """There is a new connection to the broker."""
        self._session_present = session_present
        if not session_present:
            for identifier, exchange in self._open.items():
                if exchange.stage is _Stage.RECEIVED:
                    self._complete(identifier, exchange)

    def lost(self) -> None:
        """The connection to the broker is gone; what waits is the broker's still."""
        self._waiting.clear()
        for exchange in self._open.values():
            exchange.is_old = True

    def from_broker(self, packet: bytes) -> None:
        """Take a PUBLISH or a PUBREL.  Raises PacketError."""
        if packet[0] >> 4 == PacketType.PUBREL:
            identifier = identifier_of(packet)
            self._open[identifier] = _Exchange(2, _Stage.RELEASED)
            self._to_device(packet)
        elif self._waiting or not self._pass(packet):
            self._waiting.append(packet)

    def from_device(self, packet: bytes) -> None:
        """Take a PUBACK, a PUBREC or a PUBCOMP.  Raises PacketError."""
        packet_type, identifier = PacketType(packet[0] >> 4), identifier_of(packet)
        exchange = self._open.get(identifier)
        if exchange is None or (packet_type is PacketType.PUBREC and exchange.stage is not _Stage.SENT):
            return
        is_over = packet_type is not PacketType.PUBREC or code_of(packet) >= _FIRST_REFUSAL
        if not exchange.is_old:
            self._to_broker(packet)
        if is_over:
            self._open.pop(identifier, None)
        else:
            exchange.stage = _Stage.RECEIVED
            if exchange.is_old and not self._session_present:
                self._complete(identifier, exchange)
        while self._waiting and self._pass(self._waiting[0]):
            self._waiting.popleft()

    def _pass(self, packet: bytes) -> bool:
        """Give a PUBLISH to the device, if that is possible now."""
        qos = packet[0] >> 1 & 0b11
        if qos:
            identifier = publish_identifier(packet)
            exchange = self._open.get(identifier)
            if exchange is None:
                if len(self._open) >= self._receive_maximum:
                    return False
            elif exchange.is_old and not (
                # The same message once more: the broker's session goes on, and the device knows what to do with it.
                self._session_present and qos == 2 and exchange.stage is _Stage.RECEIVED
            ):
                return False
            self._open[identifier] = _Exchange(qos, _Stage.SENT)
        self._to_device(packet)
        return True

    def _complete(self, identifier: int, exchange: _Exchange) -> None:
        """End, in the broker's place, a delivery of which the broker knows nothing any more."""
        exchange.stage = _Stage.RELEASED
        exchange.is_old = True
        self._to_device(acknowledgement(PacketType.PUBREL, identifier))
