"""The device's side: plain MQTT from the LAN.

In: bytes from a device.  Out: bytes to its session, and from the session to the device.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import ISystemHandle
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.relay.carrier import Carrier
from gateway.relay.side import RelaySide
from gateway.session.session import Session

_log = Logger(namespace="gateway")


class DeviceProtocol(RelaySide):
    """One device's connection.  `open_session` is called with it once it is connected."""

    def __init__(self, open_session: Callable[[DeviceProtocol], Session], user_timeout: float) -> None:
        super().__init__()
        self._open_session = open_session
        self._user_timeout = user_timeout
        self._session: Session
        # Set when there is an upstream, and a core that the session can be lent to.
        self.carrier: Carrier | None = None

    def connectionMade(self) -> None:
        """Open a session."""
        self.watch(self._user_timeout)
        self._session = self._open_session(self)
        del self._open_session  # It refers to this protocol: a reference cycle otherwise.

    def dataReceived(self, data: bytes) -> None:
        """Pass the device's bytes to the session."""
        if self._closing:
            return
        try:
            self._session.device_received(data)
        except Exception as error:  # noqa: BLE001  an error in one session must not affect the others, nor leak its reason
            _log.failure("session {number}: internal error", number=self._session.record.number)
            self._session.fail(type(error).__name__)
        if self.carrier is not None:
            self.carrier.lend()

    def go_on(self) -> None:
        """Let the session go on with what it has."""
        self.dataReceived(b"")

    def has_left(self) -> bool:
        """Return whether the device has closed or reset its connection, and nothing that it sent is unread.

        For a device that is not read: the kernel reports the end of a connection only to readers.
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
        """Send the last bytes to the device."""
        self.transport.write(data)

    def close(self) -> None:
        """Send pending bytes, then close the connection."""
        self.finish()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell the session."""
        self.lost()
        session = self._session
        # Break the reference cycle, which would keep the session's generation alive until the next garbage collection.
        del self._session
        self.carrier = None
        session.device_gone(self.how_lost(reason))
