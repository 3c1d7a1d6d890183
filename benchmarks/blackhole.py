"""Sockets whose packets the kernel drops: a broker behind a firewall or a cable that says nothing.

In: sockets of this process.  Out: nothing, which is the point: no SYN is answered and nothing is acknowledged, and
nothing is refused or reset either.  Needs no rights, unlike a firewall or a network namespace.
"""

from __future__ import annotations

import ctypes
import socket

# In linux/socket.h; a filter of one instruction that keeps nothing of any packet.
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_BPF_RETURN_CONSTANT = 0x06


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def drop_packets(target: socket.socket) -> None:
    """Let the kernel drop whatever comes for a socket, SYN and FIN too, and answer nothing."""
    nothing = (_Instruction * 1)(_Instruction(_BPF_RETURN_CONSTANT, 0, 0, 0))
    target.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(_Program(1, nothing)))


def keep_packets(target: socket.socket) -> None:
    """Undo `drop_packets`."""
    target.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
