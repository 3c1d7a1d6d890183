"""The socket of `mqtts-gateway store`: one request a connection, a time limit, and an answer to anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from gateway.ops.store_port import StorePort

Asked = list[tuple[str, str]]


class Caller:
    """A connection to the port."""

    def __init__(self, port: StorePort) -> None:
        self.transport = StringTransport()
        protocol = port.buildProtocol(None)
        assert protocol is not None
        self._protocol = protocol
        protocol.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self._protocol.dataReceived(data)

    def close(self) -> None:
        """Close the connection."""
        self._protocol.connectionLost(Failure(ConnectionDone()))

    @property
    def answer(self) -> dict[str, object]:
        """What has come back."""
        got: dict[str, object] = json.loads(self.transport.value())
        return got


@pytest.fixture
def asked() -> Asked:
    """Return the changes that were asked for."""
    return []


@pytest.fixture
def clock() -> Clock:
    """Return the port's clock."""
    return Clock()


@pytest.fixture
def port(clock: Clock, asked: Asked, tmp_path: Path) -> StorePort:
    """Return a port on which one message is dropped for each request."""

    def change(action: str, device: str) -> Deferred[list[tuple[str, int]]]:
        asked.append((action, device))
        return succeed([(device, 1)])

    return StorePort(clock, tmp_path, change)


def test_a_request_is_answered_once(port: StorePort, asked: Asked) -> None:
    """What follows it is ignored."""
    caller = Caller(port)
    caller.send(b'{"action": "drop", ')
    caller.send(b'"device": "pump-3"}\n')
    caller.send(b'{"action": "drop", "device": "pump-4"}\n')
    assert asked == [("drop", "pump-3")]
    assert caller.answer == {"changed": [["pump-3", 1]]}
    assert caller.transport.disconnecting


NOT_REQUESTS = [
    b"\n",
    b"[]\n",
    b"{}\n",
    b'{"action": "stop", "device": "a"}\n',
    b'{"action": "drop", "device": 1}\n',
    b"\xff\n",
    b"[" * 100_000 + b"\n",
    b"x" * 300_000,
]


@pytest.mark.parametrize("request_", NOT_REQUESTS, ids=lambda each: repr(each[:20]))
def test_anything_else_is_refused(request_: bytes, port: StorePort, asked: Asked) -> None:
    """Nested values that Python cannot read, and a request without an end, too."""
    caller = Caller(port)
    caller.send(request_)
    assert caller.answer == {"error": "this is not a request"}
    assert not asked


def test_callers_that_say_nothing_make_room(port: StorePort, clock: Clock, asked: Asked) -> None:
    """Eight at a time, each for five seconds."""
    idle = [Caller(port) for _ in range(8)]
    assert port.buildProtocol(None) is None
    clock.advance(5)
    assert all(caller.transport.disconnecting for caller in idle)
    for caller in idle:
        caller.close()
    caller = Caller(port)
    caller.send(b'{"action": "retry", "device": "pump-3"}\n')
    clock.advance(60)
    assert asked == [("retry", "pump-3")]
    caller.close()
    assert not clock.getDelayedCalls()
