"""Lends a session to the compiled core while all is ordinary, and takes it back for everything else.

In: the two sides of an established session, and its calls on a `Loan`.  Out: a lent `Pair` (`gateway/relay/_core.c`),
what the core has passed, and what it has handed over.

A session's state has one owner at a time.  `lend` copies it to the core: where both framers and the TLS records stand.
`recall` copies it back, and must come before anything else is done to the session: the session calls it before it
ends, the reactor before a connection is watched otherwise, and `hand_over` when the core could not go on.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol

from twisted.logger import Logger

from gateway.mqtt.framer import Framer
from gateway.net.transport import RelayReactor, SendsAtOnce
from gateway.session.session import Session
from gateway.tls.channel import TLSChannel

_log = Logger(namespace="gateway")


class Handed(IntEnum):
    """Why the core handed a session over: `enum handed` in gateway/relay/_core.c."""

    NOTHING = 0
    FROM_DEVICE = 1
    FROM_BROKER = 2
    TO_DEVICE = 3
    TO_BROKER = 4
    TLS_ENDED = 5
    DEVICE_ENDED = 6
    BROKER_ENDED = 7
    FAILED = 8


_NONE = (Handed.NOTHING, b"", 0)
_TO_SEND = (Handed.TO_DEVICE, Handed.TO_BROKER)


class Device(Protocol):
    """The device's side, as a carrier sees it."""

    transport: Any

    def dataReceived(self, data: bytes, /) -> None:
        """Take bytes from the device."""


class Upstream(Protocol):
    """The broker's side, as a carrier sees it."""

    transport: Any

    def decrypted(self, plaintext: bytes, result: int | None = None) -> None:
        """Take plaintext, behind which OpenSSL has failed with `result` if that is not None."""

    def send_rest(self, ciphertext: bytes) -> None:
        """Send ciphertext, and whatever else waits."""


class Carrier:
    """The loan of one session; made when its upstream is verified, and of no use once either side is lost."""

    __slots__ = ("_channel", "_descriptors", "_device", "_left", "_pair", "_reactor", "_session", "_upstream")

    def __init__(
        self, reactor: RelayReactor, session: Session, device: Device, upstream: Upstream, channel: TLSChannel
    ) -> None:
        self._reactor = reactor
        self._session = session
        self._device = device
        self._upstream = upstream
        self._channel = channel
        self._pair: Any = None
        # The two descriptors while they are lent.
        self._descriptors: tuple[int, int] | None = None
        # What was handed over and is still to be done.
        self._left: tuple[int, bytes, int] = _NONE

    @property
    def is_lent(self) -> bool:
        """Whether the core has the session."""
        return self._descriptors is not None

    def lend(self) -> None:
        """Lend the session if all is ordinary."""
        if self._descriptors is not None or self._left is not _NONE:
            return
        framers, records = self._session.lend(), self._channel.lend()
        device, upstream = self._device.transport, self._upstream.transport
        if framers is None or records is None:
            return
        up, down = framers[0].lend(), framers[1].lend()
        core = self._reactor.core
        if up is None or down is None or core is None or max(len(up[1]), len(down[1])) > core.HELD:
            return
        if self._pair is None:
            self._pair = self._make_pair(core, *framers)
        if self._pair is None or not self._reactor.lend(self, device, upstream):
            return
        descriptors = device.fileno(), upstream.fileno()
        try:
            self._pair.lend(*descriptors, self, *up, *down, *records)
        except Exception:
            self._reactor.reclaim(*descriptors)
            raise
        self._descriptors = descriptors
        self._session.lent(self)

    def _make_pair(self, core: Any, up: Framer, down: Framer) -> Any:
        addresses = self._channel.addresses()
        if addresses is None:
            return None
        keep, *pointers = addresses
        return core.Pair(keep, tuple(pointers), up.tables, up.max_packet_size, down.tables, down.max_packet_size)

    def settle(self) -> None:
        """Tell the session what has passed."""
        self._session.settled(*self._pair.settle())

    def recall(self) -> None:
        """Take the session back.  What the core has passed and could not send is sent now, before anything else."""
        if self._descriptors is None:
            return
        descriptors, self._descriptors = self._descriptors, None
        up_skip, up_held, down_skip, down_held, missing, header, why, data, result = self._pair.take_back()
        self._reactor.reclaim(*descriptors)
        framers = self._session.framers
        framers[0].take_back(up_skip, up_held)
        framers[1].take_back(down_skip, down_held)
        self._channel.take_back(missing, header)
        self.settle()
        self._session.lent(None)
        if why == Handed.TO_DEVICE:
            self._device.transport.write(data)
        elif why == Handed.TO_BROKER:
            self._upstream.send_rest(data)
        elif why != Handed.NOTHING:
            self._left = why, data, result

    def hand_over(self) -> None:
        """Take the session back and do what the core could not."""
        try:
            self.recall()
            (why, data, result), self._left = self._left, _NONE
            if why == Handed.FROM_DEVICE:
                self._device.dataReceived(data)
            elif why == Handed.FROM_BROKER:
                self._upstream.decrypted(data)
            elif why == Handed.TLS_ENDED:
                self._upstream.decrypted(data, result)
            elif why == Handed.DEVICE_ENDED:
                self._reactor.end(self._device.transport, result)
            elif why == Handed.BROKER_ENDED:
                self._reactor.end(self._upstream.transport, result)
            elif why == Handed.FAILED:
                self._session.fail(MemoryError.__name__)
        except Exception as error:  # noqa: BLE001  an error in one session must not affect the others
            _log.failure("internal error in session {number}", number=self._session.record.number)
            self._session.fail(type(error).__name__)


def carrier_for(session: Session, device: Any, upstream: Any, channel: TLSChannel) -> Carrier | None:
    """Return what lends this session to the core; None if there is no core, or connections are of another kind."""
    at_device, at_broker = device.transport, upstream.transport
    if not isinstance(at_device, SendsAtOnce) or not isinstance(at_broker, SendsAtOnce):
        return None
    reactor: object = at_device.reactor
    if not isinstance(reactor, RelayReactor) or reactor.core is None or at_broker.reactor is not reactor:
        return None
    return Carrier(reactor, session, device, upstream, channel)
