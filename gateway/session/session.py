"""The state machine of a session: what a device and its broker may do, in which order, and what each is told.

In: bytes and events from both sides, the time.  Out: calls on two `Side`s and a `Journal`.  There is no I/O and no
reactor here; the sides do that.

The states and their transitions; ENDED accepts every late input and ignores it::

    WAIT_CONNECT ──CONNECT──▶ DIALLING ──verified──▶ WAIT_CONNACK ──CONNACK──▶ RELAYING
          │                       └──by a rule with `store`──▶ STORED                │
          └───────────────────────┴────────── any failure, any end ──┴─────────────┴────▶ ENDED

In each state:

* WAIT_CONNECT: the device's bytes are collected until its CONNECT is complete; nothing is sent to either side.
* DIALLING: the device is not read.  `dial` decides about the session: a `Refusal`, a `Treatment`, or neither.  There is
  no upstream side yet, so nothing can be sent to it: it is created by `upstream_verified`, once the chain is trusted
  and the identity matches.
* WAIT_CONNACK: CONNECT has been sent.  The device is read only for MQTT 5.0 enhanced authentication (§4.12).
* RELAYING: each direction passes through a framer.
* STORED: the device's rule says `store`; `gateway.session.stored` does all but the bookkeeping of the two ends.
* ENDED: the reason is recorded, both sides are closing; the session is gone when both transports are.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

import attrs

from gateway.config import Limits, Timeouts
from gateway.errors import EndReason, PacketError, Refusal, SessionEnd
from gateway.mqtt.checking import CheckingFramer
from gateway.mqtt.connack import (
    Connack,
    connack_for_device,
    connack_refusal,
    connack_without_session,
    disconnect,
    parse_connack,
)
from gateway.mqtt.connect import Connect, UnsupportedVersion, parse_connect
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.inspector import BrokerInspector, DeviceInspector
from gateway.mqtt.packets import (
    LARGEST_PACKET,
    PacketType,
    ProtocolVersion,
    ReasonCode,
    describe_connack,
    disconnect_detail,
)
from gateway.mqtt.reader import Packet, PacketReader
from gateway.mqtt.rewrite import announce_packet_size
from gateway.session.pace import Pace
from gateway.session.record import Dial, Peer, SessionRecord, Traffic
from gateway.session.treatment import Treatment
from gateway.text import printable


class State(Enum):
    """The state of a session."""

    # Enum's own is a function in Python.
    __hash__ = object.__hash__

    WAIT_CONNECT = auto()
    DIALLING = auto()
    WAIT_CONNACK = auto()
    RELAYING = auto()
    STORED = auto()
    ENDED = auto()


# Compared for each message: in Python 3.11 an Enum member lookup takes longer than a function call.
_RELAYING = State.RELAYING

TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAIT_CONNECT: frozenset({State.DIALLING, State.ENDED}),
    State.DIALLING: frozenset({State.WAIT_CONNACK, State.STORED, State.ENDED}),
    State.WAIT_CONNACK: frozenset({State.RELAYING, State.ENDED}),
    State.RELAYING: frozenset({State.ENDED}),
    State.STORED: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}

# What a 5.0 device may send before CONNACK if its CONNECT has an Authentication Method [MQTT-3.1.2-30].
_AUTHENTICATING = frozenset({PacketType.AUTH, PacketType.DISCONNECT})
# Server unavailable, before 5.0 (MQTT 3.1.1 §3.2.2.3) and in 5.0.
_NO_SERVER = (0x03, ReasonCode.SERVER_UNAVAILABLE)

_PINGREQ = bytes((PacketType.PINGREQ << 4, 0))
# Without a reason code, which means normal disconnection in 5.0 (§3.14.2.1), it is the same in all versions.
_DISCONNECT = disconnect(0)
_DISCONNECT_OF_5_SIZE = 3  # bytes up to the reason code

# The reason code of the DISCONNECT that a 5.0 device gets when the gateway ends an established session.  For a lost
# upstream it is 0x80: 0x88 Server unavailable is not a DISCONNECT reason code (MQTT 5.0 §3.14.2.1, table 3-10), and
# clients that check the table, such as paho, fail on it.  The Reason String tells what happened.
_DISCONNECT_CODES = {
    EndReason.KEEPALIVE_TIMEOUT: ReasonCode.KEEP_ALIVE_TIMEOUT,
    EndReason.GATEWAY_STOPPING: ReasonCode.SERVER_SHUTTING_DOWN,
    EndReason.TAKEN_OVER: ReasonCode.SESSION_TAKEN_OVER,
    EndReason.TOKEN_EXPIRING: ReasonCode.MAXIMUM_CONNECT_TIME,
    EndReason.DEVICE_DISABLED: ReasonCode.ADMINISTRATIVE_ACTION,
}
# What is read at a time where packets are inspected, in bytes, so that a turn of the event loop stays short. A broker's
# bytes come in TLS records of up to 16 KiB, so smaller reads would not help there.
_READ_FROM_DEVICE, _READ_FROM_BROKER = 1024, 4096
# Until CONNACK, as little: what comes behind CONNECT waits here.  Then as much as usual.
_READ_AT_MOST = 0x10000
# How often the kernel is asked whether peers acknowledge: in seconds, and per timeout.
_CHECK_INTERVAL, _CHECKS_PER_TIMEOUT = 5.0, 10
# After this many unanswered PINGREQs of the gateway the broker counts as lost.
_MAX_UNANSWERED_PINGS = 2


class Connection(Protocol):
    """One end's network connection."""

    @property
    def unread(self) -> bool:
        """Whether bytes have arrived that have not been read yet."""

    def write(self, data: bytes) -> None:
        """Send bytes."""

    def hold(self) -> None:
        """Stop reading until `release`."""

    def release(self) -> None:
        """Read again."""

    def go_on_later(self) -> None:
        """Give the session no bytes in a later turn of the event loop, and read nothing until then."""

    def write_last(self, data: bytes) -> None:
        """Send the last bytes before `close`; they may wait for it."""

    def close(self) -> None:
        """Send pending bytes, then close the connection in an orderly way.  Nothing more is received."""

    def abort(self) -> None:
        """Close the connection at once."""


class Side(Connection, Protocol):
    """A connection whose buffers the session looks after."""

    @property
    def reading(self) -> bool:
        """Whether bytes are read: the session does not hold, and the other side's buffer is not full."""

    def check(self, now: float) -> None:
        """Close the connection if the peer no longer acknowledges; `now` is in seconds."""

    def limit_reads(self, size: int) -> None:
        """Read at most `size` bytes at a time."""


class Journal(Protocol):
    """Receives session records."""

    def session_started(self, record: SessionRecord) -> None:
        """The broker accepted the session."""

    def session_ended(self, record: SessionRecord) -> None:
        """The session ended; `record.reason` says why."""


class Loan(Protocol):
    """Who has lent the session's relaying to the compiled core (`gateway/relay/carrier.py`)."""

    def settle(self) -> None:
        """Call `settled` with what has passed."""

    def recall(self) -> None:
        """Take everything back; the framers are the session's again."""


class Store(Protocol):
    """What a stored device's packets are for; see `gateway.session.stored.StoredSession`."""

    def device_received(self, data: bytes) -> None:
        """Take bytes of the device."""

    def detached(self, device: Session) -> None:
        """The device's session has ended."""

    def settle(self, done: Callable[[], None]) -> None:
        """Put everything on disk and acknowledge it, then call `done`."""


class Cancellable(Protocol):
    """A connection attempt to the upstream."""

    def cancel(self) -> None:
        """Cancel it."""


class Session:
    """One device session, from its connection to its end.

    `dial` is called once, with the session, when CONNECT is complete; it responds with `upstream_verified`,
    `upstream_failed` or `refuse`.  `gone` is called once, when both connections are closed.
    """

    __slots__ = (
        "__weakref__",
        "_assigned",
        "_beyond_pings",
        "_broker_keep_alive",
        "_bytes_down",
        "_bytes_up",
        "_check_at",
        "_connect",
        "_connect_packet",
        "_deadline",
        "_device",
        "_device_present",
        "_device_reader",
        "_dial",
        "_dialled",
        "_dialling",
        "_down_when_pinged",
        "_from_broker",
        "_from_device",
        "_gone",
        "_heard",
        "_is_gone",
        "_journal",
        "_keep_alive_limit",
        "_last_data",
        "_last_heard",
        "_last_pinged",
        "_last_sent",
        "_limits",
        "_lives_until",
        "_loan",
        "_pace",
        "_ping_interval",
        "_seconds",
        "_sent_at",
        "_state",
        "_stored",
        "_timeouts",
        "_treatment",
        "_up_when_swept",
        "_upstream",
        "_upstream_reader",
        "record",
    )

    def __init__(
        self,
        record: SessionRecord,
        device: Side,
        dial: Callable[[Session], Cancellable],
        journal: Journal,
        gone: Callable[[Session], None],
        seconds: Callable[[], float],
        limits: Limits,
        timeouts: Timeouts,
    ) -> None:
        self.record = record
        self._device = device
        device.limit_reads(_READ_FROM_DEVICE)
        self._device_present = True
        self._dial = dial
        self._dialling: Cancellable | None = None
        self._dialled: Dial | None = None
        self._upstream: Side | None = None
        self._journal = journal
        self._gone = gone
        self._is_gone = False
        self._seconds = seconds
        self._limits = limits
        self._timeouts = timeouts
        self._state = State.WAIT_CONNECT
        self._deadline = record.started + timeouts.connect_packet
        self._device_reader = PacketReader(
            frozenset({PacketType.CONNECT}), limits.max_connect_size, EndReason.NOT_MQTT, any_flags=True
        )
        self._upstream_reader: PacketReader | None = None
        self._connect: Connect | None = None
        self._connect_packet: Packet | None = None
        self._treatment: Treatment | None = None
        self._assigned: Callable[[str], None] | None = None
        self._from_device: Framer | DeviceInspector | None = None
        self._from_broker: Framer | BrokerInspector | None = None
        self._pace: Pace | None = None
        self._ping_interval = 0.0
        self._last_pinged = 0.0
        self._down_when_pinged = 0
        self._check_at = 0.0
        self._broker_keep_alive = 0
        self._up_when_swept = 0
        self._last_sent = 0.0
        self._lives_until = float("inf")
        self._bytes_up = 0
        self._bytes_down = 0
        self._sent_at = 0.0
        self._heard = False
        self._last_heard = 0.0
        # No other packet that a device repeats is as short as a PINGREQ, so this changes with all the others.
        self._beyond_pings = 0
        self._last_data = 0.0
        self._keep_alive_limit = 0.0
        # Set while somebody else relays, who has both framers meanwhile.
        self._loan: Loan | None = None
        self._stored: Store | None = None

    @property
    def state(self) -> State:
        """The current state."""
        return self._state

    @property
    def traffic(self) -> Traffic:
        """What has been relayed so far."""
        if self._loan is not None:
            self._loan.settle()
        record, up, down = self.record, self._from_device, self._from_broker
        # Once the session has ended, the record includes the framers' packets.
        counted = self._state is not State.RELAYING or up is None or down is None
        return Traffic(
            self._bytes_up,
            self._bytes_down,
            record.packets_up + (0 if counted or up is None else up.packets),
            record.packets_down + (0 if counted or down is None else down.packets),
        )

    @property
    def shown_state(self) -> State:
        """The state for people: a stored device that waits for its CONNACK is DIALLING."""
        if self._state is State.STORED and not self.record.established:
            return State.DIALLING
        return self._state

    @property
    def last_heard(self) -> float | None:
        """When the device last sent something, on the injected clock, to the sweep's precision; None before CONNACK."""
        if self._state is State.STORED:
            return self._last_heard if self.record.established else None
        if self._state is not State.RELAYING:
            return None
        if self._loan is not None:
            self._loan.settle()
        return self._seconds() if self._heard else self._last_heard

    @property
    def last_data(self) -> float | None:
        """As `last_heard`, of what the device sent other than PINGREQ; not before the last sweep."""
        is_open = self._state is State.RELAYING or self._state is State.STORED
        return self._last_data if is_open and self.record.established else None

    @property
    def held_back(self) -> bool:
        """Whether the device of an established session is not read, because the broker does not keep up."""
        return self._state is State.RELAYING and not self._device.reading

    @property
    def pending(self) -> int:
        """How many bytes from the device wait here: after CONNECT, or of an incomplete packet."""
        return self._device_reader.buffered

    @property
    def connect(self) -> tuple[Packet, Connect]:
        """The device's CONNECT, while there is no upstream yet."""
        assert self._connect_packet is not None  # noqa: S101  `dial` is called with a CONNECT; narrows the type
        assert self._connect is not None  # noqa: S101  the same
        return self._connect_packet, self._connect

    # ---- to and from the compiled core

    @property
    def framers(self) -> tuple[Framer, Framer]:
        """What comes from the device passes through the first one, what comes from the broker through the other."""
        up, down = self._from_device, self._from_broker
        assert isinstance(up, Framer)  # noqa: S101  they have been lent; narrows the type
        assert isinstance(down, Framer)  # noqa: S101  the same
        return up, down

    def lend(self) -> tuple[Framer, Framer] | None:
        """Give `framers` if there is nothing to be done but to pass on what they let through."""
        if self._state is not _RELAYING or self._pace is not None:
            return None
        up, down = self._from_device, self._from_broker
        # Many sessions end without a message; for those, a loan is work for nothing.
        if isinstance(up, Framer) and isinstance(down, Framer) and (up.packets or down.packets):
            return up, down
        return None

    def lent(self, loan: Loan | None) -> None:
        """From here on `loan` relays; None if it no longer does."""
        self._loan = loan

    def settled(self, bytes_up: int, bytes_down: int, packets_up: int, packets_down: int, heard: bool) -> None:
        """So much has passed since it was told before; `heard` if the device has sent anything."""
        up, down = self.framers
        self._bytes_up += bytes_up
        self._bytes_down += bytes_down
        up.packets += packets_up
        down.packets += packets_down
        self._heard = self._heard or heard

    # ---- from the device

    def device_received(self, data: bytes) -> None:
        """Take bytes from the device."""
        if self._state is _RELAYING:
            self._relay_up(data)
        elif self._state is State.WAIT_CONNECT:
            self._device_reader.feed(data)
            self._read_connect()
        elif self._state is State.STORED:
            self._store_up(data)
        elif self._state is not State.ENDED:
            self._device_reader.feed(data)
            if self._state is State.WAIT_CONNACK:
                self._authenticate()

    def device_gone(self, detail: str) -> None:
        """The device's connection is closed."""
        self._device_present = False
        if self._state is State.ENDED:
            self._check_gone()
            return
        # The broker gets no DISCONNECT either, so that it publishes the Will.
        if self._connect is None:
            detail = f"{detail}, before CONNECT"  # a port scanner or a health check, most likely
        self._end(EndReason.DEVICE_LOST, detail)

    # ---- from the upstream

    def dials(self, dial: Dial) -> None:
        """A connection attempt to this broker begins; its results go into the record when it ends."""
        self._dialled = dial
        self.record.upstream = dial.upstream

    def upstream_verified(self, upstream: Side, peer: Peer) -> None:
        """The channel to the broker is verified: send CONNECT now, and never earlier."""
        if self._state is not State.DIALLING:
            upstream.abort()
            return
        assert self._connect is not None  # noqa: S101  DIALLING is entered with a CONNECT; narrows the type
        assert self._connect_packet is not None  # noqa: S101  the same
        self._enter(State.WAIT_CONNACK)
        self._dialling = None
        self._upstream = upstream
        self._record_dial()
        self.record.peer = peer
        self._sent_at = self._seconds()
        self._deadline = self._sent_at + self._timeouts.connack
        authenticates = self._connect.authentication_method is not None
        awaited = {PacketType.CONNACK, PacketType.AUTH} if authenticates else {PacketType.CONNACK}
        treatment = self._treatment
        if (self._connect if treatment is None else treatment).version is ProtocolVersion.MQTT_5_0:
            # No broker may send it before CONNACK [MQTT-3.14.0-1], but some do, and its reason code says why.
            awaited.add(PacketType.DISCONNECT)
        self._upstream_reader = PacketReader(
            frozenset(awaited),
            self._limits.max_connect_size,
            EndReason.UPSTREAM_PROTOCOL_ERROR,
            any_flags=self._connect.version is ProtocolVersion.MQTT_3_1
            or (treatment is not None and treatment.lenient),
        )
        packet = self._connect_packet.raw if treatment is None else treatment.connect
        limit = self._largest_packet
        if self._connect.version is ProtocolVersion.MQTT_5_0 and limit < (
            self._connect.maximum_packet_size or LARGEST_PACKET
        ):
            packet = announce_packet_size(packet, limit)
        if treatment is not None:
            # It contains credentials and is no longer needed.
            self._treatment = attrs.evolve(treatment, connect=b"")
        self._connect_packet = None
        # The rest can be large, and the session may last for months.
        self._connect = self._connect.without_content()
        self._bytes_up = len(packet)
        self.record.packets_up = 1
        # This may break the channel and end the session before it returns, so this must be the last use of the packet.
        upstream.write(packet)
        if authenticates:
            rest = self._device_reader.take_rest()
            self._device_reader = PacketReader(_AUTHENTICATING, self._limits.max_connect_size, EndReason.PROTOCOL_ERROR)
            self._device_reader.feed(rest)
            self._device.release()
            self._authenticate()

    def treat(self, treatment: Treatment | None) -> None:
        """Set what the session's rule changes, before there is an upstream; None if it is to be judged again."""
        self._treatment = treatment
        lives = None if treatment is None else treatment.lives
        self._lives_until = float("inf") if lives is None else self._seconds() + lives
        if treatment is None:
            self._assigned = None
            record = self.record
            record.rule = record.upstream_certificate = ""
            record.upstream_username = record.upstream_client_identifier = ""

    def when_assigned(self, call: Callable[[str], None]) -> None:
        """Call this with the Client Identifier that the broker assigns, if it assigns one (MQTT 5.0 §3.2.2.3.7)."""
        self._assigned = call

    def refuse(self, refusal: Refusal) -> None:
        """The gateway refuses this device."""
        if self._state is State.DIALLING:
            self._dialling = None
            self._end(refusal.reason, refusal.detail, connack_codes=(refusal.code_3, refusal.code_5))

    def upstream_failed(self, failure: SessionEnd) -> None:
        """No verified channel could be established."""
        if self._state is not State.ENDED:
            self._dialling = None
            self._end(failure.reason, failure.detail)

    def upstream_received(self, data: bytes) -> None:
        """Take bytes from the broker."""
        if self._state is _RELAYING:
            self._relay_down(data)
        elif self._state is State.WAIT_CONNACK:
            assert self._upstream_reader is not None  # noqa: S101  made with the state; narrows the type
            self._upstream_reader.feed(data)
            self._read_connack(self._upstream_reader)

    def upstream_broken(self, failure: SessionEnd) -> None:
        """The verified channel has ended, in an orderly way or not."""
        if self._state is State.WAIT_CONNACK and failure.reason is EndReason.UPSTREAM_LOST:
            self._end(EndReason.UPSTREAM_CLOSED, failure.detail)
        elif self._state is not State.ENDED:
            self._end(failure.reason, failure.detail)

    def upstream_gone(self) -> None:
        """The upstream's connection is closed; if the session did not close it, `upstream_broken` came first."""
        self._upstream = None
        if self._state is State.ENDED:
            self._check_gone()

    # ---- a stored device

    def become_stored(self, stored: Store) -> None:
        """From now on `stored` is what this device speaks to, whether there is a broker or not."""
        self._enter(State.STORED)
        self._dialling = None
        self._connect_packet = None
        self._stored = stored

    def verified(self, peer: Peer) -> None:
        """The stored device's broker is verified."""
        self._record_dial()
        self.record.peer = peer

    def admit(self, connack: bytes, *, offline: bool) -> bytes:
        """Accept a stored device with this CONNACK; return what it has sent behind CONNECT."""
        record = self.record
        record.offline = offline
        record.connack_seconds = self._seconds() - record.started - (record.connect_seconds or 0.0)
        self._last_heard = self._last_data = self._seconds()
        self.send(connack)
        self._journal.session_started(record)
        rest = self._device_reader.take_rest()
        self._bytes_up += len(rest)
        return rest

    def send(self, data: bytes) -> None:
        """Send a packet to a stored device."""
        if self._state is State.STORED:
            self._bytes_down += len(data)
            self.record.packets_down += 1
            self._device.write(data)

    def count_up(self) -> None:
        """Count a packet of a stored device."""
        self.record.packets_up += 1

    def hold(self) -> None:
        """Do not read a stored device."""
        self._device.hold()

    def release(self) -> None:
        """Read a stored device again."""
        if self._state is State.STORED:
            self._device.release()

    @property
    def unread(self) -> bool:
        """Whether the device has sent bytes that have not been read yet."""
        return self._device.unread

    def go_on_later(self) -> None:
        """Let a stored device go on with what it has sent."""
        if self._state is State.STORED:
            self._device.go_on_later()

    def finish(
        self, reason: EndReason, detail: str = "", *, answer: bytes | None = None, code: int | None = None
    ) -> None:
        """End the session of a stored device."""
        self._end(reason, detail, answer=answer, code=code)

    def _store_up(self, data: bytes) -> None:
        if not self.record.established:
            self._device_reader.feed(data)
        elif self._stored is not None:
            self._last_heard = self._seconds()
            self._bytes_up += len(data)
            self._stored.device_received(data)

    # ---- from the gateway

    def sweep(self, now: float) -> bool:
        """Check the deadlines; called about once a second, with `now` in seconds on the injected clock.

        Return whether the kernel was asked about the peers, which takes most of the time.
        """
        check_at = self._check_at
        if self._state is _RELAYING:
            if self._loan is not None:
                self._loan.settle()
            # A device that is not read, because the broker does not keep up, must not count as silent.
            if self._heard or not self._device.reading:
                self._heard = False
                self._last_heard = now
                self._note_data(now)
            elif self._keep_alive_limit and now - self._last_heard > self._keep_alive_limit:
                if self._device.unread:
                    # This process was busy, not the device silent.
                    self._last_heard = now
                else:
                    self._end(EndReason.KEEPALIVE_TIMEOUT, f"silent for {now - self._last_heard:.0f} s")
            if now >= self._check_at and self._state is _RELAYING:
                self._check_peers(now)
            if self._treatment is not None and self._state is _RELAYING:
                self._sweep_treatment(now)
        elif self._state is State.STORED:
            self._sweep_stored(now)
        elif now >= self._deadline:
            self._deadline_passed()
        return self._check_at != check_at

    def _sweep_stored(self, now: float) -> None:
        if now >= self._lives_until:
            self._end(EndReason.GATEWAY_STOPPING, "its last messages were not written to disk in time")
            return
        if self._last_heard > self._last_data:
            self._note_data(now)
        if now >= self._check_at:
            # Who stores for the device checks its broker.
            self._check_peers(now)

    def _note_data(self, now: float) -> None:
        """Notice whether the device has sent something other than PINGREQ, or could not, since it is not read."""
        beyond = self._count_beyond_pings()
        if beyond != self._beyond_pings or not self._device.reading:
            self._beyond_pings = beyond
            self._last_data = now

    def _count_beyond_pings(self) -> int:
        """Return how many bytes up there were beyond a PINGREQ's two for each packet."""
        up = self._from_device
        packets = self.record.packets_up + (0 if up is None else up.packets)
        return self._bytes_up - len(_PINGREQ) * packets

    def _send_own(self, upstream: Side, packet: bytes) -> None:
        """Send the broker packets that are not the device's."""
        self._bytes_up += len(packet)
        self._beyond_pings += len(packet)
        upstream.write(packet)

    def _check_peers(self, now: float) -> None:
        """Find out whether the peers still acknowledge what TCP sends."""
        self._check_at = now + min(_CHECK_INTERVAL, self._timeouts.tcp_user / _CHECKS_PER_TIMEOUT)
        self._device.check(now)
        if self._upstream is not None:
            self._upstream.check(now)

    def give_back(self, seconds: float, now: float) -> None:
        """Move the deadlines by `seconds` in which this process did not run, or by which the clock has jumped."""
        self._last_heard, self._last_data, self._last_pinged, self._last_sent = (
            min(each + seconds, now) for each in (self._last_heard, self._last_data, self._last_pinged, self._last_sent)
        )
        self._deadline = min(self._deadline + seconds, now + self._patience)

    @property
    def _patience(self) -> float:
        """The whole time that the current state may last, in seconds."""
        of_state = {
            State.WAIT_CONNECT: self._timeouts.connect_packet,
            State.WAIT_CONNACK: self._timeouts.connack,
            State.ENDED: self._timeouts.close,
        }
        return of_state.get(self._state, float("inf"))

    def stop(
        self,
        reason: EndReason,
        detail: str = "",
        *,
        discard_will: bool = False,
        connack_codes: tuple[int, int] = _NO_SERVER,
    ) -> None:
        """End the session for a reason of the gateway; `connack_codes` as in a `Refusal`, if no CONNACK has been sent.

        With `discard_will` the broker gets a DISCONNECT on the device's behalf, so that it does not publish the Will
        (MQTT 3.1.1 and 5.0 §3.14.4), unless an incomplete packet was passed on, whose body it would become.
        """
        if self._loan is not None:
            self._loan.recall()
        if discard_will and self._state is State.RELAYING and self._upstream is not None:
            assert self._from_device is not None  # noqa: S101  made with the state; narrows the type
            if self._from_device.at_boundary:
                self._upstream.write_last(_DISCONNECT)
                self._bytes_up += len(_DISCONNECT)
        if self._stored is not None and reason is EndReason.GATEWAY_STOPPING:
            self._lives_until = self._seconds() + self._timeouts.close
            self._stored.settle(lambda: self._end(reason))
            return
        self._end(reason, detail, connack_codes=connack_codes)

    def fail(self, detail: str) -> None:
        """End the session after an internal error, without sending another packet to either side."""
        # The device may have an incomplete packet, and a DISCONNECT would become part of its body.
        self._end(EndReason.INTERNAL_ERROR, detail, answered=True)
        self.abort()

    def abort(self) -> None:
        """Close both connections at once."""
        if self._upstream is not None:
            self._upstream.abort()
        if self._device_present:
            self._device.abort()

    # ---- the steps

    def _enter(self, state: State) -> None:
        if state not in TRANSITIONS[self._state]:
            raise AssertionError(f"a session cannot go from {self._state.name} to {state.name}")
        self._state = state

    def _read_connect(self) -> None:
        try:
            packet = self._device_reader.next_packet()
            if packet is None:
                return
            connect = parse_connect(packet)
        except UnsupportedVersion as error:
            self._end(error.reason, error.detail, answer=error.answer)
            return
        except PacketError as error:
            self._end(error.reason, error.detail)
            return
        self._enter(State.DIALLING)
        self._device.hold()
        # DIALLING has no deadline of its own: `dial` enforces one for each step.
        self._deadline = float("inf")
        self._connect = connect
        self._connect_packet = packet
        self.record.client_identifier = connect.client_identifier
        self.record.protocol_version = connect.version.label
        self.record.connect_seconds = self._seconds() - self.record.started
        dialling = self._dial(self)
        if self._state is State.DIALLING:
            self._dialling = dialling

    @property
    def _largest_packet(self) -> int:
        """The gateway's limit for packets of this session, in bytes."""
        of_rule = None if self._treatment is None else self._treatment.max_packet_size
        return of_rule or self._limits.max_packet_size

    def _sweep_treatment(self, now: float) -> None:
        """Do the periodic work of the session's rule."""
        if self._pace is not None and self._pace.paused and self._pace.recovered(now):
            self._device.release()
        self._keep_broker_patient(now)
        if now >= self._lives_until:
            # The device should reconnect at once, so its Will must not be published.
            self.stop(EndReason.TOKEN_EXPIRING, discard_will=True)
            return
        if self._ping_interval and now - self._last_pinged >= self._ping_interval:
            self._ping(now)
        self._acknowledge()

    def _keep_broker_patient(self, now: float) -> None:
        """Send something if the device may have, but its packets wait here, and the broker's Keep Alive runs."""
        up = self._from_device
        if self._bytes_up != self._up_when_swept:
            self._up_when_swept = self._bytes_up
            self._last_sent = now
            return
        paced = self._pace is not None and self._pace.paused
        withholds = paced or (isinstance(up, DeviceInspector) and up.withholds)
        if not (withholds and self._broker_keep_alive and now - self._last_sent >= self._broker_keep_alive / 2):
            return
        assert up is not None  # noqa: S101  made with the state; narrows the type
        if up.at_boundary:
            self._ping(now)
        elif paced:
            # No PINGREQ fits into the middle of a packet, so let a little more of it pass.
            self._device.release()

    def _ping(self, now: float) -> None:
        """Keep the Keep Alive that was sent to the broker; the device's own is checked as usual."""
        down, upstream = self._from_broker, self._upstream
        if self._state is not State.RELAYING or upstream is None or not isinstance(down, BrokerInspector):
            return
        assert self._from_device is not None  # noqa: S101  made with the state; narrows the type
        # A broker is not lost while it is not read, because the device does not keep up, or while it still sends
        # something, since its answer may wait behind that.
        is_silent = upstream.reading and self._bytes_down == self._down_when_pinged and not upstream.unread
        if down.pings >= _MAX_UNANSWERED_PINGS and is_silent:
            self._end(EndReason.UPSTREAM_LOST, f"{down.pings} unanswered PINGREQs of the gateway")
        elif self._from_device.at_boundary:
            down.expect_answer()
            self._last_pinged = now
            self._down_when_pinged = self._bytes_down
            self._send_own(upstream, _PINGREQ)

    def _authenticate(self) -> None:
        """Pass AUTH and DISCONNECT on until CONNACK (MQTT 5.0 §4.12)."""
        connect, upstream = self._connect, self._upstream
        if connect is None or upstream is None or connect.authentication_method is None:
            return
        while self._state is State.WAIT_CONNACK:
            try:
                packet = self._device_reader.next_packet()
            except PacketError as error:
                code = error.reason_code
                self._end(error.reason, error.detail, answer=connack_refusal(connect.version, 3, code))
                return
            if packet is None:
                return
            upstream.write(packet.raw)
            self._bytes_up += len(packet.raw)
            self.record.packets_up += 1
            if packet.type is PacketType.DISCONNECT:
                self._end(EndReason.DEVICE_DISCONNECT)

    def _read_connack(self, reader: PacketReader) -> None:
        assert self._connect is not None  # noqa: S101  a session that waits for CONNACK has a CONNECT; narrows the type
        while self._state is State.WAIT_CONNACK:
            try:
                packet = reader.next_packet()
                if packet is None:
                    return
                treatment = self._treatment
                version = self._connect.version if treatment is None else treatment.version
                lenient = treatment is not None and treatment.lenient
                is_connack = packet.type is PacketType.CONNACK
                connack = parse_connack(packet, version, lenient=lenient) if is_connack else None
            except PacketError as error:
                self._end(error.reason, error.detail)
                return
            if packet.type is PacketType.DISCONNECT:
                code = packet.body[0] if packet.body else 0
                self._end(EndReason.UPSTREAM_DISCONNECT, f"{disconnect_detail(code)} (in place of CONNACK)")
                return
            self._device.write(packet.raw if connack is None else self._answer(packet, connack))
            self._bytes_down += len(packet.raw)
            self.record.packets_down += 1
            if connack is None:
                continue
            if not connack.accepted:
                words = describe_connack(self._connect.version, connack.code)
                detail = f"CONNACK 0x{connack.code:02X}, {words}"
                if connack.reason_string:
                    detail += f": {printable(connack.reason_string)}"
                self._end(EndReason.UPSTREAM_REFUSED, detail, answered=True)
                return
            now = self._seconds()
            self.record.connack_seconds = now - self._sent_at
            assigned = connack.assigned_client_identifier
            if assigned is not None and self._assigned is not None:
                self._assigned(assigned)
                self._assigned = None
            if assigned is None and treatment is not None:
                assigned = treatment.assigned
            if assigned is not None:
                self.record.client_identifier = assigned
            keep_alive = connack.server_keep_alive
            if keep_alive is None:
                keep_alive = self._connect.keep_alive
                self._broker_keep_alive = keep_alive if treatment is None else treatment.keep_alive
            else:
                # The device itself must use the Keep Alive that the broker sets (MQTT 5.0 §3.2.2.3.14).
                self._broker_keep_alive = keep_alive
                if treatment is not None:
                    self._treatment = attrs.evolve(treatment, ping_interval=0.0)
            self._relay(keep_alive, connack.maximum_packet_size, reader, now)

    def _answer(self, packet: Packet, connack: Connack) -> bytes:
        """Return the CONNACK for the device: the broker's own, except where the gateway changed the CONNECT."""
        assert self._connect is not None  # noqa: S101  see _read_connack
        connect, treatment = self._connect, self._treatment
        if treatment is not None and treatment.version is not connect.version:
            # Session Present of 3.1.1 is a reserved byte in 3.1, and a device may require 0.
            return b"\x20\x02\0" + packet.body[1:2]
        # A device that asked for a clean start must close if it is told of a session [MQTT-3.2.2-4].
        hide_session = treatment is not None and connack.session_present and connect.clean_start
        if connect.version is not ProtocolVersion.MQTT_5_0:
            return connack_without_session(packet) if hide_session else packet.raw
        if not connack.accepted:
            return connack_for_device(packet)
        at_broker = connack.maximum_packet_size
        largest = self._largest_packet
        if at_broker is not None:
            largest = max(1, min(largest, at_broker - (0 if treatment is None else treatment.lengthens)))
        return connack_for_device(
            packet,
            hide_session=hide_session,
            maximum_packet_size=largest if largest < (at_broker or LARGEST_PACKET) else None,
            # A device without a Client Identifier must be told the one it got [MQTT-3.2.2-16].
            assigned=None if treatment is None or connack.assigned_client_identifier else treatment.assigned,
        )

    def _relay(self, keep_alive: int, largest_at_broker: int | None, reader: PacketReader, now: float) -> None:
        """Start relaying; bytes that arrived after CONNECT and CONNACK go first."""
        assert self._connect is not None  # noqa: S101  see _read_connack
        version, limit = self._connect.version, self._limits.max_packet_size
        treatment = self._treatment
        if treatment is None:
            make = CheckingFramer if self._limits.check_bodies else Framer
            self._from_device = make(Sender.DEVICE, version, limit)
            self._from_broker = make(Sender.BROKER, version, limit)
            self._device.limit_reads(_READ_AT_MOST)
        else:
            checked = self._limits.check_bodies
            self._from_device = treatment.from_device(version, limit, largest_at_broker, check_bodies=checked)
            if not treatment.inspects(version):
                self._device.limit_reads(_READ_AT_MOST)
            if treatment.topics.concern_broker and self._upstream is not None:
                self._upstream.limit_reads(_READ_FROM_BROKER)
            self._from_broker = treatment.from_broker(version, limit, check_bodies=checked)
            self._pace = treatment.pace(self._seconds)
            self._ping_interval = treatment.ping_interval
            self._last_pinged = self._last_sent = now
        self._keep_alive_limit = keep_alive * 1.5  # MQTT 3.1.1 §3.1.2.10
        self._last_heard = self._last_data = now
        self._beyond_pings = self._count_beyond_pings()
        self._enter(State.RELAYING)
        self._journal.session_started(self.record)
        waiting_down, waiting_up = reader.take_rest(), self._device_reader.take_rest()
        self._upstream_reader = None
        if waiting_down:
            self.upstream_received(waiting_down)
        if waiting_up:
            self.device_received(waiting_up)
        if self._state is State.RELAYING and not (self._pace is not None and self._pace.paused):
            self._device.release()

    def _relay_up(self, data: bytes) -> None:
        framer = self._from_device
        assert framer is not None  # noqa: S101  made with the state; narrows the type
        self._heard = True
        passed = framer.feed(data)
        if passed and self._upstream is not None:
            if framer.disconnected:
                self._upstream.write_last(passed)
            else:
                self._upstream.write(passed)
            self._bytes_up += len(passed)
        if framer.error is not None:
            self._end(framer.error.reason, framer.error.detail, code=framer.error.reason_code)
        elif framer.disconnected:
            self._end(EndReason.DEVICE_DISCONNECT)
        else:
            if framer.behind:
                self._device.go_on_later()
            if self._pace is not None and self._pace.overdrawn(framer.packets, len(data)):
                self._device.hold()
            if self._treatment is not None:
                self._acknowledge()

    def _relay_down(self, data: bytes) -> None:
        framer = self._from_broker
        assert framer is not None  # noqa: S101  made with the state; narrows the type
        passed = framer.feed(data)
        if passed:
            self._device.write(passed)
            self._bytes_down += len(passed)
        if framer.error is not None:
            is_5 = self._connect is None or self._connect.version is ProtocolVersion.MQTT_5_0
            code = None if is_5 else _disconnect_of_5(framer.rejected)
            if code is not None:
                words = f"{disconnect_detail(code)} (a DISCONNECT of MQTT 5.0, which 3.x does not have)"
                self._end(EndReason.UPSTREAM_DISCONNECT, words)
            else:
                self._end(framer.error.reason, framer.error.detail)
        elif framer.disconnected:
            code = framer.disconnect_code or 0
            self._end(EndReason.UPSTREAM_DISCONNECT, disconnect_detail(code), answered=True)
        else:
            if framer.behind and self._upstream is not None:
                self._upstream.go_on_later()
            if self._treatment is not None:
                self._acknowledge()

    def _acknowledge(self) -> None:
        """Acknowledge messages that the rule keeps from the device, unless the broker does not read."""
        down, up, upstream = self._from_broker, self._from_device, self._upstream
        if self._state is not State.RELAYING or up is None or upstream is None or not isinstance(down, BrokerInspector):
            return
        if up.at_boundary and self._device.reading:
            owed = down.take_owed()
            if owed:
                self._send_own(upstream, owed)

    def _deadline_passed(self) -> None:
        waits_for = {State.WAIT_CONNECT: self._device, State.WAIT_CONNACK: self._upstream}.get(self._state)
        if waits_for is not None and waits_for.unread:
            return  # It is read first.
        if self._state is State.WAIT_CONNECT:
            self._end(EndReason.CONNECT_TIMEOUT, f"{self._device_reader.buffered} bytes received")
        elif self._state is State.WAIT_CONNACK:
            self._end(EndReason.UPSTREAM_SILENT, f"no CONNACK within {self._timeouts.connack:g} s")
        elif self._state is State.ENDED:
            self.abort()

    # ---- the end

    def _end(
        self,
        reason: EndReason,
        detail: str = "",
        *,
        answer: bytes | None = None,
        code: int | None = None,
        answered: bool = False,
        connack_codes: tuple[int, int] = _NO_SERVER,
    ) -> None:
        """End the session: tell the device, close both sides, write the record.

        `answer` replaces the usual answer to the device, `answered` tells that none is needed, `code` replaces the
        usual reason code of the DISCONNECT. `connack_codes` are the codes of a CONNACK, before 5.0 and in 5.0, if none
        has been sent.
        """
        if self._state is State.ENDED:
            return
        if self._loan is not None:
            self._loan.recall()
        told = answer if answer is not None else b"" if answered else self._farewell(reason, code, connack_codes)
        self._enter(State.ENDED)
        self._record_dial()
        self._write_record(reason, detail)
        self._deadline = self._seconds() + self._timeouts.close
        dialling, self._dialling = self._dialling, None
        if dialling is not None:
            dialling.cancel()
        self._connect_packet = None
        self._upstream_reader = None
        if self._device_present:
            if told:
                self._device.write(told)
            self._device.close()
        if self._upstream is not None:
            self._upstream.close()
        stored, self._stored = self._stored, None
        if stored is not None:
            stored.detached(self)
        try:
            self._journal.session_ended(self.record)
        finally:
            self._check_gone()

    def _farewell(self, reason: EndReason, code: int | None, connack_codes: tuple[int, int]) -> bytes:
        """Return the packet that tells the device, in its own version, why the session ends.

        Before CONNACK that is a CONNACK; after it, a DISCONNECT in 5.0 and nothing in 3.x.
        """
        if self._connect is None or reason in {EndReason.DEVICE_DISCONNECT, EndReason.DEVICE_LOST}:
            return b""
        version, words = self._connect.version, f"{reason}: {reason.meaning}"
        limit = self._connect.maximum_packet_size or self._limits.max_packet_size
        is_stored = self._from_broker is None and self.record.established
        if self._from_broker is None and not is_stored:
            full, short = (connack_refusal(version, *connack_codes, text) for text in (words, ""))
        elif version is not ProtocolVersion.MQTT_5_0 or not (
            self._from_broker is None or self._from_broker.at_boundary
        ):
            # After an incomplete packet, a DISCONNECT would become part of its body.
            return b""
        else:
            code = _DISCONNECT_CODES.get(reason, ReasonCode.UNSPECIFIED_ERROR) if code is None else code
            full, short = (disconnect(code, text) for text in (words, ""))
        # A Reason String must not make the packet larger than the device accepts [MQTT-3.14.2-3].
        return full if len(full) <= limit else short

    def _record_dial(self) -> None:
        dial, self._dialled = self._dialled, None
        if dial is not None:
            record = self.record
            record.upstream_address = dial.address
            record.dns_seconds, record.tcp_seconds, record.tls_seconds = (
                dial.dns_seconds,
                dial.tcp_seconds,
                dial.tls_seconds,
            )

    def _write_record(self, reason: EndReason, detail: str) -> None:
        record = self.record
        record.reason = reason
        record.detail = detail
        record.duration = self._seconds() - record.started
        record.bytes_up = self._bytes_up
        record.bytes_down = self._bytes_down
        if self._from_device is not None and self._from_broker is not None:
            record.packets_up += self._from_device.packets
            record.packets_down += self._from_broker.packets
        if isinstance(self._from_broker, BrokerInspector):
            record.withheld = self._from_broker.withheld

    def _check_gone(self) -> None:
        if not self._device_present and self._upstream is None and not self._is_gone:
            self._is_gone = True
            self._gone(self)


def _disconnect_of_5(rest: bytes) -> int | None:
    """Return the reason code of a DISCONNECT that some brokers send to 3.x clients too; None if `rest` is none."""
    is_whole = len(rest) >= _DISCONNECT_OF_5_SIZE and rest[0] == PacketType.DISCONNECT << 4 and 1 <= rest[1] < 0x80
    return rest[2] if is_whole else None
