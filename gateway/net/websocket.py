"""WebSocket, client side, without I/O (RFC 6455): the opening handshake and frames.

In: bytes from the server; payloads to send.  Out: bytes for the server; payloads received; `WebSocketError`.

Only what MQTT needs (MQTT 5.0 §6): binary frames, whose borders mean nothing to MQTT, so payloads pass as they come and
no message is assembled; no extensions.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Sequence

import h11
from attrs import field, frozen

from gateway.errors import GatewayError
from gateway.net import http
from gateway.text import printable

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3
_SUBPROTOCOL = b"mqtt"
# Bytes of the head of the server's answer.
_LARGEST_HEAD = 16_384
# As in gateway/dial/tunnel.py: each costs time, and none ends the wait.
_MOST_INTERIM_ANSWERS = 10
_SHOWN = 200

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_FIN, _RESERVED, _OPCODE, _MASKED, _LENGTH = 0x80, 0x70, 0x0F, 0x80, 0x7F
# Frames, or parts of them, taken at a time, some 1 µs each.
_MOST_AT_ONCE = 1_000
_WHOLE = _FIN | _BINARY
_LARGEST_CONTROL = 125  # RFC 6455 §5.5
_NORMAL_CLOSURE, _PROTOCOL_ERROR, _UNSUPPORTED_DATA, _NO_STATUS, _INVALID_DATA = 1000, 1002, 1003, 1005, 1007
# IANA's registry "WebSocket Close Code Number", without those that no Close may have.
_STATUS_CODES = frozenset({*range(1000, 1004), *range(1007, 1015)})


class WebSocketError(GatewayError):
    """The server does not speak WebSocket as it should; `code` is the status code to close with (RFC 6455 §7.4)."""

    def __init__(self, message: str, code: int = _PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


class WebSocketRefused(WebSocketError):
    """The server answered the opening handshake with something else than 101."""


@frozen
class Request:
    """What the opening handshake asks for.  `target` and `headers` may be secret, so `repr()` shows neither.

    `authority` is the host, with the port if it is not 443; `target` begins with "/".
    """

    authority: str
    target: str = field(repr=False)
    headers: Sequence[tuple[str, str]] = field(default=(), repr=False)


class OpeningHandshake:
    """The HTTP exchange that opens a WebSocket (RFC 6455 §4.1)."""

    def __init__(self, request: Request, random: Callable[[int], bytes] = os.urandom) -> None:
        """`random` returns that many random bytes."""
        self._request = request
        self._key = base64.b64encode(random(16))
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LARGEST_HEAD)
        self._interim_answers = 0
        self._first = b""

    def start(self) -> bytes:
        """Return the request."""
        headers = [
            ("Host", self._request.authority),
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Key", self._key.decode()),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Protocol", _SUBPROTOCOL.decode()),
            *self._request.headers,
        ]
        request = h11.Request(method="GET", target=self._request.target, headers=headers)
        return (self._connection.send(request) or b"") + (self._connection.send(h11.EndOfMessage()) or b"")

    def receive(self, data: bytes) -> bytes | None:
        """Take bytes; return those behind the answer once the WebSocket is open, `None` before.

        Raises `WebSocketError`.
        """
        self._first += data[: http.LONGEST - len(self._first)]
        if not http.may_be_http(self._first):
            raise WebSocketRefused("no valid HTTP answer: the broker speaks another protocol")
        try:
            self._connection.receive_data(data)
            while True:
                event = self._connection.next_event()
                if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                    self._check(event)
                    rest, _ = self._connection.trailing_data
                    return rest
                if isinstance(event, h11.Response):
                    said = f"{event.status_code} {event.reason.decode('latin-1')}".strip()
                    raise WebSocketRefused(f"the broker answered {printable(said, _SHOWN)}")
                if not isinstance(event, h11.InformationalResponse):
                    return None
                self._interim_answers += 1
                if self._interim_answers > _MOST_INTERIM_ANSWERS:
                    raise WebSocketRefused("the broker sends interim answers without end")
        except h11.RemoteProtocolError as error:
            raise WebSocketRefused(f"no valid HTTP answer ({printable(str(error), _SHOWN)})") from None

    def _check(self, answer: h11.InformationalResponse) -> None:
        fields: dict[bytes, list[bytes]] = {}
        for name, value in answer.headers:
            fields.setdefault(name.lower(), []).append(value.strip())
        tokens = {token.strip().lower() for value in fields.get(b"connection", []) for token in value.split(b",")}
        # SHA-1 here proves that the server read the key, and nothing else.
        expected = base64.b64encode(hashlib.sha1(self._key + _GUID, usedforsecurity=False).digest())
        if [value.lower() for value in fields.get(b"upgrade", [])] != [b"websocket"] or b"upgrade" not in tokens:
            raise WebSocketRefused("the broker answered 101, but not for WebSocket")
        if fields.get(b"sec-websocket-accept") != [expected]:
            raise WebSocketRefused("the broker's Sec-WebSocket-Accept does not match the key")
        if b"sec-websocket-extensions" in fields:
            raise WebSocketRefused("the broker chose an extension that was not offered")
        if fields.get(b"sec-websocket-protocol") != [_SUBPROTOCOL]:
            raise WebSocketRefused("the broker did not choose the subprotocol mqtt: check the path")


def binary_frame(payload: bytes, random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Return `payload` as one masked binary frame; `random` returns that many random bytes."""
    return _frame(_BINARY, payload, random)


def ping_frame(random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Return a Ping without payload."""
    return _frame(_PING, b"", random)


def close_frame(code: int = _NORMAL_CLOSURE, random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Return a Close with a status code."""
    return _frame(_CLOSE, code.to_bytes(2, "big"), random)


def _frame(opcode: int, payload: bytes, random: Callable[[int], bytes]) -> bytes:
    size = len(payload)
    if size < 126:
        head = bytes((_FIN | opcode, _MASKED | size))
    elif size < 0x10000:
        head = bytes((_FIN | opcode, _MASKED | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((_FIN | opcode, _MASKED | 127)) + size.to_bytes(8, "big")
    mask = random(4)
    # As one long number: Python has no quicker way to XOR bytes.
    masks = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    masked = (int.from_bytes(payload, "big") ^ masks).to_bytes(size, "big")
    return head + mask + masked


class FrameReader:
    """Takes frames apart, cut anywhere, so many at a time: while it is `behind`, `feed(b"")` goes on.

    `closed` is the status code of the server's Close, 1005 if it has none (RFC 6455 §7.1.5), `None` before.  `pinged`
    is the payload of the last Ping that has no Pong yet, or `None`; earlier ones need none (§5.5.3).
    """

    __slots__ = ("_control", "_fragmented", "_head", "_left", "_opcode", "_waiting", "closed", "pinged")

    def __init__(self) -> None:
        self._head = b""
        # Of the frame whose payload is being read: what it is, and how many bytes are missing.
        self._opcode = _BINARY
        self._left = 0
        self._control = b""
        self._fragmented = False
        # What is put off.
        self._waiting = b""
        self.pinged: bytes | None = None
        self.closed: int | None = None

    @property
    def behind(self) -> bool:
        """Whether bytes that were fed wait for the next `feed`, which may be of none."""
        return bool(self._waiting)

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return the application's.  Raises `WebSocketError`.  What follows a Close is dropped."""
        found: list[bytes] = []
        if self._waiting:
            data, self._waiting = self._waiting + data, b""
        steps = 0
        position, size = 0, len(data)
        while position < size and self.closed is None:
            if steps == _MOST_AT_ONCE:
                self._waiting = data[position:]
                break
            steps += 1
            if self._left:
                part = data[position : position + self._left]
                position += len(part)
                self._left -= len(part)
                self._take(part, found)
                continue
            # Most frames are whole messages of less than 126 bytes, one behind the other.
            if data[position] == _WHOLE and not (self._head or self._fragmented) and position + 2 <= size:
                end = position + 2 + data[position + 1]
                if position + 2 < end <= size and data[position + 1] < 126:
                    found.append(data[position + 2 : end])
                    position = end
                    continue
            position = self._read_head(data, position)
        return found[0] if len(found) == 1 else b"".join(found)

    def _take(self, part: bytes, found: list[bytes]) -> None:
        if self._opcode < _CLOSE:
            found.append(part)
            return
        self._control += part
        if not self._left:
            self._end_control()

    def _read_head(self, data: bytes, position: int) -> int:
        """Read a frame's head, or as much of it as there is; return where its payload begins."""
        head = self._head
        wanted = 2
        while True:
            # More than this step wants may be there from before.
            part = data[position : position + max(0, wanted - len(head))]
            head += part
            position += len(part)
            if len(head) < wanted:
                self._head = head
                return position
            length = head[1] & _LENGTH
            total = 2 if length < 126 else 4 if length == 126 else 10
            if wanted == total:
                break
            self._check_head(head)
            wanted = total
        self._head = b""
        self._check_head(head)
        self._opcode = head[0] & _OPCODE
        self._left = length if length < 126 else int.from_bytes(head[2:], "big")
        if self._left >> 63:
            raise WebSocketError("a frame's length is out of range")
        if self._opcode < _CLOSE:
            self._fragmented = not head[0] & _FIN
        else:
            self._control = b""
            if not self._left:
                self._end_control()
        return position

    def _check_head(self, head: bytes) -> None:
        first, second = head[0], head[1]
        opcode = first & _OPCODE
        if first & _RESERVED:
            raise WebSocketError("a reserved bit is set, although no extension was agreed")
        if second & _MASKED:
            raise WebSocketError("a frame from the server is masked")
        if opcode == _TEXT:
            raise WebSocketError("a text frame; MQTT uses binary frames", _UNSUPPORTED_DATA)
        if opcode not in (_CONTINUATION, _BINARY, _CLOSE, _PING, _PONG):
            raise WebSocketError(f"a frame has the unknown opcode {opcode}")
        if opcode >= _CLOSE and (not first & _FIN or second & _LENGTH > _LARGEST_CONTROL):
            raise WebSocketError("a control frame is fragmented or too long")
        if opcode == _CONTINUATION and not self._fragmented:
            raise WebSocketError("a continuation frame continues nothing")
        if opcode == _BINARY and self._fragmented:
            raise WebSocketError("a message begins within another")

    def _end_control(self) -> None:
        payload, self._control = self._control, b""
        if self._opcode == _PING:
            self.pinged = payload
        elif self._opcode == _CLOSE:
            self.closed = _status_code(payload)


def _status_code(payload: bytes) -> int:
    """Return the status code of a Close, 1005 for none (RFC 6455 §7.1.5).  Raises `WebSocketError`."""
    if not payload:
        return _NO_STATUS
    if len(payload) == 1:
        raise WebSocketError("a Close has half a status code")
    code = int.from_bytes(payload[:2], "big")
    # Others are reserved, or are not for the wire (§7.4.1, §7.4.2).
    if not (code in _STATUS_CODES or 3000 <= code < 5000):
        raise WebSocketError(f"a Close has the invalid status code {code}")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        raise WebSocketError("the reason in a Close is not UTF-8", _INVALID_DATA) from None
    return code


def pong_frame(payload: bytes, random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Return the Pong that answers a Ping with `payload`."""
    return _frame(_PONG, payload, random)


def parse_request_lines(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Read `Name: value` lines, and lines that begin with "?" and add to the query.

    Returns the query without its "?", and the headers.  Raises ValueError, which shows none of the text.
    """
    queries: list[str] = []
    headers: list[tuple[str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped:
            continue
        if stripped.startswith("?"):
            query = stripped[1:]
            if not query.isascii() or not query.isprintable() or " " in query or "#" in query:
                raise ValueError(f"line {number}: the query has characters that must be percent-encoded")
            queries.append(query)
            continue
        name, colon, value = stripped.partition(":")
        token = name.replace("-", "").replace("_", "")
        if not colon or not token.isascii() or not token.isalnum():
            raise ValueError(f"line {number}: neither `Name: value` nor a query that begins with ?")
        if not value.isascii() or not value.strip().isprintable():
            raise ValueError(f"line {number}: the value has characters that HTTP does not allow")
        if name.lower() in _OWN_HEADERS:
            raise ValueError(f"line {number}: the gateway sets this field itself")
        headers.append((name, value.strip()))
    return "&".join(queries), headers


_OWN_HEADERS = frozenset(
    {
        "connection",
        "content-length",
        "host",
        "sec-websocket-extensions",
        "sec-websocket-key",
        "sec-websocket-protocol",
        "sec-websocket-version",
        "transfer-encoding",
        "upgrade",
    }
)
