"""What a stored device publishes, on its way to the broker: kept in memory, kept on disk, sent, confirmed.

In: the device's messages, the broker's acknowledgements, connections that come and go, the time.  Out: packets for the
broker; acknowledgements for the device, each only when the broker or the disk has the message.

LIVE: QoS 0 and 1 leave at once; a copy stays here until the broker's PUBACK, which the device then gets.  Not LIVE:
everything goes to disk first and is sent from there, oldest first.  It becomes LIVE when everything on disk is sent and
the broker acknowledges promptly.  It stops being LIVE when the connection breaks, a PUBACK takes too long, or a QoS 2
message arrives.  Then the copies are written to disk in order, and late acknowledgements on the same connection delete
rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from attrs import define

from gateway.mqtt.message import Message, acknowledgement, with_qos, write_message
from gateway.mqtt.packets import PacketType, ProtocolVersion, describe_disconnect
from gateway.session.drain_pace import DrainPace
from gateway.session.pace import Pace
from gateway.store.backlog import Backlog
from gateway.store.database import StoreError
from gateway.store.row import Row, size_of
from gateway.store.store import Store

WINDOW = 20
"""The most messages that are in flight to the broker."""

_MOST_COPIES = 200
_MOST_COPIED_BYTES = 1_048_576
# Packet Identifiers: QoS 2 has the upper half, since its identifiers are on disk and outlive a restart.
_HALF = 0x8000
_FIRST_REFUSAL = 0x80
# Reason codes that may pass: the message is sent again as a new one (MQTT 5.0 §3.4.2.1).
_MAY_PASS = frozenset({0x80, 0x83, 0x97})
_MOST_TRIES = 3
_PROMPT = 1.0  # seconds in which a broker that keeps up acknowledges
_MOST_HANG_UPS = 3
_HANG_UPS_APART = 60.0  # seconds
MOST_ASIDE_IN_ROW = 2
"""After so many the device, or its rule, is at fault, and not its messages."""


class Owner(Protocol):
    """The device session that a message came from."""

    @property
    def gone(self) -> bool:
        """Whether it has ended."""

    def acknowledge(self, packet_type: PacketType, identifier: int, code: int = 0) -> None:
        """Tell the device; nothing happens if it has gone."""

    def not_stored(self, why: str) -> None:
        """The session cannot go on: neither broker nor disk takes its messages."""


@define(slots=True)
class _Copy:
    """A message that is kept in memory: `at` the broker `identifier`, 0 while it is not sent."""

    message: Message
    owner: Owner | None
    of_device: int
    since: float
    identifier: int = 0


@define(slots=True)
class _Pending:
    """A message that is being written; `order` is 0 for copies, which are older than what was not sent."""

    message: Message
    owner: Owner | None
    of_device: int
    order: int = 0


@define(slots=True, eq=False)
class _Flight:
    """A row that was sent; `awaits` is the packet that is due from the broker."""

    row: Row
    identifier: int
    awaits: PacketType
    since: float
    is_pinged: bool = False
    is_marking: bool = False
    is_marked: bool = False


@define(slots=True)
class Facts:
    """What is known of the connection; `max_packet_size` is the broker's, in bytes, 0 for none.

    `is_same` says that the broker's session is certainly the one that the gateway knows.
    """

    version: ProtocolVersion = ProtocolVersion.MQTT_3_1_1
    window: int = WINDOW
    session_present: bool = False
    is_same: bool = False
    max_packet_size: int = 0
    max_qos: int = 2
    takes_retained: bool = True

    def forbids(self, message: Message) -> str:
        """Say why the broker does not take such a message; empty if it does (MQTT 5.0 §3.2.2.3.4, §3.2.2.3.5)."""
        if message.qos > self.max_qos:
            return f"QoS {message.qos} is more than the broker takes"
        if message.retain and not self.takes_retained:
            return "the broker takes no retained messages"
        return ""


class Outgoing:
    """One device's messages.

    `send` gives a packet to the broker, and may lose the connection at once, which calls `lost`.  The answer to `ping`,
    which sends a PINGREQ, goes to `pong`.  `changed` is called when something was finished.
    """

    def __init__(
        self,
        store: Store,
        backlog: Backlog,
        send: Callable[[bytes], None],
        ping: Callable[[], None],
        seconds: Callable[[], float],
        now: Callable[[], float],
        is_plausible: Callable[[], bool],
        changed: Callable[[], None],
        *,
        drain_pace: DrainPace,
        confirm: bool = False,
        after: float = 5.0,
    ) -> None:
        self._store = store
        self._backlog = backlog
        self._send = send
        self._ping = ping
        self._seconds = seconds
        self._now = now
        self._is_plausible = is_plausible
        self._changed = changed
        self._drain_pace = drain_pace
        # The rates of the device's rule hold for its backlog, too: its broker may have limits for each client.
        self.pace: Pace | None = None
        self._sent = 0
        # Rows up to this number waited for the connection; what comes later is traffic as usual.
        self._waited_until = 0
        self.confirm = confirm
        self.after = after
        self.live = False
        self.connected = False
        self.facts = Facts()
        self._full = False
        # Whether nothing more is to be sent on this connection, which will end once nothing is in flight.
        self._finishing = False
        self._epoch = 0
        self._copies: deque[_Copy] = deque()
        self._copied_bytes = 0
        self._sent_copies: dict[int, _Copy] = {}
        self._pending: dict[int, _Pending] = {}
        self.pending_bytes = 0
        self._refused: deque[_Pending] = deque()
        self._offered = 0
        self._flights: dict[int, _Flight] = {}
        # Rows that the broker confirmed before they were durable, each with its reason code.
        self._early: dict[int, int] = {}
        self._loaded: deque[Row] = deque()
        self._reading = False
        # Messages to be published anew, and how many of them are not written yet.
        self._unmarked: list[int] = []
        self._unmarking = 0
        # Flights whose PUBREL waits for the disk, in the order of their PUBRECs (MQTT 5.0 §4.6).
        self._to_release: deque[_Flight] = deque()
        # Those that the disk did not take.
        self._marked_still: list[int] = []
        # Rows that may have been sent in this session of the broker's, each with its Packet Identifier, 0 if unknown.
        self._sent_before: dict[int, int] = {}
        # After a restart nobody knows which of the first rows were sent.
        self._may_repeat = 2 * WINDOW
        self._tries: dict[int, int] = {}
        # Rows on which the broker hung up: the last one, when, and how many messages of others it had confirmed then.
        self._one_at_a_time = False
        self._suspect = 0
        self._suspected: list[tuple[float, int]] = []
        self._confirmed = 0
        # How many were set aside for that, without one that was delivered in between.
        self.aside_in_row = 0
        self._pings = 0
        self._next_low = 0
        self.reserved: set[int] = set()
        self.last_progress = 0.0

    # ---- how it stands

    @property
    def is_idle(self) -> bool:
        """Whether nothing of the device waits, here or on disk."""
        return not (
            self._copies
            or self._sent_copies
            or self._flights
            or self._pending
            or self._refused
            or self._loaded
            or self._reading
            or len(self._backlog)
            or self._backlog.loading
        )

    @property
    def is_settled(self) -> bool:
        """Whether nothing is in memory only."""
        return not (self._copies or self._sent_copies or self._pending or self._refused)

    @property
    def has_released(self) -> bool:
        """Whether messages are between the broker's PUBREC and PUBCOMP."""
        return bool(self._released())

    def publish_released_anew(self) -> None:
        """The broker may have a new session, which knows nothing of messages between PUBREC and PUBCOMP.

        Nothing is sent before that is durable: after a crash they must not be taken for received.  Comes before
        `connect`.
        """
        self._unmarked = self._released()
        self._unmarking = len(self._unmarked)
        for number in self._unmarked:
            self._unmark(number)

    def _released(self) -> list[int]:
        released = self._store.released
        # What is in flight is at the front.
        return [number for number in self._backlog.first(4 * WINDOW) if number in released] if released else []

    @property
    def in_flight(self) -> int:
        """How many messages the broker has not confirmed."""
        return len(self._sent_copies) + len(self._flights)

    @property
    def is_congested(self) -> bool:
        """Whether the device is not to be read: messages wait for the disk, or for the broker alone."""
        return self.pending_bytes > _MOST_COPIED_BYTES or len(self._pending) > 5 * _MOST_COPIES or bool(self._refused)

    # ---- from the device

    def offer(self, message: Message, of_device: int, owner: Owner | None) -> None:
        """Take a message; `of_device` is its Packet Identifier there, 0 for QoS 0."""
        if message.qos == 2:
            known = self._store.received[self._backlog.name]
            if of_device in known:
                # Sent once more; PUBREC follows the commit, which may be under way for a session that has ended.
                pending = self._pending_of(of_device)
                if pending is None:
                    _tell(owner, PacketType.PUBREC, of_device)
                else:
                    pending.owner = owner
                return
            self.spill()
        elif self.live and self._is_forbidden(message):
            # It is set aside when its turn comes.
            self.spill()
        if self._refused:
            self._refused.append(self._new_pending(message, of_device, owner))
        elif self.live and self._may_forward(message):
            self._forward(message, of_device, owner)
        else:
            self._keep(message, of_device, owner)

    def _pending_of(self, identifier: int) -> _Pending | None:
        """Return the device's last QoS 2 message with this Packet Identifier that is being written."""
        every = reversed(self._pending.values())
        return next((each for each in every if each.of_device == identifier and each.message.qos == 2), None)

    def forget_copies(self) -> None:
        """The device comes anew, and sends again what it has no acknowledgement for; what it does not is written."""
        kept = [copy for copy in (*self._sent_copies.values(), *self._copies) if not copy.of_device]
        self._sent_copies = {copy.identifier: copy for copy in kept if copy.identifier}
        self._copies = deque(copy for copy in kept if not copy.identifier)
        self._copied_bytes = sum(size_of(copy.message) for copy in kept)
        self._refused.clear()

    # ---- from the broker

    def connect(self, facts: Facts) -> None:
        """There is a connection, and the broker has accepted it."""
        self.facts = facts
        self.connected = True
        self._waited_until = self._store.next_number - 1
        self.last_progress = self._seconds()
        if not facts.session_present:
            self._sent_before.clear()
            self._may_repeat = 0
        elif not facts.is_same:
            # DUP and the same identifier let the broker recognise a message, if it is the old session after all.
            self._sent_before.update(dict.fromkeys(self._unmarked, 0))
        self._unmarked.clear()
        self.pump()

    def pace_by(self, pace: Pace | None) -> None:
        """The next connection sends rows at the rates of a rule; None for no limit."""
        self.pace, self._sent = pace, 0

    def finish_flights(self) -> None:
        """Send nothing more on this connection, which ends when nothing is in flight; the answers are still taken."""
        self._finishing = True

    def hung_up(self) -> None:
        """The broker closes the connection without a word; comes before `lost`.

        Some brokers do that to a message that they do not take.  The next connection sends one at a time, to find out
        which it is.  One that was alone three times is set aside, if the broker has served other devices in between.
        """
        if not self.in_flight:
            return
        self._one_at_a_time = True
        if len(self._flights) > 1 or self._sent_copies:
            return
        (flight,) = self._flights.values()
        number, now = flight.row.number, self._seconds()
        others = self._store.counts.confirmed - self._confirmed
        if number != self._suspect:
            self._suspect = number
            self._suspected.clear()
        if self._suspected:
            before, others_before = self._suspected[-1]
            if now - before < _HANG_UPS_APART or others == others_before:
                return
        self._suspected.append((now, others))
        if len(self._suspected) < _MOST_HANG_UPS or number in self._pending or flight.awaits is PacketType.PUBCOMP:
            return
        del self._flights[flight.identifier]
        self._suspected.clear()
        self.aside_in_row += 1
        words = f"the broker closed the connection {_MOST_HANG_UPS} times when it was sent"
        self._store.set_aside(self._backlog, number, words)

    def lost(self) -> None:
        """The connection is gone."""
        self._epoch += 1
        self.connected = False
        for identifier, flight in self._flights.items():
            self._sent_before[flight.row.number] = identifier
        self._flights.clear()
        self._to_release.clear()
        self._loaded.clear()
        self._reading = self._full = self._finishing = False
        self._unmarking = 0
        self._marked_still.clear()
        self._pings = 0
        self._backlog.give_back()
        self.spill()
        # What could be kept nowhere is sent again by the device, which has no acknowledgement for it.
        owners = [copy.owner for copy in (*self._sent_copies.values(), *self._copies)]
        for owner in (*owners, *(each.owner for each in self._refused)):
            if owner is not None:
                owner.not_stored("the broker's connection was lost, and the store takes nothing")
        self._sent_copies.clear()
        self._copies.clear()
        self._refused.clear()
        self._copied_bytes = 0
        self.live = False

    def full(self, is_full: bool) -> None:
        """The connection takes no more for now, or again."""
        self._full = is_full
        if is_full:
            self.spill()
        else:
            self.pump()

    def acknowledged(self, packet_type: PacketType, identifier: int, code: int) -> None:
        """Take PUBACK, PUBREC or PUBCOMP; what nobody waits for is ignored, since it may be late."""
        self.last_progress = self._seconds()
        copy = self._sent_copies.get(identifier)
        if copy is not None or identifier in self._flights:
            self._was_confirmed()
        if copy is not None and packet_type is PacketType.PUBACK:
            del self._sent_copies[identifier]
            self._copied_bytes -= size_of(copy.message)
            if copy.of_device:
                _tell(copy.owner, PacketType.PUBACK, copy.of_device, code)
            self._send_copies()
            self._changed()
            return
        flight = self._flights.get(identifier)
        if flight is None or flight.awaits is not packet_type:
            return
        if code >= _FIRST_REFUSAL and packet_type is not PacketType.PUBCOMP:
            self._rejected(flight, code)
        elif packet_type is PacketType.PUBREC:
            if flight not in self._to_release and not flight.is_marking:
                self._to_release.append(flight)
                self._mark(flight)
            return
        else:
            self._finish(flight)
        self.pump()
        self._changed()

    def pong(self) -> None:
        """The answer to `ping` came: the broker has read everything that was sent before."""
        self.last_progress = self._seconds()
        if self._pings:
            self._pings = 0
            for flight in [each for each in self._flights.values() if each.is_pinged]:
                self._was_confirmed()
                self._finish(flight)
            self.pump()
            self._changed()

    # ---- from time to time

    def sweep(self, now: float, interval: float) -> None:
        """Write copies whose PUBACK takes too long; called every `interval` seconds."""
        oldest = next(iter(self._sent_copies.values()), None) or next(iter(self._copies), None)
        if oldest is not None and now + interval > oldest.since + self.after:
            self.spill()
        if self._store.failure is None:
            again, self._marked_still = self._marked_still, []
            for number in again:
                self._unmark(number)
            for flight in self._to_release:
                if not flight.is_marking:
                    self._mark(flight)
        self.pump()

    def spill(self) -> None:
        """Put all copies on disk, in their order, and be LIVE no more; nothing happens if the disk takes nothing."""
        copies = [*self._sent_copies.values(), *self._copies]
        size = sum(size_of(copy.message) for copy in copies)
        if copies and not self._store.has_room(self._backlog, size):
            return
        self.live = False
        self._sent_copies.clear()
        self._copies.clear()
        self._copied_bytes = 0
        for copy in copies:
            number = self._append(_Pending(copy.message, copy.owner, copy.of_device))
            if copy.identifier and self.connected:
                row = Row(number, self._backlog.number, int(self._now()), copy.message)
                self._flights[copy.identifier] = _Flight(row, copy.identifier, PacketType.PUBACK, copy.since)
            elif copy.identifier:
                self._sent_before[number] = copy.identifier

    def pump(self) -> None:
        """Send what may be sent."""
        window = self._window
        while self._loaded and self._may_send_rows and self.in_flight < window:
            if self._loaded[0].identifier in self._flights:
                break  # an identifier comes again after 32,768 rows of all devices
            if self._would_overtake(self._loaded[0]) or not self._is_in_pace(self._loaded[0]):
                break
            self._send_row(self._loaded.popleft())
        if not self.connected or self._full:
            return
        if len(self._loaded) < window and not self._reading and not self._backlog.loading:
            numbers = self._backlog.take(2 * window - len(self._loaded))
            if numbers:
                self._reading = True
                self._store.read(self._backlog, numbers, partial(self._read, self._epoch, numbers))
        self._ping_if_needed()
        self._check_refused()
        if not self.live and self._is_all_sent:
            self.live = True

    def _is_in_pace(self, row: Row) -> bool:
        """Whether the row may be sent now; if not, `pump` is called later."""
        if self.pace is not None and self.pace.paused and not self.pace.recovered(self._seconds()):
            return False  # until a sweep
        return row.number > self._waited_until or self._drain_pace.may_send(self.pump)

    @property
    def _is_all_sent(self) -> bool:
        """Whether nothing waits to be sent, so that what the device sends next may leave at once.

        Rows may be in flight if the broker answers promptly: otherwise a device that always has one on its way would
        never be LIVE again.
        """
        unsent = self._copies or self._pending or self._refused or self._loaded or self._reading
        in_backlog = len(self._backlog) > self._backlog.taken or self._backlog.loading
        if unsent or in_backlog or self._finishing or self.in_flight >= self._window:
            return False
        prompt = self._seconds() - _PROMPT
        return all(flight.since > prompt for flight in self._flights.values())

    @property
    def _may_send_rows(self) -> bool:
        return self.connected and not (self._full or self._unmarking or self._finishing)

    def _would_overtake(self, row: Row) -> bool:
        """Whether PUBREL of a row must wait for earlier messages, whose PUBRECs the disk did not take."""
        return row.number in self._store.released and any(
            flight.awaits is PacketType.PUBREC for flight in self._flights.values()
        )

    @property
    def _window(self) -> int:
        return 1 if self._one_at_a_time else self.facts.window

    def _was_confirmed(self) -> None:
        self._confirmed += 1
        self._store.counts.confirmed += 1
        self._one_at_a_time = False
        self.aside_in_row = 0

    # ---- inside: LIVE

    @property
    def _confirms(self) -> bool:
        """Whether QoS 0 is sent with QoS 1."""
        return self.confirm and self.facts.max_qos > 0

    def _is_forbidden(self, message: Message) -> bool:
        """Whether the broker said at the connect that it takes no such message; a device may have been told less."""
        if self.facts.forbids(message):
            return True
        limit = self.facts.max_packet_size
        # `size_of` is never less than the packet.
        if not limit or size_of(message) <= limit:
            return False
        return len(write_message(self.facts.version, message, 1)) > limit

    def _may_forward(self, message: Message) -> bool:
        """Whether a message may be sent past the disk."""
        return message.qos < 2 and not self._is_forbidden(message)

    def _forward(self, message: Message, of_device: int, owner: Owner | None) -> None:
        if not message.qos and not self._confirms:
            self._send(write_message(self.facts.version, message, 0))
            return
        self._copies.append(_Copy(with_qos(message, 1), owner, of_device, self._seconds()))
        self._copied_bytes += size_of(message)
        self._send_copies()
        if len(self._copies) > _MOST_COPIES or self._copied_bytes > _MOST_COPIED_BYTES:
            self.spill()

    def _send_copies(self) -> None:
        while self._copies and self.connected and not self._finishing and self.in_flight < self._window:
            copy = self._copies.popleft()
            copy.identifier = self._low_identifier()
            self._note_first_in_flight()
            self._sent_copies[copy.identifier] = copy
            self._send(write_message(self.facts.version, copy.message, copy.identifier))

    def _note_first_in_flight(self) -> None:
        """Start the time that the broker has to acknowledge something; it had nothing to acknowledge before."""
        if not self.in_flight:
            self.last_progress = self._seconds()

    def _check_refused(self) -> None:
        """Send what the disk does not take, once it cannot overtake anything."""
        if not self._refused or self._copies or self._flights or self._loaded or self._reading or self._pending:
            return
        if len(self._backlog) or self._backlog.loading:
            return
        refused, self._refused = self._refused, deque()
        self.live = True
        for each in refused:
            if _is_sent_again(each):
                continue
            if each.message.qos == 2:
                self.spill()
            if self.connected and self.live and self._may_forward(each.message):
                self._forward(each.message, each.of_device, each.owner)
            else:
                self._keep(each.message, each.of_device, each.owner)

    # ---- inside: to disk

    def _keep(self, message: Message, of_device: int, owner: Owner | None) -> None:
        if not message.qos and self._confirms:
            message = with_qos(message, 1)
        pending = self._new_pending(message, of_device, owner)
        if self._store.has_room(self._backlog, size_of(message)):
            self._append(pending)
        else:
            self._not_stored(pending, "the store is full" if self._store.failure is None else str(self._store.failure))

    def _new_pending(self, message: Message, of_device: int, owner: Owner | None) -> _Pending:
        self._offered += 1
        return _Pending(message, owner, of_device, self._offered)

    def _append(self, pending: _Pending) -> int:
        message = pending.message
        # No two of them are in flight at a time (`pump`).
        identifier = _HALF + self._store.next_number % _HALF if message.qos == 2 else 0
        received = pending.of_device if message.qos == 2 else 0
        number = self._store.append(self._backlog, message, self._appended, identifier=identifier, received=received)
        self._pending[number] = pending
        self.pending_bytes += size_of(message)
        return number

    def _appended(self, number: int, error: StoreError | None) -> None:
        pending = self._pending.pop(number)
        self.pending_bytes -= size_of(pending.message)
        if error is not None:
            flight = next((each for each in self._flights.values() if each.row.number == number), None)
            if flight is not None:
                # It was sent on this connection, and must not be sent a second time (MQTT 5.0 §4.4).
                del self._flights[flight.identifier]
                copy = _Copy(with_qos(pending.message, 1), pending.owner, pending.of_device, self._seconds())
                copy.identifier = flight.identifier
                self._sent_copies[copy.identifier] = copy
                self._copied_bytes += size_of(copy.message)
            elif number in self._early:
                _tell_stored(pending, self._early.pop(number))
            else:
                self._not_stored(pending, str(error))
            self._changed()
            return
        if number in self._early or any(flight.row.number == number for flight in self._flights.values()):
            self._backlog.adopt(number)
        code = self._early.pop(number, None)
        if code is not None:
            self._store.finish(self._backlog, [number])
        _tell_stored(pending, code or 0)
        self.pump()
        self._changed()

    def _not_stored(self, pending: _Pending, why: str) -> None:
        if _is_sent_again(pending):
            # Others may have waited for it.
            self._check_refused()
            return
        if self.connected and self._may_forward(pending.message):
            # The broker is there: it waits for its turn and goes past the disk.
            # Earlier messages may fail later, once the disk says so.
            at = len(self._refused)
            while at and self._refused[at - 1].order > pending.order:
                at -= 1
            self._refused.insert(at, pending)
            self._check_refused()
        elif pending.owner is not None and (pending.of_device or self.confirm):
            pending.owner.not_stored(why)
        else:
            self._store.counts.dropped["no room for QoS 0"] += 1

    # ---- inside: from disk

    def _read(self, epoch: int, asked: list[int], rows: list[Row | int]) -> None:
        if epoch != self._epoch:
            return
        self._reading = False
        self._backlog.put_back(asked[len(rows) :])
        if not rows:
            # The disk cannot be read; the next sweep tries again.
            return
        for row in rows:
            if isinstance(row, Row):
                self._loaded.append(row)
            else:
                self._store.finish(self._backlog, [row], "damaged")
        self.pump()
        self._changed()

    def _send_row(self, row: Row) -> None:
        message, version = row.message, self.facts.version
        number = row.number
        before = self._sent_before.pop(number, None)
        is_released = number in self._store.released
        waited = max(0, int(self._now()) - row.stamp) if self._is_plausible() else 0
        was_sent = before is not None or is_released
        if message.expiry is not None and waited >= message.expiry and not was_sent:
            self._store.finish(self._backlog, [number], "expired")
            return
        forbidden = "" if is_released else self.facts.forbids(message)
        if forbidden:
            self._store.set_aside(self._backlog, number, forbidden)
            return
        duplicate = self.facts.session_present and (before is not None or self._is_of_last_run(number))
        if not message.qos and not self._confirms:
            identifier, awaits = -number, PacketType.PINGRESP
            packet = write_message(version, message, 0, waited=waited)
        elif message.qos == 2:
            identifier, awaits = row.identifier, PacketType.PUBCOMP if is_released else PacketType.PUBREC
            packet = (
                acknowledgement(PacketType.PUBREL, identifier)
                if is_released
                else write_message(version, message, identifier, duplicate=duplicate, waited=waited)
            )
        else:
            identifier, awaits = before or self._low_identifier(), PacketType.PUBACK
            if identifier in self._flights or identifier in self.reserved:
                identifier = self._low_identifier()
            packet = write_message(version, with_qos(message, 1), identifier, duplicate=duplicate, waited=waited)
        if self.facts.max_packet_size and len(packet) > self.facts.max_packet_size:
            self._store.set_aside(self._backlog, number, f"{len(packet)} bytes are more than the broker takes")
            return
        self._note_first_in_flight()
        self._flights[identifier] = _Flight(row, identifier, awaits, self._seconds(), is_marking=is_released)
        if self.pace is not None:
            self._sent += 1
            self.pace.overdrawn(self._sent, len(packet))
        self._send(packet)

    def _is_of_last_run(self, number: int) -> bool:
        """Whether a row may have been sent before the gateway was started."""
        if number > self._store.last_of_last_run or not self._may_repeat:
            return False
        self._may_repeat -= 1
        return True

    def _mark(self, flight: _Flight) -> None:
        flight.is_marking = True
        self._store.mark_released(flight.row.number, partial(self._marked, flight, self._epoch))

    def _marked(self, flight: _Flight, epoch: int, error: StoreError | None) -> None:
        if epoch != self._epoch or self._flights.get(flight.identifier) is not flight:
            return
        if error is not None:
            # PUBREL must not leave: after a crash the message would be published a second time.  Nor may that of a
            # later message, since brokers may publish on PUBREL.
            flight.is_marking = False
            return
        flight.is_marked = True
        while self._to_release and self._to_release[0].is_marked:
            first = self._to_release.popleft()
            first.awaits = PacketType.PUBCOMP
            self._send(acknowledgement(PacketType.PUBREL, first.identifier))
        self.pump()

    def _unmark(self, number: int) -> None:
        self._store.unmark_released(number, partial(self._is_unmarked, number, self._epoch))

    def _is_unmarked(self, number: int, epoch: int, error: StoreError | None) -> None:
        if epoch != self._epoch:
            return
        if error is not None:
            self._marked_still.append(number)
            return
        self._unmarking -= 1
        self.pump()

    def _finish(self, flight: _Flight) -> None:
        del self._flights[flight.identifier]
        number = flight.row.number
        self._tries.pop(number, None)
        if number in self._pending:
            self._early[number] = 0
        else:
            self._store.finish(self._backlog, [number])

    def _rejected(self, flight: _Flight, code: int) -> None:
        """The broker will not have a message (MQTT 5.0 §4.4: that is final, unless the code says otherwise)."""
        del self._flights[flight.identifier]
        row, number = flight.row, flight.row.number
        if number in self._pending:
            # The device is still waiting, and gets the code.
            self._early[number] = code
            return
        tries = self._tries[number] = self._tries.get(number, 0) + 1
        if code in _MAY_PASS and tries < _MOST_TRIES:
            self._loaded.appendleft(row)
            return
        del self._tries[number]
        words = describe_disconnect(code)
        self._store.set_aside(self._backlog, number, f"the broker refused it: 0x{code:02X}, {words}")

    def _ping_if_needed(self) -> None:
        """Ask for proof that QoS 0 messages from disk have arrived: brokers read in order."""
        waiting = [each for each in self._flights.values() if each.awaits is PacketType.PINGRESP and not each.is_pinged]
        is_stuck = self._finishing or self.in_flight >= self._window or not (self._loaded or self._reading)
        if waiting and not self._pings and is_stuck:
            self._pings = 1
            for flight in waiting:
                flight.is_pinged = True
            self._ping()

    # ---- inside: Packet Identifiers

    def low_identifier(self) -> int:
        """Return a Packet Identifier for a SUBSCRIBE or an UNSUBSCRIBE, kept until `reserved` has it no more."""
        identifier = self._low_identifier()
        self.reserved.add(identifier)
        return identifier

    def _low_identifier(self) -> int:
        in_use = {*self._sent_copies, *self._flights, *self.reserved, *self._sent_before.values()}
        while True:
            self._next_low = self._next_low % (_HALF - 1) + 1
            if self._next_low not in in_use:
                return self._next_low


def _is_sent_again(pending: _Pending) -> bool:
    """Whether its device has gone without an acknowledgement: it sends it again, behind earlier ones."""
    return bool(pending.of_device) and pending.owner is not None and pending.owner.gone


def _tell(owner: Owner | None, packet_type: PacketType, identifier: int, code: int = 0) -> None:
    if owner is not None:
        owner.acknowledge(packet_type, identifier, code)


def _tell_stored(pending: _Pending, code: int) -> None:
    if pending.of_device:
        packet_type = PacketType.PUBREC if pending.message.qos == 2 else PacketType.PUBACK
        _tell(pending.owner, packet_type, pending.of_device, code)
