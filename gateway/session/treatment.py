"""What a rule makes of one session: how it is presented to the broker, and what is done to its packets.

In: values.  Out: `Treatment`, made when CONNECT is whole, and the framers or inspectors of the session.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import field, frozen

from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.inspector import BrokerInspector, DeviceInspector, TopicRules
from gateway.mqtt.packets import ProtocolVersion
from gateway.session.pace import Pace

# Where packets are read whole, this is as large as one may be unless the rule says more, in bytes.
LARGEST_HELD = 1_048_576


@frozen
class Treatment:
    """One session's treatment; `repr()` shows no CONNECT, which holds credentials.

    `connect` is the CONNECT for the broker, of `version`. `max_packet_size` is the rule's own, in bytes, or None.
    `ping_interval` is how often the gateway sends a PINGREQ of its own, in seconds, 0 for never; `lives` is after how
    many seconds the session has to end, None for never.
    """

    connect: bytes = field(repr=False)
    version: ProtocolVersion
    topics: TopicRules = TopicRules()  # noqa: RUF009  frozen
    max_packet_size: int | None = None
    packets_per_second: float = 0.0
    bytes_per_second: float = 0.0
    ping_interval: float = 0.0
    lives: float | None = None

    def from_device(self, version: ProtocolVersion, max_packet_size: int) -> Framer | DeviceInspector:
        """Make what checks the packets of a device of `version`; `max_packet_size` holds where the rule has none."""
        upgraded = version is not self.version
        if not (self.topics.concern_device or upgraded):
            return Framer(Sender.DEVICE, version, self.max_packet_size or max_packet_size)
        return DeviceInspector(self.topics, version, self._largest(max_packet_size), upgraded=upgraded)

    def from_broker(self, version: ProtocolVersion, max_packet_size: int) -> Framer | BrokerInspector:
        """Make what checks the packets of the broker for a device of `version`."""
        if not (self.topics.concern_broker or self.ping_interval):
            return Framer(Sender.BROKER, version, self.max_packet_size or max_packet_size)
        limit = self._largest(max_packet_size) if self.topics.concern_broker else self.max_packet_size
        return BrokerInspector(self.topics, version, limit or max_packet_size)

    def pace(self, seconds: Callable[[], float]) -> Pace | None:
        """Make what limits the rate, if anything does."""
        if not (self.packets_per_second or self.bytes_per_second):
            return None
        return Pace(self.packets_per_second, self.bytes_per_second, seconds)

    def _largest(self, max_packet_size: int) -> int:
        return self.max_packet_size or min(max_packet_size, LARGEST_HELD)
