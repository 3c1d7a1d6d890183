"""The HTTP site: whatever comes, there is one answer or none, no exception and no line in the log."""

from __future__ import annotations

import http.client
import io
from collections.abc import Iterable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import maybeDeferred
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.logger import globalLogPublisher

from gateway.config import Config, Upstream
from gateway.ops.web import site as site_module
from gateway.ops.web.guard import Guard
from gateway.ops.web.site import StatusSite
from gateway.service import GatewayService
from tests.fuzz.tools import Choices, cut_in_three

_STATUSES = {200, 400, 404, 405, 413, 414, 421, 429, 431, 501, 503}
_ADDRESS = IPv4Address("TCP", "127.0.0.1", 50_000)

SEEDS = tuple(
    bytes((60,)) + request
    for request in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /status?device=x&limit=3 HTTP/1.1\r\nHost: 127.0.0.1:9\r\nAccept: application/json\r\n\r\n",
        b"HEAD /metrics HTTP/1.1\r\nHost: [::1]\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: \xff\r\n\r\n",
        b"GET /%ff?%00=&device=%f0%9f HTTP/1.1\r\nHost: \xff\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"POST /readyz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nabcde",
    )
)


class _Reactor(MemoryReactorClock):
    """What a gateway asks of a reactor before it is started."""

    def getThreadPool(self) -> None:  # noqa: N802  the interface's name
        """There are no threads here."""


class _Transport(StringTransport):
    """A transport that counts what is written after its end."""

    aborted = False

    def loseWriteConnection(self) -> None:  # noqa: N802  the interface's name
        """The answer ends here; the far end closes when it likes."""

    def abortConnection(self) -> None:
        self.aborted = True
        self.loseConnection()


_CLOCK = _Reactor()
_GUARD = Guard(_CLOCK.seconds, maybeDeferred)
_SERVICE = GatewayService(Config(upstream=(Upstream("broker.example"),)), _CLOCK)


def _exchange(parts: Iterable[bytes]) -> tuple[bytes, list[dict[str, Any]]]:
    """Give a connection of its own these bytes; return what was answered, and what was logged."""
    logged: list[dict[str, Any]] = []
    site = StatusSite(_SERVICE.sight, _CLOCK, _GUARD)
    protocol = site.buildProtocol(_ADDRESS)
    assert protocol is not None
    transport = _Transport(peerAddress=_ADDRESS)
    globalLogPublisher.addObserver(logged.append)
    try:
        protocol.makeConnection(transport)
        for part in parts:
            if part and not transport.disconnecting:
                protocol.dataReceived(part)
        # Whoever says nothing more is not waited for.
        _CLOCK.pump([1] * 16)
        assert transport.disconnecting or transport.aborted, "a connection outlives its time"
        protocol.connectionLost(site_module.connectionDone)
    finally:
        globalLogPublisher.removeObserver(logged.append)
    assert not site.protocols, "a connection is still counted"
    assert not _CLOCK.getDelayedCalls(), "a timer is left"
    return transport.value(), logged


class _Received:
    """Bytes in the place of a socket, for http.client."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _status(answer: bytes) -> int:
    """Read an answer with Python's own client: its status, or 0 if there is none."""
    if not answer:
        return 0
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    response = http.client.HTTPResponse(_Received(answer))  # type: ignore[arg-type]  # it asks for makefile alone
    response.begin()
    head, _, body = answer.partition(b"\r\n\r\n")
    length = response.getheader("Content-Length")
    if length is not None and body:
        assert int(length) == len(body), "more than one answer, or half of one"
    assert b"\n" not in head.replace(b"\r\n", b""), "a bare line feed in the head"
    return response.status


def check(data: bytes) -> None:
    """Ask whole and in three parts."""
    choices = Choices(data)
    where = choices.number(256)
    stream = choices.rest()
    answer, logged = _exchange([stream])
    assert not logged, f"logged: {logged[0].get('log_format')} {logged[0].get('log_failure')}"
    status = _status(answer)
    assert not status or status in _STATUSES, f"status {status}"
    cut, logged = _exchange(cut_in_three(stream, where))
    assert not logged, f"logged: {logged[0].get('log_format')} {logged[0].get('log_failure')}"
    assert _status(cut) == status, f"status {status} whole, {_status(cut)} in parts"


def reads_headers_as_ascii() -> None:
    """A header that is no ASCII escapes the handler."""
    answer = StatusSite.answer

    def faulty(self: StatusSite, method: str, uri: str, fields: Any, done: Any) -> None:
        "".join(fields[b"accept"]).encode("ascii")
        answer(self, method, uri, fields, done)

    StatusSite.answer = faulty  # type: ignore[method-assign]


def answers_twice() -> None:
    """What is behind the request is another one."""
    respond = site_module._Connection._respond

    def faulty(self: Any, method: bytes, answer: Any) -> None:
        respond(self, method, answer)
        if answer[0] in (200, 503):
            self.transport.write(b"HTTP/1.1 200 OK\r\n\r\n")

    site_module._Connection._respond = faulty  # type: ignore[method-assign]


FAULTS = (reads_headers_as_ascii, answers_twice)
