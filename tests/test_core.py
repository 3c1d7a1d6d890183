"""The compiled core beside Python: the same verdicts on every stream and every cut, and nothing lost at a hand-over.

Where the core was not built there is nothing to compare; `.ci/run` builds it, so there nothing is left out.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL

from gateway.errors import EndReason
from gateway.mqtt.checking import CheckingFramer
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import ProtocolVersion
from gateway.relay import core as choosing
from gateway.relay.carrier import Handed
from gateway.tls.channel import TLSChannel
from gateway.tls.choice import connected_pair
from gateway.tls.direct import DirectCalls
from gateway.tls.engine import PublicCalls
from tests import mqtt_packets as mqtt
from tests.core.virtual import Records, build
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, connect_version, eventually
from tests.leftovers import Leftovers
from tests.test_mqtt_framer import valid_packets

if choosing.engine().core is None and os.environ.get(choosing.SWITCH) != "1":
    pytest.skip(choosing.engine().why, allow_module_level=True)

WAYS = list(product((Framer, CheckingFramer), Sender, ProtocolVersion))
LIMIT = 30_000

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]


@pytest.fixture(scope="module")
def core() -> Any:
    """Return the core, whatever the environment says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(choosing.SWITCH, raising=False)
        choice = choosing.engine()
    assert choice.core is not None, choice.why
    return choice.core


# ---- framing


@st.composite
def streams(draw: st.DrawFn, sender: Sender, version: int) -> bytes:
    """Packets in order, some with a byte or two that is not."""
    packets = [
        *valid_packets(sender, version),
        mqtt.publish("é/€/😀", version=version),
        mqtt.publish(version=version, qos=1, payload=b""),
    ]
    if version == 5:
        properties = b"\x01\1\x02\0\0\0\5" + mqtt.text(0x03, "c") + mqtt.text(0x08, "r") + b"\x09\0\1x"
        packets.append(mqtt.publish(version=5, properties=properties + mqtt.user_property() + b"\x0b\x81\1"))
    stream = bytearray(b"".join(draw(st.lists(st.sampled_from(packets), min_size=1, max_size=6))))
    for _ in range(draw(st.integers(0, 3))):
        where = draw(st.integers(0, min(len(stream), 200) - 1))
        stream[where] = draw(st.sampled_from((0, 1, 2, 3, 0x23, 0x26, 0x2B, 0x30, 0x80, 0xC3, 0xED, 0xFF)))
    return bytes(stream)


def pieces(draw: Any, stream: bytes) -> list[bytes]:
    edges = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    return [stream[start:end] for start, end in zip([0, *edges], [*edges, len(stream)], strict=True)]


@pytest.mark.parametrize(("make", "sender", "version"), WAYS)
@given(data=st.data())
def test_the_core_passes_what_python_passes_and_nothing_else(
    core: Any, make: type[Framer], sender: Sender, version: ProtocolVersion, data: st.DataObject
) -> None:
    """However the stream is cut, and from wherever Python stands."""
    framer = make(sender, version, LIMIT)
    for piece in pieces(data.draw, data.draw(streams(sender, int(version)))):
        before, packets = framer.lend(), framer.packets
        given = framer.feed(piece)
        if before is None:
            continue
        skip, held = before
        found = core.walk(framer.tables, LIMIT, skip, held + piece)
        if found is not None:
            passed, skip_after, counted = found
            assert framer.error is None
            assert given == (held + piece)[:passed]
            assert framer.packets == packets + counted
            assert framer.lend() == (skip_after, (held + piece)[passed:])


@pytest.mark.parametrize(("make", "sender", "version"), WAYS)
def test_the_core_passes_what_is_ordinary(
    core: Any, make: type[Framer], sender: Sender, version: ProtocolVersion
) -> None:
    """Else the other tests would hold for a core that passes nothing."""
    for packet in valid_packets(sender, int(version)):
        is_seldom = packet[0] >> 4 in {8, 9, 10, 11, 15} and make is CheckingFramer
        is_padded = packet[2:5] == b"\x80\x80\0"
        if not is_seldom and not is_padded and packet[0] >> 4 != 15:
            tables = make(sender, version, LIMIT).tables
            assert core.walk(tables, LIMIT, 0, packet) == (len(packet), 0, 1), packet


@given(st.binary(max_size=4))
def test_the_core_knows_utf8_as_python_does(core: Any, raw: bytes) -> None:
    """RFC 3629, but for U+0000 and the wildcards."""
    topic = raw or b"x"
    packet = mqtt.packet(0x30, mqtt.binary(topic))
    try:
        may_pass = {"\0", "+", "#"}.isdisjoint(topic.decode())
    except UnicodeDecodeError:
        may_pass = False
    tables = CheckingFramer(Sender.DEVICE, ProtocolVersion.MQTT_3_1_1, LIMIT).tables
    assert (core.walk(tables, LIMIT, 0, packet) is not None) == may_pass


@given(data=st.data())
def test_the_core_counts_records_as_the_channel_does(data: st.DataObject) -> None:
    """Headers and all, cut anywhere."""
    sizes = data.draw(st.lists(st.integers(0, 300), max_size=6))
    stream = b"".join(b"\x17\x03\x03" + size.to_bytes(2, "big") + bytes(size) for size in sizes)
    channel = TLSChannel.__new__(TLSChannel)
    channel.take_back(0, b"")
    state = Records()
    for piece in pieces(data.draw, stream):
        assert build().records(state, piece) == channel._completed_records(piece)
        header = bytes(state.header[: state.header_size])
        assert (state.missing, header) == (channel._missing, channel._partial_header)


# ---- a pair, by itself


def pair_with_tickets() -> tuple[SSL.Connection, SSL.Connection, bytes]:
    """Return a client, a server, and the tickets that the client has not been given."""
    context = connected_pair()[0].get_context()
    client, server = SSL.Connection(context, None), SSL.Connection(context, None)
    client.set_connect_state()
    server.set_accept_state()
    for end, other in ((client, server), (server, client), (client, server)):
        with contextlib.suppress(SSL.WantReadError):
            end.do_handshake()
        other.bio_write(end.bio_read(100_000))
    server.do_handshake()
    return client, server, server.bio_read(100_000)


class Bench:
    """A lent pair between two sockets."""

    def __init__(self, core: Any, client: SSL.Connection | None = None, broker: SSL.Connection | None = None) -> None:
        self.core = core
        if client is None or broker is None:
            client, broker = connected_pair()
        self.client = client
        self.tls = PublicCalls(broker)
        self.server = broker
        self.engine = DirectCalls(client)
        keep, *pointers = self.engine.addresses()
        framers = [Framer(sender, ProtocolVersion.MQTT_3_1_1, 0x100000) for sender in Sender]
        tables = [part for framer in framers for part in (framer.tables, framer.max_packet_size)]
        self.pair = core.Pair(keep, tuple(pointers), *tables)
        self.device, self.at_device = socket.socketpair()
        self.broker, self.at_broker = socket.socketpair()
        self.epoll = select.epoll()
        for each in (self.at_device, self.at_broker):
            each.setblocking(False)
            self.epoll.register(each, select.EPOLLIN)
        self.owner = object()
        self.lend()

    def lend(self) -> None:
        self.pair.lend(self.at_device.fileno(), self.at_broker.fileno(), self.owner, 0, b"", 0, b"", 0, b"")

    def turn(self) -> tuple[int, list[Any], list[Any]]:
        result: tuple[int, list[Any], list[Any]] = self.core.poll(self.epoll.fileno(), 0, 64)
        return result

    def handed(self) -> tuple[int, bytes | None, int]:
        """Take a turn, after which there must be a hand-over; return it."""
        _, handed, _ = self.turn()
        assert handed == [self.owner]
        why, data, result = self.pair.take_back()[-3:]
        return why, data, result

    def close(self) -> None:
        for each in (self.device, self.at_device, self.broker, self.at_broker, self.epoll):
            each.close()


@pytest.fixture
def bench(core: Any) -> Iterator[Bench]:
    bench = Bench(core)
    yield bench
    with contextlib.suppress(RuntimeError):
        bench.pair.take_back()
    bench.close()


PACKET = mqtt.publish(payload=b"ordinary")


def test_a_pair_counts_what_it_relays(bench: Bench) -> None:
    """Bytes and packets of both ways, and that the device was heard, once."""
    bench.device.sendall(PACKET * 3)
    bench.broker.sendall(bench.tls.encrypt(PACKET))
    assert bench.turn() == (2, [], [])
    assert bench.tls.decrypt(bench.broker.recv(1000), 1) == (PACKET * 3, None)
    assert bench.device.recv(1000) == PACKET
    assert bench.pair.settle() == (3 * len(PACKET), len(PACKET), 3, 1, True)
    assert bench.pair.settle() == (0, 0, 0, 0, False)


def test_what_costs_much_shares_several_turns(core: Any) -> None:
    """So many bytes at a time; those for whom there was no time come first then, though the others have more."""
    benches = [Bench(core) for _ in range(12)]
    with select.epoll() as epoll:
        for bench in benches:
            epoll.register(bench.at_device, select.EPOLLIN)
            bench.device.sendall(mqtt.publish(payload=bytes(60_000)) * 2)
        passed = []
        for _ in range(2):
            count, handed, others = core.poll(epoll.fileno(), 0, 64)
            assert (handed, others) == ([], [])
            passed.append([bench.pair.settle()[0] for bench in benches])
        assert 500_000 < sum(passed[0]) < 650_000
        assert count == 64  # there is more
        assert all(map(any, zip(*passed, strict=True)))
        for _ in range(5):
            core.poll(epoll.fileno(), 0, 64)
        assert core.poll(epoll.fileno(), 0, 64) == (0, [], [])
    for bench in benches:
        bench.pair.take_back()
        bench.close()


def test_hand_overs_share_several_turns(core: Any) -> None:
    """Each is work for Python."""
    benches = [Bench(core) for _ in range(12)]
    with select.epoll() as epoll:
        for bench in benches:
            epoll.register(bench.at_device, select.EPOLLIN)
            bench.device.sendall(mqtt.disconnect())
        owners: list[Any] = []
        for _ in range(3):
            _, handed, _ = core.poll(epoll.fileno(), 0, 64)
            assert len(handed) == 4
            owners += handed
            for bench in benches:
                if bench.owner in handed:
                    bench.pair.take_back()
                    epoll.unregister(bench.at_device)
        assert set(owners) == {bench.owner for bench in benches}
    for bench in benches:
        bench.close()


def test_what_the_device_sends_unusually_is_handed_over_untouched(bench: Bench) -> None:
    """The framer has not seen any of it, so it stands where it stood."""
    bench.device.sendall(PACKET[:5])
    assert bench.turn() == (1, [], [])
    bench.device.sendall(PACKET[5:] + b"\xe0\0")
    _, handed, _ = bench.turn()
    assert handed == [bench.owner]
    state = bench.pair.take_back()
    assert state == (len(PACKET) - 5, b"", 0, b"", 0, b"", Handed.FROM_DEVICE, PACKET[5:] + b"\xe0\0", 0)


def test_what_the_broker_sends_unusually_is_handed_over_decrypted(bench: Bench) -> None:
    """A reserved type, say."""
    bench.broker.sendall(bench.tls.encrypt(PACKET + b"\0\0"))
    assert bench.handed() == (Handed.FROM_BROKER, PACKET + b"\0\0", 0)


def test_a_head_that_is_cut_off_waits_in_the_core(bench: Bench) -> None:
    """Nothing of the packet passes before; then all of it does."""
    bench.device.sendall(PACKET + b"\x30")
    bench.turn()
    assert bench.tls.decrypt(bench.broker.recv(1000), 1) == (PACKET, None)
    bench.device.sendall(PACKET[1:])
    bench.turn()
    assert bench.tls.decrypt(bench.broker.recv(1000), 1) == (PACKET, None)


def test_what_is_not_application_data_is_handed_over_with_what_came_before(bench: Bench) -> None:
    """As close_notify is; why OpenSSL stopped can still be asked."""
    last = bench.tls.encrypt(PACKET)
    bench.server.shutdown()
    bench.broker.sendall(last + bench.tls.waiting())
    why, data, result = bench.handed()
    assert (why, data) == (Handed.TLS_ENDED, PACKET)
    assert isinstance(bench.engine.why(result), SSL.ZeroReturnError)


def test_what_is_for_openssl_alone_is_handed_over(core: Any) -> None:
    """Tickets here; after a KeyUpdate, OpenSSL would have an answer to send.  What came with them is not lost."""
    client, server, tickets = pair_with_tickets()
    bench = Bench(core, client, server)
    bench.broker.sendall(tickets + bench.tls.encrypt(PACKET))
    why, data, result = bench.handed()
    assert (why, data) == (Handed.TLS_ENDED, PACKET)
    assert isinstance(bench.engine.why(result), SSL.WantReadError)
    bench.lend()
    bench.broker.sendall(bench.tls.encrypt(PACKET))
    assert bench.turn() == (1, [], [])
    bench.pair.take_back()
    bench.close()


def test_a_forged_record_is_handed_over(bench: Bench) -> None:
    """After what was whole."""
    whole, forged = bench.tls.encrypt(PACKET), bytearray(bench.tls.encrypt(PACKET))
    forged[-1] ^= 1
    bench.broker.sendall(whole + bytes(forged))
    why, data, result = bench.handed()
    assert (why, data) == (Handed.TLS_ENDED, PACKET)
    assert "mac" in str(bench.engine.why(result)).lower()


@pytest.mark.parametrize("end", ["device", "broker"])
def test_the_end_of_a_connection_is_handed_over(bench: Bench, end: str) -> None:
    """Behind the bytes that came before it."""
    getattr(bench, end).sendall(PACKET if end == "device" else bench.tls.encrypt(PACKET))
    getattr(bench, end).shutdown(socket.SHUT_WR)
    assert bench.turn() == (1, [], [])
    why, data, result = bench.handed()
    assert (why, data, result) == (Handed.DEVICE_ENDED if end == "device" else Handed.BROKER_ENDED, b"", 0)


def test_an_event_of_another_kind_is_handed_over_and_reported(bench: Bench) -> None:
    """Both ends closed: EPOLLHUP comes with it."""
    bench.device.close()
    _, handed, others = bench.turn()
    assert handed == [bench.owner]
    assert others == [(bench.at_device.fileno(), select.EPOLLIN | select.EPOLLHUP)]
    assert bench.pair.take_back()[-3:] == (Handed.NOTHING, b"", 0)


@pytest.mark.parametrize("way", ["up", "down"])
def test_what_the_kernel_does_not_take_is_handed_over_in_order(bench: Bench, way: str) -> None:
    """All of it arrives if what was handed over is sent next."""
    sender, receiver = (bench.device, bench.broker) if way == "up" else (bench.broker, bench.device)
    outgoing = bench.at_broker if way == "up" else bench.at_device
    outgoing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    packet = mqtt.publish(payload=bytes(range(256)) * 40)
    sent, handed = 0, []
    while not handed:
        sender.sendall(packet if way == "up" else bench.tls.encrypt(packet))
        sent += 1
        _, handed, _ = bench.turn()
    why, data, _ = bench.pair.take_back()[-3:]
    assert why == (Handed.TO_BROKER if way == "up" else Handed.TO_DEVICE)
    arrived = b""
    receiver.setblocking(False)
    for rest in (b"", data):
        view = memoryview(rest)
        while True:
            with contextlib.suppress(BlockingIOError):
                arrived += receiver.recv(1 << 20)
                continue
            if not view:
                break
            with contextlib.suppress(BlockingIOError):
                view = view[outgoing.send(view) :]
    plaintext = arrived if way == "down" else bench.tls.decrypt(arrived, sent)[0]
    assert plaintext == packet * sent


def test_descriptors_are_not_lent_twice(bench: Bench, core: Any) -> None:
    """Neither by the same pair nor by another."""
    with pytest.raises(ValueError, match="cannot be lent"):
        bench.lend()
    other = Bench(core)
    with pytest.raises(ValueError, match="cannot be lent"):
        bench.pair.lend(other.at_device.fileno(), other.at_broker.fileno(), bench.owner, 0, b"", 0, b"", 0, b"")
    other.pair.take_back()
    with pytest.raises(ValueError, match="cannot be lent"):
        other.pair.lend(bench.at_device.fileno(), other.at_broker.fileno(), other.owner, 0, b"", 0, b"", 0, b"")
    other.close()


def test_after_a_hand_over_the_core_touches_nothing(bench: Bench) -> None:
    """What comes next is reported as an event; a descriptor that is lent anew is the new pair's."""
    bench.device.sendall(b"\xe0\0")
    assert bench.turn()[1] == [bench.owner]
    bench.device.sendall(PACKET)
    bench.broker.sendall(b"no TLS at all")
    events = {(bench.at_device.fileno(), select.EPOLLIN), (bench.at_broker.fileno(), select.EPOLLIN)}
    count, handed, others = bench.turn()
    assert (count, handed, set(others)) == (2, [], events)
    assert bench.at_device.recv(1000) == PACKET
    bench.pair.take_back()
    bench.at_broker.recv(1000)
    bench.lend()
    bench.device.sendall(PACKET)
    assert bench.turn() == (1, [], [])


def test_the_second_event_of_a_pair_that_was_handed_over_is_python_s(bench: Bench) -> None:
    """In the same batch."""
    bench.device.sendall(b"\xe0\0")
    bench.broker.sendall(bench.tls.encrypt(b"\0\0"))
    count, handed, others = bench.turn()
    assert (count, handed, len(others)) == (2, [bench.owner], 1)


def test_a_lent_pair_keeps_what_it_points_to(core: Any) -> None:
    """Though nobody else has a reference to it any more."""
    bench = Bench(core)
    tls, device, broker, epoll = bench.tls, bench.device, bench.broker, bench.epoll
    kept = bench.at_device, bench.at_broker, bench.server
    del bench.pair, bench.client, bench.engine
    gc.collect()
    device.sendall(PACKET)
    assert core.poll(epoll.fileno(), 0, 64) == (1, [], [])
    assert tls.decrypt(broker.recv(1000), 1) == (PACKET, None)
    device.sendall(b"\xe0\0")
    assert core.poll(epoll.fileno(), 0, 64)[1] == [bench.owner]
    for each in (*kept[:2], device, broker, epoll):
        each.close()


@pytest.mark.parametrize(
    "arguments",
    [
        (-1, b"", 0, b"", 0, b""),
        (1, b"x", 0, b"", 0, b""),
        (0, bytes(257), 0, b"", 0, b""),
        (0, b"", 0, b"", 0, b"12345"),
    ],
)
def test_a_state_that_cannot_be_is_refused(bench: Bench, arguments: tuple[Any, ...]) -> None:
    """Before anything is lent."""
    bench.pair.take_back()
    with pytest.raises(ValueError, match="cannot"):
        bench.pair.lend(bench.at_device.fileno(), bench.at_broker.fileno(), bench.owner, *arguments)
    bench.lend()


# ---- sessions of a gateway


def echo(connection: BrokerConnection) -> None:
    """Accept, and send every packet back."""
    version = connect_version(connection.read_packet())
    connection.send(mqtt.connack(version=version))
    while True:
        connection.send(connection.read_packet())


def lent_to(gateway: RunningGateway) -> dict[int, Any]:
    """Return who has lent what."""
    lent: dict[int, Any] = gateway.service._relay._lent
    return lent


OPENED: list[Device] = []


def established(gateway: RunningGateway, version: int = 4, client_identifier: str = "sensor-1") -> Device:
    device = Device(gateway.port)
    OPENED.append(device)
    device.send(mqtt.connect(client_identifier, version=version))
    assert device.read(len(mqtt.connack(version=version))) == mqtt.connack(version=version)
    return device


def relaying(gateway: RunningGateway, version: int = 4) -> Device:
    """Return a device whose session is lent."""
    device = established(gateway, version)
    packet = mqtt.publish(version=version)
    for _ in range(2):
        device.send(packet)
        assert device.read(len(packet)) == packet
    return device


@pytest.fixture
def compiled(
    start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningGateway]:
    """Return a gateway with the core, whatever the environment says, and a broker that sends everything back."""
    monkeypatch.delenv(choosing.SWITCH, raising=False)
    gateway = start_gateway(upstream=start_broker(serve=echo).port, timeouts={"close": 0.3})
    assert gateway.service.engine.core is not None
    yield gateway
    while OPENED:
        OPENED.pop().close()


def test_an_established_session_is_lent_and_its_traffic_known(compiled: RunningGateway) -> None:
    """Both its descriptors; what is asked meanwhile is as if Python had relayed."""
    device = relaying(compiled)
    eventually(lambda: len(lent_to(compiled)) == 2, "the session is lent")
    (session,) = compiled.service.gateway.sessions
    traffic = compiled.call(lambda: session.traffic)
    packet = mqtt.publish()
    connect, connack = mqtt.connect(), mqtt.connack()
    assert (traffic.bytes_up, traffic.bytes_down) == (len(connect) + 2 * len(packet), len(connack) + 2 * len(packet))
    assert (traffic.packets_up, traffic.packets_down) == (3, 3)
    device.send(mqtt.disconnect())
    record = compiled.wait_ended()
    assert record.reason is EndReason.DEVICE_DISCONNECT
    assert (record.bytes_up, record.packets_up) == (traffic.bytes_up + 2, 4)
    assert not lent_to(compiled)


@pytest.mark.parametrize("version", [3, 4, 5])
@pytest.mark.parametrize(
    ("offence", "reason"),
    [
        (b"\x30\x03\0\x01+", EndReason.MALFORMED_PACKET),
        (b"\0\0", EndReason.MALFORMED_PACKET),
        (b"\x20\x02\0\0", EndReason.PROTOCOL_ERROR),
    ],
)
def test_an_offence_of_a_lent_session_ends_it(
    compiled: RunningGateway, version: int, offence: bytes, reason: EndReason
) -> None:
    """For the reason that Python gives."""
    device = relaying(compiled, version)
    if version == 5 and offence[0] == 0x30:
        offence = b"\x30\x04\0\x01+\0"
    device.send(offence)
    assert compiled.wait_ended().reason is reason


def test_a_topic_that_only_a_broker_may_send_ends_no_lent_session(
    start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python passes it on, and the session is lent again."""
    monkeypatch.delenv(choosing.SWITCH, raising=False)
    answer = mqtt.publish() + mqtt.packet(0x30, mqtt.binary(b"\xff/#") + b"21.5")

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(mqtt.connack())
        while True:
            connection.read_packet()
            connection.send(answer)

    gateway = start_gateway(upstream=start_broker(serve=serve).port, timeouts={"close": 0.3})
    with established(gateway) as device:
        for _ in range(3):
            device.send(mqtt.publish())
            assert device.read(len(answer)) == answer
            eventually(lambda: len(lent_to(gateway)) == 2, "the session is lent")


def test_a_lent_session_ends_in_every_way_and_leaves_nothing(
    compiled: RunningGateway, logged_errors: list[dict[str, Any]]
) -> None:
    """By FIN, reset, either of them behind data or within a packet, and for the gateway's own reasons."""
    relaying(compiled).close()
    compiled.wait_ended(1)
    compiled.wait_empty()
    leftovers = Leftovers(compiled)
    ways: list[Callable[[Device], Any]] = [
        lambda device: device.reset(),
        lambda device: device.close(),
        lambda device: (device.send(mqtt.publish()), device.socket.shutdown(socket.SHUT_WR), device.read_to_end()),
        lambda device: (device.send(mqtt.publish()[:7]), device.reset()),
        lambda device: device.send(mqtt.publish() + mqtt.disconnect()),
        lambda device: compiled.call(next(iter(compiled.service.gateway.sessions)).stop, EndReason.GATEWAY_STOPPING),
        lambda device: compiled.call(next(iter(compiled.service.gateway.sessions)).abort),
        lambda device: compiled.call(next(iter(compiled.service.gateway.sessions)).fail, "a test"),
    ]
    for count, way in enumerate(ways, 2):
        device = relaying(compiled)
        eventually(lambda: len(lent_to(compiled)) == 2, "the session is lent")
        way(device)
        compiled.wait_ended(count)
        device.close()
        compiled.wait_empty()
        assert not lent_to(compiled)
    leftovers.check()
    logged_errors.clear()


def test_a_session_that_is_held_is_taken_back_and_then_lent_again(compiled: RunningGateway) -> None:
    """What came meanwhile is relayed by Python, what comes after it by the core."""
    device = relaying(compiled)
    eventually(lambda: len(lent_to(compiled)) == 2, "the session is lent")
    (session,) = compiled.service.gateway.sessions
    compiled.call(session._device.hold)
    assert not lent_to(compiled)
    device.send(PACKET)
    compiled.call(session._device.release)
    assert device.read(len(PACKET)) == PACKET
    eventually(lambda: len(lent_to(compiled)) == 2, "the session is lent again")
    device.send(PACKET)
    assert device.read(len(PACKET)) == PACKET


@pytest.mark.parametrize("rule", [{"max_qos": 1}, {"publish": ["#"]}, {"packets_per_second": 1000}])
def test_a_session_whose_rule_reads_packets_or_limits_them_is_never_lent(
    start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    """The core knows nothing of rules."""
    monkeypatch.delenv(choosing.SWITCH, raising=False)
    rules = [{"name": "bound", "match_client_id": ["sensor-1"], **rule}]
    gateway = start_gateway(upstream=start_broker(serve=echo).port, device=rules)
    bound = relaying(gateway)
    assert not lent_to(gateway)
    other = established(gateway, client_identifier="sensor-2")
    for _ in range(2):
        other.send(PACKET)
        assert other.read(len(PACKET)) == PACKET
    eventually(lambda: len(lent_to(gateway)) == 2, "a session without a rule is lent")
    bound.send(PACKET)
    assert bound.read(len(PACKET)) == PACKET
    assert len(lent_to(gateway)) == 2
    bound.close()
    other.close()
    gateway.wait_empty()


def test_a_stop_takes_all_sessions_back(compiled: RunningGateway) -> None:
    """And tells every device."""
    devices = [relaying(compiled, 5) for _ in range(5)]
    eventually(lambda: len(lent_to(compiled)) == 10, "all are lent")
    compiled.stop()
    assert not lent_to(compiled)
    for device in devices:
        assert device.read_to_end()[0] == 0xE0
        device.close()


def test_bulk_both_ways_past_full_buffers_arrives_whole(compiled: RunningGateway) -> None:
    """The device sends on while it does not read, so that everything fills up."""
    device = relaying(compiled)
    packets = [mqtt.publish(payload=bytes([index]) * (1000 * index)) for index in range(120)] * 4
    expected = b"".join(packets)
    device.socket.setblocking(False)
    to_send, arrived = memoryview(expected), bytearray()
    pause = 4_000_000
    while len(arrived) < len(expected):
        readable, writable, _ = select.select(
            [device.socket] if not to_send or pause <= 0 else [], [device.socket] if to_send else [], [], 0.5
        )
        if writable:
            sent = device.socket.send(to_send[:200_000])
            to_send, pause = to_send[sent:], pause - sent
        elif not readable:
            pause = 0
        if readable:
            arrived += device.socket.recv(1 << 20)
    assert arrived == expected
    # What was taken back for that is lent again.
    device.socket.settimeout(20)
    for _ in range(2):
        device.send(PACKET)
        assert device.read(len(PACKET)) == PACKET
    eventually(lambda: len(lent_to(compiled)) == 2, "the session is lent again")


# ---- which engine runs


def test_the_environment_switches_the_core_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is said why."""
    monkeypatch.setenv(choosing.SWITCH, "1")
    choice = choosing.engine()
    assert (choice.core, choice.name) == (None, "python")
    assert choosing.SWITCH in choice.words
    assert choosing.COST in choice.words
    assert not choice.remedy


def test_the_configuration_switches_the_core_off(compiled: RunningGateway, start_gateway: StartGateway) -> None:
    """All works the same."""
    gateway = start_gateway(upstream=compiled.config.upstream[0].port, relay={"engine": "python"})
    assert gateway.service.engine.name == "python"
    relaying(gateway)
    assert not lent_to(gateway)


@pytest.mark.parametrize("broken", ["walk", "poll"])
def test_a_core_that_fails_its_trial_is_not_used(core: Any, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Python relays, and it is said why."""

    def wrong(*_: object) -> Any:
        return (1, 1, 1)

    monkeypatch.delenv(choosing.SWITCH, raising=False)
    monkeypatch.setattr(core, broken, wrong)
    choosing._tried.cache_clear()
    try:
        choice = choosing.engine()
    finally:
        choosing._tried.cache_clear()
    assert choice.core is None
    assert "trial" in choice.words
    assert choice.remedy


def test_a_core_that_is_older_than_its_source_is_not_used(
    core: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a `git pull`, Python and a core of before may not fit together."""
    binary = tmp_path / "_core.abi3.so"
    binary.touch()
    monkeypatch.delenv(choosing.SWITCH, raising=False)
    monkeypatch.setattr(core, "__file__", str(binary))
    choosing._tried.cache_clear()
    try:
        installed = choosing.engine()
        os.utime(binary, (1, 1))
        (tmp_path / "_core.c").touch()
        choosing._tried.cache_clear()
        stale = choosing.engine()
    finally:
        choosing._tried.cache_clear()
    assert installed.name == "compiled", "a wheel has no source"
    assert stale.name == "python"
    assert "older than its source" in stale.words
    assert stale.remedy
