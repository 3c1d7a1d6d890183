"""Notifies the service manager: systemd's notification protocol (sd_notify(3)).

In: events of the gateway's life, a one-line status.  Out: datagrams to the socket that NOTIFY_SOCKET names.  Without
such a socket, or if nobody reads it, nothing happens.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, MutableMapping
from time import monotonic

from twisted.logger import Logger

from gateway.text import printable

_log = Logger(namespace="gateway")

_LONGEST_STATUS = 400  # characters; `systemctl status` has one line for it


class Notifier:
    """Sends notifications to systemd.

    `address` is the path of a socket, or `@` and the name of an abstract one; empty if there is none.  `watchdog` is
    systemd's watchdog timeout in seconds; 0 if it is off.  `seconds` is the monotonic clock (CLOCK_MONOTONIC) that a
    reload is dated with.
    """

    def __init__(self, address: str = "", watchdog: float = 0.0, seconds: Callable[[], float] = monotonic) -> None:
        self._address = address if address[:1] in {"/", "@"} else ""
        self._every = watchdog / 2  # as sd_watchdog_enabled(3) recommends
        self._seconds = seconds
        self._pinged: float | None = None
        self._status = ""
        self._owed = ""
        # Opened now, so that the watchdog still works when the process has no descriptor left.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self._address else None
        if self._socket is not None:
            self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str], pid: int) -> Notifier:
        """Make the notifier that the environment of process `pid` describes.

        The variables are removed: child processes must not notify in this process's name.
        """
        address = environment.pop("NOTIFY_SOCKET", "")
        microseconds = environment.pop("WATCHDOG_USEC", "")
        meant = environment.pop("WATCHDOG_PID", str(pid))
        watched = meant == str(pid) and microseconds.isascii() and microseconds.isdigit()
        return cls(address, int(microseconds) / 1e6 if watched else 0.0)

    def ready(self, status: str) -> None:
        """Report that everything is open and loaded: after the start and after each reload, successful or not."""
        self._status = _line(status)
        self._insist(f"READY=1\nSTATUS={self._status}")

    def reloading(self) -> None:
        """Report that a reload begins; `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={int(self._seconds() * 1e6)}")

    def stopping(self, status: str, seconds: float) -> None:
        """Report that the gateway stops, which may take `seconds`; systemd extends its stop timeout accordingly."""
        self._status = _line(status)
        self._insist(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(seconds * 1e6)}\nSTATUS={self._status}")

    def alive(self, status: str, until_next: float) -> None:
        """Ping the watchdog if the next call, in `until_next` seconds, would be too late; report a changed status."""
        if self._owed:
            self._insist(self._owed)
        now = self._seconds()
        if self._every and (self._pinged is None or now + until_next - self._pinged > self._every):
            # A ping that could not be sent is due again at the next call.
            self._pinged = now if self._send("WATCHDOG=1") else None
        status = _line(status)
        if status != self._status and self._send(f"STATUS={status}"):
            self._status = status

    def close(self) -> None:
        """Close the socket; later calls do nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _insist(self, message: str) -> None:
        """Send a message; if systemd does not take it now, `alive` sends it again."""
        self._owed = "" if self._send(message) else message

    def _send(self, message: str) -> bool:
        """Send a message; return False if it must be sent again.  Never blocks."""
        if self._socket is None:
            return True
        # A first NUL stands for the `@` of an abstract address (unix(7)).
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            self._socket.sendto(message.encode(), address)
        except OSError as error:
            _log.debug(
                "notification to systemd failed: {error} ({message})",
                message=", ".join(message.splitlines()),
                error=error,
            )
            return False
        return True


def _line(text: str) -> str:
    return printable(text, _LONGEST_STATUS)
