"""The upstream's side: a verified TLS channel to the broker, and MQTT over it.

In: a connection to a broker, then a session.  Out: `verified`, then decrypted bytes one way and encrypted bytes the
other.
"""

from __future__ import annotations

from typing import Protocol

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.errors import EndReason, SessionEnd, UpstreamFailure
from gateway.relay.carrier import Carrier, carrier_for
from gateway.relay.device import DeviceProtocol
from gateway.relay.side import Gauge, RelaySide
from gateway.session.record import Peer
from gateway.session.session import Session
from gateway.tls.channel import ChannelState, TLSChannel

_log = Logger(namespace="gateway")

MAX_UNREAD_ANSWERS = 1000
"""How many answers of TLS itself may wait for a peer that does not read: about 30 bytes each; none needs many."""


class Served(Protocol):
    """What an upstream serves: a `Session`, or a stored device's connection."""

    def upstream_verified(self, upstream: UpstreamProtocol, peer: Peer) -> None:
        """See `Session.upstream_verified`."""

    def upstream_received(self, data: bytes) -> None:
        """See `Session.upstream_received`."""

    def upstream_broken(self, failure: SessionEnd) -> None:
        """See `Session.upstream_broken`."""

    def upstream_gone(self) -> None:
        """See `Session.upstream_gone`."""

    def fail(self, detail: str) -> None:
        """See `Session.fail`."""


class UpstreamProtocol(RelaySide):
    """One TLS connection to the broker.

    `verified` fires with the `Peer` once the handshake is done, the chain is trusted and the identity matches, and
    fails with `UpstreamFailure` otherwise; cancelling it closes the connection.  There is no session before that.
    """

    def __init__(self, channel: TLSChannel, user_timeout: float) -> None:
        super().__init__()
        self._channel = channel
        self._user_timeout = user_timeout
        self._session: Served | None = None
        self._device: DeviceProtocol | Gauge | None = None
        self._carrier: Carrier | None = None
        self._unread_answers = 0
        # Ciphertext to send with `close`.
        self._last = b""
        self.verified: Deferred[Peer] = Deferred(self._given_up)

    def _given_up(self, _: Deferred[Peer]) -> None:
        self.abort()

    @property
    def resuming(self) -> bool:
        """Whether the handshake, not yet done, offers to resume a TLS session."""
        return self._channel.resuming

    @property
    def approved(self) -> bool:
        """Whether the broker's chain and name have been approved, also after the handshake has failed."""
        return self._channel.approved

    def connectionMade(self) -> None:
        """Send the ClientHello."""
        self.watch(self._user_timeout)
        try:
            self._channel.start()
        except UpstreamFailure as failure:
            self._refuse(failure)
        else:
            self._flush()

    def serve(self, session: Served, device: DeviceProtocol | Gauge, peer: Peer) -> None:
        """Become the upstream of `session`; a stored device is not stopped by its upstream, and has a `Gauge`."""
        self._session = session
        self._device = device
        if isinstance(device, Gauge):
            self.transport.registerProducer(device, True)
        else:
            self.link(device)
            if isinstance(session, Session):
                self._carrier = device.carrier = carrier_for(session, device, self, self._channel)
        session.upstream_verified(self, peer)

    def dataReceived(self, data: bytes) -> None:
        """Decrypt the bytes and pass them to the session."""
        if self._closing:
            return
        try:
            # Here and not in a method of its own, which would be a call more for each message.
            try:
                plaintext = self._channel.receive(data)
            except UpstreamFailure as failure:
                self._broken(failure)
            else:
                self._deliver(plaintext)
        except Exception as problem:  # noqa: BLE001  an error in one session must not affect the others
            self._internal_error(problem)
        if self._carrier is not None:
            self._carrier.lend()

    def go_on(self) -> None:
        """Let the session go on with what it has, and then the channel."""
        try:
            if self._session is not None:
                self._session.upstream_received(b"")
        except Exception as problem:  # noqa: BLE001  an error in one session must not affect the others
            self._internal_error(problem)
        if not self._behind:
            self.dataReceived(b"")

    def decrypted(self, plaintext: bytes, result: int | None = None) -> None:
        """See `gateway.relay.carrier.Upstream`."""
        if self._closing:
            return
        try:
            if result is not None:
                try:
                    plaintext = self._channel.ended(plaintext, result)
                except UpstreamFailure as failure:
                    self._broken(failure)
                    return
            self._deliver(plaintext)
        except Exception as problem:  # noqa: BLE001  an error in one session must not affect the others
            self._internal_error(problem)
        if self._carrier is not None:
            self._carrier.lend()

    def send_rest(self, ciphertext: bytes) -> None:
        """See `gateway.relay.carrier.Upstream`."""
        self.transport.write(ciphertext)
        self._channel.waiting = True
        self._flush()

    def _internal_error(self, problem: Exception) -> None:
        _log.failure("internal error in an upstream connection")
        if self._session is not None:
            self._session.fail(type(problem).__name__)
        else:
            self._refuse(UpstreamFailure(EndReason.INTERNAL_ERROR, type(problem).__name__))

    def _broken(self, failure: UpstreamFailure) -> None:
        """End what a channel that has just failed was for."""
        self._flush()
        if self._session is None:
            self._refuse(failure)
        else:
            self._session.upstream_broken(failure)

    def _deliver(self, plaintext: bytes) -> None:
        """Do what is due when the channel has taken something."""
        channel = self._channel
        if self._session is None:
            if channel.broken is not None:
                self._refuse(channel.broken)
                return
            if channel.state is not ChannelState.VERIFIED or channel.peer is None:
                self._flush()
                return
            # The last handshake message is sent together with the session's CONNECT.
            self.verified.callback(channel.peer)
        if channel.waiting and not self._closing:
            self._flush()
        session = self._session
        if session is None:
            # The caller has gone meanwhile, or needed only the verification and has closed the connection.
            if not self._closing:
                self.abort()
            return
        if plaintext:
            session.upstream_received(plaintext)
        if channel.due:
            self.go_on_later()
        if self._behind:
            return  # What is left of the plaintext comes before the end of the channel.
        if channel.broken is not None:
            session.upstream_broken(channel.broken)
        elif channel.received_close:
            words = "the broker closed the connection"
            session.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, words, is_orderly=True))

    def write(self, data: bytes) -> None:
        """Encrypt and send.  Raises `NotVerified` before the broker is verified."""
        try:
            ciphertext = self._channel.send(data)
        except UpstreamFailure as failure:
            if self._session is not None:
                self._session.upstream_broken(failure)
            self._flush()
        else:
            self.transport.write(ciphertext)

    def write_last(self, data: bytes) -> None:
        """Encrypt bytes to send with `close`: DISCONNECT and close_notify in one write."""
        try:
            self._last = self._channel.send(data)
        except UpstreamFailure as failure:
            if self._session is not None:
                self._session.upstream_broken(failure)
            self._flush()

    def close(self) -> None:
        """Send pending bytes, then close_notify and FIN."""
        if self._closing:
            return
        self._channel.close()
        ciphertext = self._last + self._channel.outgoing()
        if ciphertext:
            self.transport.write(ciphertext)
        self.finish()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell the session, or fail `verified`."""
        closing = self._closing
        self.lost()
        self._channel.dispose()
        session, self._session = self._session, None
        self._device = None
        self._carrier = None
        if session is not None:
            if not closing:
                detail = f"{self.how_lost(reason)} by the broker, without close_notify"
                is_orderly = reason.check(ConnectionDone) is not None
                session.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, detail, is_orderly=is_orderly))
            session.upstream_gone()
        elif not closing and not self.verified.called:
            self.verified.errback(UpstreamFailure(EndReason.TLS_CLOSED, f"{self.how_lost(reason)} by the upstream"))

    def _refuse(self, failure: UpstreamFailure) -> None:
        """Close a connection that failed verification; nothing but the alert is sent."""
        self._flush()
        self._closing = True
        self.transport.loseConnection()
        if not self.verified.called:
            self.verified.errback(failure)

    def _flush(self) -> None:
        ciphertext = self._channel.outgoing()
        if not ciphertext:
            return
        self.transport.write(ciphertext)
        # TLS answers some messages automatically (KeyUpdate, RFC 8446 §4.6.3).  A broker that requests such answers and
        # does not read them would fill this process's memory, bypassing backpressure.
        self._unread_answers = self._unread_answers + 1 if self._is_full() else 0
        if self._unread_answers > MAX_UNREAD_ANSWERS and self._session is not None:
            self._session.upstream_broken(
                UpstreamFailure(EndReason.UPSTREAM_PROTOCOL_ERROR, "it requests TLS answers but does not read them")
            )
            self.abort()

    def _is_full(self) -> bool:
        """Whether the broker does not keep up: its transport has paused its producer, the device's side."""
        return self._device is not None and self._device.choked
