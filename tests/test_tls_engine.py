"""The two ways to have OpenSSL encrypt and decrypt: the direct one does what the public one does, or is not used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
from OpenSSL import SSL
from OpenSSL._util import ffi, lib
from twisted.logger import capturedLogs

from gateway.tls import direct
from gateway.tls.choice import choose, connected_pair
from gateway.tls.direct import DirectCalls
from gateway.tls.engine import RECORD_SIZE, Engine, MakeEngine, PublicCalls

BOTH = pytest.mark.parametrize("make", [PublicCalls, DirectCalls])
# A record of TLS 1.3 adds 22 bytes; the ciphertext of two of these sizes fills the buffer, or needs one byte more.
EIGHT_RECORDS = 0x20000 - 8 * 22
SIZES = [1, RECORD_SIZE, RECORD_SIZE + 1, EIGHT_RECORDS, EIGHT_RECORDS + 1, 0x20000, 0x20000 + 1, 1_000_000]


@pytest.fixture(autouse=True)
def choice() -> Iterator[None]:
    """Have each test choose anew, and the next file's."""
    choose.cache_clear()
    yield
    choose.cache_clear()


def pair(make: MakeEngine) -> tuple[Engine, Engine, SSL.Connection]:
    """Return an engine, that of its peer, and the peer."""
    client, server = connected_pair()
    return make(client), PublicCalls(server), server


def record_count(size: int) -> int:
    """Return how many records it takes."""
    return -(-size // RECORD_SIZE)


def chosen_with_log() -> tuple[MakeEngine, list[Any]]:
    """Return what is chosen, and what the log says about it."""
    with capturedLogs() as events:
        chosen = choose()
        choose()
    return chosen, [event for event in events if event["log_namespace"] == "gateway"]


def test_openssl_is_called_directly_with_the_pyopenssl_that_is_installed() -> None:
    """A release of pyOpenSSL with which it is not shows here, and not only in the log of an installation."""
    assert chosen_with_log() == (DirectCalls, [])


@pytest.mark.parametrize("size", SIZES)
@BOTH
def test_any_size_passes_both_ways(make: MakeEngine, size: int) -> None:
    """Below, at and above what a record and the buffer hold."""
    calls, peer, _ = pair(make)
    plaintext = bytes(index * 7 % 251 for index in range(size))
    assert peer.decrypt(calls.encrypt(plaintext), record_count(size)) == (plaintext, None)
    assert calls.decrypt(peer.encrypt(plaintext), record_count(size)) == (plaintext, None)
    assert calls.waiting() == b""


@BOTH
def test_connections_that_take_turns_keep_apart(make: MakeEngine) -> None:
    """They share a buffer, and nothing of one shows in what the other returns."""
    ends = [pair(make) for _ in range(3)]
    for size in (5000, 1, 40_000, 100):
        wires = [peer.encrypt(bytes([number]) * size) for number, (_, peer, _) in enumerate(ends)]
        for number, (calls, peer, _) in enumerate(ends):
            assert calls.decrypt(wires[number], record_count(size)) == (bytes([number]) * size, None)
            sent = calls.encrypt(bytes([number + 100]) * size)
            assert peer.decrypt(sent, record_count(size)) == (bytes([number + 100]) * size, None)


@BOTH
def test_threads_keep_apart(make: MakeEngine) -> None:
    """OpenSSL is called without Python's lock: what one thread decrypts must not show in another's."""

    def converse(number: int) -> bool:
        calls, peer, _ = pair(make)
        plaintext = bytes([number]) * 100_000
        return all(
            peer.decrypt(calls.encrypt(plaintext), 7) == (plaintext, None) == calls.decrypt(peer.encrypt(plaintext), 7)
            for _ in range(30)
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(converse, range(4))) == [True] * 4


@BOTH
def test_a_record_that_is_not_whole_is_waited_for(make: MakeEngine) -> None:
    """What was whole before it is given; the rest comes with its last byte."""
    calls, peer, _ = pair(make)
    wire = peer.encrypt(b"first") + peer.encrypt(b"second")
    plaintext, ended = calls.decrypt(wire[:-1], 2)
    assert plaintext == b"first"
    assert isinstance(ended, SSL.WantReadError)
    assert calls.decrypt(wire[-1:], 1) == (b"second", None)


@BOTH
def test_nothing_is_decrypted_of_nothing(make: MakeEngine) -> None:
    """No ciphertext and no record is no error."""
    calls, _, _ = pair(make)
    assert calls.decrypt(b"", 0) == (b"", None)
    assert isinstance(calls.decrypt(b"", 1)[1], SSL.WantReadError)


@BOTH
def test_an_error_that_others_have_left_is_not_taken_for_the_connections(make: MakeEngine) -> None:
    """OpenSSL's error queue is the thread's: an old entry would make of a record that is not whole a broken one."""
    calls, peer, _ = pair(make)
    wire = peer.encrypt(b"packet")
    assert lib.BIO_new_file(b"/nonexistent", b"r") == ffi.NULL
    if make is PublicCalls:
        lib.ERR_clear_error()  # pyOpenSSL itself does not; this is what the direct calls do better.
    plaintext, ended = calls.decrypt(wire[:-1], 1)
    assert plaintext == b""
    assert isinstance(ended, SSL.WantReadError)
    assert calls.decrypt(wire[-1:], 1) == (b"packet", None)


@BOTH
def test_a_forged_record_is_an_error_with_openssls_words(make: MakeEngine) -> None:
    """What came whole before it is given, and the queue is empty afterwards."""
    calls, peer, _ = pair(make)
    wire = bytearray(peer.encrypt(b"whole") + peer.encrypt(b"forged"))
    wire[-1] ^= 1
    plaintext, ended = calls.decrypt(bytes(wire), 2)
    assert plaintext == b"whole"
    assert "bad record mac" in str(ended)
    assert lib.ERR_peek_error() == 0
    assert calls.waiting()  # An alert.


@BOTH
def test_the_peers_close_notify_is_told_apart(make: MakeEngine) -> None:
    """It is an end, not an error."""
    calls, peer, server = pair(make)
    last = peer.encrypt(b"last")
    server.shutdown()
    plaintext, ended = calls.decrypt(last + peer.waiting(), 2)
    assert plaintext == b"last"
    assert isinstance(ended, SSL.ZeroReturnError)


@BOTH
def test_what_openssl_does_not_encrypt_is_an_error(make: MakeEngine) -> None:
    """After close_notify nothing may follow."""
    client, _ = connected_pair()
    calls = make(client)
    client.shutdown()
    with pytest.raises(SSL.Error):
        calls.encrypt(b"more")


@BOTH
def test_what_waited_goes_before_what_is_encrypted(make: MakeEngine) -> None:
    """Records keep their order."""
    calls, peer, _ = pair(make)
    calls._connection.send(b"first, ")  # type: ignore[attr-defined]  # both have it
    assert peer.decrypt(calls.encrypt(b"second"), 2) == (b"first, second", None)


@pytest.mark.parametrize("records", [1, 3])
def test_whenever_openssl_is_called_its_error_queue_is_empty(monkeypatch: pytest.MonkeyPatch, records: int) -> None:
    """Whatever is left there in between.  OpenSSL before 4.0 would take it for an error of this call."""

    def leaving_an_error(call: Callable[..., int]) -> Callable[..., int]:
        def called(*arguments: Any) -> int:
            assert lib.ERR_peek_error() == 0
            result = call(*arguments)
            assert lib.BIO_new_file(b"/nonexistent", b"r") == ffi.NULL
            return result

        return called

    calls, peer, _ = pair(DirectCalls)
    monkeypatch.setattr(direct, "_ssl_write", leaving_an_error(direct._ssl_write))
    monkeypatch.setattr(direct, "_ssl_read", leaving_an_error(direct._ssl_read))
    try:
        for _ in range(2):
            assert peer.decrypt(calls.encrypt(b"up"), 1) == (b"up", None)
            wire = b"".join(peer.encrypt(b"down") for _ in range(records))
            assert calls.decrypt(wire, records) == (b"down" * records, None)
    finally:
        lib.ERR_clear_error()


def test_a_full_memory_is_no_lost_ciphertext(monkeypatch: pytest.MonkeyPatch) -> None:
    """What OpenSSL does not take would be missing in the middle of the stream."""
    calls, peer, _ = pair(DirectCalls)
    monkeypatch.setattr(direct, "_bio_write", lambda _bio, _data, size: size - 1)
    with pytest.raises(MemoryError):
        calls.decrypt(peer.encrypt(b"packet"), 1)


def test_an_error_that_openssl_does_not_explain_is_one() -> None:
    """Nothing must go on as if it had succeeded."""
    calls, _, _ = pair(DirectCalls)
    assert isinstance(calls.why(1), SSL.Error)


def test_connections_of_a_thread_share_their_buffer() -> None:
    """It is 128 KiB, and there are thousands of sessions."""
    one, other = (DirectCalls(connected_pair()[0]) for _ in range(2))
    assert one._buffer is other._buffer


def test_a_group_that_openssl_refuses_leaves_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call would find it."""

    def refuse(_ssl: object, _names: bytes) -> int:
        assert lib.BIO_new_file(b"/nonexistent", b"r") == ffi.NULL
        return 0

    calls, _, _ = pair(DirectCalls)
    monkeypatch.setattr(direct, "_set_groups", refuse)
    calls.offer_group("P-384")
    assert lib.ERR_peek_error() == 0


@pytest.mark.parametrize("key", ["groups", "signature_algorithms"])
def test_a_list_with_an_unknown_name_is_refused_and_leaves_no_error(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """The next call would find it."""
    context = SSL.Context(SSL.TLS_METHOD)
    known = {"groups": "P-384", "signature_algorithms": "ecdsa_secp256r1_sha256"}[key]
    assert direct.set_list(context, key, [known]) is True
    assert direct.set_list(context, key, [known, "no such name"]) is False

    def refuse(_context: object, _names: bytes) -> int:
        assert lib.BIO_new_file(b"/nonexistent", b"r") == ffi.NULL
        return 0

    monkeypatch.setattr(lib, direct._LISTS[key], refuse)
    assert direct.set_list(context, key, [known]) is False
    assert lib.ERR_peek_error() == 0


def test_a_handshake_that_only_one_side_finishes_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test needs a connection; without one, the slow calls are used."""
    right, done = SSL.Connection.do_handshake, []

    def shake_hands(connection: SSL.Connection) -> None:
        right(connection)
        done.append(connection)
        if len(done) % 2 == 0:
            raise SSL.WantReadError

    monkeypatch.setattr(SSL.Connection, "do_handshake", shake_hands)
    with pytest.raises(RuntimeError, match="does not finish"):
        connected_pair()
    assert chosen_with_log()[0] is PublicCalls


def test_a_pair_begins_with_nothing_unread() -> None:
    """The server's tickets would be records more than a trial counts."""
    rest = ffi.new("char[]", 1)
    for end in connected_pair():
        assert lib.BIO_read(end._into_ssl, rest, 1) <= 0
        assert lib.BIO_read(end._from_ssl, rest, 1) <= 0


@pytest.mark.skipif(direct._set_groups is None, reason="this cryptography does not give SSL_set1_curves_list")
def test_only_the_group_that_is_asked_for_is_offered() -> None:
    """In the ClientHello's supported_groups (RFC 8446 §4.2.7); a name that OpenSSL does not know changes nothing."""

    def hello(group: str) -> bytes:
        client = SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)
        client.set_connect_state()
        calls = DirectCalls(client)
        calls.offer_group(group)
        assert lib.ERR_peek_error() == 0
        with pytest.raises(SSL.WantReadError):
            client.do_handshake()
        return calls.waiting()

    only_p384 = b"\x00\x0a\x00\x04\x00\x02\x00\x18"
    assert only_p384 in hello("secp384r1")
    assert only_p384 not in hello("no such group")


def test_without_pyopenssls_private_names_the_public_calls_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a release that has put them elsewhere; the log says so, once."""
    monkeypatch.setitem(sys.modules, "OpenSSL._util", ModuleType("OpenSSL._util"))
    monkeypatch.delitem(sys.modules, "gateway.tls.direct")
    chosen, (event,) = chosen_with_log()
    assert chosen is PublicCalls
    assert event["log_level"].name == "warn"
    assert "ImportError" in str(event["error"].__class__)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_ssl_write", lambda _ssl, _data, size: size),
        ("_ssl_read", lambda _ssl, _data, _size: -1),
        ("_bio_write", lambda _bio, _data, _size: -1),
        ("_bio_read", lambda _bio, _data, _size: 0),
        ("_unpack", lambda buffer, size: ffi.unpack(buffer, size).replace(b"\0", b"\1")),
        ("_ssl_read", lambda ssl, data, size: abs(lib.SSL_read(ssl, data, size))),
        ("_clear_errors", lambda: lib.no_such_function()),
    ],
)
def test_direct_calls_that_do_not_do_the_same_are_not_used(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: object
) -> None:
    """Whatever is wrong with them shows before the first session."""
    monkeypatch.setattr(direct, name, broken)
    chosen, (event,) = chosen_with_log()
    assert chosen is PublicCalls
    assert event["log_level"].name == "warn"


Found = tuple[bytes, SSL.Error | None]
Applies = Callable[[bytes, SSL.Error | None, int], bool]
# What the engine decrypts, of how many records, and what a broken one would make of it.  One record and several are
# read in different ways.
MISTAKES: list[tuple[str, Applies, Callable[[Found], Found]]] = [
    (
        "half a record is nothing",
        lambda _, ended, records: type(ended) is SSL.WantReadError and records == 1,
        lambda found: (found[0], None),
    ),
    ("its rest is lost", lambda plaintext, _, records: plaintext == b"record" and records == 1, lambda _: (b"", None)),
    (
        "a forged record is nothing",
        lambda _, ended, records: type(ended) is SSL.Error and records == 2,
        lambda found: (found[0], None),
    ),
    ("what is before it is lost", lambda _, ended, __: type(ended) is SSL.Error, lambda found: (b"", found[1])),
    (
        "an end is nothing",
        lambda _, ended, records: type(ended) is SSL.ZeroReturnError and records == 2,
        lambda found: (found[0], None),
    ),
    (
        "what is before it is lost",
        lambda _, ended, __: type(ended) is SSL.ZeroReturnError,
        lambda found: (b"", found[1]),
    ),
    *(
        (
            f"{size} bytes change",
            lambda plaintext, _, records, size=size: len(plaintext) == size and records == record_count(size),
            lambda found: (b"?", found[1]),
        )
        for size in (1, RECORD_SIZE, 40_960, 0x50000)
    ),
]


@pytest.mark.parametrize(("applies", "mistake"), [pytest.param(*case[1:], id=case[0]) for case in MISTAKES])
def test_one_mistake_in_decrypting_is_enough(monkeypatch: pytest.MonkeyPatch, applies: Any, mistake: Any) -> None:
    """Each is found by itself: one record more, less or altered would be another message."""
    right = DirectCalls.decrypt

    def decrypt(calls: DirectCalls, ciphertext: bytes, records: int) -> Found:
        found = right(calls, ciphertext, records)
        return mistake(found) if applies(*found, records) else found

    monkeypatch.setattr(DirectCalls, "decrypt", decrypt)
    assert chosen_with_log()[0] is PublicCalls


@pytest.mark.parametrize("size", [1, RECORD_SIZE, 40_960, 0x50000])
def test_one_mistake_in_encrypting_is_enough(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Of one size only."""
    right = DirectCalls.encrypt

    def encrypt(calls: DirectCalls, plaintext: bytes) -> bytes:
        return right(calls, b"?" + plaintext[1:] if len(plaintext) == size else plaintext)

    monkeypatch.setattr(DirectCalls, "encrypt", encrypt)
    assert chosen_with_log()[0] is PublicCalls


def test_bytes_from_nowhere_are_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits in a connection that has just finished its handshake."""
    right = DirectCalls.waiting
    monkeypatch.setattr(DirectCalls, "waiting", lambda calls: right(calls) or b"?")
    assert chosen_with_log()[0] is PublicCalls


def test_a_connection_that_is_made_in_another_way_is_not_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cffi looks at the types of what it is given, so that this is an exception and no crash."""
    made = SSL.Connection.__init__

    def changed(connection: Any, *arguments: Any) -> None:
        made(connection, *arguments)
        connection._into_ssl = ffi.new("char[]", 8)

    monkeypatch.setattr(SSL.Connection, "__init__", changed)
    assert chosen_with_log()[0] is PublicCalls
