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

# Lengthening a packet can lengthen its Remaining Length and its Property Length by a byte each.
_LENGTHENED = 2


@frozen
class Treatment:
    """One session's treatment; `repr()` omits the CONNECT, which contains credentials.

    `connect` is the CONNECT for the broker, of `version`. `max_packet_size` is the rule's, in bytes, or None.
    `keep_alive` is in seconds, as sent to the broker. `assigned` is the Client Identifier that the rule gives to a
    device without one. `lenient` lets deviations from the standard pass that do not affect the framing.
    `ping_interval` is the interval of the gateway's own PINGREQs in seconds, 0 for none; `lives` is the maximum
    duration of the session in seconds, None for no limit.
    """

    connect: bytes = field(repr=False)
    version: ProtocolVersion
    topics: TopicRules = TopicRules()  # noqa: RUF009  frozen
    keep_alive: int = 0
    assigned: str | None = None
    lenient: bool = False
    max_packet_size: int | None = None
    packets_per_second: float = 0.0
    bytes_per_second: float = 0.0
    ping_interval: float = 0.0
    lives: float | None = None

    def inspects(self, version: ProtocolVersion) -> bool:
        """Whether packets of a device of `version` are inspected or delayed, so that some may have to wait."""
        paced = self.packets_per_second or self.bytes_per_second
        return bool(self.topics.concern_device or paced or version is not self.version)

    def from_device(
        self,
        version: ProtocolVersion,
        max_packet_size: int,
        largest_at_broker: int | None = None,
        *,
        check_bodies: bool = False,
    ) -> Framer | DeviceInspector:
        """Return the checker for packets of a device of `version`.

        The rule's limit overrides `max_packet_size`; `largest_at_broker` is the broker's own.
        """
        limit = self.max_packet_size or max_packet_size
        if not self.inspects(version):
            return self._framer(Sender.DEVICE, version, limit, check_bodies=check_bodies)
        return DeviceInspector(
            self.topics,
            version,
            limit,
            upgraded=version is not self.version,
            lenient=self.lenient,
            largest_at_broker=largest_at_broker,
        )

    def from_broker(
        self, version: ProtocolVersion, max_packet_size: int, *, check_bodies: bool = False
    ) -> Framer | BrokerInspector:
        """Return the checker for packets of the broker, for a device of `version`."""
        limit = self.max_packet_size or max_packet_size
        # Where packets may have to wait, the gateway may have to ping.
        if not (self.inspects(version) or self.topics.concern_broker or self.ping_interval):
            return self._framer(Sender.BROKER, version, limit, check_bodies=check_bodies)
        return BrokerInspector(self.topics, version, limit, lenient=self.lenient)

    def _framer(self, sender: Sender, version: ProtocolVersion, limit: int, *, check_bodies: bool) -> Framer:
        # What a lenient rule lets pass, a check of bodies would not.
        if check_bodies and not self.lenient:
            return CheckingFramer(sender, version, limit)
        return Framer(sender, version, limit, lenient=self.lenient)

    @property
    def lengthens(self) -> int:
        """By how many bytes a PUBLISH of the device can become longer."""
        prefixes = len(self.topics.publish_prefix.encode()) + len(self.topics.subscribe_prefix.encode())
        return prefixes + _LENGTHENED if prefixes else 0

    def pace(self, seconds: Callable[[], float]) -> Pace | None:
        """Return the rate limiter, or None without limits."""
        if not (self.packets_per_second or self.bytes_per_second):
            return None
        return Pace(self.packets_per_second, self.bytes_per_second, seconds)
