"""The one thread that touches the disk, and its queue.

In: changes and reads, from the reactor's thread.  Out: callbacks, through `post`, in the order of the changes; a
callback means that the change is durable, or, with a `StoreError`, that it is not.

Everything that arrives while a transaction runs becomes the next one (group commit).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

from attrs import evolve, frozen

from gateway.store.database import (
    Append,
    Change,
    Database,
    Delete,
    Forget,
    Opened,
    Probe,
    Release,
    Save,
    StoreError,
    is_damaged,
    needs_recovery,
)
from gateway.store.row import Row

_MOST = 200  # changes in a transaction; their callbacks are one turn of the reactor
_SCANNED = 2_000  # rows that are looked at in one piece, so that commits need not wait for the scan
_RECOVER_EVERY = 10.0  # seconds between two attempts to go on with a copy
_SCAN_AGAIN = 1.0  # seconds until rows that could not be read are scanned again
_MOST_SCANS = 10  # scans in a row that fail; then the file is taken for damaged
_UNREADABLE_FOR = 10.0  # seconds in which a row cannot be read; then the same
_MOST_STARTS = 3  # times that a damaged file is moved aside, each of which takes room on the disk

# What waits for room, and `Forget`, which must not overtake a `Save` of its device.
_NEEDS_ROOM = (Append, Probe, Save, Forget)

Done = Callable[[StoreError | None], None]
Post = Callable[[Callable[[], None]], None]


@frozen(slots=True)
class _Write:
    change: Change
    done: Done | None
    # How many failed transactions had been reported when this was asked for.
    reported: int


@frozen(slots=True)
class _Work:
    work: Callable[[Database], Any]
    done: Callable[[Any, StoreError | None], None]


class Writer:
    """Runs a `Database` in a thread of its own.

    `post` calls a function in the reactor's thread; `committed` is called there with the seconds that each transaction
    took and the bytes of the files after it, `noted` with words for the log.
    """

    def __init__(
        self,
        database: Database,
        post: Post,
        committed: Callable[[float, int, StoreError | None], None],
        scanned: Callable[[list[tuple[int, int, int, int]] | None], None],
        noted: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._database = database
        self._post = post
        self._committed = committed
        self._scanned = scanned
        self._noted = noted
        self._condition = threading.Condition()
        self._queue: deque[_Write | _Work] = deque()
        self._closing = False
        # What must become durable although its transaction failed: it comes first in the next one.
        self._owed: list[Change] = []
        # Failed transactions, as the thread knows and as the reactor's thread has been told; the last error.
        self._failed = self._reported = 0
        self._error: StoreError | None = None
        self._recovered_at = -_RECOVER_EVERY
        self._scan_from = 0
        self._scan_at = 0.0
        self._scan_to = 0
        self._scanning = False
        self._failed_scans = 0
        # Rows that the disk did not give when they were asked for, and since when.
        self._unreadable: dict[int, float] = {}
        self._starts_left = _MOST_STARTS
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)

    def open(self) -> Opened:
        """Open the database, in the caller's thread, and start the thread.  Raises `StoreUnusable`."""
        opened = self._database.open()
        self._scan_to = opened.last_number
        self._scanning = True
        self._thread.start()
        return opened

    def write(self, change: Change, done: Done | None = None) -> None:
        """Make a change durable, then call `done`."""
        self._put(_Write(change, done, self._reported))

    def work(self, work: Callable[[Database], Any], done: Callable[[Any, StoreError | None], None]) -> None:
        """Call `work` in the thread; `done` gets what it returns, or the error."""
        self._put(_Work(work, done))

    def read(self, numbers: Sequence[int], done: Callable[[Any, StoreError | None], None]) -> None:
        """Read rows; `done` gets what `Database.read` returns, or the error.

        If the first row cannot be read for some time, the others are taken into a new file.
        """
        self.work(lambda database: self._rows(database, numbers), done)

    def close(self) -> None:
        """Write what waits, close the file, end the thread.  Blocks until that is done."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    def _put(self, item: _Write | _Work) -> None:
        with self._condition:
            self._queue.append(item)
            self._condition.notify()

    # ---- in the thread

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._queue or self._closing or (self._scanning and monotonic() >= self._scan_at)):
                    self._condition.wait(max(0.0, self._scan_at - monotonic()) if self._scanning else None)
                taken = [self._queue.popleft() for _ in range(min(_MOST, len(self._queue)))]
                if not taken and self._closing:
                    break
            if taken:
                self._do(taken)
            if self._scanning and monotonic() >= self._scan_at:
                self._scan()
        self._settle_debts()
        self._database.close()

    def _do(self, taken: Sequence[_Write | _Work]) -> None:
        writes = [item for item in taken if isinstance(item, _Write)]
        if writes:
            told = self._write(writes)
            # Devices wait for this, and must not wait for what is read for drains.
            self._post(lambda: self._call_all(told))
        works = [self._called(item) for item in taken if isinstance(item, _Work)]
        if works:
            self._post(lambda: self._call_all(works))

    def _call_all(self, calls: Sequence[Callable[[], None]]) -> None:
        """In the reactor's thread: call all; an error in one, for whoever runs what is posted, leaves the others."""
        for call in calls:
            try:
                call()
            except Exception as error:  # noqa: BLE001  it is raised again, behind the others
                self._post(partial(_raise, error))

    def _called(self, item: _Work) -> Callable[[], None]:
        try:
            value = item.work(self._database)
        except StoreError as error:
            failure = error
            return lambda: item.done(None, failure)
        except Exception as error:  # noqa: BLE001  without this thread, no device would be acknowledged any more
            internal = StoreError(f"internal error: {type(error).__name__}: {error}")
            return lambda: item.done(None, internal)
        return lambda: item.done(value, None)

    def _rows(self, database: Database, numbers: Sequence[int]) -> list[Row | int]:
        try:
            rows = database.read(numbers)
        except StoreError as error:
            since = self._unreadable.setdefault(numbers[0], monotonic())
            if monotonic() - since < _UNREADABLE_FOR or not self._start_anew(error):
                raise
            rows = database.read(numbers)
        self._unreadable.pop(numbers[0], None)
        return rows

    def _write(self, writes: Sequence[_Write]) -> list[Callable[[], None]]:
        began = monotonic()
        # A message whose predecessor failed must not become durable before the device knows: it would overtake it.
        failures: dict[int, StoreError] = {}
        for index, each in enumerate(writes):
            if self._error is not None and isinstance(each.change, Append) and each.reported < self._failed:
                failures[index] = self._error
        tried = {index: each for index, each in enumerate(writes) if index not in failures}
        error: StoreError | None = None
        try:
            self._database.commit([*self._owed, *(each.change for each in tried.values())])
            self._owed.clear()
        except StoreError as failed:
            error = failed
            failures |= self._rescue(tried, failed)
        if failures:
            error = self._error
        seconds, used, count = monotonic() - began, self._database.used(), self._failed
        told: list[Callable[[], None]] = [lambda: self._report(seconds, used, error, count)]
        for index, write in enumerate(writes):
            if write.done is not None:
                told.append(_told(write.done, failures.get(index)))
        return told

    def _report(self, seconds: float, used: int, error: StoreError | None, failed: int) -> None:
        """In the reactor's thread: what became of a transaction."""
        self._reported = failed
        self._committed(seconds, used, error)

    def _rescue(self, tried: Mapping[int, _Write], error: StoreError) -> dict[int, StoreError]:
        """After a transaction failed: find room for what frees room, or another file.  Return what failed, by index."""
        failures = dict.fromkeys(tried, error)
        freeing: list[int] = []
        if error.is_full:
            self._database.give_up_reserve()
            freeing = [index for index, each in tried.items() if not isinstance(each.change, _NEEDS_ROOM)]
        elif needs_recovery(error) and monotonic() - self._recovered_at >= _RECOVER_EVERY:
            self._recovered_at = monotonic()
            try:
                self._database.recover()
                freeing = list(tried)
            except StoreError:
                pass  # the first error says why
        elif is_damaged(error) and self._start_anew(error):
            freeing = list(tried)
        try:
            if freeing or self._owed:
                self._database.commit([*self._owed, *(tried[index].change for index in freeing)])
                self._owed.clear()
                for index in freeing:
                    del failures[index]
        except StoreError:
            pass
        if failures:
            self._failed += 1
            self._error = error
        for index in failures:
            self._owe(tried[index])
        return failures

    def _owe(self, write: _Write) -> None:
        """Take note of what the next transaction has to do because this failed."""
        change = write.change
        if isinstance(change, Append):
            # It may be on the disk all the same, and would be found there after a restart.
            self._owed.append(Delete((change.row.number,)))
            if change.received:
                self._owed.append(Release(change.row.device, change.received))
        elif isinstance(change, Save):
            self._owe_state(change)
        elif write.done is None:
            self._owed.append(change)

    def _owe_state(self, change: Save) -> None:
        """Owe one state of each device, however often its device comes while the disk fails."""
        for at, owed in enumerate(self._owed):
            if isinstance(owed, Save) and owed.device == change.device:
                forgets = owed.forget_received or change.forget_received
                self._owed[at] = evolve(change, forget_received=forgets)
                return
        self._owed.append(change)

    def _settle_debts(self) -> None:
        if self._owed:
            try:
                self._database.commit(self._owed)
            except StoreError:
                return  # the rows are sent once more after the next start, with DUP

    def _scan(self) -> None:
        try:
            rows = self._database.scan(self._scan_from, self._scan_to, _SCANNED)
        except StoreError as error:
            self._failed_scan(error)
            return
        self._failed_scans = 0
        if rows:
            self._scan_from = rows[-1][0]
            self._post(lambda: self._scanned(rows))
        else:
            self._end_scan()

    def _failed_scan(self, error: StoreError) -> None:
        """Try again, or go on with a new file; serve devices without the rows if neither helps."""
        # What was acknowledged before the start must not wait for the next one.
        self._scan_at = monotonic() + _SCAN_AGAIN
        self._failed_scans += 1
        if self._failed_scans < _MOST_SCANS and not is_damaged(error):
            return
        self._failed_scans = 0
        if not self._start_anew(error):
            self._note(f"messages from before the start cannot be read, and wait for the next start: {error}")
            self._end_scan()

    def _end_scan(self) -> None:
        self._scanning = False
        self._post(lambda: self._scanned(None))

    def _start_anew(self, error: StoreError) -> bool:
        """Go on with what can be read of a damaged file; return whether that went well."""
        if not self._starts_left:
            return False
        self._starts_left -= 1
        try:
            self._note(self._database.start_anew(str(error)))
        except StoreError as failed:
            self._note(f"the store is damaged ({error}), and cannot be copied: {failed}")
            return False
        return True

    def _note(self, words: str) -> None:
        self._post(lambda: self._noted(words))


def _told(done: Done, failure: StoreError | None) -> Callable[[], None]:
    return lambda: done(failure)


def _raise(error: Exception) -> None:
    raise error
