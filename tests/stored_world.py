"""Stored devices, a broker and a disk that forgets what was not committed, each run made of one seed.

In: a seed.  Out: what went wrong, which should be nothing.  The stored session, the store and the database are the
gateway's own; device, broker, connections and time are models.  The gateway crashes at any moment and starts again on
what was committed.

The oracles know what the models did: every message that a device has an acknowledgement for has arrived; first arrivals
are in order; QoS 2 arrives once while the broker's session lives; nothing arrives under another name; the broker never
sees a packet that a client must not send.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from gateway.config import StoreConfig
from gateway.errors import EndReason, SessionEnd
from gateway.mqtt.connect import Connect, parse_connect
from gateway.mqtt.packets import PacketType
from gateway.mqtt.reader import Packet, PacketReader
from gateway.pieces import at_once
from gateway.session.record import Peer
from gateway.session.stored import StoredSession
from gateway.session.treatment import Treatment
from gateway.session.visit import World
from gateway.store.database import Change, Database, StoreError
from gateway.store.row import Row
from gateway.store.store import Store
from gateway.store.writer import Writer, _Write

EPOCH = 1_800_000_000
_RUNS = count()
_PEER: Any = Peer("CN=broker", "CN=ca", "DNS:broker", None, "TLSv1.3", "x", "")  # type: ignore[arg-type]


class Clock:
    """Virtual time, and what is to happen in it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something after some seconds."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), call))

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, call = heapq.heappop(self._queue)
            call()
        self.now = until


class Memory(sqlite3.Connection):
    """A database in memory; a gateway that crashes does not close it, and Python 3.13 would warn.

    The garbage collector closes it in whichever thread it runs.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, uri=True, isolation_level=None, check_same_thread=False)

    def __del__(self) -> None:
        self.close()


class MemoryDatabase(Database):
    """The gateway's database in memory, which outlives the gateway."""

    def __init__(self, directory: Path, name: str) -> None:
        super().__init__(directory, lambda _: Memory(name))
        self.path = directory / "none"
        # Called before and after each access to the disk; raises what the disk says.
        self.fault: Callable[[], None] = lambda: None

    def _take_lock(self) -> None:
        pass

    def keep_reserve(self) -> bool:
        """There is none; whether there would be room for it."""
        try:
            self.fault()
        except StoreError:
            return False
        return True

    def give_up_reserve(self) -> bool:
        """There is none."""
        return False

    def recover(self) -> None:
        """Memory has nothing to copy."""
        self.fault()

    def commit(self, changes: Sequence[Change]) -> None:
        """A commit that fails may be durable all the same."""
        self.fault()
        super().commit(changes)
        self.fault()

    def read(self, numbers: Sequence[int]) -> list[Row | int]:
        """Reading can fail, too."""
        self.fault()
        return super().read(numbers)


class MemoryWriter:
    """The gateway's writer without its thread: commits when told to; what was not committed at a crash is lost."""

    def __init__(self, database: MemoryDatabase) -> None:
        self.database = database
        self.store: Store
        self.failing = False
        # Called when there is something to do for a disk that was idle.
        self.wake: Callable[[], None] = lambda: None
        self.committed = 0
        self._calls: list[Callable[[], None]] = []
        database.fault = self._fail_if_told
        self._writer = Writer(
            database,
            self._calls.append,
            lambda seconds, used, error: self.store.committed(0.0, 0, error),
            lambda rows: self.store.scanned(rows),
        )
        # A lock would only cost time here.
        self.queue = self._writer._queue

    def _fail_if_told(self) -> None:
        if self.failing:
            raise StoreError("database or disk is full", is_full=True)

    def write(self, change: Change, done: Callable[[StoreError | None], None] | None = None) -> None:
        """See `StoreWriter`."""
        self._writer.write(change, done)
        self._wake()

    def work(self, work: Any, done: Any) -> None:
        """See `StoreWriter`."""
        self._writer.work(work, done)
        self._wake()

    def read(self, numbers: Sequence[int], done: Any) -> None:
        """See `StoreWriter`."""
        self._writer.read(numbers, done)
        self._wake()

    def _wake(self) -> None:
        if len(self.queue) == 1:
            self.wake()

    def commit(self, most: int = 1000, *, silently: bool = False) -> None:
        """Make what waits durable, then call back, unless the gateway crashes in between (`silently`)."""
        taken = [self.queue.popleft() for _ in range(min(most, len(self.queue)))]
        if taken:
            self._writer._do(taken)
            self.committed += any(isinstance(each, _Write) for each in taken) and not self.failing
        if silently:
            self._calls.clear()
        while self._calls:
            self._calls.pop(0)()

    def close(self) -> None:
        """See `StoreWriter`."""
        self.commit()


def open_memory_store(
    directory: Path, name: str, config: StoreConfig, seconds: Callable[[], float], now: Callable[[], float]
) -> tuple[Store, MemoryWriter]:
    """Open the store of a gateway that starts; all rows are found at once."""
    database = MemoryDatabase(directory, name)
    opened = database.open()
    writer = MemoryWriter(database)
    store = Store(config, opened, writer, seconds, now)
    writer.store = store
    store.scanned(database.scan(0, opened.last_number, 1 << 30))
    store.scanned(None)
    return store, writer


def packets_of(data: bytes) -> list[bytes]:
    """Cut whole packets."""
    packets = []
    while data:
        length, shift, at = 0, 0, 1
        while True:
            length |= (data[at] & 0x7F) << shift
            shift += 7
            at += 1
            if not data[at - 1] & 0x80:
                break
        packets.append(data[: at + length])
        data = data[at + length :]
    return packets


def packet(first: int, body: bytes) -> bytes:
    """Write a packet."""
    length, encoded = len(body), b""
    while length > 0x7F:
        encoded += bytes((length & 0x7F | 0x80,))
        length >>= 7
    return bytes((first,)) + encoded + bytes((length,)) + body


def publish(version: int, topic: bytes, payload: bytes, qos: int, identifier: int, *, dup: bool = False) -> bytes:
    """Write a PUBLISH."""
    body = len(topic).to_bytes(2, "big") + topic + (identifier.to_bytes(2, "big") if qos else b"")
    return packet(0x30 | qos << 1 | (8 if dup else 0), body + (b"\0" if version == 5 else b"") + payload)


def read_publish(version: int, raw: bytes) -> tuple[bytes, bytes, int, int, bool]:
    """Read a PUBLISH: topic, payload, QoS, identifier, DUP."""
    start = 1
    while raw[start] & 0x80:
        start += 1
    body = raw[start + 1 :]
    size = int.from_bytes(body[:2], "big")
    topic, at, qos = body[2 : 2 + size], 2 + size, raw[0] >> 1 & 3
    identifier = int.from_bytes(body[at : at + 2], "big") if qos else 0
    at += 2 if qos else 0
    if version == 5:
        assert body[at] < 0x80
        at += 1 + body[at]
    return topic, body[at:], qos, identifier, bool(raw[0] & 8)


def connect_packet(name: str, version: int, *, clean: bool, expiry: int = 0, keep_alive: int = 60) -> bytes:
    """Write a CONNECT."""
    encoded = name.encode()
    properties = b""
    if version == 5:
        properties = b"\x05\x11" + expiry.to_bytes(4, "big") if expiry else b"\0"
    head = b"\0\4MQTT" + bytes((version, 2 if clean else 0)) + keep_alive.to_bytes(2, "big")
    return packet(0x10, head + properties + len(encoded).to_bytes(2, "big") + encoded)


def parsed(raw: bytes) -> tuple[Packet, Connect]:
    """Read a CONNECT."""
    reader = PacketReader(frozenset({PacketType.CONNECT}), 1 << 20, EndReason.NOT_MQTT)
    reader.feed(raw)
    found = reader.next_packet()
    assert found is not None
    return found, parse_connect(found)


class BrokerSession:
    """What the broker keeps of a client."""

    def __init__(self) -> None:
        self.number = 0
        self.received: dict[int, bytes] = {}
        # QoS 2 messages whose PUBREL has come, the last of them.
        self.completed: deque[bytes] = deque(maxlen=40)
        self.seen: set[int] = set()


class BrokerLink:
    """One connection of the gateway to the broker: the gateway's upstream, with a delay in each direction."""

    def __init__(self, world: StoredWorld, stored: StoredSession, gateway: GatewayModel) -> None:
        self.world = world
        self.stored = stored
        self.gateway = gateway
        self.open = True
        # Nothing waits in a socket: the virtual process is never busy.
        self.unread = False
        self.blackhole = False
        self.session: BrokerSession | None = None
        self.version = 4
        self.name = ""
        self.sent: Counter[bytes] = Counter()
        self.flight: dict[int, str] = {}
        self._up_at = self._down_at = 0.0
        self.is_dead = False
        # Whether CONNACK, or anything, has reached the gateway.
        self.is_answered = self.is_accepted = False
        # Whether a CONNECT since the last one that was accepted got no answer.
        self.is_unsure = False

    # the gateway's side

    def write(self, data: bytes) -> None:
        """See `gateway.session.session.Connection`."""
        for raw in packets_of(data):
            if raw[0] >> 4 == 1:
                before, self.world.asked[self.stored.name] = self.world.asked.get(self.stored.name), self
                if before is not None:
                    # A refusal says nothing about a CONNECT before it.
                    self.is_unsure = not before.is_answered or (before.is_unsure and not before.is_accepted)
            if raw[0] >> 4 == 3 and self.session is not None:
                self._wrote(raw, self.session)
        if self.open:
            self._up_at = max(self._up_at, self.world.clock.now) + self.world.delay()
            self.world.clock.later(self._up_at - self.world.clock.now, partial(self._arrive, data))

    def _wrote(self, raw: bytes, session: BrokerSession) -> None:
        world = self.world
        _, payload, qos, _, dup = read_publish(self.version, raw)
        if not qos:
            return
        # Nor can a client know that a session is a new one if its CONNACK was lost.
        may_know = not world.crashed and world.keeps_sessions
        if dup and may_know and not self.is_unsure and payload not in world.sent_in[session.number]:
            world.wrong(f"DUP on what was never sent in this session: {payload!r}")
        self.sent[payload] += 1
        if self.sent[payload] > world.offered[payload]:
            world.wrong(f"sent again on the same connection: {payload!r}")
        world.sent_in[session.number].add(payload)

    write_last = write

    def hold(self) -> None:
        """Nothing is held back here."""

    release = hold

    def go_on_later(self) -> None:
        """See `gateway.session.session.Connection`."""
        self.world.clock.later(0.0, partial(self._deliver, b""))

    def close(self) -> None:
        """The gateway closes."""
        self.open = False

    def abort(self) -> None:
        """The gateway cuts the connection; what is under way may be lost."""
        self.open = False
        if self.world.random.random() < 0.5:
            self.is_dead = True

    # the broker's side

    def lose(self) -> None:
        """The connection breaks."""
        if self.open:
            self.open = False
            if self.world.random.random() < 0.5:
                self.is_dead = True
            if self.gateway.alive:
                self.stored.upstream_broken(SessionEnd(EndReason.UPSTREAM_LOST, "cut"))

    def _answer(self, data: bytes) -> None:
        wait = self.world.delay()
        if self.world.random.random() < self.world.slowness:
            wait += self.world.random.uniform(0, 12)
        self._down_at = max(self._down_at, self.world.clock.now) + wait
        self.world.clock.later(self._down_at - self.world.clock.now, partial(self._deliver, data))

    def _deliver(self, data: bytes) -> None:
        if self.open and self.gateway.alive and not self.blackhole and self.stored._upstream is self:
            self.is_answered = True
            self.is_accepted = self.is_accepted or (data[0] >> 4 == 2 and not data[3])
            self.stored.upstream_received(data)

    def _arrive(self, data: bytes) -> None:
        if self.blackhole or not self.world.broker_up:
            self.is_dead = True
        if self.is_dead:
            return
        for raw in packets_of(data):
            self._take(raw)

    def _take(self, raw: bytes) -> None:
        kind = raw[0] >> 4
        world = self.world
        if self.session is None:
            assert kind == 1, "the first packet is CONNECT"
            self._accept(raw)
        elif kind == 1:
            world.wrong("a second CONNECT")
        elif world.current.get(self.name) is not self:
            return  # another connection has taken over
        elif kind == 3:
            self._published(raw)
        elif kind == 6:
            identifier = int.from_bytes(raw[2:4], "big")
            payload = self.session.received.pop(identifier, None)
            if payload is not None:
                self.session.completed.append(payload)
                if world.publishes_on_release:
                    world.arrived(self.name, payload, self.session.number)
            self.flight.pop(identifier, None)
            self._answer(packet(0x70, raw[2:4]))
        elif kind == 8:
            at = 5 if self.version == 5 else 4
            filters = 0
            while at < len(raw):
                at += 2 + int.from_bytes(raw[at : at + 2], "big") + 1
                filters += 1
            self._answer(packet(0x90, raw[2:4] + (b"\0" if self.version == 5 else b"") + b"\1" * filters))
        elif kind == 12:
            self._answer(b"\xd0\0")
        elif kind == 14:
            self.open = False

    def _accept(self, raw: bytes) -> None:
        world = self.world
        _, connect = parsed(raw)
        self.version, self.name = int(connect.version), connect.client_identifier
        if self.name != self.stored.name:
            world.wrong(f"{self.name} came on the connection of {self.stored.name}")
        if world.random.random() < world.refusing:
            self._answer(packet(0x20, b"\0\x88\0" if self.version == 5 else b"\0\3"))
            self.session = BrokerSession()
            world.clock.later(0.1, self.lose)
            return
        previous = world.current.get(self.name)
        if previous is not None and previous is not self:
            previous.lose()
        world.current[self.name] = self
        session = world.sessions_of.get(self.name)
        present = session is not None and not connect.clean_start
        if not present:
            session = BrokerSession()
            session.number = next(world.numbers)
            world.sessions_of[self.name] = session
            world.new_sessions[self.name] += 1
        elif self.is_unsure:
            # Without that CONNACK the gateway cannot know that this session is the one of before: a message whose
            # PUBCOMP was lost as well may come a second time.
            world.may_repeat.update(session.completed)
        self.session = session
        flags = 1 if present else 0
        self._answer(packet(0x20, bytes((flags, 0)) + (b"\0" if self.version == 5 else b"")))

    def _published(self, raw: bytes) -> None:
        world, session = self.world, self.session
        assert session is not None
        topic, payload, qos, identifier, _ = read_publish(self.version, raw)
        if topic.decode().split("/")[0] != self.name:
            world.wrong(f"{payload!r} of {topic!r} came from {self.name}")
        if qos == 2:
            if identifier not in session.received:
                session.received[identifier] = payload
                if not world.publishes_on_release:
                    world.arrived(self.name, payload, session.number)
            self._answer(packet(0x50, identifier.to_bytes(2, "big")))
            return
        world.arrived(self.name, payload, session.number)
        if qos == 1:
            self._answer(packet(0x40, identifier.to_bytes(2, "big")))


class GatewayModel:
    """One life of the gateway: from a start to a crash."""

    def __init__(self, world: StoredWorld) -> None:
        self.world = world
        self.alive = True
        self._is_due = False
        self.stored: dict[str, StoredSession] = {}
        self.store, self.writer = open_memory_store(
            world.directory, world.database, world.config, lambda: world.clock.now, world.wall
        )
        self.writer.database.fault = world.disk
        self.links: dict[str, BrokerLink] = {}
        self.dialling: dict[str, int] = {}
        self._numbers = count()
        self.writer.wake = self._commit_later
        world.clock.later(1.0, self._sweep)
        for backlog in list(self.store):
            if len(backlog) or '"will": null' not in self.store.states.get(backlog.name, ""):
                self.session(backlog.name)

    def session(self, name: str) -> StoredSession:
        """Return the stored session of a name."""
        found = self.stored.get(name)
        if found is None:
            world = self.world
            facts = World(
                seconds=lambda: world.clock.now,
                now=world.wall,
                is_plausible=lambda: True,
                uniform=world.random.random,
                max_packet_size=1 << 20,
                max_connect_size=1 << 16,
                check_bodies=True,
                connack=10.0,
            )
            found = StoredSession(name, self.store, self.store.backlog(name), self, facts, after=world.config.after)
            self.stored[name] = found
        return found

    # gateway.session.stored.Link

    def dial(self, stored: StoredSession) -> None:
        """Reach the broker after a while, or not."""
        number = self.dialling[stored.name] = next(self._numbers)
        self.world.clock.later(self.world.delay(), partial(self._dialled, stored, number))

    def cancel(self, stored: StoredSession) -> None:
        """Forget a dial."""
        self.dialling.pop(stored.name, None)

    def may_dial(self, stored: StoredSession) -> bool:
        """The health of a broker is not modelled."""
        return True

    def over(self, stored: StoredSession) -> None:
        """Nothing is left."""
        if self.stored.get(stored.name) is stored:
            del self.stored[stored.name]

    def _dialled(self, stored: StoredSession, number: int) -> None:
        if not self.alive or self.dialling.get(stored.name) != number:
            return
        del self.dialling[stored.name]
        if not self.world.broker_up or self.world.random.random() < self.world.unreachable:
            stored.upstream_failed(SessionEnd(EndReason.TCP_REFUSED, "down"))
            return
        link = BrokerLink(self.world, stored, self)
        self.links[stored.name] = link
        presented = stored.presented()
        assert presented is not None
        raw, connect = presented
        stored.upstream_verified(link, _PEER, Treatment(connect=raw.raw, version=connect.version))

    def _commit(self) -> None:
        self._is_due = False
        if self.alive:
            self.writer.commit(self.world.random.choice((1, 3, 1000)))
            if self.writer.queue and not self._is_due:
                self._commit_later()

    def _commit_later(self) -> None:
        self._is_due = True
        if self.world.crash_when_writing:
            self.world.clock.later(self.world.random.uniform(0.0005, self.world.commit_time), self._crash_if_alive)
        self.world.clock.later(self.world.random.uniform(0.001, self.world.commit_time), self._commit)

    def _sweep(self) -> None:
        if self.alive:
            at_once(self.store.sweep())
            for stored in list(self.stored.values()):
                stored.sweep(self.world.clock.now)
            self.world.clock.later(1.0, self._sweep)

    def _crash_if_alive(self) -> None:
        if self.alive and self.world.crash_when_writing:
            self.world.crash()

    def crash(self) -> None:
        """End at this moment; sometimes what was being committed is durable without anybody having been told."""
        if self.world.random.random() < 0.5:
            self.writer.commit(silently=True)
        self.alive = False


class DeviceModel:
    """A conforming client: it sends again what it has no acknowledgement for, if its session is kept."""

    def __init__(self, world: StoredWorld, name: str) -> None:
        random = world.random
        self.world = world
        self.name = name
        self.version = random.choice((4, 5))
        self.persistent = random.random() < 0.7
        self.qos = random.choice(((1,), (2,), (1, 2), (0, 1, 2)))
        self.sent = 0
        self.acked: list[bytes] = []
        self.order: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
        self.unacked: dict[int, tuple[int, bytes, bool]] = {}
        self.identifier = 0
        self.connected = False
        self.admitted = False
        self.visit: DeviceEnd | None = None
        self.quiet = False
        world.clock.later(random.uniform(0, 5), self.connect)

    def connect(self) -> None:
        """Come, if the gateway is there."""
        world = self.world
        if self.connected:
            return
        gateway = world.gateway
        if not gateway.alive:
            world.clock.later(1.0, self.connect)
            return
        self.connected, self.admitted = True, False
        raw = connect_packet(self.name, self.version, clean=not self.persistent, expiry=3600 if self.persistent else 0)
        found, connect = parsed(raw)
        self.visit = end = DeviceEnd(self, gateway)
        stored = gateway.session(self.name)
        end.stored = stored
        stored.attach(
            end, found, Treatment(connect=found.raw, version=connect.version), ("10.0.0.1", ""), confirm=world.confirm
        )

    def lost(self, end: DeviceEnd) -> None:
        """The gateway ended the session, or crashed."""
        if self.visit is not end:
            return
        self.connected = self.admitted = False
        self.visit = None
        if not self.persistent:
            self.unacked.clear()
        self.world.clock.later(self.world.random.uniform(0.2, 4), self.connect)

    def receive(self, end: DeviceEnd, data: bytes) -> None:
        """Take packets of the gateway."""
        if self.visit is not end:
            return
        for raw in packets_of(data):
            kind, identifier = raw[0] >> 4, int.from_bytes(raw[2:4], "big")
            if kind == 4 or kind == 7:
                found = self.unacked.pop(identifier, None)
                if found is not None:
                    self.acked.append(found[1])
            elif kind == 5:
                entry = self.unacked.get(identifier)
                if entry is not None:
                    self.unacked[identifier] = (entry[0], entry[1], True)
                    if not entry[2]:
                        self.acked.append(entry[1])
                self._send(packet(0x62, identifier.to_bytes(2, "big")))

    def admit(self, session_present: bool) -> None:
        """CONNACK came."""
        self.admitted = True
        if self.persistent and not session_present:
            # Its state is discarded, as the standard demands; what it had sent is sent as new.
            self.unacked = {key: (qos, payload, False) for key, (qos, payload, _) in self.unacked.items()}
        for identifier, (qos, payload, released) in list(self.unacked.items()):
            if released:
                self._send(packet(0x62, identifier.to_bytes(2, "big")))
            else:
                topic = f"{self.name}/t".encode()
                self._send(publish(self.version, topic, payload, qos, identifier, dup=session_present))
        self.world.clock.later(self.world.random.uniform(0, 1), partial(self._work, self.visit))

    def _work(self, visit: DeviceEnd | None) -> None:
        random = self.world.random
        if self.visit is not visit or not self.admitted or self.quiet:
            return
        chance = random.random()
        if chance < 0.03:
            self._leave(orderly=True)
            return
        if chance < 0.06:
            self._leave(orderly=False)
            return
        for _ in range(random.choice((1, 1, 2, 12))):
            qos = random.choice(self.qos)
            payload = f"{self.name}:{qos}:{len(self.order[qos])}".encode()
            self.order[qos].append(payload)
            if qos:
                while True:
                    self.identifier = self.identifier % 200 + 1
                    if self.identifier not in self.unacked:
                        break
                    if len(self.unacked) > 150:
                        self.order[qos].pop()
                        break
                else:
                    continue
                if self.identifier in self.unacked:
                    continue
                self.unacked[self.identifier] = (qos, payload, False)
            self._send(publish(self.version, f"{self.name}/t".encode(), payload, qos, self.identifier))
            if self.visit is not visit:
                return
        self.world.clock.later(random.expovariate(1.0), partial(self._work, visit))

    def _leave(self, *, orderly: bool) -> None:
        visit = self.visit
        if visit is None:
            return
        self.visit = None
        self.connected = self.admitted = False
        if not self.persistent:
            self.unacked.clear()
        if orderly:
            visit.send_up(b"\xe0\0")
        elif self.world.random.random() < 0.5:
            visit.gone()  # otherwise it stays half open
        self.world.clock.later(self.world.random.choice((0.1, 2, 30)), self.connect)

    def _send(self, data: bytes) -> None:
        if data[0] >> 4 == 3:
            self.world.offered[read_publish(self.version, data)[1]] += 1
        if self.visit is not None:
            self.visit.send_up(data)


class DeviceEnd:
    """One connection of a device to the gateway: `gateway.session.visit.Device`."""

    def __init__(self, device: DeviceModel, gateway: GatewayModel) -> None:
        self.device = device
        self.gateway = gateway
        self.stored: StoredSession
        self.ended = False
        self.unread = False

    def send_up(self, data: bytes) -> None:
        """The device sends."""
        self.device.world.clock.later(0.001, partial(self._up, data))

    def _up(self, data: bytes) -> None:
        if not self.ended and self.gateway.alive:
            self.stored.device_received(data)

    def gone(self) -> None:
        """The device's connection is closed."""
        if not self.ended and self.gateway.alive:
            self.ended = True
            self.stored.detached(self)

    def _down(self, call: Callable[[], None]) -> None:
        self.device.world.clock.later(0.001, call)

    def admit(self, connack: bytes, *, offline: bool) -> bytes:
        """See `gateway.session.visit.Device`."""
        del offline
        if self.device.visit is self:
            self._down(partial(self._admitted, bool(connack[2])))
        return b""

    def _admitted(self, session_present: bool) -> None:
        if self.device.visit is self:
            self.device.admit(session_present)

    def send(self, data: bytes) -> None:
        """See `gateway.session.visit.Device`."""
        self._down(partial(self.device.receive, self, data))

    def hold(self) -> None:
        """See `gateway.session.visit.Device`."""

    release = hold

    def go_on_later(self) -> None:
        """See `gateway.session.visit.Device`."""
        self.device.world.clock.later(0.0, partial(self._up, b""))

    def finish(self, reason: EndReason, detail: str = "", **_: Any) -> None:
        """See `gateway.session.visit.Device`."""
        if not self.ended:
            self.ended = True
            self.device.world.reasons[reason] += 1
            self.stored.detached(self)
            self._down(partial(self.device.lost, self))

    def count_up(self) -> None:
        """See `gateway.session.visit.Device`."""

    def dials(self, dial: Any) -> None:
        """See `gateway.session.visit.Device`."""

    def verified(self, peer: Any) -> None:
        """See `gateway.session.visit.Device`."""


class StoredWorld:
    """One run."""

    def __init__(self, seed: int, directory: Path, *, seconds: float = 120.0, failing_disk: bool = False) -> None:
        self.random = random = Random(seed)  # noqa: S311  reproducible
        self.seed = seed
        self.directory = directory
        # A name of its own: a gateway that crashed in an earlier run of this seed may still have the database open.
        self.database = f"file:stored{seed}-{next(_RUNS)}?mode=memory&cache=shared"
        self._keeps = Memory(self.database)
        self.clock = Clock()
        self.config = StoreConfig(after=random.choice((2.0, 5.0)))
        self.problems: list[str] = []
        self.reasons: Counter[str] = Counter()
        self.broker_up = random.random() < 0.7
        self.crashed = self.crash_when_writing = False
        self.confirm = random.random() < 0.3
        self.latency = random.choice((0.001, 0.05, 0.5))
        self.slowness = random.choice((0.0, 0.0, 0.05))
        self.refusing = random.choice((0.0, 0.2))
        self.unreachable = random.choice((0.0, 0.3))
        self.commit_time = random.choice((0.01, 0.5))
        self.keeps_sessions = random.random() < 0.7
        # Brokers may publish a QoS 2 message on PUBLISH or on PUBREL (MQTT 5.0 §4.3.3).
        self.publishes_on_release = seed % 2 == 0
        self.may_repeat: set[bytes] = set()
        self.asked: dict[str, BrokerLink] = {}
        self.numbers = count(1)
        self.sessions_of: dict[str, BrokerSession] = {}
        self.current: dict[str, BrokerLink] = {}
        self.new_sessions: Counter[str] = Counter()
        self.sent_in: defaultdict[int, set[bytes]] = defaultdict(set)
        self.offered: Counter[bytes] = Counter()
        self.arrivals: dict[str, list[tuple[bytes, int]]] = {}
        self.crashes = 0
        # What the disk says now, if it fails; chances of its own, so that other runs stay as they are.
        self.disk_fault: StoreError | None = None
        self.disk_chances = Random(seed)  # noqa: S311  reproducible
        self.disk_faults = 0
        if failing_disk:
            self.clock.later(self.disk_chances.uniform(1, 10), self._disk_weather)
        self.gateway = GatewayModel(self)
        self.devices = [DeviceModel(self, f"d{number}") for number in range(random.choice((1, 2, 4)))]
        self.seconds = seconds
        self.with_crashes = random.random() < 0.6
        self.clock.later(random.uniform(1, 20), self._weather)

    def wall(self) -> float:
        """The time of day."""
        return EPOCH + self.clock.now

    def _disk_weather(self) -> None:
        chances = self.disk_chances
        if self.disk_fault is not None or self.clock.now > self.seconds:
            self.disk_fault = None
        else:
            is_full = chances.random() < 0.5
            self.disk_fault = StoreError("database or disk is full" if is_full else "disk I/O error", is_full=is_full)
        if self.clock.now <= self.seconds:
            self.clock.later(chances.choice((0.05, 1.0, 10.0)) * chances.uniform(0.1, 2), self._disk_weather)

    def disk(self) -> None:
        """Fail as the disk does now: always, or once in a while."""
        if self.disk_fault is not None and self.disk_chances.random() < 0.7:
            self.disk_faults += 1
            raise self.disk_fault

    def delay(self) -> float:
        """How long a packet takes."""
        return self.random.uniform(0.0005, self.latency)

    def wrong(self, what: str) -> None:
        """Take note of what must not be."""
        self.problems.append(f"seed {self.seed}, {self.clock.now:.2f} s: {what}")

    def arrived(self, name: str, payload: bytes, session: int) -> None:
        """A message reached the broker's subscribers."""
        self.arrivals.setdefault(name, []).append((payload, session))

    def _weather(self) -> None:
        random = self.random
        if self.clock.now > self.seconds:
            return
        what = random.random()
        if what < 0.3:
            self.broker_up = not self.broker_up
            if not self.broker_up:
                for link in list(self.current.values()):
                    link.lose()
                self.current.clear()
                if not self.keeps_sessions:
                    self.sessions_of.clear()
        elif what < 0.45:
            for link in list(self.current.values()):
                link.blackhole = True
        elif what < 0.65 and self.with_crashes:
            if random.random() < 0.3:
                self.crash()
            else:
                self.crash_when_writing = True
        elif what < 0.8:
            for link in list(self.current.values()):
                if random.random() < 0.5:
                    link.lose()
        self.clock.later(random.uniform(0.2, 15), self._weather)

    def crash(self) -> None:
        """The gateway dies, and starts again."""
        self.crash_when_writing = False
        self.crashes += 1
        self.crashed = True
        self.gateway.crash()
        for link in self.gateway.links.values():
            link.open = False
            if not link.is_answered:
                # It may have been about to send CONNECT, which it cannot know any more.
                self.asked[link.stored.name] = link
            link.is_dead = link.is_dead or self.random.random() < 0.5
        links = self.gateway.links
        self.gateway = GatewayModel(self)
        for name, link in links.items():
            if '"connack_missing": true' in self.gateway.store.states.get(name, ""):
                # CONNACK came, and that was not durable yet.
                link.is_answered = link.is_accepted = False
                self.asked[name] = link
        for device in self.devices:
            if device.visit is not None:
                device.lost(device.visit)

    def run(self) -> list[str]:
        """Let everything happen, then let it come to rest, and judge."""
        self.clock.run(self.seconds)
        self.broker_up = True
        self.refusing = self.unreachable = self.slowness = 0.0
        self.latency = min(self.latency, 0.05)
        self.clock.run(self.seconds + 60)
        for device in self.devices:
            device.quiet = True
        self.clock.run(self.seconds + 500)
        for device in self.devices:
            self._judge(device)
        if self.gateway.store.messages:
            self.wrong(f"{self.gateway.store.messages} messages are left in the store")
        self._keeps.close()
        return self.problems

    def _judge(self, device: DeviceModel) -> None:
        arrivals = self.arrivals.get(device.name, [])
        times = Counter(payload for payload, _ in arrivals)
        for payload in device.acked:
            if not times[payload]:
                self.wrong(f"acknowledged and lost: {payload!r}")
        for qos in (1, 2):
            first = list(dict.fromkeys(payload for payload, _ in arrivals if f":{qos}:".encode() in payload))
            numbers = [int(payload.rpartition(b":")[2]) for payload in first]
            if numbers != sorted(numbers):
                at = next(index for index in range(1, len(numbers)) if numbers[index] < numbers[index - 1])
                self.wrong(f"{device.name} QoS {qos} out of order: {numbers[at - 1]} before {numbers[at]}")
        if device.admitted and device.unacked:
            self.wrong(f"{device.name} still waits for {sorted(device.unacked.values())[:3]}")
        if device.persistent and self.keeps_sessions and self.new_sessions[device.name] > 1:
            self.wrong(f"{device.name} had {self.new_sessions[device.name]} new sessions at the broker")
        if device.persistent and self.keeps_sessions:
            twice = [payload for payload, number in times.items() if number > 1 and b":2:" in payload]
            twice = [payload for payload in twice if payload not in self.may_repeat]
            if twice:
                self.wrong(f"QoS 2 twice: {twice[:3]!r}")
