"""The upstream's side over WebSocket: MQTT in frames, inside the verified channel.

In: a verified connection, the request that opens the WebSocket.  Out: the same as `UpstreamProtocol`, whose session
sees the MQTT bytes alone.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure

from gateway.errors import EndReason, SessionEnd, UpstreamFailure
from gateway.net.websocket import (
    FrameReader,
    OpeningHandshake,
    Request,
    WebSocketError,
    binary_frame,
    close_frame,
    ping_frame,
    pong_frame,
)
from gateway.relay.device import DeviceProtocol
from gateway.relay.side import Gauge
from gateway.relay.upstream import Served, UpstreamProtocol
from gateway.session.record import Peer
from gateway.tls.channel import TLSChannel

# Middleboxes drop WebSockets on which nothing has passed for 60 s.
PING_INTERVAL = 50.0  # seconds


class WebSocketUpstream(UpstreamProtocol):
    """One WebSocket to the broker.  Once it is verified, `upgrade` opens it; only then may it `serve` a session."""

    def __init__(self, channel: TLSChannel, user_timeout: float, clock: IReactorTime) -> None:
        super().__init__(channel, user_timeout)
        self._clock = clock
        self._frames: _Frames | None = None
        self._said_close = False
        self._ping: IDelayedCall | None = None

    def upgrade(self, request: Request) -> Deferred[None]:
        """Open the WebSocket; call it when the broker is verified, in the same turn.

        Fires when it is open, fails with `UpstreamFailure`; cancelling it closes the connection.
        """
        handshake = OpeningHandshake(request)
        frames = self._frames = _Frames(self, handshake)
        # From here on the channel's plaintext goes to the frames, and what comes out of them to the session.
        self._session = frames  # type: ignore[assignment]  # has the methods of a session that are called here
        super().write(handshake.start())
        return frames.opened

    def serve(self, session: Served, device: DeviceProtocol | Gauge, peer: Peer) -> None:
        """Become the upstream of `session`."""
        assert self._frames is not None  # noqa: S101  `upgrade` comes first; narrows the type
        self._frames.session = session
        self._device = device
        if isinstance(device, Gauge):
            self.transport.registerProducer(device, True)
        else:
            self.link(device)
        self._ping = self._clock.callLater(PING_INTERVAL, self._send_ping)
        session.upstream_verified(self, peer)
        self._frames.go_on()

    def write(self, data: bytes) -> None:
        """Frame, encrypt and send."""
        super().write(binary_frame(data))

    def write_last(self, data: bytes) -> None:
        """Frame and encrypt bytes to send with `close`: DISCONNECT, Close and close_notify in one write."""
        self._said_close = True
        super().write_last(binary_frame(data) + close_frame())

    def close(self) -> None:
        """Send pending bytes, then Close, close_notify and FIN."""
        if not self._closing and not self._said_close and self._frames is not None:
            self._said_close = True
            super().write_last(close_frame())
        super().close()

    def end(self, error: WebSocketError) -> None:
        """Close a WebSocket whose server broke the rules, with the code that says so."""
        self._said_close = True
        super().write(close_frame(error.code))

    def pong(self, payload: bytes) -> None:
        """Answer a Ping."""
        # While the broker reads nothing, its Pings are not answered: the answers would fill this process's memory.
        if not self._is_full():
            super().write(pong_frame(payload))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Report the loss to the session, or to whoever waits for the WebSocket."""
        if self._ping is not None and self._ping.active():
            self._ping.cancel()
        super().connectionLost(reason)
        self._frames = None

    def _send_ping(self) -> None:
        if self._closing:
            return
        if not self._is_full():
            super().write(ping_frame())
        self._ping = self._clock.callLater(PING_INTERVAL, self._send_ping)


class _Frames:
    """Stands between the channel and the session: HTTP first, then frames to MQTT bytes.

    It has the methods of `Session` that an `UpstreamProtocol` calls.
    """

    def __init__(self, upstream: WebSocketUpstream, handshake: OpeningHandshake) -> None:
        self._upstream = upstream
        self._handshake: OpeningHandshake | None = handshake
        self._reader = FrameReader()
        # What came with the end of the handshake, until there is a session.
        self._rest = b""
        self.session: Served | None = None
        self.opened: Deferred[None] = Deferred(lambda _: upstream.abort())

    def upstream_received(self, data: bytes) -> None:
        """Take plaintext."""
        try:
            if self._handshake is not None:
                if data:  # Nothing would be the end for it.
                    self._open(self._handshake, data)
            elif self.session is not None:
                self._read(self.session, data)
            # A trial has no session: it closes the WebSocket as soon as it is open.
        except WebSocketError as error:
            self._end(error)

    def go_on(self) -> None:
        """There is a session: give it what has come already."""
        rest, self._rest = self._rest, b""
        if rest:
            self.upstream_received(rest)

    def _open(self, handshake: OpeningHandshake, data: bytes) -> None:
        rest = handshake.receive(data)
        if rest is not None:
            self._handshake = None
            self._rest = rest
            self.opened.callback(None)

    def _read(self, session: Served, data: bytes) -> None:
        reader = self._reader
        # The session may be behind itself, so it goes on even if there is nothing new.
        session.upstream_received(reader.feed(data))
        if reader.pinged is not None:
            self._upstream.pong(reader.pinged)
            reader.pinged = None
        if reader.behind:
            self._upstream.go_on_later()
        elif reader.closed is not None and not self._upstream.behind:
            detail = f"the broker closed the WebSocket with code {reader.closed}"
            session.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, detail))

    def _end(self, error: WebSocketError) -> None:
        if self.session is None:
            self._fail(UpstreamFailure(EndReason.WEBSOCKET_REFUSED, str(error)))
            self._upstream.abort()
        else:
            self._upstream.end(error)
            self.session.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_PROTOCOL_ERROR, f"WebSocket: {error}"))

    def upstream_broken(self, failure: SessionEnd) -> None:
        """The channel has ended."""
        if self.session is not None:
            self.session.upstream_broken(failure)
        else:
            detail = f"the broker closed the connection in the opening handshake ({failure.detail})"
            self._fail(UpstreamFailure(EndReason.WEBSOCKET_REFUSED, detail))

    def upstream_gone(self) -> None:
        """The connection is closed."""
        if self.session is not None:
            self.session.upstream_gone()

    def fail(self, detail: str) -> None:
        """Something unexpected happened in the gateway."""
        if self.session is not None:
            self.session.fail(detail)
        else:
            self._fail(UpstreamFailure(EndReason.INTERNAL_ERROR, detail))
            self._upstream.abort()

    def _fail(self, failure: UpstreamFailure) -> None:
        if not self.opened.called:
            self.opened.errback(failure)
