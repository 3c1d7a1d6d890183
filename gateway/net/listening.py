"""Opens the addresses that devices connect to.

In: a `Listener` of the configuration, a factory.  Out: an open port, or `ListenFailed` with the cause and the remedy.
`Listeners` holds all listeners of a configuration and switches to the next configuration without a gap.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure

from gateway.config import Listener
from gateway.errors import ConfigError

# Connections that wait to be accepted; the kernel's own limit is net.core.somaxconn.
_BACKLOG = 4096
_IN_USE = "find what listens there with `ss -ltnp` and stop it, or choose another port"
_REMEDIES = {
    errno.EADDRINUSE: _IN_USE,
    errno.EADDRNOTAVAIL: "no interface of this machine has this address (yet); check with `ip address`",
    errno.EACCES: "a port below 1024 needs CAP_NET_BIND_SERVICE, a UNIX socket needs a writable directory",
    errno.ENOENT: "create the directory of the socket first",
}


class ListenFailed(Exception):
    """An endpoint could not be opened. `remedy` may be empty; `in_use` tells that something else listens there."""

    def __init__(self, cause: str, remedy: str = "", *, in_use: bool = False) -> None:
        super().__init__(f"{cause}; {remedy}" if remedy else cause)
        self.cause = cause
        self.remedy = remedy
        self.in_use = in_use


class ListenerFactory(Factory):
    """The factory for one listener's connections; a reload replaces `listener` if the endpoint stays the same.

    `is_open` becomes false when a reload closes the listener.
    """

    noisy = False

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.is_open = True

    def logPrefix(self) -> str:
        """See ILoggingContext; appears in Twisted's own log line at start."""
        return "listener"


@frozen(slots=True)
class _Open:
    """An open listener; `description` is what it was opened with."""

    description: str
    factory: ListenerFactory
    port: IListeningPort


class Listeners:
    """The open listeners of a configuration, in order."""

    def __init__(self, reactor: Any, make_factory: Callable[[Listener], ListenerFactory]) -> None:
        """Take a reactor that can listen, and a function that creates the factory for a listener."""
        self._reactor = reactor
        self._make_factory = make_factory
        self._open: list[_Open] = []

    @property
    def ports(self) -> list[IListeningPort]:
        """The open ports, in the order of the configuration."""
        return [each.port for each in self._open]

    @property
    def named(self) -> list[tuple[str, IListeningPort]]:
        """The open ports with their listeners' names."""
        return [(each.factory.listener.name, each.port) for each in self._open]

    def change(self, listeners: Sequence[Listener]) -> tuple[list[IListeningPort], list[Listener]]:
        """Open new listeners, then close removed ones; unchanged ones stay open and take the new settings.

        Returns the ports that were opened and the listeners that were closed.  Raises `ConfigError` without having
        changed anything.
        """
        staying = list(self._open)
        opened: list[_Open] = []
        wanted: list[tuple[Listener, _Open]] = []
        problems: list[str] = []
        for index, listener in enumerate(listeners):
            same = next((each for each in staying if each.description == listener.description), None)
            if same is not None:
                staying.remove(same)
                wanted.append((listener, same))
                continue
            factory = self._make_factory(listener)
            try:
                new = _Open(listener.description, factory, listen(self._reactor, listener, factory))
            except ListenFailed as error:
                hint = "; to change one of the gateway's own listeners, restart the gateway" if staying else ""
                hint = hint if error.in_use else ""
                problems.append(f"listen[{index}].endpoint: cannot listen on {listener.endpoint}: {error}{hint}")
            else:
                opened.append(new)
                wanted.append((listener, new))
        if problems:
            _close(opened)
            raise ConfigError(problems)
        for listener, each in wanted:
            each.factory.listener = listener
        for each in staying:
            each.factory.is_open = False
        self._open = [each for _, each in wanted]
        _close(staying)
        return [each.port for each in opened], [each.factory.listener for each in staying]

    def close(self) -> list[Deferred[Any]]:
        """Close all; each result fires when its listener is closed."""
        closing, self._open = self._open, []
        return _close(closing)


def _close(listeners: Sequence[_Open]) -> list[Deferred[Any]]:
    closed: list[Deferred[Any]] = [maybeDeferred(each.port.stopListening) for each in listeners]
    return closed


def listen(reactor: Any, listener: Listener, factory: Factory) -> IListeningPort:
    """Open a listener.  Raises `ListenFailed`."""
    results: list[Any] = []
    try:
        serverFromString(reactor, _with_backlog(listener.description)).listen(factory).addBoth(results.append)
    except (OSError, ValueError, TypeError) as error:
        raise _failed(error) from None
    except KeyError as error:
        raise ListenFailed(
            f"systemd passed no socket named {error}",
            "set FileDescriptorName= of the socket unit to this name, and start the gateway as its service unit",
        ) from None
    if not results:
        raise ListenFailed("this kind of endpoint is not supported")
    result = results[0]
    if isinstance(result, Failure):
        raise _failed(result.value) from None
    port: IListeningPort = result
    return port


def _with_backlog(description: str) -> str:
    """Let many connections wait to be accepted, unless the endpoint says how many.

    Twisted lets 50.  What comes when so many wait is dropped, and its next attempt is 1, 3, 7 and 15 seconds later: one
    host that opens a thousand connections at once would keep all others out for so long.
    """
    kind = description.partition(":")[0]
    if kind not in {"tcp", "tcp6", "unix"} or ":backlog=" in description:
        return description
    return f"{description}:backlog={_BACKLOG}"


def _failed(error: BaseException | None) -> ListenFailed:
    cause = error.socketError if isinstance(error, CannotListenError) else error
    if isinstance(cause, OSError) and cause.errno is not None:
        in_use = cause.errno == errno.EADDRINUSE
        return ListenFailed(cause.strerror or str(cause), _REMEDIES.get(cause.errno, ""), in_use=in_use)
    if isinstance(error, CannotListenError):
        # Another process holds the lock of the UNIX socket.
        return ListenFailed(str(cause), _IN_USE, in_use=True)
    return ListenFailed(str(error))
