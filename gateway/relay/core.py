"""Which engine relays messages: the compiled core, if it is there and does what Python does; tried at each start.

In: the compiled core, if it was built, and the environment.  Out: the core, or why Python relays.

The trial compares verdicts on streams of packets, cut anywhere, and has a session relay through sockets.
"""

from __future__ import annotations

import os
import random
import select
import socket
from contextlib import suppress
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from attrs import frozen

from gateway.mqtt.checking import CheckingFramer
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import ProtocolVersion, encode_remaining_length, encode_string
from gateway.tls.choice import choose, connected_pair
from gateway.tls.engine import RECORD_SIZE, PublicCalls

SWITCH = "MQTTS_GATEWAY_PURE"
COST = "each message costs more CPU"

_BUILD = "Install a wheel for this platform, or install a C compiler and Python's headers and reinstall the gateway."

_LIMIT = 1000
_ROUNDS = 40
_SEED = 11


@frozen
class Choice:
    """What relays.  If `core` is None, it is Python: `why` says why, `remedy` what to do unless that was wanted."""

    core: Any
    why: str = ""
    remedy: str = ""

    @property
    def name(self) -> str:
        """One word for metrics and pages."""
        return "python" if self.core is None else "compiled"

    @property
    def words(self) -> str:
        """A sentence for people."""
        if self.core is not None:
            return "the compiled core relays messages"
        return f"Python relays messages, so {COST}: {self.why}"


def engine(*, wanted: bool = True) -> Choice:
    """Return what is to relay, if the configuration wants the core or not."""
    if os.environ.get(SWITCH) == "1":
        return Choice(None, f"{SWITCH}=1 is set")
    if not wanted:
        return Choice(None, 'the configuration has relay.engine = "python"')
    return _tried()


@cache
def _tried() -> Choice:
    try:
        # Whether it is there is the first thing to find out.
        core: Any = import_module("gateway.relay._core")
    except ImportError:
        return Choice(None, "the compiled core was not built", _BUILD)
    if _is_stale(Path(core.__file__)):
        return Choice(None, "the compiled core is older than its source", "Reinstall the gateway: pip install -e .")
    if choose() is PublicCalls:
        return Choice(None, "OpenSSL cannot be called directly", "Install a pyOpenSSL that this version supports.")
    try:
        from gateway.tls.direct import DirectCalls, functions

        core.use(*functions())
        _compare_verdicts(core)
        _compare_relaying(core, DirectCalls)
    except Exception as error:  # noqa: BLE001  whatever a core that was built for another version comes up with
        return Choice(None, f"the compiled core failed its trial ({error!r})", _BUILD)
    return Choice(core)


def _is_stale(core: Path) -> bool:
    """Whether this is a clone whose source has changed since the core was built: they may not fit together."""
    source = core.with_name("_core.c")
    return source.exists() and source.stat().st_mtime > core.stat().st_mtime


# ---- verdicts


def _compare_verdicts(core: Any) -> None:
    """Raise if the core passes what Python does not, or anything that is ordinary needs a look."""
    uniform = random.Random(_SEED)  # noqa: S311  not for secrets
    for make, sender, version in product((Framer, CheckingFramer), Sender, ProtocolVersion):
        ordinary = _ordinary(version)
        _compare(core, make(sender, version, _LIMIT), b"".join(ordinary), must_pass=True)
        for _ in range(_ROUNDS):
            stream = bytearray(b"".join(uniform.choices(ordinary, k=3)))
            for _ in range(uniform.randrange(3)):
                stream[uniform.randrange(len(stream))] = uniform.choice(
                    (0, 2, 0x23, 0x2B, 0xFF, uniform.randrange(256))
                )
            end = uniform.randrange(len(stream) + 1)
            _compare(core, make(sender, version, _LIMIT), bytes(stream[:end]))


def _ordinary(version: ProtocolVersion) -> list[bytes]:
    properties = b"\0" if version is ProtocolVersion.MQTT_5_0 else b""
    topic = encode_string("a/topic/\u00e9\u20ac")
    packets = []
    for size in (0, 3, 200):
        bodies = (
            (0x30, topic + properties),
            (0x32, topic + b"\0\1" + properties),
            (0x3D, topic + b"\1\0" + properties),
        )
        for first, head in bodies:
            packets.append(bytes((first,)) + encode_remaining_length(len(head) + size) + head + bytes(size))
    if version is ProtocolVersion.MQTT_5_0:
        written = b"\x01\1\x02\0\0\0\1\x23\0\1" + b"\x26" + encode_string("key") + encode_string("value")
        head = encode_string("") + bytes((len(written),)) + written
        packets.append(bytes((0x30, len(head))) + head)
    return packets + [bytes((first, 2, 0, 7)) for first in (0x40, 0x50, 0x62, 0x70)]


def _compare(core: Any, framer: Framer, stream: bytes, *, must_pass: bool = False) -> None:
    found = core.walk(framer.tables, framer.max_packet_size, 0, stream)
    if found is None:
        if must_pass:
            raise RuntimeError("the core does not pass what is ordinary")
        return
    passed, skip, packets = found
    packets_before = framer.packets
    given = framer.feed(stream)
    stands = framer.lend()
    if (given, framer.packets - packets_before, stands) != (stream[:passed], packets, (skip, stream[passed:])):
        raise RuntimeError(f"the core passes {passed} of {len(stream)} bytes, Python {len(given)}")


# ---- relaying


def _compare_relaying(core: Any, direct_calls: Any) -> None:
    """Raise unless a pair relays both ways, and is handed over with what is unusual."""
    client, broker = connected_pair()
    addresses = direct_calls(client).addresses()
    public = PublicCalls(broker)
    rules = (
        Framer(Sender.DEVICE, ProtocolVersion.MQTT_3_1_1, 0x100000),
        Framer(Sender.BROKER, ProtocolVersion.MQTT_3_1_1, 0x100000),
    )
    tables = [part for framer in rules for part in (framer.tables, framer.max_packet_size)]
    keep, *pointers = addresses
    pair = core.Pair(keep, tuple(pointers), *tables)
    ends = [*socket.socketpair(), *socket.socketpair()]
    epoll = select.epoll()
    try:
        for end in ends:
            end.setblocking(False)
        device, lent_device, lent_broker, upstream = ends
        for end in (lent_device, lent_broker):
            epoll.register(end, select.EPOLLIN)
        owner = object()
        pair.lend(lent_device.fileno(), lent_broker.fileno(), owner, 0, b"", 0, b"", 0, b"")
        for size in (1, 3000, RECORD_SIZE + 5, 3 * RECORD_SIZE):
            head = encode_string("t")
            message = b"\x30" + encode_remaining_length(len(head) + size) + head + bytes(size)
            device.sendall(message)
            core.poll(epoll.fileno(), 0, 1)
            _expect(
                "up", public.decrypt(upstream.recv(len(message) * 2 + 100), -(-len(message) // RECORD_SIZE)), message
            )
            upstream.sendall(public.encrypt(message))
            core.poll(epoll.fileno(), 0, 1)
            _expect("down", (device.recv(len(message) + 1), None), message)
        device.sendall(b"\xe0\0")
        count, handed, others = core.poll(epoll.fileno(), 0, 1)
        state = pair.take_back()
        if (count, handed, others, state) != (1, [owner], [], (0, b"", 0, b"", 0, b"", 1, b"\xe0\0", 0)):
            raise RuntimeError("the core does not hand over a DISCONNECT")
    finally:
        with suppress(RuntimeError):  # It has been taken back.
            pair.take_back()
        epoll.close()
        for end in ends:
            end.close()


def _expect(way: str, found: tuple[bytes, object], expected: bytes) -> None:
    if found != (expected, None):
        raise RuntimeError(f"the core does not relay {way}")
