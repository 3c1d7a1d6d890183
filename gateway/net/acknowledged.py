"""Tells from the kernel's TCP state whether a peer still acknowledges what it is sent.

In: a connected TCP socket, the time.  Out: whether the peer has been dead for some time.

TCP_USER_TIMEOUT does not tell: the kernel counts the probes of a closed window against it, and so ends connections to
peers that are alive but do not read.  While nothing is sent, TCP keepalive finds a dead peer.
"""

from __future__ import annotations

import socket

# Offsets in struct tcp_info (linux/tcp.h).
_PROBES = 3
_UNACKED = slice(24, 28)
_LAST_ACK_RECEIVED = slice(56, 60)
_SEND_WINDOW = slice(228, 232)
_INFO_SIZE = 232

# So many probes of a closed window in a row without an answer; a peer that lives answers each.
_UNANSWERED_PROBES = 3


class AcknowledgementWatch:
    """Watches one connection; `timeout` is in seconds."""

    __slots__ = ("_socket", "_timeout", "_waiting_since")

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self._socket = connection
        self._timeout = timeout
        self._waiting_since: float | None = None

    def is_dead(self, now: float) -> bool:
        """Whether something that was sent has not been acknowledged for the timeout, although the peer could.

        `now` is in seconds.  Call it several times per timeout.  A peer whose window is closed is dead if it leaves
        probes unanswered.
        """
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
        except OSError:
            return False  # It is closed already.
        unacked, silent_ms = _number(info[_UNACKED]), _number(info[_LAST_ACK_RECEIVED])
        is_open = len(info) < _INFO_SIZE or _number(info[_SEND_WINDOW]) > 0
        if not is_open:
            self._waiting_since = None
            return info[_PROBES] >= _UNANSWERED_PROBES and silent_ms >= self._timeout * 1000
        if not unacked:
            self._waiting_since = None
            return False
        if self._waiting_since is None or silent_ms < (now - self._waiting_since) * 1000:
            # An acknowledgement has come since, so what is waiting now was sent after it.
            self._waiting_since = max(now - silent_ms / 1000, self._waiting_since or now)
        return now - self._waiting_since >= self._timeout


def _number(field: bytes) -> int:
    return int.from_bytes(field, "little")
