"""Ports of loopback for programs that are told where to listen."""

from __future__ import annotations

import socket

# Bound and not listening, for as long as the process runs: the kernel then gives the port to nobody who asks for any,
# be it another test's listener or a client, while a program that asks for this very port (with SO_REUSEADDR, as
# servers do) may have it, and have it again after a restart.
_HELD: list[socket.socket] = []


def free_port() -> int:
    """Return a port of loopback on which nobody listens, and which nobody gets by chance."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _HELD.append(held)
    port: int = held.getsockname()[1]
    return port


def free_port_pair() -> int:
    """Return a port as `free_port` does, of which the same is true of the next one."""
    while True:
        port = free_port()
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(("127.0.0.1", port + 1))
        except (OSError, OverflowError):
            held.close()
            continue
        _HELD.append(held)
        return port
