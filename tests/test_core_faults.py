"""Faults at each hand-over between the compiled core and Python: nothing is lost, doubled, or out of order.

A real gateway and a real broker; the core is `_core.c`, its source unchanged, whose system calls and OpenSSL functions
fail when a test wants it (`tests/core/virtual.py`).  `FAULTS` are planted in the source: the test that is named with
each must notice it.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import trustme
from OpenSSL import SSL

from gateway.errors import EndReason
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import ProtocolVersion
from gateway.relay import core as choosing
from gateway.tls.choice import connected_pair
from gateway.tls.direct import DirectCalls, functions
from gateway.tls.engine import PublicCalls
from tests import harness
from tests import mqtt_packets as mqtt
from tests.core.virtual import VirtualCore, build
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, connect_version, eventually
from tests.ports import free_port
from tests.tools import require_tool

if choosing.engine().core is None and os.environ.get(choosing.SWITCH) != "1":
    pytest.skip(choosing.engine().why, allow_module_level=True)

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]

PLANTED = "CORE_PLANTED"
PACKET = mqtt.publish(payload=b"ordinary")
BULK = mqtt.publish(payload=bytes(range(256)) * 300)


class Failing:
    """The kernel, which fails as `script` says: what becomes of the next calls of `recv` and `send`, by descriptor.

    A number is how many bytes the call may take at most, an exception what it raises; None is an ordinary call.
    """

    def __init__(self) -> None:
        self.script: dict[tuple[str, int], deque[Any]] = {}
        self.calls: list[tuple[str, int]] = []

    def next(self, call: str, descriptor: int, *outcomes: Any) -> None:
        self.script[call, descriptor] = deque(outcomes)

    def recv(self, descriptor: int, size: int) -> bytes:
        return os.read(descriptor, min(size, self._outcome("recv", descriptor)))

    def send(self, descriptor: int, data: bytes) -> int:
        return os.write(descriptor, data[: self._outcome("send", descriptor)])

    def wait(self, most: int) -> list[tuple[int, int]]:
        raise NotImplementedError("the real one waits")

    def _outcome(self, call: str, descriptor: int) -> int:
        self.calls.append((call, descriptor))
        outcomes = self.script.get((call, descriptor))
        outcome = outcomes.popleft() if outcomes else None
        if isinstance(outcome, OSError):
            raise outcome
        return 1 << 30 if outcome is None else outcome


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class FailingOpenSSL:
    """OpenSSL's five functions; `fail` lets the next calls of one return something without doing anything."""

    NAMES = ("ssl_write", "ssl_read", "bio_write", "bio_read")

    def __init__(self, core: VirtualCore) -> None:
        self._core = core
        self._left: dict[str, deque[int]] = {}
        self.pointers: set[int] = set()
        call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
        addresses = functions()
        self._calls = [
            call(self._wrapped(name, call(address))) for name, address in zip(self.NAMES, addresses, strict=False)
        ]
        core.module.use(*(ctypes.cast(each, ctypes.c_void_p).value for each in self._calls), addresses[4])

    def _wrapped(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def wrapper(of: int, data: int, size: int) -> int:
            self.pointers.add(of)
            outcomes = self._left.get(name)
            return outcomes.popleft() if outcomes else real(of, data, size)

        return wrapper

    def fail(self, name: str, *results: int) -> None:
        self._left[name] = deque(results)

    def restore(self) -> None:
        self._core.module.use(*functions())


def echo(connection: BrokerConnection) -> None:
    """Accept, and send every packet back."""
    version = connect_version(connection.read_packet())
    connection.send(mqtt.connack(version=version))
    while True:
        connection.send(connection.read_packet())


class Bench:
    """A gateway with a core that may fail, and one session that is lent to it."""

    def __init__(self, core: VirtualCore, gateway: RunningGateway, version: int = 4) -> None:
        self.core = core
        self.gateway = gateway
        self.version = version
        self.kernel = Failing()
        core.use_kernel(self.kernel, waits=False)
        self.openssl = FailingOpenSSL(core)
        self.device = Device(gateway.port)
        self.device.socket.settimeout(harness.PATIENCE)
        self.device.send(mqtt.connect(version=version))
        connack = mqtt.connack(version=version)
        assert self.device.read(len(connack)) == connack
        self.exchange()
        self.wait_lent()
        (self.session,) = gateway.service.gateway.sessions
        self.at_device: int = self.session._device.transport.fileno()
        self.at_broker: int = self.session._upstream.transport.fileno()

    @property
    def lent(self) -> dict[int, Any]:
        lent: dict[int, Any] = self.gateway.service._relay._lent
        return lent

    def wait_lent(self) -> None:
        eventually(lambda: len(self.lent) == 2, "the session is lent")

    def exchange(self, *packets: bytes) -> None:
        """Have packets sent back: all of them, once, in order."""
        sent = b"".join(packets or (mqtt.publish(version=self.version),))
        self.device.send(sent)
        assert self.device.read(len(sent)) == sent

    def goes_on(self) -> None:
        """The session is lent again and relays, and its counts are right."""
        self.exchange()
        self.exchange()
        self.wait_lent()
        assert not self.gateway.ended

    def ended(self) -> Any:
        """Wait for the end of the session; nothing is left of it."""
        self.device.read_to_end()
        self.device.close()
        record = self.gateway.wait_ended()
        self.gateway.wait_empty()
        assert not self.lent
        return record

    def close(self) -> None:
        self.core.fail_after(-1)
        self.device.close()
        self.gateway.wait_empty()
        self.openssl.restore()
        self.core.use_kernel(None)


@pytest.fixture(scope="module")
def virtual() -> VirtualCore:
    """Return the core; with the fault that the environment names planted in it, which need not be waited for long."""
    planted = os.environ.get(PLANTED)
    if planted is None:
        return build()
    harness.PATIENCE = 1.5
    return build(*FAULTS[planted][1])


@pytest.fixture
def start_bench(
    virtual: VirtualCore, start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Bench]]:
    """Return a function that starts a bench."""
    benches: list[Bench] = []
    monkeypatch.delenv(choosing.SWITCH, raising=False)
    monkeypatch.setattr(choosing, "_tried", lambda: choosing.Choice(virtual))

    def start(version: int = 4) -> Bench:
        gateway = start_gateway(upstream=start_broker(serve=echo).port, timeouts={"close": 0.3})
        benches.append(Bench(virtual, gateway, version))
        return benches[-1]

    yield start
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(start_bench: Callable[..., Bench]) -> Bench:
    return start_bench()


# ---- what the kernel does


@pytest.mark.parametrize("most", [0, 1, 7, 1000, "EAGAIN"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_short_send_loses_nothing(bench: Bench, way: str, most: int | str) -> None:
    """What the kernel has not taken goes out before what follows; then the session is lent again."""
    descriptor = bench.at_broker if way == "up" else bench.at_device
    outcome = error(errno.EAGAIN) if isinstance(most, str) else most
    bench.kernel.next("send", descriptor, outcome)
    bench.exchange(PACKET, BULK, PACKET)
    assert not bench.kernel.script["send", descriptor]
    bench.goes_on()


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EINTR, errno.ENOMEM])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_send_that_fails_for_now_loses_nothing(bench: Bench, way: str, number: int) -> None:
    """Python sends it, and learns if the connection is really broken."""
    bench.kernel.next("send", bench.at_broker if way == "up" else bench.at_device, error(number))
    bench.exchange(PACKET, BULK)
    bench.goes_on()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_receive_that_finds_nothing_changes_nothing(bench: Bench, way: str, number: int) -> None:
    """The event is reported again; the session stays lent."""
    descriptor = bench.at_device if way == "up" else bench.at_broker
    bench.kernel.next("recv", descriptor, error(number), error(number))
    loan = bench.lent[descriptor]
    bench.exchange(PACKET)
    assert not bench.kernel.script["recv", descriptor]
    assert bench.lent.get(descriptor) is loan
    bench.goes_on()


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("way", ["up", "down"])
def test_receives_may_end_anywhere(bench: Bench, way: str, most: int) -> None:
    """In a fixed header, in a topic, in the header of a TLS record."""
    descriptor = bench.at_device if way == "up" else bench.at_broker
    bench.kernel.next("recv", descriptor, *[most] * 60)
    bench.exchange(PACKET, PACKET)
    bench.goes_on()


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_receive_that_fails_ends_the_session_with_the_kernels_words(bench: Bench, way: str, number: int) -> None:
    """As it does without the core."""
    bench.kernel.next("recv", bench.at_device if way == "up" else bench.at_broker, error(number))
    bench.device.send(PACKET)
    record = bench.ended()
    assert record.reason is (EndReason.DEVICE_LOST if way == "up" else EndReason.UPSTREAM_LOST)
    words = "reset" if number == errno.ECONNRESET else os.strerror(number)
    assert words in record.detail


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_broken_connection_is_noticed_by_the_send(bench: Bench, way: str) -> None:
    """And what came before is not taken for an orderly end."""
    bench.kernel.next("send", bench.at_broker if way == "up" else bench.at_device, error(errno.EPIPE))

    def break_it() -> None:
        side = bench.session._upstream if way == "up" else bench.session._device
        side.transport.getHandle().shutdown(socket.SHUT_WR)

    bench.gateway.call(break_it)
    bench.device.send(PACKET)
    assert bench.ended().reason in {EndReason.DEVICE_LOST, EndReason.UPSTREAM_LOST}


def test_an_end_behind_data_comes_after_the_data(bench: Bench) -> None:
    """Though the data could not be sent at once: FIN of the device waits behind it."""
    bench.kernel.next("send", bench.at_broker, 10)
    bench.device.send(PACKET + BULK + mqtt.disconnect())
    record = bench.ended()
    assert record.reason is EndReason.DEVICE_DISCONNECT
    sent = mqtt.publish() + PACKET + BULK
    assert record.bytes_up == len(mqtt.connect() + sent + mqtt.disconnect())


def test_a_reset_behind_data_is_one(bench: Bench) -> None:
    """It is passed on as loss, and the data is counted."""
    bench.kernel.next("recv", bench.at_device, None, error(errno.ECONNRESET))
    bench.exchange(PACKET)
    bench.device.send(PACKET)
    record = bench.ended()
    assert (record.reason, record.detail) == (EndReason.DEVICE_LOST, "reset")
    assert record.packets_up == 3


# ---- what OpenSSL does


def test_an_encryption_that_fails_is_python_s(bench: Bench) -> None:
    """Which gets the bytes once more, and only once."""
    bench.openssl.fail("ssl_write", -1)
    bench.exchange(PACKET, BULK)
    bench.goes_on()


def test_an_encryption_that_fails_for_python_too_ends_the_session(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is sent or counted."""
    bench.openssl.fail("ssl_write", -1)
    before = bench.gateway.call(lambda: bench.session.traffic).bytes_up

    def fail(*_: object) -> bytes:
        raise SSL.Error([("", "", "a test")])

    monkeypatch.setattr(DirectCalls, "encrypt", fail)
    bench.device.send(PACKET)
    record = bench.ended()
    assert record.reason is EndReason.UPSTREAM_LOST
    assert record.bytes_up == before


def test_bytes_of_which_openssl_took_a_part_end_the_session(bench: Bench, logged_errors: list[dict[str, Any]]) -> None:
    """To encrypt them again would send that part twice."""
    bench.openssl.fail("ssl_write", 5)
    bench.device.send(PACKET)
    assert bench.ended().reason is EndReason.INTERNAL_ERROR
    logged_errors.clear()


@pytest.mark.parametrize("results", [(0,), (-1,)])
def test_ciphertext_that_stays_in_openssl_is_sent_by_python(bench: Bench, results: tuple[int, ...]) -> None:
    """Before anything else."""
    bench.openssl.fail("bio_read", *results)
    bench.exchange(PACKET, PACKET)
    bench.goes_on()


def test_ciphertext_that_openssl_cannot_take_ends_the_session(
    bench: Bench, logged_errors: list[dict[str, Any]]
) -> None:
    """It is lost: there is no memory."""
    bench.openssl.fail("bio_write", -1)
    bench.device.send(PACKET)
    assert bench.ended().reason is EndReason.INTERNAL_ERROR
    logged_errors.clear()


class RealBroker:
    """`openssl s_server`: what is written to it is sent; "K" at the beginning is a KeyUpdate that asks for another."""

    def __init__(self, ca: trustme.CA, directory: Path) -> None:
        path = directory / "broker.pem"
        ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
        self.port = free_port()
        options = ["-accept", f"127.0.0.1:{self.port}", "-cert", str(path), "-key", str(path), "-tls1_3"]
        self._process = subprocess.Popen(
            [require_tool("openssl"), "s_server", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self.seen = b""
        eventually(lambda: b"ACCEPT" in self.read(), "openssl listens")

    def read(self) -> bytes:
        """Return all that has been printed so far."""
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], 0)[0]:
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                break
            self.seen += data
        return self.seen

    def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.parametrize("asks", [b"K\n", b"k\n"])
def test_a_key_update_while_lent_is_answered(
    virtual: VirtualCore,
    start_gateway: StartGateway,
    ca: trustme.CA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asks: bytes,
) -> None:
    """By OpenSSL, through Python; then the session is lent again, under the new keys (RFC 8446, 4.6.3)."""
    monkeypatch.delenv(choosing.SWITCH, raising=False)
    monkeypatch.setattr(choosing, "_tried", lambda: choosing.Choice(virtual))
    broker = RealBroker(ca, tmp_path)
    try:
        gateway = start_gateway(upstream=broker.port)
        with Device(gateway.port) as device:
            device.send(mqtt.connect())
            eventually(lambda: b"sensor-1" in broker.read(), "CONNECT at the broker")
            broker.write(mqtt.connack())
            assert device.read(4) == mqtt.connack()
            lent, recalled = gateway.service._relay._lent, recalls(gateway)
            for number in range(3):
                up, down = (mqtt.publish(payload=b"%s %d." % (way, number)) for way in (b"up", b"down"))
                device.send(up)
                eventually(lambda up=up: up[-5:] in broker.read(), "a message at the broker")
                broker.write(down)
                assert device.read(len(down)) == down
                eventually(lambda: len(lent) == 2, "the session is lent")
                del recalled[:]
                broker.write(asks)
                eventually(lambda: recalled, "the KeyUpdate is handed over")
            assert not gateway.ended
            device.send(mqtt.disconnect())
            device.read_to_end()
        assert gateway.wait_ended().reason is EndReason.DEVICE_DISCONNECT
    finally:
        broker.stop()


def recalls(gateway: RunningGateway) -> list[Any]:
    """Return a list that grows each time that a session is taken back."""
    reactor = gateway.service._relay
    calls: list[Any] = []
    reclaim = type(reactor).reclaim

    def noted(*descriptors: int) -> None:
        calls.append(descriptors)
        reclaim(reactor, *descriptors)

    reactor.reclaim = noted
    return calls


# ---- memory


def test_no_memory_for_what_is_handed_over_ends_the_session(bench: Bench, logged_errors: list[dict[str, Any]]) -> None:
    """Bytes are lost, so it must not go on; other sessions do."""
    other = Device(bench.gateway.port)
    other.send(mqtt.connect("another"))
    other.read(4)
    bench.kernel.next("send", bench.at_broker, 5)
    bench.core.fail_after(0)
    bench.device.send(PACKET)
    assert bench.gateway.wait_ended().reason is EndReason.INTERNAL_ERROR
    other.send(PACKET)
    assert other.read(len(PACKET)) == PACKET
    other.close()
    bench.ended()
    logged_errors.clear()


# ---- the gateway's own doings while a session is lent


@pytest.mark.parametrize("discard_will", [False, True])
def test_a_stop_while_bytes_wait_sends_them_first(start_bench: Callable[..., Bench], discard_will: bool) -> None:
    """Python's buffer has them by then; DISCONNECT comes behind them."""
    bench = start_bench(5)
    packet = mqtt.publish(payload=bytes(5000), version=5)
    bench.kernel.next("send", bench.at_device, 100)
    bench.device.send(packet)
    assert bench.device.read(len(packet)) == packet
    bench.gateway.call(lambda: bench.session.stop(EndReason.GATEWAY_STOPPING, discard_will=discard_will))
    assert bench.device.read_to_end()[0] == 0xE0
    assert bench.ended().reason is EndReason.GATEWAY_STOPPING


def test_a_reload_leaves_what_is_lent_alone(bench: Bench) -> None:
    """Established sessions go on under the configuration that they began with."""
    loan = bench.lent[bench.at_device]
    bench.gateway.change(limits={"max_packet_size": 300})
    bench.exchange(BULK)
    assert bench.lent.get(bench.at_device) in {loan, None}
    bench.goes_on()


def test_a_stop_of_the_relay_takes_everything_back(bench: Bench) -> None:
    """Whatever is lent at that moment."""
    bench.gateway.stop()
    assert not bench.lent
    bench.device.read_to_end()


# ---- what the core may touch


class Pairs:
    """Pairs of descriptors and an epoll, without a gateway; where a test says so, descriptors are used again."""

    def __init__(self, core: VirtualCore) -> None:
        self.core = core
        self.epoll = select.epoll()
        self.opened: list[socket.socket] = []

    def make(self) -> tuple[Any, PublicCalls, list[socket.socket]]:
        """Return a pair that is not lent, its broker's TLS, and its sockets: device, lent, lent, broker."""
        client, server = connected_pair()
        keep, *pointers = DirectCalls(client).addresses()
        framers = [Framer(sender, ProtocolVersion.MQTT_3_1_1, 0x100000) for sender in Sender]
        tables = [part for framer in framers for part in (framer.tables, framer.max_packet_size)]
        pair = self.core.Pair(keep, tuple(pointers), *tables)
        device, at_device = socket.socketpair()
        at_broker, broker = socket.socketpair()
        sockets = [device, at_device, at_broker, broker]
        self.opened += sockets
        for each in (at_device, at_broker):
            each.setblocking(False)
            self.epoll.register(each, select.EPOLLIN)
        return pair, PublicCalls(server), sockets

    def lend(self, pair: Any, sockets: list[socket.socket], owner: object) -> None:
        pair.lend(sockets[1].fileno(), sockets[2].fileno(), owner, 0, b"", 0, b"", 0, b"")

    def poll(self) -> tuple[int, list[Any], list[tuple[int, int]]]:
        result: tuple[int, list[Any], list[tuple[int, int]]] = self.core.poll(self.epoll.fileno(), 0, 64)
        return result

    def close(self) -> None:
        self.epoll.close()
        for each in self.opened:
            each.close()


@pytest.fixture
def pairs(virtual: VirtualCore) -> Iterator[Pairs]:
    made = Pairs(virtual)
    yield made
    made.close()


def steps_of(tls: PublicCalls, sockets: list[socket.socket]) -> list[Callable[[], object]]:
    """Return what may happen to a lent pair before it is closed."""
    device, _, _, broker = sockets
    record = tls.encrypt(PACKET)
    return [
        lambda: device.sendall(PACKET),
        lambda: device.sendall(PACKET[:1]),
        lambda: device.sendall(PACKET[1:9]),
        lambda: device.sendall(PACKET[9:] + PACKET),
        lambda: broker.sendall(record[:3]),
        lambda: broker.sendall(record[3:40]),
        lambda: broker.sendall(record[40:]),
        lambda: device.sendall(b"\xe0\0"),
    ]


@pytest.mark.parametrize(("steps", "is_polled"), list(product(range(9), (True, False))))
def test_descriptors_that_were_closed_and_are_used_again_are_not_touched(
    pairs: Pairs, steps: int, is_polled: bool
) -> None:
    """A pair is taken back and closed at any point; what has its descriptors now is nobody's that the core knows."""
    pair, tls, sockets = pairs.make()
    owner = object()
    pairs.lend(pair, sockets, owner)
    for step in steps_of(tls, sockets)[:steps]:
        step()
        if is_polled:
            pairs.poll()
    pair.take_back()
    numbers = {each.fileno() for each in sockets[1:3]}
    for each in sockets:
        each.close()
    new_pair, new_tls, new = pairs.make()
    assert {each.fileno() for each in new[1:3]} & numbers
    new[0].sendall(PACKET)
    new[3].sendall(b"not TLS")
    count, handed, others = pairs.poll()
    assert (count, handed) == (2, [])
    assert {descriptor for descriptor, _ in others} == {each.fileno() for each in new[1:3]}
    assert new[1].recv(1000) == PACKET
    assert new[2].recv(1000) == b"not TLS"
    pairs.lend(new_pair, new, owner)
    new[0].sendall(PACKET)
    assert pairs.poll() == (1, [], [])
    assert new_tls.decrypt(new[3].recv(1000), 1) == (PACKET, None)
    new_pair.take_back()


def test_a_pair_that_was_handed_over_takes_nothing_from_its_successor(pairs: Pairs) -> None:
    """Its descriptors may be another's by the time that it is taken back."""
    pair, _, sockets = pairs.make()
    pairs.lend(pair, sockets, "first")
    sockets[0].sendall(b"\xe0\0")
    assert pairs.poll()[1] == ["first"]
    numbers = {each.fileno() for each in sockets[1:3]}
    for each in sockets:
        each.close()
    new_pair, new_tls, new = pairs.make()
    assert {each.fileno() for each in new[1:3]} & numbers
    pairs.lend(new_pair, new, "second")
    assert pair.take_back()[-2] == b"\xe0\0"
    new[0].sendall(PACKET)
    assert pairs.poll() == (1, [], [])
    assert new_tls.decrypt(new[3].recv(1000), 1) == (PACKET, None)
    new_pair.take_back()


@pytest.mark.parametrize("way", ["taken back", "handed over", "dropped"])
def test_an_ssl_object_is_not_used_once_its_pair_is_withdrawn(pairs: Pairs, virtual: VirtualCore, way: str) -> None:
    """The spy sees each pointer that the core gives to OpenSSL; a pair that is lent keeps its own alive."""
    spy = FailingOpenSSL(virtual)
    try:
        pair, _, sockets = pairs.make()
        pairs.lend(pair, sockets, "owner")
        if way == "taken back":
            pair.take_back()
        elif way == "handed over":
            sockets[0].sendall(b"\xe0\0")
            pairs.poll()
        else:
            del pair
            gc.collect()
        spy.pointers.clear()
        sockets[0].sendall(PACKET)
        sockets[3].sendall(bytes(100))
        pairs.poll()
        assert bool(spy.pointers) == (way == "dropped")
    finally:
        spy.restore()


def test_the_table_has_one_reference_to_a_lent_pair(pairs: Pairs) -> None:
    """While it is lent, and no longer."""
    pair, _, sockets = pairs.make()
    before = sys.getrefcount(pair)
    pairs.lend(pair, sockets, "owner")
    assert sys.getrefcount(pair) == before + 1
    pair.take_back()
    assert sys.getrefcount(pair) == before
    pairs.lend(pair, sockets, "owner")
    sockets[0].sendall(b"\xe0\0")
    assert pairs.poll()[1] == ["owner"]
    assert sys.getrefcount(pair) == before
    pair.take_back()
    assert sys.getrefcount(pair) == before


def test_descriptors_beyond_the_table_are_not_lent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python relays such a session; the core refuses them, too."""
    bench.gateway.call(bench.lent[bench.at_device].recall)
    monkeypatch.setattr(bench.core.module, "DESCRIPTORS", bench.at_device)
    bench.exchange(PACKET, BULK)
    assert not bench.lent
    monkeypatch.undo()
    bench.goes_on()


def test_the_core_refuses_descriptors_beyond_its_table(pairs: Pairs) -> None:
    """And negative ones."""
    pair, _, sockets = pairs.make()
    for number in (-1, pairs.core.DESCRIPTORS, 1 << 30):
        with pytest.raises(ValueError, match="cannot be lent"):
            pair.lend(sockets[1].fileno(), number, "owner", 0, b"", 0, b"", 0, b"")
        with pytest.raises(ValueError, match="cannot be lent"):
            pair.lend(number, sockets[1].fileno(), "owner", 0, b"", 0, b"", 0, b"")


# ---- faults that are planted in the source

# What is planted, the test that must notice it (as for `-k`), and how: the first text of a pair becomes the second.
FAULTS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "a short send loses the rest": (
        "short_send",
        (("hand_over(pair, rest, data + gone, size - gone, 0);", "hand_over(pair, NOTHING, NULL, 0, 0);"),),
    ),
    "a short send sends all again": (
        "short_send",
        (("hand_over(pair, rest, data + gone, size - gone, 0);", "hand_over(pair, rest, data, size, 0);"),),
    ),
    "a send that fails counts as sent": (
        "fails_for_now",
        (("sent < 0 ? 0 : (size_t)sent", "sent < 0 ? size : (size_t)sent"),),
    ),
    "EAGAIN is an end": (
        "finds_nothing",
        (("else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)", "else"),),
    ),
    "EINTR is an end": (
        "finds_nothing",
        ((" && errno != EINTR)\n        hand_over(pair, ended", ")\n        hand_over(pair, ended"),),
    ),
    "an errno is an orderly end": (
        "kernels_words",
        (("hand_over(pair, ended, NULL, 0, errno);", "hand_over(pair, ended, NULL, 0, 0);"),),
    ),
    "an errno is not noticed": ("kernels_words", (("hand_over(pair, ended, NULL, 0, errno);", ";"),)),
    "what is held is forgotten": (
        "receives_may_end_anywhere",
        (("stream->held_size = size - found->passed;", "stream->held_size = 0;"),),
    ),
    "a failed encryption counts as done": (
        "encryption_that_fails",
        (("if (written != (int)found.passed) {", "if (written == 0) {"),),
    ),
    "a partial encryption is done again": (
        "of_which_openssl_took_a_part",
        (("written > 0 ? FAILED : FROM_DEVICE", "FROM_DEVICE"),),
    ),
    "a failed encryption is committed": (
        "encryption_that_fails",
        (
            (
                "    if (found.passed > 0) {\n        openssl.clear_errors();",
                "commit(&pair->up, data, size, &found);\n    if (found.passed > 0) {\n openssl.clear_errors();",
            ),
        ),
    ),
    "ciphertext that cannot be read is forgotten": (
        "stays_in_openssl",
        (("hand_over(pair, TO_BROKER, cipher, taken > 0 ? (size_t)taken : 0, 0);", ";"),),
    ),
    "ciphertext that cannot be written is forgotten": (
        "cannot_take",
        (
            (
                "hand_over(pair, FAILED, NULL, 0, 0);\n        return;\n    }\n    size_t records",
                "return;\n    }\n    size_t records",
            ),
        ),
    ),
    "a record that is no data counts as none": (
        "key_update",
        (("hand_over(pair, TLS_ENDED, plain + HELD, *filled, got);\n            return false;", "continue;"),),
    ),
    "no memory is not told of": ("no_memory", (("pair->handed = FAILED;", "pair->handed = NOTHING;"),)),
    "the end is reported before the data": (
        "behind_data",
        (
            (
                "    if (got > 0) {\n        *size = (size_t)got;",
                "    if (got > 0 && got < 60) {\n        *size = (size_t)got;",
            ),
        ),
    ),
    "a pair that is taken back stays in the table": (
        "used_again",
        (("    withdraw(pair);\n    Py_CLEAR(pair->data);", "    Py_CLEAR(pair->data);"),),
    ),
    "a pair takes another out of the table": (
        "successor",
        (("    if (lent(pair->device) != pair)\n        return;\n    slots", "    slots"),),
    ),
    "a pair that is handed over stays in the table": (
        "handed or withdrawn",
        (
            (
                "adds the owner to what it reports. */\n    slots[pair->device] = slots[pair->broker] = NULL;",
                "adds the owner to what it reports. */\n    slots[pair->device] = NULL;",
            ),
        ),
    ),
    "the broker's slot stays": (
        "used_again",
        (
            (
                "        return;\n    slots[pair->device] = slots[pair->broker] = NULL;\n    Py_DECREF(pair);",
                "        return;\n    slots[pair->device] = NULL;\n    Py_DECREF(pair);",
            ),
        ),
    ),
    "a lent pair is not kept": (
        "one_reference",
        (("    Py_INCREF(self);\n    slots[device]", "    slots[device]"),),
    ),
    "a pair that is handed over is kept": (
        "one_reference",
        (("Py_DECREF(pair); /* the table's; the owner has one of its own */", ""),),
    ),
    "a pair that is taken back is kept": (
        "one_reference",
        (("slots[pair->broker] = NULL;\n    Py_DECREF(pair);", "slots[pair->broker] = NULL;"),),
    ),
    "descriptors beyond the table are lent": (
        "beyond_its_table",
        (("return descriptor >= 0 && descriptor < DESCRIPTORS;", "return descriptor >= 0;"),),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str) -> None:
    """By the test that is named with it, in a process of its own: such a core may do anything."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", __file__]
    options = ["-k", f"({FAULTS[name][0]}) and not planted", "-o", "faulthandler_timeout=60"]
    environment = {**os.environ, PLANTED: name}
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in {1, -6, -11}, done.stdout
