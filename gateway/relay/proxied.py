"""Connections from load balancers, which begin with a PROXY header that names the device's address.

In: connections to a listener with `proxies`.  Out: after its header, each becomes an ordinary device connection,
admitted by the address in the header; this module no longer handles its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol as Interface

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress, ITCPTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from gateway.errors import EndReason
from gateway.net.listening import ListenerFactory
from gateway.net.network import shown_address
from gateway.net.proxy_header import MalformedProxyHeader, parse_proxy_header
from gateway.pieces import Pieces, slices
from gateway.relay.side import has_unread
from gateway.rules.admission import Doorkeeper, host_of

# To close a connection costs far more than to look at it, so this many are closed in a turn.
_CLOSED_AT_A_TIME = 20


class Enter(Interface):
    """Creates the protocol of an admitted device connection."""

    def __call__(
        self,
        address: IAddress | None,
        door: ListenerFactory,
        accepted: float,
        balancer: IAddress | None = None,
        *,
        is_proxied: bool = False,
    ) -> Protocol:
        """Return the protocol; `accepted` is in seconds on the gateway's clock.

        `is_proxied` tells that the connection began with a PROXY header, sent by the load balancer at `balancer`.
        """


class Doorstep:
    """All connections of load balancers whose header is still incomplete.

    They count towards the limit of all sessions and share the timeout of CONNECT.  `refused` is called for each that is
    refused, with the load balancer's or the device's address and a detail; `left` each time one has gone.
    """

    def __init__(
        self,
        doorkeeper: Doorkeeper,
        enter: Enter,
        refused: Callable[[EndReason, str, str], None],
        left: Callable[[], None],
        seconds: Callable[[], float],
    ) -> None:
        self.connections: set[ProxiedConnection] = set()
        self._doorkeeper = doorkeeper
        self._enter = enter
        self._refused = refused
        self._left = left
        self._seconds = seconds
        # The seconds that were lost since the start, all together.
        self._lost = 0.0
        self._is_sweeping = False
        self._is_closed = False

    def admit(self, address: IAddress | None, door: ListenerFactory) -> Protocol | None:
        """Return the protocol for a new connection to a listener with `proxies`, or `None` if it is refused."""
        reason = self._doorkeeper.admit_proxy(host_of(address), door.listener.proxies)
        if reason is not None:
            self._refused(reason, shown_address(address), "")
            return None
        connection = ProxiedConnection(self, address, door, self._seconds())
        connection.given_back = self._lost
        self.connections.add(connection)
        return connection

    def sweep(self, now: float, patience: float) -> Pieces[None]:
        """Refuse connections older than `patience` seconds; `now` is in seconds on the gateway's clock.

        Does nothing while another sweep is under way.
        """
        if self._is_sweeping:
            return
        self._is_sweeping = True
        try:
            for some in slices(list(self.connections)):
                closed = 0
                for connection in some:
                    if self._is_too_old(connection, now, patience):
                        connection.run_out()
                        closed += 1
                        if not closed % _CLOSED_AT_A_TIME:
                            yield
                yield
        finally:
            self._is_sweeping = False

    def _is_too_old(self, connection: ProxiedConnection, now: float, patience: float) -> bool:
        """Give a connection the time back that was lost, and judge it."""
        if connection.given_back != self._lost:
            owed, connection.given_back = self._lost - connection.given_back, self._lost
            connection.accepted = min(connection.accepted + owed, self._seconds())
        # It may have become a device's since this sweep began.
        return (
            now >= connection.accepted + patience
            and connection in self.connections
            and not has_unread(connection.transport)
        )

    def give_back(self, seconds: float) -> None:
        """Move the deadlines by `seconds` in which this process did not run, or by which the clock has jumped.

        Each connection gets them right before the sweep judges it: there may be thousands.
        """
        self._lost += seconds

    def open(self) -> None:
        """Let connections become devices' again after `clear`."""
        self._is_closed = False

    def clear(self) -> Pieces[None]:
        """Close them all without a record: the gateway stops.  None becomes a device's any more."""
        self._is_closed = True
        for some in slices(list(self.connections), _CLOSED_AT_A_TIME):
            for connection in some:
                connection.close()
            yield

    def named(self, connection: ProxiedConnection, source: IAddress | None, rest: bytes) -> None:
        """Admit or refuse a connection of the device at `source`, which sent `rest` after the header."""
        if self._is_closed:
            connection.close()
            return
        door, host, balancer = connection.door, host_of(source), host_of(connection.proxy)
        # A reload may have changed the listener since the connection was accepted.
        reason = self._doorkeeper.judge_again(host, door, balancer, is_proxied=True)
        reason = reason or self._doorkeeper.admit_device(host)
        if reason is not None:
            self.refuse(connection, reason, f"via {shown_address(connection.proxy)}", source)
            return
        self.connections.discard(connection)
        device = self._enter(source, door, connection.accepted, connection.proxy, is_proxied=True)
        connection.become(device, rest)

    def refuse(
        self, connection: ProxiedConnection, reason: EndReason, detail: str, source: IAddress | None = None
    ) -> None:
        """Close a connection and record why."""
        connection.close()
        self._refused(reason, shown_address(source or connection.proxy), detail)

    def gone(self, connection: ProxiedConnection) -> None:
        """A connection closed before it became a device's."""
        self._doorkeeper.leave(None)
        self.connections.discard(connection)
        self._left()


class ProxiedConnection(Protocol):
    """One connection of a load balancer at the address `proxy`, until its header is complete.

    `accepted` is when it was accepted, in seconds on the gateway's clock, or later by the time that was lost since.
    """

    transport: ITCPTransport

    def __init__(self, doorstep: Doorstep, proxy: IAddress | None, door: ListenerFactory, accepted: float) -> None:
        self.proxy = proxy
        self.door = door
        self.accepted = accepted
        # For the doorstep: how much of all lost time has been given back here.
        self.given_back = 0.0
        self._doorstep = doorstep
        self._header = b""
        # The header is complete and names the load balancer itself.
        self._is_local = False
        self._closing = False

    def dataReceived(self, data: bytes) -> None:
        """Read the header; the bytes after it are the device's."""
        if self._is_local:
            self._doorstep.named(self, self.proxy, data)
            return
        self._header += data
        try:
            header = parse_proxy_header(self._header)
        except MalformedProxyHeader as error:
            self._doorstep.refuse(self, EndReason.NO_PROXY_HEADER, str(error))
            return
        if header is None:
            return
        rest = self._header[header.length :]
        source = self._address(header.source)
        # A health check sends LOCAL, or the load balancer's own address (the only way in v1), and closes. It becomes a
        # session only if bytes follow the header.
        if rest or not self._is_own(source):
            self._doorstep.named(self, source, rest)
        else:
            self._is_local = True

    def _is_own(self, source: IAddress | None) -> bool:
        # Not by equality: an IPv4 address may appear as IPv6.
        ports = (getattr(address, "port", None) for address in (source, self.proxy))
        return host_of(source) == host_of(self.proxy) and len(set(ports)) == 1

    def _address(self, source: tuple[object, int] | None) -> IAddress | None:
        if source is None:
            return self.proxy
        host, port = str(source[0]), source[1]
        return IPv6Address("TCP", host, port) if ":" in host else IPv4Address("TCP", host, port)

    def become(self, device: Protocol, rest: bytes) -> None:
        """Hand the transport over to the device's protocol, with the bytes after the header."""
        transport: ITCPTransport = self.transport
        transport.protocol = device  # type: ignore[attr-defined]  # where Twisted's transports deliver bytes
        device.makeConnection(transport)
        if rest:
            device.dataReceived(rest)

    def run_out(self) -> None:
        """The header or the CONNECT did not arrive in time."""
        if self._closing:
            return
        if self._is_local:
            self._doorstep.refuse(self, EndReason.CONNECT_TIMEOUT, "a health check's header, and nothing after it")
        else:
            self._doorstep.refuse(
                self, EndReason.NO_PROXY_HEADER, f"only {len(self._header)} bytes of it before the timeout"
            )

    def close(self) -> None:
        """Close the connection at once."""
        if not self._closing:
            self._closing = True
            self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The load balancer closed.  Without a header, or with its own address, that was a health check."""
        del reason
        if self._header and not self._is_local and not self._closing:
            self._doorstep.refuse(self, EndReason.NO_PROXY_HEADER, f"closed after {len(self._header)} bytes")
        self._doorstep.gone(self)
