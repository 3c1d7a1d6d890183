"""Opening and moving the status endpoint.

In: the `[status]` sections of the current and the next configuration.  Out: a port that serves `Sight`, or
`ConfigError`.  twisted.web and prometheus_client are imported only if there is an endpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from attrs import frozen
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger

from gateway.config import Listener, Status
from gateway.errors import ConfigError
from gateway.net.listening import ListenFailed, listen
from gateway.net.network import shown_address
from gateway.ops.expiry import Certificate, of_page
from gateway.ops.sight import Sight

if TYPE_CHECKING:
    from gateway.ops.web.guard import Guard
    from gateway.ops.web.site import StatusSite
    from gateway.ops.web.tls import ServerSide

_log = Logger(namespace="gateway")

RETRY_INTERVAL = 60.0  # seconds between attempts to open an endpoint that could not be opened at start


@frozen
class _Open:
    """An open endpoint."""

    status: Status
    site: StatusSite
    port: IListeningPort


@frozen
class Prepared:
    """What a new configuration needs: `opened` if that is a new endpoint, `None` if that stays or there is none."""

    status: Status
    opened: _Open | None
    tls: ServerSide | None = None


class StatusPort:
    """The status endpoint of a gateway, if it has one."""

    def __init__(self, reactor: Any, sight: Sight, in_thread: Callable[[Callable[[], bool]], Deferred[bool]]) -> None:
        """Take a reactor that provides IReactorTime, IReactorTCP and IReactorUNIX; `in_thread` works in a thread."""
        self._reactor = reactor
        self._sight = sight
        self._in_thread = in_thread
        self._guard: Guard | None = None
        self._open: _Open | None = None
        self._wanted: Status | None = None
        self._try_again_at = 0.0

    @property
    def port(self) -> IListeningPort | None:
        """The open port."""
        return self._open.port if self._open is not None else None

    def open(self, status: Status) -> None:
        """Open what `status` describes; if that fails, log it and retry later."""
        try:
            self.adopt(self.prepare(status))
        except ConfigError as error:
            self._wanted = status
            self._try_again_at = self._reactor.seconds() + RETRY_INTERVAL
            _log.error(
                "the status page is not available: {problems}; next attempt in {interval:.0f} s",
                problems="; ".join(error.problems),
                interval=RETRY_INTERVAL,
            )

    def sweep(self) -> None:
        """Retry opening the endpoint, and log what is due; called about once a second."""
        if self._wanted is not None and self._reactor.seconds() >= self._try_again_at:
            self.open(self._wanted)
        if self._guard is not None:
            self._guard.sweep()

    def certificates(self) -> Iterator[Certificate]:
        """Yield the endpoint's own certificate and its intermediates, if it has TLS."""
        tls = self._open.site.tls if self._open is not None else None
        return of_page(tls.chain if tls is not None else ())

    def prepare(self, status: Status) -> Prepared:
        """Open what `status` describes, unless it is already open.  Raises `ConfigError`."""
        if not status.endpoint:
            return Prepared(status, None)
        from gateway.ops.web.guard import Guard
        from gateway.ops.web.site import StatusSite
        from gateway.ops.web.tls import server_side

        tls = server_side(status)
        if self._open is not None and self._open.status.description == status.description:
            return Prepared(status, None, tls)

        if self._guard is None:
            self._guard = Guard(self._reactor.seconds, self._in_thread)
        site = StatusSite(self._sight, self._reactor, self._guard)
        try:
            factory: Any = site  # its generic bases do not agree
            port = listen(self._reactor, Listener(status.endpoint), factory)
        except ListenFailed as error:
            raise ConfigError([f"status.endpoint: cannot listen on {status.endpoint}: {error}"]) from None
        site.port = port
        return Prepared(status, _Open(status, site, port), tls)

    def adopt(self, prepared: Prepared) -> None:
        """Replace what is open with what was prepared."""
        self._wanted = None
        before = self._open
        if prepared.opened is not None:
            self._open = prepared.opened
            _log.info("status page on {address}", address=shown_address(prepared.opened.port.getHost()))
        elif not prepared.status.endpoint:
            self._open = None
        if before is not None and before is not self._open:
            _close(before)
        if self._open is not None:
            self._open.site.tls = prepared.tls
            self._open.site.guard.require(prepared.status.password)
            # A browser cannot reach a UNIX socket by name, and the names of a public endpoint are not known.
            is_unix = not hasattr(self._open.port.getHost(), "host")
            self._open.site.any_host = prepared.status.public or is_unix

    def discard(self, prepared: Prepared) -> None:
        """Close what was prepared but not adopted."""
        if prepared.opened is not None:
            _close(prepared.opened)

    def close(self) -> Deferred[Any]:
        """Close; the result fires when that is done."""
        self._wanted = None
        closing, self._open = self._open, None
        return succeed(None) if closing is None else _close(closing)


def _close(closing: _Open) -> Deferred[Any]:
    closing.site.end()
    closed: Deferred[Any] = maybeDeferred(closing.port.stopListening)
    return closed
