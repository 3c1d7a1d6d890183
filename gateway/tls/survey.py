"""Finds out which algorithms a broker has, for `check`: by ClientHellos that offer all, then all but what it chose.

In: what the broker answers to a ClientHello.  Out: ClientHellos, and an `Offer` of the broker's.

Nothing else is sent: no handshake is finished, and what the broker says here is not trusted for anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from attrs import frozen

from gateway.config.algorithms import check_cipher, check_group, check_signature_algorithm, is_of_tls_1_3
from gateway.tls.algorithms import (
    CIPHERS,
    GROUPS,
    SIGNATURE_ALGORITHMS,
    SIGNATURES,
    SUPPORTED_GROUPS,
    SUPPORTED_VERSIONS,
    VERSIONS,
    Offer,
    extensions,
)

_SERVER_NAME, _POINT_FORMATS, _ALPN, _EXTENDED_MASTER_SECRET, _KEY_SHARE = 0, 11, 16, 23, 51
_HANDSHAKE = 22
_SERVER_HELLO, _SERVER_KEY_EXCHANGE, _SERVER_HELLO_DONE = 2, 12, 14
_CLIENT_HELLO, _TLS_1_2, _TLS_1_3 = 1, 0x0303, 0x0304
_NAMED_CURVE = 3
# ClientHellos at most, and answers of the broker that are read, in bytes.
_MOST_HELLOS = 40
LARGEST_ANSWER = 0x10000


@frozen
class Answer:
    """What a broker chose; a part that it did not say is 0."""

    version: int
    cipher: int
    group: int = 0
    signature_algorithm: int = 0


@frozen
class Hello:
    """The algorithms of one ClientHello."""

    is_1_3: bool
    ciphers: tuple[int, ...]
    groups: tuple[int, ...]
    signature_algorithms: tuple[int, ...]

    def record(self, server_name: str | None, alpn: Iterable[str]) -> bytes:
        """Return it as a TLS record."""
        parts = {
            SUPPORTED_GROUPS: _vector(_codes(self.groups)),
            _POINT_FORMATS: b"\1\0",
            SIGNATURES: _vector(_codes(self.signature_algorithms)),
            _EXTENDED_MASTER_SECRET: b"",
        }
        if server_name is not None:
            parts[_SERVER_NAME] = _vector(b"\0" + _vector(server_name.encode("ascii")))
        names = b"".join(bytes((len(name),)) + name.encode("ascii") for name in alpn)
        if names:
            parts[_ALPN] = _vector(names)
        if self.is_1_3:
            # Without a key share, the broker must name its group (HelloRetryRequest).
            parts |= {SUPPORTED_VERSIONS: b"\2" + _codes([_TLS_1_3]), _KEY_SHARE: _vector(b"")}
        block = b"".join(_codes([kind]) + _vector(content) for kind, content in parts.items())
        body = _codes([_TLS_1_2]) + os.urandom(32) + b"\x20" + os.urandom(32)
        body += _vector(_codes(self.ciphers)) + b"\1\0" + _vector(block)
        message = bytes((_CLIENT_HELLO,)) + len(body).to_bytes(3) + body
        return bytes((_HANDSHAKE, 3, 1)) + _vector(message)


class Reader:
    """Reads a broker's answer to a ClientHello."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> tuple[bool, Answer | None]:
        """Take bytes; return whether the answer is complete, and what it is (`None` for a refusal)."""
        self._data += data
        messages, at, is_over = b"", 0, len(self._data) > LARGEST_ANSWER
        while at + 5 <= len(self._data):
            kind, end = self._data[at], at + 5 + int.from_bytes(self._data[at + 3 : at + 5])
            if kind != _HANDSHAKE:  # an alert; or change_cipher_spec, after a HelloRetryRequest
                is_over = True
                break
            if end > len(self._data):
                break
            messages += self._data[at + 5 : end]
            at = end
        try:
            answer = _read(messages)
        except IndexError:
            return True, None
        return answer is not None or is_over, answer


def _read(messages: bytes) -> Answer | None:
    """Return the answer in handshake messages, if it is complete.  Raises `IndexError` for what is malformed."""
    chosen: Answer | None = None
    at = 0
    while at + 4 <= len(messages):
        kind, end = messages[at], at + 4 + int.from_bytes(messages[at + 1 : at + 4])
        if end > len(messages):
            return None
        body = messages[at + 4 : end]
        at = end
        if kind == _SERVER_HELLO:
            chosen = _server_hello(body)
            if chosen.version == _TLS_1_3 or not CIPHERS.get(chosen.cipher, "").startswith(("ECDHE", "DHE")):
                return chosen
        elif chosen is not None and kind == _SERVER_KEY_EXCHANGE:
            return _key_exchange(chosen, body)
        elif kind == _SERVER_HELLO_DONE:
            return chosen
    return None


def _server_hello(body: bytes) -> Answer:
    version, at = int.from_bytes(body[:2]), 2 + 32
    at += 1 + body[at]
    cipher = body[at] << 8 | body[at + 1]
    known = extensions(body, at + 3)
    version = int.from_bytes(known[SUPPORTED_VERSIONS]) if SUPPORTED_VERSIONS in known else version
    return Answer(version, cipher, int.from_bytes(known.get(_KEY_SHARE, b"")[:2]))


def _key_exchange(chosen: Answer, body: bytes) -> Answer:
    """Add group and signature algorithm of a ServerKeyExchange (RFC 8422 §5.4, RFC 5246 §7.4.3)."""
    group = 0
    if CIPHERS[chosen.cipher].startswith("ECDHE"):
        if body[0] != _NAMED_CURVE:
            return chosen
        group = body[1] << 8 | body[2]
        at = 4 + body[3]
    else:
        at = 0
        for _ in range(3):  # dh_p, dh_g, dh_Ys
            at += 2 + (body[at] << 8 | body[at + 1])
    algorithm = body[at] << 8 | body[at + 1] if chosen.version == _TLS_1_2 else 0
    return Answer(chosen.version, chosen.cipher, group, algorithm)


class Survey:
    """Asks what a broker has: send `hello` and call `answered`, until `hello` is `None`."""

    def __init__(self) -> None:
        self._versions: dict[int, None] = {}
        self._found: tuple[dict[int, None], dict[int, None], dict[int, None]] = ({}, {}, {})
        self._left = _MOST_HELLOS
        self._hellos = self._all()
        self._answer: Answer | None = None
        self.hello: Hello | None = next(self._hellos)

    def answered(self, answer: Answer | None) -> None:
        """Take the answer, `None` for a refusal."""
        self._answer = answer
        if answer is not None:
            self._versions[answer.version] = None
            parts = (answer.cipher, answer.group, answer.signature_algorithm)
            for known, code in zip(self._found, parts, strict=True):
                if code:
                    known[code] = None
        self._left -= 1
        self.hello = next(self._hellos, None) if self._left else None

    @property
    def offer(self) -> Offer | None:
        """What the broker has, as far as it is known; `None` if it chose nothing at all."""
        if not self._versions:
            return None
        ciphers, groups, algorithms = self._found
        return Offer(
            tuple(VERSIONS.get(code, f"0x{code:04x}") for code in self._versions),
            tuple(CIPHERS[code] for code in ciphers if code in CIPHERS),
            tuple(GROUPS[code] for code in groups if code in GROUPS),
            tuple(SIGNATURE_ALGORITHMS[code] for code in algorithms if code in SIGNATURE_ALGORITHMS),
        )

    def _all(self) -> Iterator[Hello]:
        for is_1_3 in (True, False):
            ciphers = tuple(code for code, name in CIPHERS.items() if is_of_tls_1_3(name) == is_1_3)
            whole = Hello(is_1_3, ciphers, tuple(GROUPS), tuple(SIGNATURE_ALGORITHMS))
            yield from self._without(whole, "ciphers", "cipher")
            yield from self._without(whole, "groups", "group")
            if not is_1_3:  # In TLS 1.3 the choice is encrypted.
                yield from self._without(whole, "signature_algorithms", "signature_algorithm")

    def _without(self, hello: Hello, key: str, part: str) -> Iterator[Hello]:
        """Yield ClientHellos without what was chosen of one list, until nothing is chosen."""
        codes = {"ciphers": hello.ciphers, "groups": hello.groups, "signature_algorithms": hello.signature_algorithms}
        while codes[key]:
            yield Hello(hello.is_1_3, codes["ciphers"], codes["groups"], codes["signature_algorithms"])
            chosen = 0 if self._answer is None else getattr(self._answer, part)
            if chosen not in codes[key]:
                return
            codes[key] = tuple(code for code in codes[key] if code != chosen)


def advice(ours: Offer, brokers: Offer) -> str:
    """Return what to do about a broker that has nothing in common with what the gateway offers; "" if it has."""
    if not set(ours.versions) & set(brokers.versions):
        if "TLS 1.2" in brokers.versions:
            return 'Set min_version = "1.2" in [tls], or enable TLS 1.3 on the broker.'
        return "Enable TLS 1.2 or 1.3 on the broker."
    for key, check, mine, theirs in (
        ("ciphers", check_cipher, ours.ciphers, brokers.ciphers),
        ("groups", check_group, ours.groups, brokers.groups),
        ("signature_algorithms", check_signature_algorithm, ours.signature_algorithms, brokers.signature_algorithms),
    ):
        if not theirs or set(mine) & set(theirs):
            continue
        permitted = [name for name in theirs if _is_permitted(check, name)]
        if not permitted:
            return f"The broker has no {key.replace('_', ' ')} that the gateway permits. Update the broker."
        listed = ", ".join(f'"{name}"' for name in permitted)
        return f"Enable on the broker what the gateway offers, or set {key} = [{listed}] in its [[upstream]]."
    return ""


def _is_permitted(check: Callable[[str], None], name: str) -> bool:
    try:
        check(name)
    except ValueError:
        return False
    return True


def _codes(values: Iterable[int]) -> bytes:
    return b"".join(value.to_bytes(2) for value in values)


def _vector(content: bytes) -> bytes:
    return len(content).to_bytes(2) + content
