"""Writing the state of a stored device: one write at a time, with all changes that came meanwhile.

In: a state that changes, and who waits until it is durable.  Out: writes to the store; those who wait are called.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.session.stored_state import DeviceState
from gateway.store.backlog import Backlog
from gateway.store.database import StoreError
from gateway.store.store import Store


class Saving:
    """Writes one device's state."""

    def __init__(self, store: Store, backlog: Backlog, state: DeviceState) -> None:
        self._store = store
        self._backlog = backlog
        self._state = state
        # Who waits for the state to be durable; how many times it is being written.
        self._waiting: list[tuple[Callable[[], None] | None, Callable[[StoreError], None]]] = []
        self._writes = 0
        self._is_stopping = False

    def save(
        self,
        done: Callable[[], None] | None = None,
        failed: Callable[[StoreError], None] = lambda _: None,
        *,
        forget_received: bool = False,
    ) -> None:
        """Write the state: together with what changes until the disk is done with an earlier one.

        `forget_received` deletes the Packet Identifiers of the device's QoS 2 messages in the same transaction.
        """
        self._waiting.append((done, failed))
        if forget_received or self._is_stopping or not self._writes:
            self.now(forget_received=forget_received)

    def stop(self) -> None:
        """Write what waits, and from now on each change at once."""
        self._is_stopping = True
        self.now()

    def now(self, *, forget_received: bool = False) -> None:
        """Write the state without waiting for an earlier write, if anybody wants it written."""
        if not self._waiting:
            return
        told, self._waiting = self._waiting, []
        self._writes += 1

        def saved(error: StoreError | None) -> None:
            try:
                for done, failed in told:
                    if error is not None:
                        failed(error)
                    elif done is not None:
                        done()
            finally:
                self._writes -= 1
                if not self._writes:
                    self.now()

        self._store.save(self._backlog, self._state.dumped(), saved, forget_received=forget_received)
