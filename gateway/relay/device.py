"""The device's side: plain MQTT from the LAN.

In: bytes from a device.  Out: bytes to its session, and the session's answers to the device.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import ISystemHandle
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.relay.side import RelaySide, how_lost, tune
from gateway.session.session import Session

_log = Logger(namespace="gateway")


class DeviceProtocol(RelaySide):
    """One device's connection.  `open_session` is called with it once it stands."""

    def __init__(self, open_session: Callable[[DeviceProtocol], Session], user_timeout: float) -> None:
        super().__init__()
        self._open_session = open_session
        self._user_timeout = user_timeout
        self._session: Session

    def connectionMade(self) -> None:
        """Open a session."""
        tune(self.transport, self._user_timeout)
        self._session = self._open_session(self)
        del self._open_session  # It knows this device, and each would keep the other.

    def dataReceived(self, data: bytes) -> None:
        """Give the device's bytes to the session."""
        if self._closing:
            return
        try:
            self._session.device_received(data)
        except Exception as error:  # noqa: BLE001  a mistake in one session must not end the others, nor leak its reason
            _log.failure("session {number}: a mistake of the gateway", number=self._session.record.number)
            self._session.fail(type(error).__name__)

    def has_left(self) -> bool:
        """Return whether the device has closed or reset its connection, and nothing that it sent is unread.

        For a device that is held: the kernel reports the end of a connection only to those who read from it.
        """
        if not ISystemHandle.providedBy(self.transport):
            return False
        handle: Any = ISystemHandle(self.transport).getHandle()
        try:
            return not handle.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def write(self, data: bytes) -> None:
        """Send bytes to the device."""
        self.transport.write(data)

    def write_last(self, data: bytes) -> None:
        """Send bytes to the device, and nothing behind them."""
        self.transport.write(data)

    def close(self) -> None:
        """Send what is waiting, then end the connection."""
        self.finish()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell the session, for the last time."""
        self.lost()
        session = self._session
        # Each would keep the other, and both what the session began under, until the collector comes, which is seldom.
        del self._session
        session.device_gone(how_lost(reason))
