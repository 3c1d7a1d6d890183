"""The one thread that touches the disk, and its queue.

In: changes and reads, from the reactor's thread.  Out: callbacks, through `post`, in the order of the changes; a
callback means that the change is durable, or, with a `StoreError`, that it is not.

Everything that arrives while a transaction runs becomes the next one (group commit).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from attrs import frozen

from gateway.store.database import (
    Append,
    Change,
    Database,
    Opened,
    Probe,
    Save,
    StoreError,
    is_input_output,
)

_MOST = 200  # changes in a transaction; their callbacks are one turn of the reactor
_SCANNED = 2_000  # rows that are looked at in one piece, so that commits need not wait for the scan
_RECOVER_EVERY = 10.0  # seconds between two attempts to go on with a copy

Done = Callable[[StoreError | None], None]
Post = Callable[[Callable[[], None]], None]


@frozen(slots=True)
class _Write:
    change: Change
    done: Done | None


@frozen(slots=True)
class _Work:
    work: Callable[[Database], Any]
    done: Callable[[Any, StoreError | None], None]


class Writer:
    """Runs a `Database` in a thread of its own.

    `post` calls a function in the reactor's thread; `committed` is called there with the seconds that each transaction
    took and the bytes of the files after it.
    """

    def __init__(
        self,
        database: Database,
        post: Post,
        committed: Callable[[float, int, StoreError | None], None],
        scanned: Callable[[list[tuple[int, int, int, int]] | None], None],
    ) -> None:
        self._database = database
        self._post = post
        self._committed = committed
        self._scanned = scanned
        self._condition = threading.Condition()
        self._queue: deque[_Write | _Work] = deque()
        self._closing = False
        # Deletes that failed: nobody waits for them, but they must not be forgotten.
        self._owed: list[Change] = []
        self._recovered_at = -_RECOVER_EVERY
        self._scan_from = 0
        self._scan_to = 0
        self._scanning = False
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
        self._put(_Write(change, done))

    def work(self, work: Callable[[Database], Any], done: Callable[[Any, StoreError | None], None]) -> None:
        """Call `work` in the thread; `done` gets what it returns, or the error."""
        self._put(_Work(work, done))

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
                while not (self._queue or self._closing or self._scanning):
                    self._condition.wait()
                taken = [self._queue.popleft() for _ in range(min(_MOST, len(self._queue)))]
                if not taken and self._closing:
                    break
            if taken:
                self._do(taken)
            if self._scanning:
                self._scan()
        self._settle_debts()
        self._database.close()

    def _do(self, taken: Sequence[_Write | _Work]) -> None:
        writes = [item for item in taken if isinstance(item, _Write)]
        calls: list[Callable[[], None]] = []
        if writes:
            calls += self._write(writes)
        for item in taken:
            if isinstance(item, _Work):
                calls.append(self._called(item))
        self._post(lambda: _call_all(calls))

    def _called(self, item: _Work) -> Callable[[], None]:
        try:
            value = item.work(self._database)
        except StoreError as error:
            failure = error
            return lambda: item.done(None, failure)
        return lambda: item.done(value, None)

    def _write(self, writes: Sequence[_Write]) -> list[Callable[[], None]]:
        began = monotonic()
        failures: dict[int, StoreError] = {}
        error: StoreError | None = None
        try:
            self._database.commit([*self._owed, *(write.change for write in writes)])
            self._owed.clear()
        except StoreError as failed:
            error = failed
            failures = self._rescue(writes, failed)
        seconds, used = monotonic() - began, self._database.used()
        told: list[Callable[[], None]] = [lambda: self._committed(seconds, used, error)]
        for index, write in enumerate(writes):
            if write.done is not None:
                told.append(_told(write.done, failures.get(index)))
        return told

    def _rescue(self, writes: Sequence[_Write], error: StoreError) -> dict[int, StoreError]:
        """After a transaction failed: find room for what frees room, or another file.  Return what failed, by index."""
        failures = dict.fromkeys(range(len(writes)), error)
        if error.is_full:
            self._database.give_up_reserve()
            freeing = [
                (index, write)
                for index, write in enumerate(writes)
                if not isinstance(write.change, Append | Probe | Save)
            ]
        elif is_input_output(error) and monotonic() - self._recovered_at >= _RECOVER_EVERY:
            self._recovered_at = monotonic()
            try:
                self._database.recover()
            except StoreError:
                freeing = []
            else:
                freeing = list(enumerate(writes))
        else:
            freeing = []
        try:
            if freeing or self._owed:
                self._database.commit([*self._owed, *(write.change for _, write in freeing)])
                self._owed.clear()
                for index, _ in freeing:
                    del failures[index]
        except StoreError:
            pass  # the first error says why
        self._owed += [writes[index].change for index in failures if writes[index].done is None]
        return failures

    def _settle_debts(self) -> None:
        if self._owed:
            try:
                self._database.commit(self._owed)
            except StoreError:
                return  # the rows are sent once more after the next start, with DUP

    def _scan(self) -> None:
        try:
            rows = self._database.scan(self._scan_from, self._scan_to, _SCANNED)
        except StoreError:
            rows = []
        if rows:
            self._scan_from = rows[-1][0]
            self._post(lambda: self._scanned(rows))
        else:
            self._scanning = False
            self._post(lambda: self._scanned(None))


def _told(done: Done, failure: StoreError | None) -> Callable[[], None]:
    return lambda: done(failure)


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
