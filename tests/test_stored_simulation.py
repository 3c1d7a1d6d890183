"""Stored devices through outages, crashes and slow disks, in virtual time; and that broken gateways are found."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest

from gateway.mqtt.message import Message
from gateway.mqtt.packets import PacketType, ProtocolVersion
from gateway.mqtt.rewrite import ConnectChanges, rewrite_connect
from gateway.session import outgoing as outgoing_module
from gateway.session.outgoing import Outgoing
from gateway.session.stored import StoredSession
from gateway.store.backlog import Backlog
from gateway.store.store import Store
from tests.stored_world import StoredWorld, parsed

SEEDS = 6
MANY_SEEDS = int(os.environ.get("STORE_SEEDS", "200"))
# A broken gateway is found within so many seeds, or, if that is hard, within many.
ENOUGH, MANY = 60, 200


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_acknowledged_is_lost(seed: int, tmp_path: Path) -> None:
    """Neither lost nor reordered, QoS 2 once, through outages and crashes."""
    assert StoredWorld(seed, tmp_path, seconds=40).run() == []


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_disk_that_fails_now_and_then_loses_nothing_acknowledged(seed: int, tmp_path: Path) -> None:
    """ENOSPC and EIO, once or for a while, also of commits that are durable all the same; then it goes on."""
    world = StoredWorld(seed, tmp_path, seconds=40, failing_disk=True)
    assert world.run() == []
    assert world.disk_faults


def test_a_seed_is_the_same_each_time(tmp_path: Path) -> None:
    """What a seed finds can be found again, whatever an earlier run has left behind."""
    for seed in range(4):
        first, second = (StoredWorld(seed, tmp_path, seconds=40) for _ in range(2))
        assert first.run() == second.run()
        assert (first.arrivals, first.reasons, first.crashes) == (second.arrivals, second.reasons, second.crashes)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1_000_000, 1_000_000 + MANY_SEEDS, 100))
def test_nothing_acknowledged_is_lost_in_many_worlds(first: int, tmp_path: Path) -> None:
    """The same, in thousands of worlds."""
    for seed in range(first, first + 100):
        assert StoredWorld(seed, tmp_path, seconds=40).run() == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(2_000_000, 2_000_000 + MANY_SEEDS, 100))
def test_a_disk_that_fails_loses_nothing_acknowledged_in_many_worlds(first: int, tmp_path: Path) -> None:
    """The same, in thousands of worlds."""
    for seed in range(first, first + 100):
        assert StoredWorld(seed, tmp_path, seconds=40, failing_disk=True).run() == []


# ---- broken gateways

Patch = Callable[[pytest.MonkeyPatch], None]
BROKEN: dict[str, Patch] = {}


def broken(patch: Patch) -> Patch:
    """Register a broken gateway."""
    BROKEN[patch.__name__] = patch
    return patch


def replace(patch: pytest.MonkeyPatch, owner: Any, name: str, wrap: Callable[..., Any]) -> None:
    """Put a function in the place of a method; it gets the method first."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **more: wrap(original, *arguments, **more))


@broken
def acknowledges_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    """What is lost with the power has been acknowledged."""

    def append(original: Any, self: Outgoing, pending: Any) -> int:
        outgoing_module._tell_stored(pending, 0)
        number: int = original(self, pending)
        return number

    replace(patch, Outgoing, "_append", append)


@broken
def deletes_before_the_broker_has_it(patch: pytest.MonkeyPatch) -> None:
    """A row goes when it is sent."""

    def send_row(original: Any, self: Outgoing, row: Any) -> None:
        original(self, row)
        if self._flights:
            self._store.finish(self._backlog, [row.number])

    replace(patch, Outgoing, "_send_row", send_row)


@broken
def spills_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    """Copies that were not sent are written before those that were."""

    def spill(original: Any, self: Outgoing) -> None:
        if self.connected:
            original(self)
            return
        self._copies.extendleft(self._sent_copies.values())
        self._sent_copies.clear()
        original(self)

    replace(patch, Outgoing, "spill", spill)


@broken
def says_dup_always(patch: pytest.MonkeyPatch) -> None:
    """DUP on what was never sent."""
    original = outgoing_module.write_message
    patch.setattr(
        outgoing_module, "write_message", lambda *given, **more: original(*given, **(more | {"duplicate": True}))
    )


@broken
def sends_under_another_identity(patch: pytest.MonkeyPatch) -> None:
    """All backlogs leave under one name."""

    def presented(original: Any, self: StoredSession) -> Any:
        found = original(self)
        if found is None or self.name == "d0":
            return found
        packet, connect = found
        return attrs.evolve(packet, raw=packet.raw.replace(self.name.encode(), b"d0")), connect

    replace(patch, StoredSession, "presented", presented)


@broken
def forgets_what_qos_2_it_received(patch: pytest.MonkeyPatch) -> None:
    """A message that is sent again is stored again."""

    def append(original: Any, self: Store, *given: Any, **more: Any) -> int:
        number: int = original(self, *given, **(more | {"received": 0}))
        return number

    replace(patch, Store, "append", append)


@broken
def releases_before_that_is_durable(patch: pytest.MonkeyPatch) -> None:
    """PUBREL leaves, and after a crash the message is published a second time."""

    def mark(original: Any, self: Store, number: int, done: Any) -> None:
        del original, self, number
        done(None)

    replace(patch, Store, "mark_released", mark)


@broken
def releases_what_the_broker_forgot(patch: pytest.MonkeyPatch) -> None:
    """PUBREL for a message of a session that is gone."""

    def connect(original: Any, self: Outgoing, facts: Any) -> None:
        original(self, attrs.evolve(facts, session_present=True))

    replace(patch, Outgoing, "connect", connect)


@broken
def keeps_rows_of_a_lost_connection(patch: pytest.MonkeyPatch) -> None:
    """What was in flight is never sent again."""
    patch.setattr(Backlog, "give_back", lambda self: None)


@broken
def drops_copies_with_the_connection(patch: pytest.MonkeyPatch) -> None:
    """A device waits for ever."""

    def lost(original: Any, self: Outgoing) -> None:
        self._sent_copies.clear()
        original(self)

    replace(patch, Outgoing, "lost", lost)


@broken
def completes_before_that_is_durable(patch: pytest.MonkeyPatch) -> None:
    """After a crash, a new message with a Packet Identifier of before is taken for the old one."""

    def release(original: Any, self: Store, backlog: Backlog, identifier: int, done: Any) -> None:
        del original, backlog, identifier, self
        done(None)

    replace(patch, Store, "release", release)


@broken
def forgets_received_with_each_connect(patch: pytest.MonkeyPatch) -> None:
    """A QoS 2 message that is sent again after a reconnect is another one."""

    def save(original: Any, self: Store, *given: Any, **more: Any) -> None:
        original(self, *given, **(more | {"forget_received": True}))

    replace(patch, Store, "save", save)


@broken
def is_live_at_once(patch: pytest.MonkeyPatch) -> None:
    """New messages overtake those on disk."""

    def connect(original: Any, self: Outgoing, facts: Any) -> None:
        original(self, facts)
        self.live = True

    replace(patch, Outgoing, "connect", connect)


@broken
def says_clean_start_each_time(patch: pytest.MonkeyPatch) -> None:
    """The broker's session is wiped with each connection."""

    def for_broker(original: Any, self: StoredSession, *given: Any) -> bytes:
        found, connect = parsed(original(self, *given))
        return rewrite_connect(found, connect, ConnectChanges(clean_start=True), 65_536)

    replace(patch, StoredSession, "_for_broker", for_broker)


@broken
def sends_again_on_the_same_connection(patch: pytest.MonkeyPatch) -> None:
    """A time-out is no reason (MQTT 5.0 §4.4)."""

    def sweep(original: Any, self: Outgoing, now: float, interval: float) -> None:
        original(self, now, interval)
        for flight in list(self._flights.values()):
            if flight.awaits is PacketType.PUBACK:
                version: ProtocolVersion = self.facts.version
                message: Message = flight.row.message
                self._send(outgoing_module.write_message(version, message, flight.identifier))

    replace(patch, Outgoing, "sweep", sweep)


@broken
def forgets_a_backlog_with_its_device(patch: pytest.MonkeyPatch) -> None:
    """What waits for a device that has left is dropped."""

    def leave(original: Any, self: StoredSession, *given: Any, **more: Any) -> None:
        numbers, _ = self.backlog.evict(1 << 62)
        original(self, *given, **more)
        self._store.finish(self.backlog, numbers)

    replace(patch, StoredSession, "_leave", leave)


@broken
def takes_a_late_answer_for_another_message(patch: pytest.MonkeyPatch) -> None:
    """One Packet Identifier for all that is in flight."""
    patch.setattr(Outgoing, "_low_identifier", lambda self: 1)


@broken
def confirms_what_was_only_written(patch: pytest.MonkeyPatch) -> None:
    """The device is told as soon as its message is in the connection's buffer."""

    def forward(original: Any, self: Outgoing, message: Message, of_device: int, owner: Any) -> None:
        if of_device:
            owner.acknowledge(PacketType.PUBACK, of_device)
            owner = None
        original(self, message, of_device, owner)

    replace(patch, Outgoing, "_forward", forward)


# These need many worlds: `drops_copies_with_the_connection` and `spills_in_the_wrong_order` 27, those that acknowledge
# before the commit 15, those that forget what was received 12, the others up to 4.
HARD_TO_FIND = frozenset(
    {
        "is_live_at_once",
        "drops_copies_with_the_connection",
        "forgets_what_qos_2_it_received",
        "forgets_received_with_each_connect",
        "releases_before_that_is_durable",
        "acknowledges_before_the_commit",
        "deletes_before_the_broker_has_it",
        "releases_what_the_broker_forgot",
        "spills_in_the_wrong_order",
    }
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in HARD_TO_FIND else ()) for name in BROKEN]
)
def test_a_broken_gateway_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each breaks one promise."""
    BROKEN[name](monkeypatch)
    seeds = range(MANY if name in HARD_TO_FIND else ENOUGH)
    assert any(map(partial(_is_found, tmp_path), seeds)), f"{name} was not found"


def _is_found(directory: Path, seed: int) -> bool:
    try:
        return bool(StoredWorld(seed, directory, seconds=40).run())
    except (AssertionError, KeyError):
        return True  # it stumbled over what it had broken
