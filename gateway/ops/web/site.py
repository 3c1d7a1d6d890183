"""The HTTP server of the status endpoint: the page, /status, /metrics, /healthz, /readyz.

In: requests.  Out: answers made from `Sight`.  Nothing can be changed here, so only GET and HEAD are accepted.  The
relay runs in the same process, so every request must be cheap and short, and an error in an answer must not spread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from io import BytesIO
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl

from twisted.internet.interfaces import IAddress, IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.http import HTTPFactory, Request

from gateway.ops.metrics import Metrics
from gateway.ops.sight import Query, Sight
from gateway.ops.web.page import CONTENT_SECURITY_POLICY, page

_log = Logger(namespace="gateway")

_MOST_CONNECTIONS = 32
_LIFETIME = 15.0  # seconds that a connection may last
_IDLE = 5  # seconds without a byte
_LONGEST_PATH = 2048  # bytes, query included
_MOST_ARGUMENTS = 16
# Answers per second for all clients together, and the burst.  A page of ten thousand sessions takes milliseconds, which
# the relay has to wait for.
_RATE = 5.0
_BURST = 40.0

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Connection": "close",
}
_TEXT = "text/plain; charset=utf-8"

Answer = tuple[int, str, bytes]


class StatusSite(WrappingFactory):
    """The factory of status connections.

    `any_host` leaves the Host header unchecked.
    """

    noisy = False

    def __init__(self, sight: Sight, reactor: Any) -> None:
        """Take a reactor that provides IReactorTime."""
        self._sight = sight
        self._metrics = Metrics(sight)
        self._reactor = reactor
        self.any_host = False
        self._tokens = _BURST
        self._tokens_at = reactor.seconds()
        self._answers: Mapping[str, Callable[[Mapping[str, str], str], Answer]] = {
            "/": self._page,
            "/status": self._status,
            "/metrics": self._expose,
            "/healthz": self._health,
            "/readyz": self._readiness,
        }
        super().__init__(_HTTP(self, reactor))

    def buildProtocol(self, addr: IAddress | None) -> _Bounded | None:  # type: ignore[override]  # as factories may
        """Take a connection, unless there are too many."""
        if len(self.protocols) >= _MOST_CONNECTIONS:
            return None
        return _Bounded(self, self.wrappedFactory.buildProtocol(addr), self._reactor)

    def end(self) -> None:
        """Close all connections."""
        for connection in list(self.protocols):
            connection.abortConnection()

    def answer(self, method: str, uri: str, host: str | None, accept: str) -> Answer:
        """Answer a request; an error is answered with 500."""
        try:
            return self._answer(method, uri, host, accept)
        except Exception:  # noqa: BLE001  an error in an answer must not reach the relay
            _log.failure("internal error in the status page")
            return 500, _TEXT, b"Internal error; see the gateway's log.\n"

    def _answer(self, method: str, uri: str, host: str | None, accept: str) -> Answer:
        if method not in {"GET", "HEAD"}:
            return 405, _TEXT, b"Only GET and HEAD are allowed.\n"
        if not (self.any_host or host is None or _is_this_machine(host)):
            # A page on the Internet whose name was made to resolve to 127.0.0.1 would have the same origin as this one.
            return (
                421,
                _TEXT,
                b"Use localhost or 127.0.0.1 as the host name; a proxy must set the Host header accordingly.\n",
            )
        if len(uri) > _LONGEST_PATH:
            return 414, _TEXT, b"The path is too long.\n"
        path, _, query = uri.partition("?")
        answer = self._answers.get(path)
        if answer is None:
            return 404, _TEXT, b"Not found. Available: /, /status, /metrics, /healthz, /readyz.\n"
        if path not in {"/healthz", "/readyz"} and not self._take_token():
            return 429, _TEXT, b"Too many requests: retry in a second.\n"
        try:
            arguments = dict(parse_qsl(query, max_num_fields=_MOST_ARGUMENTS))
        except ValueError:
            return 400, _TEXT, b"Too many arguments.\n"
        return answer(arguments, accept)

    def _take_token(self) -> bool:
        now = self._reactor.seconds()
        self._tokens = min(_BURST, self._tokens + (now - self._tokens_at) * _RATE)
        self._tokens_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    # ---- the answers

    def _page(self, arguments: Mapping[str, str], _: str) -> Answer:
        return 200, "text/html; charset=utf-8", page(self._sight.document(Query.of(arguments))).encode()

    def _status(self, arguments: Mapping[str, str], _: str) -> Answer:
        document = self._sight.document(Query.of(arguments))
        return 200, "application/json", json.dumps(document, indent=1).encode("ascii") + b"\n"

    def _expose(self, _: Mapping[str, str], accept: str) -> Answer:
        body, content_type = self._metrics.exposition(accept)
        return 200, content_type, body

    def _health(self, _: Mapping[str, str], __: str) -> Answer:
        if self._sight.is_alive():
            return 200, _TEXT, b"alive\n"
        return 503, _TEXT, b"the event loop is stuck: timeouts are not enforced\n"

    def _readiness(self, _: Mapping[str, str], __: str) -> Answer:
        unready = self._sight.unready()
        return (503, _TEXT, f"{unready}\n".encode()) if unready else (200, _TEXT, b"ready\n")


class _HTTP(HTTPFactory):
    """Twisted's HTTP without an access log: scrapes are frequent, and their text is untrusted."""

    noisy = False

    def __init__(self, site: StatusSite, reactor: Any) -> None:
        super().__init__(timeout=_IDLE, reactor=reactor)
        self._site = site

    def startFactory(self) -> None:
        pass

    def stopFactory(self) -> None:
        pass

    def log(self, request: Request) -> None:
        pass

    def buildProtocol(self, addr: IAddress | None) -> Any:
        channel: Any = super().buildProtocol(addr)
        site = self._site
        channel.requestFactory = lambda *arguments, **keywords: _Request(site, *arguments, **keywords)
        return channel


class _Bounded(ProtocolWrapper):
    """A connection with a limited lifetime, however slowly requests arrive or answers are read."""

    def __init__(self, factory: StatusSite, wrapped: Any, reactor: Any) -> None:
        super().__init__(factory, wrapped)  # type: ignore[arg-type]  # the two name each other
        self._reactor = reactor
        self._end: IDelayedCall | None = None

    def connectionMade(self) -> None:
        self._end = self._reactor.callLater(_LIFETIME, self.abortConnection)
        super().connectionMade()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._end is not None and self._end.active():
            self._end.cancel()
        super().connectionLost(reason)


class _Request(Request):
    """One request; its body is dropped."""

    def __init__(self, site: StatusSite, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._site = site

    def gotLength(self, length: int | None) -> None:
        del length
        self.content = BytesIO()

    def handleContentChunk(self, data: bytes) -> None:
        pass

    def process(self) -> None:
        hosts = self.requestHeaders.getRawHeaders("host")
        status, content_type, body = self._site.answer(
            self.method.decode("latin-1"),
            self.uri.decode("latin-1"),
            # HTTP/1.0 health checkers send none; browsers always do.
            ",".join(hosts) if hosts else None,
            ",".join(self.requestHeaders.getRawHeaders("accept") or []),
        )
        self.setResponseCode(status)
        for name, value in _HEADERS.items():
            self.setHeader(name, value)
        if status == 405:
            self.setHeader("Allow", "GET, HEAD")
        elif status == 429:
            self.setHeader("Retry-After", "1")
        self.setHeader("Content-Type", content_type)
        self.setHeader("Content-Length", str(len(body)))
        # One answer per connection: connections are few, and an idle one would block others.
        self.channel.persistent = False
        if self.method != b"HEAD":
            self.write(body)
        self.finish()


def _is_this_machine(host: str) -> bool:
    """Return whether a Host header names this machine's loopback, with or without a port (RFC 9110 §7.2)."""
    name = host.lower()
    name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
    if name.removesuffix(".") == "localhost" or name.removesuffix(".").endswith(".localhost"):
        return True  # RFC 6761 §6.3
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
