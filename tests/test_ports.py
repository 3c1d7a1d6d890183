"""A port that a program of a test is told to use is there when the program asks for it."""

from __future__ import annotations

import errno
import socket

import pytest

from tests.ports import free_port


def test_nobody_gets_a_port_that_was_given() -> None:
    """It is bound, and nobody listens."""
    port = free_port()
    with socket.socket() as another, pytest.raises(OSError) as raised:  # noqa: PT011  its number is looked at
        another.bind(("127.0.0.1", port))
    assert raised.value.errno == errno.EADDRINUSE
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_a_server_that_asks_for_it_gets_it_again_and_again(address: str) -> None:
    port = free_port()
    for _ in range(2):
        with socket.create_server((address, port)), socket.create_connection(("127.0.0.1", port)):
            pass
