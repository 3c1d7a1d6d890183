"""The store as the sessions use it: backlogs, quotas, what was counted.

In: messages to keep, rows that are finished, the configuration.  Out: callbacks once something is durable.  It runs in
the reactor's thread; only the writer touches the disk.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from attrs import define, field

from gateway.config import StoreConfig
from gateway.mqtt.message import Message
from gateway.pieces import Pieces, slices
from gateway.store.backlog import Backlog
from gateway.store.database import (
    Append,
    Change,
    Database,
    Delete,
    Forget,
    Opened,
    Probe,
    Release,
    Released,
    Save,
    SetAside,
    StoreError,
    Unreleased,
)
from gateway.store.row import OVERHEAD, Row, size_of

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds
_PROBE_EVERY = 5.0  # seconds, while the disk does not take what is written
_LIST_EVERY = 60.0  # seconds until files that were moved aside are listed again
# Messages of one device; and what is done in a turn: each message counts 1, so does each device that is looked at, and
# deleting from it 10 more.
_AGED_AT_A_TIME = 1_000
_AGED_IN_A_TURN = 1_000
_SAVED_IN_A_TURN = 100  # devices
MOST_REMEMBERED = 128 * 1024 * 1024
"""Bytes of what is kept of devices besides their messages, in memory as on disk, before idle ones are forgotten."""
_LOOKED_AT = 1000  # devices in one search for idle ones
_DEVICE_OVERHEAD = 1024  # bytes in memory of a device without messages
# At most so many rows that the broker has confirmed are sent again, with DUP, after a crash.
_DELETED_TOGETHER = 20
# Evicting frees this share of the quota more than is needed, so that the search for the largest backlog is rare.
_EVICTED_SHARE = 100

Done = Callable[[StoreError | None], None]


class StoreWriter(Protocol):
    """What the store asks of the disk; see `gateway.store.writer.Writer`."""

    def write(self, change: Change, done: Done | None = None) -> None:
        """Make a change durable, then call `done`."""

    def work(self, work: Callable[[Database], object], done: Callable[[object, StoreError | None], None]) -> None:
        """Call `work` where the disk may be waited for."""

    def read(self, numbers: Sequence[int], done: Callable[[Any, StoreError | None], None]) -> None:
        """Read rows, as `Database.read` does."""

    def close(self) -> None:
        """Write what waits and close."""


@define(slots=True)
class Counts:
    """What was done since the start; `dropped` is by reason, `confirmed` counts acknowledgements of brokers."""

    stored: int = 0
    drained: int = 0
    set_aside: int = 0
    confirmed: int = 0
    dropped: Counter[str] = field(factory=Counter)
    commits: int = 0
    commit_seconds: float = 0.0
    commit_buckets: list[int] = field(factory=lambda: [0] * (len(BUCKETS) + 1))


class Store:
    """All backlogs, and what they share.

    `now` gives the time of day in seconds since 1970, `is_plausible` whether it can be believed; `seconds` is the
    injected clock.
    """

    def __init__(
        self,
        config: StoreConfig,
        opened: Opened,
        writer: StoreWriter,
        seconds: Callable[[], float],
        now: Callable[[], float],
        is_plausible: Callable[[], bool] = lambda: True,
    ) -> None:
        self.config = config
        self._writer = writer
        self._seconds = seconds
        self._now = now
        self._is_plausible = is_plausible
        self._last_number = self.last_of_last_run = opened.last_number
        self._by_name: dict[str, Backlog] = {}
        self._by_number: dict[int, Backlog] = {}
        # The device that was saved last comes last.
        self.states: dict[str, str] = {}
        self.remembered = 0
        self.received: dict[str, set[int]] = {}
        self.released = set(opened.released)
        self.loading = True
        self.bytes = 0
        # Bytes that were given to the writer and are not durable yet.
        self._under_way = 0
        self.used = 0
        # Deletes that are put off, so that a drain does not wear out the flash with commits of its own.
        self._finished: list[int] = []
        # Why nothing is written, and why nothing is read for some devices, by name.
        self.failure: StoreError | None = None
        self.unreadable: dict[str, StoreError] = {}
        # Names of files that were moved aside because they were damaged, the newest last.
        self.damaged_files: list[str] = []
        self._listed = -_LIST_EVERY
        # The disk has another file now, in which devices may be missing.
        self._is_new_file = False
        self._probed = 0.0
        self._pending_probe = False
        self._is_ageing = False
        self._is_closed = False
        # How many messages of each device were set aside.
        self.aside: Counter[str] = Counter()
        self.counts = Counts()
        self.notes = list(opened.notes)
        for device in opened.devices:
            self._add(Backlog(device.number, device.name, loading=True))
            self._remember(device.name, device.state)
            self.received[device.name] = set(device.received)
        for number, count in opened.aside:
            self.aside[self._of_device(number).name] = count

    # ---- backlogs

    def backlog(self, name: str) -> Backlog:
        """Return the backlog with this name, a new one if there is none."""
        found = self._by_name.get(name)
        if found is None:
            self._last_number += 1
            found = Backlog(self._last_number, name, loading=False)
            self._add(found)
            self.received[name] = set()
        return found

    def known(self, name: str) -> Backlog | None:
        """Return the backlog with this name, if there is one."""
        return self._by_name.get(name)

    def __iter__(self) -> Iterator[Backlog]:
        return iter(self._by_name.values())

    @property
    def messages(self) -> int:
        """How many messages wait."""
        return sum(len(backlog) for backlog in self)

    @property
    def oldest(self) -> int | None:
        """When the oldest message that waits was stored, in seconds since 1970."""
        return min((backlog.oldest for backlog in self if backlog.oldest is not None), default=None)

    def make_place(self, name: str, in_use: Container[str]) -> bool:
        """Whether a device may be added; forgets others for it that are not `in_use`, the longest idle first.

        A device is not idle while it has messages, or has sent a QoS 2 message and not released its Packet Identifier.
        """
        if name in self._by_name or self.remembered < MOST_REMEMBERED:
            return True
        for other in list(islice(self.states, _LOOKED_AT)):
            backlog = self._by_name.get(other)
            if backlog is not None and other not in in_use and not (backlog.loading or self.received[other]):
                self.forget(backlog)
            if self.remembered < MOST_REMEMBERED:
                return True
            if other in self.states:
                # The next search begins behind it.
                self.states[other] = self.states.pop(other)
        return False

    def forget(self, backlog: Backlog) -> None:
        """Forget a device without messages."""
        if not len(backlog) and not self.aside[backlog.name] and self._by_name.pop(backlog.name, None) is not None:
            del self._by_number[backlog.number]
            self._remember(backlog.name, None)
            self.received.pop(backlog.name, None)
            self.unreadable.pop(backlog.name, None)
            # Rows without their device would wait for a person.
            self.flush()
            self._writer.write(Forget(backlog.number))

    # ---- messages

    @property
    def next_number(self) -> int:
        """The number that the next row gets."""
        return self._last_number + 1

    def has_room(self, backlog: Backlog, size: int) -> bool:
        """Whether a message of `size` bytes may be stored; makes room where the configuration says so."""
        if self.failure is not None:
            return False
        config = self.config
        over = backlog.bytes + size - config.max_size_per_device
        if over > 0 and (config.full == "refuse" or self._evict(backlog, over, config.max_size_per_device) < over):
            return False
        over = self.bytes + self._under_way + size - config.max_size
        if over <= 0:
            return True
        if config.full == "refuse":
            return False
        while over > 0:
            largest = max(self, key=lambda each: each.bytes, default=None)
            freed = self._evict(largest, over, config.max_size) if largest is not None else 0
            if not freed:
                return False
            over -= freed
        return True

    def append(
        self,
        backlog: Backlog,
        message: Message,
        done: Callable[[int, StoreError | None], None],
        *,
        identifier: int = 0,
        received: int = 0,
    ) -> int:
        """Store a message; `done` gets its number once it is durable, or why it is not.  Returns the number.

        `identifier` is the Packet Identifier that a QoS 2 message has at the broker, `received` the one that it has at
        the device, which stays known until `release`.
        """
        self._last_number += 1
        number, size, stamp = self._last_number, size_of(message), int(self._now())
        self._under_way += size
        known = self.received[backlog.name]
        if received:
            known.add(received)

        def committed(error: StoreError | None) -> None:
            self._under_way -= size
            if error is None:
                backlog.append(number, size, stamp)
                self.bytes += size
                self.counts.stored += 1
                if received:
                    # An earlier `release`, which a device can ask for twice, may have become durable meanwhile.
                    known.add(received)
            else:
                known.discard(received)
            done(number, error)

        self._writer.write(Append(Row(number, backlog.number, stamp, message, identifier), received), committed)
        return number

    def read(self, backlog: Backlog, numbers: Sequence[int], done: Callable[[list[Row | int]], None]) -> None:
        """Read rows; `done` gets them, a number for each that is damaged, and fewer if the disk does not give all."""

        def was_read(rows: Any, error: StoreError | None) -> None:
            if error is None:
                self.unreadable.pop(backlog.name, None)
            else:
                self.unreadable[backlog.name] = error
            done(rows if error is None else [])

        self._writer.read(numbers, was_read)

    def finish(self, backlog: Backlog, numbers: Sequence[int], reason: str = "") -> None:
        """Delete rows that are taken: the broker has them, or, with a `reason`, nobody gets them."""
        for number in numbers:
            self.bytes -= backlog.finish(number)
            self.released.discard(number)
        if reason:
            self.counts.dropped[reason] += len(numbers)
        else:
            self.counts.drained += len(numbers)
        self._finished += numbers
        if len(self._finished) >= _DELETED_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write the deletes that were put off."""
        if self._finished:
            finished, self._finished = self._finished, []
            self._writer.write(Delete(tuple(finished)))
            self._shrink_if_empty()

    def set_aside(self, backlog: Backlog, number: int, why: str) -> None:
        """Take a row out of its backlog that the broker will not have, and keep it."""
        self.bytes -= backlog.finish(number)
        self.counts.set_aside += 1
        self.aside[backlog.name] += 1
        self._writer.write(SetAside(number, why))

    def mark_released(self, number: int, done: Done) -> None:
        """The broker has a QoS 2 message; `done` when that is durable."""
        self.released.add(number)

        def marked(error: StoreError | None) -> None:
            if error is not None:
                self.released.discard(number)
            done(error)

        self._writer.write(Released(number), marked)

    def unmark_released(self, number: int, done: Done) -> None:
        """The broker's session is gone, and with it what it had of a QoS 2 message; `done` when that is durable."""
        self.released.discard(number)
        self._writer.write(Unreleased(number), done)

    def release(self, backlog: Backlog, identifier: int, done: Done) -> None:
        """The device released its Packet Identifier; `done` when that is durable."""
        known = self.received[backlog.name]

        def released(error: StoreError | None) -> None:
            if error is None:
                known.discard(identifier)
            done(error)

        self._writer.write(Release(backlog.number, identifier), released)

    def save(self, backlog: Backlog, state: str, done: Done | None = None, *, forget_received: bool = False) -> None:
        """Keep what is known of a device; `done` when that is durable."""
        self._remember(backlog.name, state)
        if forget_received:
            # What is under way belongs to the session before, and leaves these alone.
            self.received[backlog.name] = set()
        self._writer.write(Save(backlog.number, backlog.name, state, forget_received), done)

    def drop(self, backlog: Backlog, done: Callable[[int, StoreError | None], None]) -> None:
        """Delete all that waits of a device and is not in flight, and what was set aside.

        `done` gets how many there were, and the error if those that were set aside are still there.
        """
        waiting = self.aside.pop(backlog.name, 0)
        numbers, freed = backlog.evict(1 << 62)
        self.bytes -= freed
        self.counts.dropped["dropped by hand"] += len(numbers)
        self._writer.write(Delete(tuple(numbers)))

        def dropped(aside: object, error: StoreError | None) -> None:
            if error is not None:
                self.aside[backlog.name] += waiting
            done(len(numbers) + (aside if isinstance(aside, int) else 0), error)

        self._writer.work(lambda database: database.drop_aside(backlog.number), dropped)

    def retry(self, backlog: Backlog, done: Callable[[int, StoreError | None], None]) -> None:
        """Put what was set aside behind the backlog; `done` gets how many there were, or the error."""
        waiting = self.aside.pop(backlog.name, 0)
        # Their numbers must not be given to others meanwhile.
        first = self._last_number + 1
        self._last_number += 1_000_000

        def moved(rows: object, error: StoreError | None) -> None:
            if error is not None:
                self.aside[backlog.name] += waiting
            found = rows if isinstance(rows, list) else []
            for number, stamp, size in found:
                backlog.append(number, size, stamp)
                self.bytes += size
            done(len(found), error)

        self._writer.work(lambda database: database.retry_aside(backlog.number, first), moved)

    # ---- from time to time

    def sweep(self) -> Pieces[None]:
        """Delete what is too old, and try a disk again that failed; begun every second or so."""
        now = self._seconds()
        self.flush()
        if self.failure is not None and not self._pending_probe and now - self._probed >= _PROBE_EVERY:
            self._probed = now
            self._pending_probe = True
            self._writer.work(lambda database: database.keep_reserve(), self._has_reserve)
        if self._is_new_file and not self._is_closed:
            self._is_new_file = False
            yield from self._save_all()
        if now - self._listed >= _LIST_EVERY and not self._is_closed:
            self._listed = now
            self._writer.work(lambda database: database.damaged_files(), self._are_listed)
        # One that takes longer than a second goes on.
        if self.config.max_age and self._is_plausible() and not self.loading and not self._is_ageing:
            self._is_ageing = True
            try:
                yield from self._delete_old(int(self._now() - self.config.max_age))
            finally:
                self._is_ageing = False

    def _save_all(self) -> Pieces[None]:
        for some in slices(list(self.states.items()), _SAVED_IN_A_TURN):
            for name, state in some:
                backlog = self._by_name.get(name)
                if backlog is not None:
                    self._writer.write(Save(backlog.number, name, state))
            yield

    def _delete_old(self, limit: int) -> Pieces[None]:
        done = 0
        for backlog in list(self):
            if done >= _AGED_IN_A_TURN:
                done = 0
                yield
                if self._is_closed:
                    return
            done += 1
            oldest = backlog.oldest
            if oldest is not None and oldest < limit:
                numbers, freed = backlog.evict_before(limit, _AGED_AT_A_TIME)
                self._delete(numbers, freed, "too old")
                done += 10 + len(numbers)

    def close(self) -> None:
        """Write what waits and close the file."""
        self._is_closed = True
        self.flush()
        self._writer.close()

    # ---- from the writer

    def committed(self, seconds: float, used: int, error: StoreError | None) -> None:
        """A transaction took so long; the files have so many bytes."""
        self.counts.commits += 1
        self.counts.commit_seconds += seconds
        self.counts.commit_buckets[bisect_left(BUCKETS, seconds)] += 1
        self.used = used
        if error is not None:
            self.failure = error
            self._probed = self._seconds()

    def noted(self, words: str) -> None:
        """A file was damaged: what became of it, in words for the log."""
        self.notes.append(words)
        self._is_new_file = True
        self._listed = -_LIST_EVERY

    def scanned(self, rows: Sequence[tuple[int, int, int, int]] | None) -> None:
        """Rows from before the start were found; None when that was all of them."""
        if rows is None:
            self.loading = False
            for backlog in self:
                backlog.loading = False
            return
        found: dict[int, list[tuple[int, int, int]]] = {}
        for number, device, stamp, size in rows:
            found.setdefault(device, []).append((number, size + OVERHEAD // 2, stamp))
        for device, of_device in found.items():
            backlog = self._of_device(device)
            before = backlog.bytes
            backlog.put_first(of_device)
            self.bytes += backlog.bytes - before

    # ---- inside

    def _of_device(self, number: int) -> Backlog:
        """Return the backlog of a device that the disk has messages of.

        A damaged file can lose the device and keep the messages.  They get a name that no device has, and wait for a
        person.
        """
        found = self._by_number.get(number)
        if found is None:
            found = Backlog(number, f"device {number}", loading=True)
            self._add(found)
            self.received[found.name] = set()
            self.save(found, "{}")
        return found

    def _remember(self, name: str, state: str | None) -> None:
        before = self.states.pop(name, None)
        if before is not None:
            self.remembered -= len(before) + _DEVICE_OVERHEAD
        if state is not None:
            self.states[name] = state
            self.remembered += len(state) + _DEVICE_OVERHEAD

    def _are_listed(self, names: Any, error: StoreError | None) -> None:
        if error is None:
            self.damaged_files = names

    def _has_reserve(self, is_there: object, _error: StoreError | None) -> None:
        if self.failure is not None and self.failure.is_full and not is_there:
            # Without the reserve there is room only because it was given up.
            self._pending_probe = False
        else:
            self._writer.write(Probe(), self._proved)

    def _proved(self, error: StoreError | None) -> None:
        self._pending_probe = False
        self.failure = error

    def _evict(self, backlog: Backlog, size: int, quota: int) -> int:
        numbers, freed = backlog.evict(size + quota // _EVICTED_SHARE)
        self._delete(numbers, freed, "evicted")
        return freed

    def _delete(self, numbers: list[int], freed: int, reason: str) -> None:
        if numbers:
            self.bytes -= freed
            self.counts.dropped[reason] += len(numbers)
            self._writer.write(Delete(tuple(numbers)))

    def _add(self, backlog: Backlog) -> None:
        self._by_name[backlog.name] = backlog
        self._by_number[backlog.number] = backlog

    def _shrink_if_empty(self) -> None:
        if not self.bytes and not self._under_way and not self.loading:
            self._writer.work(lambda database: database.shrink(), lambda *_: None)
