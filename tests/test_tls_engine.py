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
SIZES = [1, RECORD_SIZE, RECORD_SIZE + 1, 0x20000 - 22, 0x20000, 0x20000 + 1, 1_000_000]


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
# What the engine decrypts, and what a broken one would make of it.
MISTAKES: list[tuple[str, Callable[[bytes, SSL.Error | None], bool], Callable[[Found], Found]]] = [
    ("half a record is nothing", lambda _, ended: type(ended) is SSL.WantReadError, lambda found: (found[0], None)),
    ("its rest is lost", lambda plaintext, _: plaintext == b"record", lambda _: (b"", None)),
    ("a forged record is nothing", lambda _, ended: type(ended) is SSL.Error, lambda found: (found[0], None)),
    ("what is before it is lost", lambda _, ended: type(ended) is SSL.Error, lambda found: (b"", found[1])),
    ("an end is nothing", lambda _, ended: type(ended) is SSL.ZeroReturnError, lambda found: (found[0], None)),
    ("what is before it is lost", lambda _, ended: type(ended) is SSL.ZeroReturnError, lambda found: (b"", found[1])),
    *(
        (f"{size} bytes change", lambda plaintext, _, size=size: len(plaintext) == size, lambda found: (b"?", found[1]))
        for size in (1, RECORD_SIZE, 40_960, 0x50000)
    ),
]


@pytest.mark.parametrize(("applies", "mistake"), [pytest.param(*case[1:], id=case[0]) for case in MISTAKES])
def test_one_mistake_in_decrypting_is_enough(monkeypatch: pytest.MonkeyPatch, applies: Any, mistake: Any) -> None:
    """Each is found by itself: one record more, less or altered would be another message."""
    right = DirectCalls.decrypt

    def decrypt(calls: DirectCalls, ciphertext: bytes, records: int) -> Found:
        found = right(calls, ciphertext, records)
        return mistake(found) if applies(*found) else found

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
    right, asked = DirectCalls.waiting, []

    def waiting(calls: DirectCalls) -> bytes:
        asked.append(calls)
        return b"?" if len(asked) == 1 else right(calls)

    monkeypatch.setattr(DirectCalls, "waiting", waiting)
    assert chosen_with_log()[0] is PublicCalls


def test_a_connection_that_is_made_in_another_way_is_not_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cffi looks at the types of what it is given, so that this is an exception and no crash."""
    made = SSL.Connection.__init__

    def changed(connection: Any, *arguments: Any) -> None:
        made(connection, *arguments)
        connection._into_ssl = ffi.new("char[]", 8)

    monkeypatch.setattr(SSL.Connection, "__init__", changed)
    assert chosen_with_log()[0] is PublicCalls
