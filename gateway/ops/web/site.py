"""The HTTP server of the status endpoint: the page, /status, /metrics, /healthz, /readyz.

In: requests.  Out: answers made from `Sight`.  Nothing can be changed here, so only GET and HEAD are accepted, and
bodies are not read.

The relay runs in the same process.  So connections are few, short and paced; a request must come in a few pieces; and
the answers that cost something are made one at a time, a piece per turn of the event loop (`_Making`), and may take a
small share of its time (`_Budget`).  An error in an answer must not spread.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl, unquote

import h11
from attrs import Factory, define, frozen
from twisted.internet import protocol
from twisted.internet.interfaces import IAddress, IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from gateway.net.network import shown_address
from gateway.ops.metrics import Metrics
from gateway.ops.sight import Query, Sight
from gateway.ops.web.guard import Access, Guard
from gateway.ops.web.page import CONTENT_SECURITY_POLICY, page
from gateway.ops.web.tls import ServerSide
from gateway.pieces import Pieces

_log = Logger(namespace="gateway")

_MOST_CONNECTIONS = 32
_LIFETIME = 15.0  # seconds that a connection may last
_LONGEST_HEAD = 8192  # bytes of request line and headers
_LONGEST_PATH = 2048  # bytes, query included
_MOST_ARGUMENTS = 16
# A request comes in one or two reads.  Each read costs a turn of the event loop, however short it is.
_MOST_READS = 64
_MOST_ENCRYPTED_READS = 2 * _MOST_READS
# What comes after the request is read and dropped for a while, because a close with unread data destroys the answer.
_MOST_READS_AFTER = 8
# New connections per second, and the burst.  Beyond that they wait in the kernel.
_RATE = 20.0
_BURST = 40.0
# The same with TLS: a handshake takes a millisecond or more of the event loop's time.
_TLS_RATE = 5.0
_TLS_BURST = 5.0
# The share of the event loop's time that page, /status and /metrics may take, and the seconds that they may take at
# once.  Less than a hundredth, so that it does not show in the 99th percentile of the relay's delay.
_SHARE = 0.005
_AT_ONCE = 0.02
# An answer may be repeated for so many seconds instead of made again; this many are kept.
_REPEATABLE_FOR = 10.0
_MOST_KEPT = 8
# Pieces of JSON, of a few characters each, that are encoded in one turn.
_ENCODED_AT_A_TIME = 2000

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
_ABSOLUTE = re.compile("https?://(?P<authority>[^/?#]*)", re.IGNORECASE)

Answer = tuple[int, str, bytes]
Done = Callable[[Answer], None]


class StatusSite(protocol.ServerFactory):
    """The factory of status connections.

    `any_host` leaves the Host header unchecked.  `guard` asks for a password, except for health checks.  `port` is the
    listening port, once there is one; it is paused while connections come too fast.  `tls` makes the server's side of
    TLS; without it, connections are plain.
    """

    noisy = False

    def __init__(self, sight: Sight, reactor: Any, guard: Guard) -> None:
        """Take a reactor that provides IReactorTime."""
        self._sight = sight
        self.guard = guard
        # Who waits for the password to be checked.
        self._checking: set[Done] = set()
        self._metrics = Metrics(sight)
        self._reactor = reactor
        self.any_host = False
        self.tls: ServerSide | None = None
        self.port: Any = None
        # The oldest first.
        self.protocols: dict[_Connection, None] = {}
        self._tokens = _BURST
        self._tokens_at = reactor.seconds()
        self._resume: IDelayedCall | None = None
        self._making = _Making(reactor, _Budget(reactor.seconds))
        self._answers: Mapping[str, Callable[[Mapping[str, str], str], Pieces[Answer]]] = {
            "/": self._page,
            "/status": self._status,
            "/metrics": self._expose,
        }
        self._cheap: Mapping[str, Callable[[], Answer]] = {
            "/healthz": self._health,
            "/readyz": self._readiness,
        }

    def buildProtocol(self, addr: IAddress | None) -> protocol.Protocol | None:
        """Accept a connection, in place of another if there are too many; stop for a while if they come too fast."""
        del addr
        now = self._reactor.seconds()
        rate, burst = (_RATE, _BURST) if self.tls is None else (_TLS_RATE, _TLS_BURST)
        self._tokens = min(burst, self._tokens + (now - self._tokens_at) * rate) - 1
        self._tokens_at = now
        if self._tokens < 1 and self.port is not None and self._resume is None:
            self.port.stopReading()
            self._resume = self._reactor.callLater((2 - self._tokens) / rate, self._accept_again)
        if len(self.protocols) >= _MOST_CONNECTIONS:
            self._make_room()
        connection = _Connection(self, self._reactor, is_plain=self.tls is None)
        if self.tls is None:
            return connection
        wrapping: Any = TLSMemoryBIOFactory(self.tls, isClient=False, wrappedFactory=self)
        return _Encrypted(wrapping, connection)

    def _make_room(self) -> None:
        """Close the connection that has had the most time for its request: a health check must get an answer."""
        oldest = next((each for each in self.protocols if not each.has_asked), next(iter(self.protocols)))
        del self.protocols[oldest]
        oldest.abort()

    def _accept_again(self) -> None:
        self._resume = None
        if self.port is not None:
            self.port.startReading()

    def end(self) -> None:
        """Close all connections, and accept no more."""
        self.port = None
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        for connection in list(self.protocols):
            connection.abort()
        self._making.end()

    def answer(self, method: str, uri: str, fields: Mapping[bytes, Sequence[str]], address: str, done: Done) -> None:
        """Answer a request, now or in a later turn; an error is answered with 500.

        `fields` are the header fields Host, Accept and Authorization, by name in lower case; `address` is the client's.
        """
        try:
            answer = self._answer(method, uri, fields, address, done)
        except Exception:  # noqa: BLE001  an error in an answer must not reach the relay
            answer = _failed()
        if answer is not None:
            done(answer)

    def forget(self, done: Done) -> None:
        """Whoever asked has left."""
        self._checking.discard(done)
        self._making.forget(done)

    def _answer(
        self, method: str, uri: str, fields: Mapping[bytes, Sequence[str]], address: str, done: Done
    ) -> Answer | None:
        # HTTP/1.0 health checkers send none; browsers always do.
        host = ",".join(fields[b"host"]) if fields[b"host"] else None
        accept = ",".join(fields[b"accept"])
        if (absolute := _ABSOLUTE.match(uri)) is not None:
            # As a client sends it to a proxy; the Host header must then be ignored (RFC 9112 §3.2.2).
            host = absolute["authority"].rpartition("@")[2]
            path = uri[absolute.end() :]
            uri = path if path.startswith("/") else f"/{path}"
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
        path = unquote(path)
        cheap = self._cheap.get(path)
        if cheap is not None:
            return cheap()
        answer = self._answers.get(path)
        if answer is None:
            return 404, _TEXT, b"Not found. Available: /, /status, /metrics, /healthz, /readyz.\n"
        try:
            arguments = dict(parse_qsl(query, max_num_fields=_MOST_ARGUMENTS))
        except ValueError:
            return 400, _TEXT, b"Too many arguments.\n"
        ask = partial(self._making.ask, (uri, accept), partial(answer, arguments, accept), done)
        self._checking.add(done)
        self.guard.judge(",".join(fields[b"authorization"]), address, partial(self._judged, ask, done))
        return None

    def _judged(self, ask: Callable[[], None], done: Done, access: Access) -> None:
        """Go on with a request, unless whoever asked has left."""
        if done not in self._checking:
            return
        self._checking.discard(done)
        if access is Access.GRANTED:
            ask()
        else:
            done(_NO_PASSWORD if access is Access.DENIED else _BUSY)

    # ---- the answers

    def _page(self, arguments: Mapping[str, str], _: str) -> Pieces[Answer]:
        document = yield from self._sight.document(Query.of(arguments))
        yield
        body = yield from page(document)
        return 200, "text/html; charset=utf-8", body

    def _status(self, arguments: Mapping[str, str], _: str) -> Pieces[Answer]:
        document = yield from self._sight.document(Query.of(arguments))
        yield
        encoded, parts = json.JSONEncoder(indent=1).iterencode(document), []
        while some := "".join(islice(encoded, _ENCODED_AT_A_TIME)):
            parts.append(some)
            yield
        return 200, "application/json", "".join(parts).encode("ascii") + b"\n"

    def _expose(self, _: Mapping[str, str], accept: str) -> Pieces[Answer]:
        body, content_type = yield from self._metrics.exposition(accept)
        return 200, content_type, body

    def _health(self) -> Answer:
        if self._sight.is_alive():
            return 200, _TEXT, b"alive\n"
        return 503, _TEXT, b"the event loop is stuck: timeouts are not enforced\n"

    def _readiness(self) -> Answer:
        unready = self._sight.unready()
        if self.guard.asks:
            # Health checkers have no password, and nobody without one is told which brokers there are.
            unready = unready.partition(":")[0]
        return (503, _TEXT, f"{unready}\n".encode()) if unready else (200, _TEXT, b"ready\n")


_NO_PASSWORD: Answer = (401, _TEXT, b"The password is missing or wrong.\n")
_BUSY: Answer = (429, _TEXT, b"Too many requests: retry in a few seconds.\n")


def _failed() -> Answer:
    """Log the exception that is being handled."""
    _log.failure("internal error in the status page")
    return 500, _TEXT, b"Internal error; see the gateway's log.\n"


@define(eq=False)
class _Request:
    """What is to be made, as far as it has been made, and who waits for it."""

    make: Callable[[], Pieces[Answer]]
    waiting: list[Done] = Factory(list)
    pieces: Pieces[Answer] | None = None


class _Making:
    """Makes one answer at a time, a piece per turn of the event loop; equal requests share an answer."""

    def __init__(self, reactor: Any, budget: _Budget) -> None:
        self._reactor = reactor
        self._budget = budget
        # The first one is being made.
        self._requests: OrderedDict[object, _Request] = OrderedDict()
        self._turn: IDelayedCall | None = None

    def ask(self, key: object, make: Callable[[], Pieces[Answer]], done: Done) -> None:
        """Give `done` the answer that `make` makes, or one for the same `key` that is being made already."""
        request = self._requests.setdefault(key, _Request(make))
        request.waiting.append(done)
        if self._turn is None:
            self._go_on()

    def forget(self, done: Done) -> None:
        """Nobody waits for this any more; what nobody waits for is not made."""
        for key, request in list(self._requests.items()):
            if done in request.waiting:
                request.waiting.remove(done)
                if not request.waiting:
                    self._drop(key)
        if not self._requests:
            self.end()

    def end(self) -> None:
        """Make nothing more."""
        for key in list(self._requests):
            self._drop(key)
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    def _drop(self, key: object) -> _Request:
        request = self._requests.pop(key)
        if request.pieces is not None:
            request.pieces.close()
        return request

    def _go_on(self) -> None:
        """Do one piece."""
        self._turn = None
        key, request = next(iter(self._requests.items()))
        answer = self._next(key, request)
        if answer is not None:
            for done in self._drop(key).waiting:
                done(answer)
        if self._requests and self._turn is None:
            self._turn = self._reactor.callLater(0, self._go_on)

    def _next(self, key: object, request: _Request) -> Answer | None:
        """Return the answer if that was the last piece."""
        if request.pieces is None and not self._budget.allows():
            return self._budget.kept(key) or _BUSY
        began = time.thread_time()
        try:
            if request.pieces is None:
                request.pieces = request.make()
            next(request.pieces)
        except StopIteration as stop:
            answer: Answer = stop.value
            self._budget.keep(key, answer)
            return answer
        except Exception:  # noqa: BLE001  an error in an answer must not reach the relay
            return _failed()
        finally:
            self._budget.spend(time.thread_time() - began)
        return None


@frozen
class _Kept:
    """An answer, and when it was made."""

    answer: Answer
    made: float


class _Budget:
    """Limits the time that answers take: a share of all time.  Beyond it, they are repeated, or there is none."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._left = _AT_ONCE
        self._since = seconds()
        self._kept: OrderedDict[object, _Kept] = OrderedDict()

    def allows(self) -> bool:
        """Whether another answer may be made now."""
        now = self._seconds()
        self._left = min(_AT_ONCE, self._left + (now - self._since) * _SHARE)
        self._since = now
        return self._left > 0

    def spend(self, seconds: float) -> None:
        """Count the time that a piece of an answer took."""
        self._left -= seconds

    def keep(self, key: object, answer: Answer) -> None:
        """Keep an answer for a while, to be repeated."""
        self._kept[key] = _Kept(answer, self._seconds())
        self._kept.move_to_end(key)
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)

    def kept(self, key: object) -> Answer | None:
        """Return what was made for the same `key` a moment ago, if anything was."""
        kept = self._kept.get(key)
        return kept.answer if kept is not None and self._seconds() - kept.made <= _REPEATABLE_FOR else None


class _Encrypted(TLSMemoryBIOProtocol):
    """The TLS around a connection; a handshake, too, must come in a few reads."""

    _reads = 0

    def dataReceived(self, data: bytes) -> None:
        self._reads += 1
        if self._reads > _MOST_ENCRYPTED_READS:
            self.abortConnection()
        else:
            super().dataReceived(data)


class _Connection(protocol.Protocol):
    """One connection: one request, one answer, and the end."""

    def __init__(self, site: StatusSite, reactor: Any, *, is_plain: bool) -> None:
        self._site = site
        self._reactor = reactor
        self._is_plain = is_plain
        self._request = h11.Connection(h11.SERVER, max_incomplete_event_size=_LONGEST_HEAD)
        self._reads = 0
        self._answered = False
        self._done: Done | None = None
        self._end: IDelayedCall | None = None

    @property
    def has_asked(self) -> bool:
        """Whether the request has come."""
        return self._answered or self._done is not None

    def connectionMade(self) -> None:
        self._site.protocols[self] = None
        self._end = self._reactor.callLater(_LIFETIME, self._expire)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        del reason
        self._site.protocols.pop(self, None)
        if self._done is not None:
            self._site.forget(self._done)
            self._done = None
        if self._end is not None and self._end.active():
            self._end.cancel()

    def _expire(self) -> None:
        # In the next turn, since this process may not have run for a while: what has arrived is read and answered.
        self._end = self._reactor.callLater(0, self.abort)

    def abort(self) -> None:
        """Close at once."""
        transport: Any = self.transport
        transport.abortConnection()

    def dataReceived(self, data: bytes) -> None:
        self._reads += 1
        if self._reads > _MOST_READS:
            self.abort()
            return
        if self.has_asked:
            return
        try:
            self._request.receive_data(data)
            event = self._request.next_event()
        except h11.RemoteProtocolError as error:
            self._respond(b"GET", (error.error_status_hint, _TEXT, b"This is not an HTTP request.\n"))
            return
        if isinstance(event, h11.Request):
            fields = {b"host": [], b"accept": [], b"authorization": []}  # type: dict[bytes, list[str]]
            for name, value in event.headers:
                if name in fields:
                    fields[name].append(value.decode("latin-1"))
            self._reads = _MOST_READS - _MOST_READS_AFTER
            self._done = partial(self._respond, event.method)
            transport: Any = self.transport
            self._site.answer(
                event.method.decode("latin-1"),
                event.target.decode("latin-1"),
                fields,
                shown_address(transport.getPeer()),
                self._done,
            )

    def _respond(self, method: bytes, answer: Answer) -> None:
        self._answered = True
        self._done = None
        self._reads = _MOST_READS - _MOST_READS_AFTER
        status, content_type, body = answer
        headers = {**_HEADERS, "Content-Type": content_type, "Content-Length": str(len(body))}
        if status == 405:
            headers["Allow"] = "GET, HEAD"
        elif status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="mqtts-gateway", charset="UTF-8"'
        elif status == 429:
            headers["Retry-After"] = "5"
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        transport: Any = self.transport
        transport.write(head if method == b"HEAD" else head + body)
        # One answer per connection: connections are few, and an idle one would block others.
        if self._is_plain:
            transport.loseWriteConnection()
        else:
            transport.loseConnection()


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
