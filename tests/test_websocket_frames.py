"""WebSocket without I/O, held against wsproto as the server, and against RFC 6455 byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Pong,
    RejectConnection,
)
from wsproto.events import (
    Request as ServerRequest,
)

from gateway.net.websocket import (
    FrameReader,
    OpeningHandshake,
    Request,
    WebSocketError,
    WebSocketRefused,
    binary_frame,
    close_frame,
    parse_request_lines,
    ping_frame,
    pong_frame,
)
from tests.mqtt_packets import fed

REQUEST = Request("broker.example", "/mqtt?a=b", (("X-Token", "t"),))
CUTS = pytest.mark.parametrize("at_a_time", [1, 2, 7, 1_000_000])
GOOD = {
    "Upgrade": "websocket",
    "Connection": "keep-alive, Upgrade",
    "Sec-WebSocket-Accept": "ICX+Yqv66kxgM0FcWaLWlFLwTAI=",  # to sixteen zero bytes
    "Sec-WebSocket-Protocol": "mqtt",
}


def opened() -> WSConnection:
    """Return a server with which a handshake has been done."""
    handshake = OpeningHandshake(REQUEST)
    server = WSConnection(ConnectionType.SERVER)
    server.receive_data(handshake.start())
    (request,) = server.events()
    assert isinstance(request, ServerRequest)
    assert (request.target, request.host, request.subprotocols) == ("/mqtt?a=b", "broker.example", ["mqtt"])
    assert (b"x-token", b"t") in request.extra_headers
    assert not request.extensions
    answer = server.send(AcceptConnection(subprotocol="mqtt"))
    assert handshake.receive(answer[:20]) is None
    assert handshake.receive(answer[20:] + b"\x82\x01x") == b"\x82\x01x"
    return server


def answer(status: str = "101 Switching Protocols", **changed: str | None) -> bytes:
    """Return a server's answer in which some fields are others; `_` stands for `-`."""
    fields = dict(GOOD) | {name.replace("_", "-"): value for name, value in changed.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def answered(data: bytes) -> bytes | None:
    """Return what becomes of an answer to a handshake whose key is known."""
    handshake = OpeningHandshake(REQUEST, bytes)
    handshake.start()
    return handshake.receive(data)


@CUTS
def test_interim_answers_come_to_an_end(at_a_time: int) -> None:
    """A few are ordinary; each costs time, and a read holds thousands."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answered(interim * 10 + answer()) == b""
    handshake = OpeningHandshake(REQUEST, bytes)
    handshake.start()
    data = interim * 11

    def receive() -> None:
        for start in range(0, len(data), at_a_time):
            handshake.receive(data[start : start + at_a_time])

    with pytest.raises(WebSocketRefused, match="interim"):
        receive()


def test_the_opening_handshake_is_the_standards() -> None:
    """Wsproto's server accepts it, and frames go both ways."""
    server = opened()
    server.receive_data(binary_frame(b"from the gateway") + ping_frame() + close_frame())
    events = list(server.events())
    assert isinstance(events[0], BytesMessage)
    assert bytes(events[0].data) == b"from the gateway"
    assert isinstance(events[1], Ping)
    assert isinstance(events[2], CloseConnection)
    assert events[2].code == 1000


def test_a_good_answer_opens_it() -> None:
    """What the refusals below change one thing of."""
    assert answered(answer()) == b""
    assert answered(b"HTTP/1.1 100 Continue\r\n\r\n" + answer()) == b""


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (answer("404 Not Found"), "404 Not Found"),
        (answer("200 OK"), "200"),
        (answer("403 \x1b[2J"), "403"),
        (answer(Upgrade="h2c"), "not for WebSocket"),
        (answer(Upgrade=None), "not for WebSocket"),
        (answer(Connection="close"), "not for WebSocket"),
        (answer(Sec_WebSocket_Accept="AAAA"), "Accept"),
        (answer(Sec_WebSocket_Accept=None), "Accept"),
        (answer(Sec_WebSocket_Protocol=None), "mqtt"),
        (answer(Sec_WebSocket_Protocol="mqttv3.1"), "mqtt"),
        (answer(Sec_WebSocket_Extensions="permessage-deflate"), "extension"),
        (b"\x20\x02\x00\x00" + b"\r\n\r\n", "HTTP"),
        (b"HTTP/1.1 101 x\r\nX: " + b"a" * 100_000, "HTTP"),
    ],
)
def test_other_answers_are_refused(data: bytes, named: str) -> None:
    """With what was wrong, in characters that print."""
    with pytest.raises(WebSocketRefused, match=named) as caught:
        answered(data)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("first", [b"\x20", b"S", b"\x15", b"HTTP:"])
def test_another_protocol_is_told_by_its_first_bytes(first: bytes) -> None:
    """The server may wait for more, as one that speaks MQTT would after a CONNACK of four bytes."""
    with pytest.raises(WebSocketRefused, match="another protocol"):
        answered(first)


def test_wsprotos_refusal_is_one() -> None:
    """With the status."""
    handshake = OpeningHandshake(REQUEST)
    server = WSConnection(ConnectionType.SERVER)
    server.receive_data(handshake.start())
    with pytest.raises(WebSocketRefused, match="401"):
        handshake.receive(server.send(RejectConnection(status_code=401)))


def test_a_secret_target_is_not_shown() -> None:
    """Nor are headers."""
    assert "a=b" not in repr(REQUEST)
    assert "X-Token" not in repr(REQUEST)


@given(st.lists(st.binary(max_size=70_000), max_size=4), st.integers(1, 5000))
def test_what_the_server_sends_arrives_whatever_the_cuts(payloads: list[bytes], at_a_time: int) -> None:
    """Whole messages and fragments of wsproto's."""
    server = opened()
    wire = b""
    for index, payload in enumerate(payloads):
        wire += server.send(BytesMessage(payload, message_finished=index % 2 == 1))
    reader = FrameReader()
    found = b"".join(reader.feed(wire[start : start + at_a_time]) for start in range(0, len(wire), at_a_time))
    assert found == b"".join(payloads)


@given(st.binary(max_size=70_000))
def test_what_is_sent_arrives(payload: bytes) -> None:
    """Masked, with a length of each size."""
    server = opened()
    server.receive_data(binary_frame(payload))
    assert b"".join(bytes(event.data) for event in server.events()) == payload  # type: ignore[attr-defined]


def test_the_mask_is_random() -> None:
    """RFC 6455 §5.3: unpredictable, and new for each frame."""
    assert binary_frame(bytes(16)) != binary_frame(bytes(16))
    assert binary_frame(b"\x01\x02\x03\x04\x05", lambda _: b"\xff\x00\xff\x00")[2:] == (
        b"\xff\x00\xff\x00" + b"\xfe\x02\xfc\x04\xfa"
    )


@CUTS
def test_control_frames_come_between_fragments(at_a_time: int) -> None:
    """RFC 6455 §5.4; a Ping is answered with its payload, a Pong needs nothing."""
    wire = b"\x02\x02ab" + b"\x89\x03png" + b"\x80\x01c" + b"\x8a\x00" + b"\x89\x00" + b"\x82\x00" + b"\x82\x01d"
    reader = FrameReader()
    found = b"".join(reader.feed(wire[start : start + at_a_time]) for start in range(0, len(wire), at_a_time))
    assert found == b"abcd"
    assert reader.pinged == b""
    server = opened()
    server.receive_data(pong_frame(b"png"))
    (event,) = server.events()
    assert isinstance(event, Pong)
    assert bytes(event.payload) == b"png"


@CUTS
@pytest.mark.parametrize(
    ("wire", "code"), [(b"\x88\x02\x03\xe8", 1000), (b"\x88\x00", 1005), (b"\x88\x06\x03\xe9away", 1001)]
)
def test_a_close_is_the_end(wire: bytes, code: int, at_a_time: int) -> None:
    """What follows is dropped."""
    reader = FrameReader()
    wire = b"\x82\x01a" + wire + b"\x82\x01b\xff\xff"
    found = b"".join(reader.feed(wire[start : start + at_a_time]) for start in range(0, len(wire), at_a_time))
    assert (found, reader.closed) == (b"a", code)


@CUTS
@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (b"\x81\x01a", 1003),  # text
        (b"\xc2\x01a", 1002),  # a reserved bit: compressed
        (b"\x82\x81\x00\x00\x00\x00a", 1002),  # masked
        (b"\x83\x01a", 1002),  # opcode 3
        (b"\x8b\x01a", 1002),  # opcode 11
        (b"\x09\x01a", 1002),  # a Ping in fragments
        (b"\x89\x7e\x00\x7e" + bytes(126), 1002),  # a long Ping
        (b"\x80\x01a", 1002),  # continues nothing
        (b"\x02\x01a\x82\x01b", 1002),  # begins within another
        (b"\x88\x01a", 1002),  # half a status code
        (b"\x82\x7f\x80\x00\x00\x00\x00\x00\x00\x01a", 1002),  # 2**63 bytes and more
    ],
)
def test_broken_frames_are_refused(wire: bytes, code: int, at_a_time: int) -> None:
    """With the status code to close with."""
    reader = FrameReader()
    parts = [wire[start : start + at_a_time] for start in range(0, len(wire), at_a_time)]
    with pytest.raises(WebSocketError) as caught:
        list(map(reader.feed, parts))
    assert caught.value.code == code


def test_small_messages_are_no_flood() -> None:
    """Thousands of acknowledgements, each in a frame of its own."""
    assert fed(FrameReader(), b"\x82\x04\x40\x02\x00\x01" * 20_000) == b"\x40\x02\x00\x01" * 20_000


def test_a_payload_is_not_collected() -> None:
    """What is there of a frame of a gibibyte passes at once."""
    reader = FrameReader()
    assert reader.feed(b"\x82\x7f" + (1 << 30).to_bytes(8, "big") + b"beginning") == b"beginning"
    assert reader.feed(b"more") == b"more"


def test_lines_of_a_request() -> None:
    """Fields and queries, for what is secret."""
    text = "\nX-Amz-CustomAuthorizer-Name: mine\r\n?a=1\n? \nAuthorization:  Bearer x\n?b=%2F\n"
    with pytest.raises(ValueError, match="neither"):
        parse_request_lines("nonsense")
    assert parse_request_lines(text.replace("? \n", "")) == (
        "a=1&b=%2F",
        [("X-Amz-CustomAuthorizer-Name", "mine"), ("Authorization", "Bearer x")],
    )


@pytest.mark.parametrize(
    "line",
    ["Host: hunter2", "Upgrade: y", "A B: hunter2", "A: b\x00hunter2", "?a hunter2", "?a#b", "?ü", ": x", "nonsense"],
)
def test_lines_that_would_break_a_request(line: str) -> None:
    """Nothing of the text is shown, since it may be secret."""
    with pytest.raises(ValueError, match="line 1") as caught:
        parse_request_lines(f"{line}\n")
    assert "hunter2" not in str(caught.value)


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, reserved: int = 0) -> bytes:
    """Return a server's frame."""
    size = len(payload)
    length = (
        bytes((size,)) if size < 126 else b"\x7e" + size.to_bytes(2) if size < 65_536 else b"\x7f" + size.to_bytes(8)
    )
    return bytes((fin << 7 | reserved << 4 | opcode,)) + length + payload


CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
REASON = "Hello-µ@ßöäüàá-UTF-8!!".encode()

# The cases of the Autobahn test suite (its numbers; fuzzing server against a client), as far as they concern MQTT:
# binary messages instead of text. To each, the application's bytes, and how the stream stands after it: `None` (open),
# the status code of an orderly Close, or the code with which the gateway fails the connection, negative.
AUTOBAHN: dict[str, tuple[bytes, bytes, int | None]] = {
    **{f"1.1.{index}": (frame(TEXT, b"*" * size), b"", -1003) for index, size in enumerate((0, 125, 126, 65_536), 1)},
    **{
        f"1.2.{index}": (frame(BINARY, b"\xfe" * size), b"\xfe" * size, None)
        for index, size in enumerate((0, 125, 126, 127, 128, 65_535, 65_536, 65_536), 1)
    },
    **{
        f"2.{index}": (frame(PING, payload), b"", None)
        for index, payload in enumerate((b"", b"Hello, world!", bytes(range(125)), b"\xfe" * 125), 1)
    },
    "2.5": (frame(PING, b"\xfe" * 126), b"", -1002),
    "2.7": (frame(PONG), b"", None),
    "2.8": (frame(PONG, b"unsolicited"), b"", None),
    "2.9": (frame(PONG, b"unsolicited") + frame(PING, b"ping"), b"", None),
    "2.10": (b"".join(frame(PING, b"%d" % index) for index in range(10)), b"", None),
    **{
        f"3.{index}": (frame(BINARY, b"a", reserved=reserved), b"", -1002)
        for index, reserved in enumerate((1, 2, 3, 4), 1)
    },
    "3.5": (frame(BINARY, b"a", reserved=5), b"", -1002),
    "3.6": (frame(PING, b"a", reserved=6), b"", -1002),
    "3.7": (frame(CLOSE, reserved=7), b"", -1002),
    "3.3, behind a message": (frame(BINARY, b"x") + frame(BINARY, b"a", reserved=3), b"x", -1002),
    **{f"4.1.{opcode - 2}": (frame(opcode), b"", -1002) for opcode in range(3, 8)},
    **{f"4.2.{opcode - 10}": (frame(opcode), b"", -1002) for opcode in range(11, 16)},
    "4.2.4, behind a message": (frame(BINARY, b"x") + frame(14) + frame(PING), b"x", -1002),
    "5.1": (frame(PING, b"a", fin=False) + frame(CONTINUATION, b"b"), b"", -1002),
    "5.2": (frame(PONG, b"a", fin=False) + frame(CONTINUATION, b"b"), b"", -1002),
    "5.3": (frame(BINARY, b"a", fin=False) + frame(CONTINUATION, b"b"), b"ab", None),
    "5.6": (frame(BINARY, b"a", fin=False) + frame(PING, b"ping") + frame(CONTINUATION, b"b"), b"ab", None),
    "5.9": (frame(CONTINUATION, b"no message") + frame(BINARY, b"a"), b"", -1002),
    "5.12": (frame(CONTINUATION, b"no message", fin=False) + frame(BINARY, b"a"), b"", -1002),
    "5.15": (
        frame(BINARY, b"a", fin=False) + frame(CONTINUATION, b"b") + frame(CONTINUATION, b"c", fin=False),
        b"ab",
        -1002,
    ),
    "5.16": ((frame(CONTINUATION, b"a", fin=False) + frame(BINARY, b"b", fin=False)) * 2, b"", -1002),
    "5.18": (frame(BINARY, b"a", fin=False) + frame(BINARY, b"b"), b"a", -1002),
    "5.19": (
        b"".join(frame(BINARY if not index else CONTINUATION, b"f%d" % index, fin=False) for index in range(3))
        + frame(PING, b"pongme 1!")
        + b"".join(frame(CONTINUATION, b"f%d" % index, fin=index == 5) for index in range(3, 6)),
        b"f0f1f2f3f4f5",
        None,
    ),
    "7.1.3": (frame(CLOSE) + frame(PING, b"late"), b"", 1005),
    "7.1.4": (frame(CLOSE) + frame(BINARY, b"late"), b"", 1005),
    "7.1.5": (frame(BINARY, b"a", fin=False) + frame(CLOSE) + frame(CONTINUATION, b"late"), b"a", 1005),
    "7.3.1": (frame(CLOSE), b"", 1005),
    "7.3.2": (frame(CLOSE, b"a"), b"", -1002),
    "7.3.3": (frame(CLOSE, b"\x03\xe8"), b"", 1000),
    "7.3.4": (frame(CLOSE, b"\x03\xe8" + REASON), b"", 1000),
    "7.3.5": (frame(CLOSE, b"\x03\xe8" + b"*" * 123), b"", 1000),
    "7.3.6": (frame(CLOSE, b"\x03\xe8" + b"*" * 124), b"", -1002),
    "7.5.1": (
        frame(CLOSE, b"\x03\xe8" + b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited"),
        b"",
        -1007,
    ),
    **{
        f"7.7.{index}": (frame(CLOSE, code.to_bytes(2)), b"", code)
        for index, code in enumerate((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999), 1)
    },
    **{
        f"7.9.{index}": (frame(CLOSE, code.to_bytes(2)), b"", -1002)
        for index, code in enumerate((0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999), 1)
    },
    "7.13.1": (frame(CLOSE, (5000).to_bytes(2)), b"", -1002),
    "7.13.2": (frame(CLOSE, (65_535).to_bytes(2)), b"", -1002),
}


@CUTS
@pytest.mark.parametrize("case", AUTOBAHN)
def test_the_cases_of_the_autobahn_test_suite(case: str, at_a_time: int) -> None:
    """As a client must; text and UTF-8 in messages are not for MQTT, compression is never agreed on."""
    wire, expected, outcome = AUTOBAHN[case]
    if at_a_time < 7 and len(wire) > 10_000:
        at_a_time = 7
    reader, found, failed = FrameReader(), [], None
    try:
        for start in range(0, len(wire), at_a_time):
            found += [reader.feed(wire[start : start + at_a_time])]
    except WebSocketError as error:
        failed = -error.code
    # What comes before a fault in one and the same read may be lost with it: the session ends either way.
    assert b"".join(found) == expected or (failed is not None and expected.startswith(b"".join(found)))
    assert (failed or reader.closed) == outcome


@pytest.mark.parametrize("size", [200, 70_000])
def test_a_head_may_be_cut_anywhere(size: int) -> None:
    """With more than one byte of it in each part."""
    wire = frame(BINARY, b"x" * size) + frame(BINARY, b"ok")
    for cut in range(1, 13):
        for second in (1, 2, 3, 5, 100, len(wire)):
            reader = FrameReader()
            parts = (wire[:cut], wire[cut : cut + second], wire[cut + second :])
            assert b"".join(map(reader.feed, parts)) == b"x" * size + b"ok"
