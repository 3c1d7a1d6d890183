"""What a rule changes in one session: its CONNECT, its packets, its rates.

In: values.  Out: `Treatment`, created once CONNECT is complete, and the session's framers or inspectors.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import field, frozen

from gateway.mqtt.checking import CheckingFramer
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.inspector import BrokerInspector, DeviceInspector, TopicRules
from gateway.mqtt.packets import ProtocolVersion
from gateway.session.pace import Pace

# The largest packet, in bytes, on a path that reads packets whole, unless the rule sets max_packet_size.
LARGEST_HELD = 1_048_576


@frozen
class Treatment:
    """One session's treatment; `repr()` omits the CONNECT, which contains credentials.

    `connect` is the CONNECT for the broker, of `version`. `max_packet_size` is the rule's, in bytes, or None.
    `ping_interval` is the interval of the gateway's own PINGREQs in seconds, 0 for none; `lives` is the maximum
    duration of the session in seconds, None for no limit.
    """

    connect: bytes = field(repr=False)
    version: ProtocolVersion
    topics: TopicRules = TopicRules()  # noqa: RUF009  frozen
    max_packet_size: int | None = None
    packets_per_second: float = 0.0
    bytes_per_second: float = 0.0
    ping_interval: float = 0.0
    lives: float | None = None

    def from_device(
        self, version: ProtocolVersion, max_packet_size: int, *, check_bodies: bool = False
    ) -> Framer | DeviceInspector:
        """Return the checker for packets of a device of `version`; the rule's limit overrides `max_packet_size`."""
        upgraded = version is not self.version
        if not (self.topics.concern_device or upgraded):
            make = CheckingFramer if check_bodies else Framer
            return make(Sender.DEVICE, version, self.max_packet_size or max_packet_size)
        return DeviceInspector(self.topics, version, self._largest(max_packet_size), upgraded=upgraded)

    def from_broker(
        self, version: ProtocolVersion, max_packet_size: int, *, check_bodies: bool = False
    ) -> Framer | BrokerInspector:
        """Return the checker for packets of the broker, for a device of `version`."""
        if not (self.topics.concern_broker or self.ping_interval):
            make = CheckingFramer if check_bodies else Framer
            return make(Sender.BROKER, version, self.max_packet_size or max_packet_size)
        limit = self._largest(max_packet_size) if self.topics.concern_broker else self.max_packet_size
        return BrokerInspector(self.topics, version, limit or max_packet_size)

    def pace(self, seconds: Callable[[], float]) -> Pace | None:
        """Return the rate limiter, or None without limits."""
        if not (self.packets_per_second or self.bytes_per_second):
            return None
        return Pace(self.packets_per_second, self.bytes_per_second, seconds)

    def _largest(self, max_packet_size: int) -> int:
        return self.max_packet_size or min(max_packet_size, LARGEST_HELD)
