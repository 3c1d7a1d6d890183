"""Opening the addresses that devices connect to.

In: a `Listener` of the configuration, a factory.  Out: an open port, or `ListenFailed` with the cause and the remedy.
"""

from __future__ import annotations

import errno
from typing import Any

from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure

from gateway.config import Listener

_IN_USE = "`ss -ltnp` names what listens there: stop it, or choose another port"
_REMEDIES = {
    errno.EADDRINUSE: _IN_USE,
    errno.EADDRNOTAVAIL: "no interface of this machine has this address, or not yet: see `ip address`",
    errno.EACCES: "a port below 1024 needs the right to open it (CAP_NET_BIND_SERVICE), a socket a writable directory",
    errno.ENOENT: "make the directory of the socket first",
}


class ListenFailed(Exception):
    """An endpoint did not open: the cause; `remedy`, empty if none is known; `in_use` if something listens there."""

    def __init__(self, cause: str, remedy: str = "", *, in_use: bool = False) -> None:
        super().__init__(f"{cause}; {remedy}" if remedy else cause)
        self.cause = cause
        self.remedy = remedy
        self.in_use = in_use


def listen(reactor: Any, listener: Listener, factory: Factory) -> IListeningPort:
    """Open a listener now.  Raises `ListenFailed`."""
    results: list[Any] = []
    try:
        serverFromString(reactor, listener.description).listen(factory).addBoth(results.append)
    except (OSError, ValueError, TypeError) as error:
        raise _failed(error) from None
    except KeyError as error:
        raise ListenFailed(
            f"systemd has passed no socket named {error}",
            "the name is FileDescriptorName= of the socket unit; start the gateway by its service unit",
        ) from None
    if not results:
        raise ListenFailed("this kind of endpoint does not open at once")
    result = results[0]
    if isinstance(result, Failure):
        raise _failed(result.value) from None
    port: IListeningPort = result
    return port


def _failed(error: BaseException | None) -> ListenFailed:
    cause = error.socketError if isinstance(error, CannotListenError) else error
    if isinstance(cause, OSError) and cause.errno is not None:
        in_use = cause.errno == errno.EADDRINUSE
        return ListenFailed(cause.strerror or str(cause), _REMEDIES.get(cause.errno, ""), in_use=in_use)
    if isinstance(error, CannotListenError):
        # The lock of a UNIX socket is held by another process.
        return ListenFailed(str(cause), _IN_USE, in_use=True)
    return ListenFailed(str(error))
