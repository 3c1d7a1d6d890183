"""A device that keeps working without its broker: a server to the device, a client to the broker.

In: packets of both sides, connections that come and go, the time, a store.  Out: packets for both sides; nothing is
acknowledged before the broker or the disk has it.  No I/O and no reactor.

There is one object per backlog, for as long as the device is connected or messages wait.  The device's connection and
the broker's are independent of each other::

             verified + CONNACK 0              all on disk is sent, broker is prompt
 OFFLINE ───────────────────────▶ DRAINING ◀──────────────────────────────────▶ LIVE
    ▲                                 │          no PUBACK within `after`, QoS 2     │
    └──────── upstream lost ──────────┴──────────────── upstream lost ─────────────┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Protocol

import attrs

from gateway.errors import EndReason, PacketError, Refusal, SessionEnd, UpstreamFailure
from gateway.mqtt.connack import (
    connack_acceptance,
    connack_properties,
    connack_refusal,
    disconnect,
    parse_connack,
)
from gateway.mqtt.connect import Connect
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.inspector import BrokerInspector
from gateway.mqtt.message import (
    Message,
    body_of,
    code_of,
    identifier_of,
    read_message,
)
from gateway.mqtt.packets import (
    LARGEST_PACKET,
    PacketType,
    ProtocolVersion,
    ReasonCode,
    describe_connack,
    disconnect_detail,
)
from gateway.mqtt.properties import (
    PropertyId,
    replace_property,
    without_properties,
)
from gateway.mqtt.reader import Packet, PacketReader
from gateway.mqtt.relayed import read_publish
from gateway.mqtt.rewrite import ConnectChanges, connect_properties, rewrite_connect
from gateway.mqtt.whole import WholePackets
from gateway.session.incoming import Incoming
from gateway.session.outgoing import MOST_ASIDE_IN_ROW, WINDOW, Facts, Outgoing
from gateway.session.record import Dial, Peer
from gateway.session.requests import Requests
from gateway.session.saving import Saving
from gateway.session.session import Connection
from gateway.session.stored_connect import are_readable, integer_of, is_persistent, limits_of, packet_of, will_of
from gateway.session.stored_state import DeviceState
from gateway.session.treatment import Treatment
from gateway.session.visit import LARGEST_HELD, Device, Visit, World
from gateway.store.backlog import Backlog
from gateway.store.database import StoreError
from gateway.store.store import Store

SWEEP = 1.0  # seconds between two sweeps; what may take so long is begun so much earlier
_PING_PATIENCE = 30.0  # seconds until PINGRESP has to be there
_STUCK = 60.0  # seconds without any acknowledgement, with messages in flight
# So many SUBSCRIBEs and UNSUBSCRIBEs of a device may wait for their answer; what it sends behind them waits, too.
_MOST_REQUESTS = 20
# So many PUBRELs may wait for the disk; then the device is not read.
_MOST_RELEASES = 1000
_IDLE_PING = 60.0  # seconds between PINGREQs of the gateway where the device has no Keep Alive
_FIRST_DELAY, _LAST_DELAY = 1.0, 60.0  # seconds until the next attempt after the broker hung up
_RECEIVE_MAXIMUM = 65_535
_ADDED = 64  # bytes by which the gateway's own properties can lengthen CONNECT

_PINGREQ = bytes((PacketType.PINGREQ << 4, 0))
_PINGRESP = bytes((PacketType.PINGRESP << 4, 0))
_DISCONNECT = disconnect(0)
_WITH_WILL = 0x04  # DISCONNECT that asks for the Will (MQTT 5.0 §3.14.2.1)
_TAKEN_OVER = 0x8E
_FIRST_REFUSAL = 0x80
# CONNACKs that say nothing about the device: the broker is not available (MQTT 3.1.1 §3.2.2.3, MQTT 5.0 §3.2.2.2).
_OUTAGES_3 = frozenset({3})
_OUTAGES_5 = frozenset({0x88, 0x89, 0x97, 0x9C, 0x9D, 0x9F})
_CREDENTIALS_3 = frozenset({4, 5})
_CREDENTIALS_5 = frozenset({0x86, 0x87})


class Phase(Enum):
    """How a stored device stands with its broker; the value is the word for people."""

    OFFLINE = "offline"
    DRAINING = "draining"
    LIVE = "live"


class Link(Protocol):
    """Who finds the broker."""

    def dial(self, stored: StoredSession) -> None:
        """Begin to look for a broker; ends with `upstream_verified` or `upstream_failed`."""

    def cancel(self, stored: StoredSession) -> None:
        """Give up what `dial` began."""

    def may_dial(self, stored: StoredSession) -> bool:
        """Whether a broker could be had now."""

    def over(self, stored: StoredSession) -> None:
        """Nothing of it is left."""


class StoredSession:
    """All of one backlog: its device, if it is there, and its connection to the broker, if there is one."""

    def __init__(
        self,
        name: str,
        store: Store,
        backlog: Backlog,
        link: Link,
        world: World,
        *,
        after: float,
    ) -> None:
        self.name = name
        self.backlog = backlog
        self._store = store
        self._link = link
        self._world = world
        self.after = after
        self.state = DeviceState.load(store.states.get(name, "{}"))
        if not are_readable(self.state.connect, self.state.limits):
            # The file was damaged.  Device and broker send others.
            self.state.connect = self.state.limits = b""
        self._saving = Saving(store, backlog, self.state)
        self.outgoing = Outgoing(
            store,
            backlog,
            self._to_broker,
            lambda: self._ping(is_barrier=True),
            world.seconds,
            world.now,
            world.is_plausible,
            self._changed,
            drain_pace=world.drain_pace,
            after=after,
        )
        self.incoming = Incoming(_RECEIVE_MAXIMUM, self._to_device, self._to_broker)
        self.visit: Visit | None = None
        self.stopping = False
        self.offline_since = world.seconds()
        self.trouble: SessionEnd | None = None
        # The upstream: dialled, asked with CONNECT, accepted.
        self._upstream: Connection | None = None
        self._is_dialling = False
        self._is_up = False
        # Whether each CONNECT before this one was answered, as far as that matters.
        self._was_answered = True
        self._has_asked = False
        self._handover: _Handover | None = None
        self._treated: Connect | None = None
        # The device's last CONNECT, with its password: in memory only.
        self._presented: tuple[Packet, Connect] | None = None
        self._lives_until = float("inf")
        self._connack_due = 0.0
        # For whoever calls `give_back`: how much of all lost time has been given back here.
        self.given_back = 0.0
        self._reader: PacketReader | None = None
        self._from_broker: WholePackets | None = None
        self._retry_at = 0.0
        self._delay = 0.0
        self._sent_at = 0.0
        self._answered_at = 0.0
        self._pinged_at: float | None = None
        self._pings: deque[bool] = deque()
        self._ping_interval = _IDLE_PING
        self._is_broker_held = False
        self._is_device_full = False
        self._requests = Requests(self.state, self._saving, self.outgoing, self._to_broker, self._go_on)
        # The last words of the device that left last, for the broker.
        self._farewell = b""
        self._will_at = float("inf")
        self._predecessor: _Predecessor | None = None
        self._is_after_restart = False
        self._status: Message | None = None
        self._status_is_due = False
        self._settled: list[Callable[[], None]] = []
        self.is_over = False
        if self.state.will is not None:
            # The gateway was stopped, or stopped itself, while the device was there: it gets time to come back.
            self._is_after_restart = not self.state.has_left
            patience = self._remembered_keep_alive() * 1.5 if self._is_after_restart else 0.0
            self._will_at = world.seconds() + max(self.state.will_delay, patience)

    # ---- how it stands

    @property
    def phase(self) -> Phase:
        """How the device stands with its broker."""
        if not self._is_up:
            return Phase.OFFLINE
        return Phase.LIVE if self.outgoing.live else Phase.DRAINING

    @property
    def is_serving(self) -> bool:
        """Whether the device is there and has been accepted."""
        return self.visit is not None and self.visit.is_admitted

    @property
    def has_device(self) -> bool:
        """Whether the device is there."""
        return self.visit is not None

    def presented(self) -> tuple[Packet, Connect] | None:
        """Return the CONNECT on whose behalf a broker is looked for; None if it is not known any more."""
        if self._presented is not None:
            return self._presented
        if not self.state.connect:
            return None
        return packet_of(self.state.connect, self._world.max_connect_size)

    # ---- the device

    def attach(
        self, device: Device, packet: Packet, treatment: Treatment, caller: tuple[str, str], *, confirm: bool
    ) -> None:
        """The device is here, and this is its CONNECT; `caller` is its address and its listener's name."""
        before = self.visit
        if before is not None:
            self._end_visit(before)
            before.device.finish(EndReason.TAKEN_OVER, "the device reconnected", code=_TAKEN_OVER)
        self.resume()
        self.outgoing.forget_copies()
        was_offline, will_at = not self._is_up, self._will_at
        treated_packet, treated = packet_of(treatment.connect, self._world.max_connect_size)
        may_wait = treated.clean_start or self.state.clean_pending
        self._leave_predecessor(may_wait=may_wait, is_half_open=before is not None)
        if self._is_dialling:
            self._is_dialling = False
            self._link.cancel(self)
        visit = Visit(device, packet, treatment, treated, self._world)
        connect = visit.connect
        self.visit = visit
        self._presented = packet, connect
        self._will_at = float("inf")
        self._status, self._status_is_due = None, False
        self.outgoing.confirm = confirm
        receive_maximum = integer_of(connect.properties, PropertyId.RECEIVE_MAXIMUM, _RECEIVE_MAXIMUM)
        self.incoming = Incoming(receive_maximum, self._to_device, self._to_broker)
        state = self.state
        forget = treated.clean_start or not state.has_session
        if before is not None and before.is_admitted and was_offline:
            will_at = self._world.seconds() + state.will_delay
        may_end = forget and will_at < float("inf") and not self._is_after_restart
        if may_end or will_at <= self._world.seconds():
            # No broker ends the predecessor's session and publishes its Will (MQTT 5.0 §3.1.4, §3.1.2.5).
            self._publish_will()
        if state.will is not None and will_at < float("inf"):
            # It is published all the same if nobody accepts this CONNECT: no session has been resumed then.
            has_left = not self._is_after_restart
            self._predecessor = _Predecessor(state.will, state.will_delay, will_at, has_left)
        self._is_after_restart = False
        if forget:
            state.subscriptions.clear()
            state.has_session = False
        if treated.clean_start:
            state.clean_pending = True
        visit.told_session_present = state.has_session
        if is_persistent(treated):
            state.has_session = True
        kept = ConnectChanges(password=None, will=None)
        state.connect = rewrite_connect(packet, connect, kept, len(packet.raw))
        state.had_password = connect.password is not None
        state.address, state.listener = caller
        state.will, state.will_delay = will_of(treated_packet, treated)
        state.has_left = False
        # What its predecessor had under way is durable before this is, and so before any CONNACK.
        self._save_visit(visit, forget_received=forget)
        self._retry_at = 0.0
        self._dial()

    def _leave_predecessor(self, *, may_wait: bool, is_half_open: bool) -> None:
        """End the predecessor's connection to the broker: at once, or when nothing is in flight, if that `may_wait`.

        Clean Start ends the session by which the broker recognises what is sent again.
        """
        handover = self._handover
        if handover is None and self._is_up:
            # Of one that is half open, the broker publishes the Will, as it does for others.
            farewell = b"" if is_half_open else self._farewell
            handover = _Handover(self._world.seconds() + self.after, farewell)
        if handover is not None and may_wait and self.outgoing.in_flight:
            self._handover = handover
            self._requests.forget()
            self.outgoing.finish_flights()
        else:
            self._leave_upstream(b"" if handover is None else handover.farewell)

    def _hand_over(self) -> None:
        """Connect for the device that has waited for its predecessor's messages."""
        if self._handover is not None:
            self._leave_upstream(self._handover.farewell)
            self._retry_at = 0.0
            self._dial()

    def device_received(self, data: bytes) -> None:
        """Take bytes of the device."""
        visit = self.visit
        if visit is None:
            return
        visit.heard = self._world.seconds()
        visit.waiting += visit.packets.feed(data)
        if visit.pace is not None:
            visit.pace.overdrawn(visit.packets.checker.packets, len(data))
        self._go_on(visit)

    def _go_on(self, visit: Visit) -> None:
        """Do what the device has asked for, as far as it need not wait for answers."""
        while visit.waiting and visit.requests < _MOST_REQUESTS and not visit.gone:
            packet = visit.waiting.popleft()
            visit.device.count_up()
            try:
                self._from_device(visit, packet)
            except PacketError as error:
                if not visit.gone:
                    visit.device.finish(error.reason, error.detail, code=error.reason_code)
        if visit.gone:
            return
        fault = visit.packets.error
        if visit.waiting:
            self._answered_at = max(self._answered_at, visit.heard)
        elif fault is not None:
            visit.device.finish(fault.reason, fault.detail, code=fault.reason_code)
            return
        self._mind_device()
        if visit.packets.behind and not visit.waiting:
            visit.device.go_on_later()

    def detached(self, device: Device) -> None:
        """The device's session has ended: without DISCONNECT, unless that came before."""
        visit = self.visit
        if visit is None or visit.device is not device:
            return
        self._leave(visit, b"")

    def device_full(self, is_full: bool) -> None:
        """The device's connection takes no more for now, or again."""
        self._is_device_full = is_full
        self._mind_broker()
        self._mind_device()

    def settle(self, done: Callable[[], None]) -> None:
        """The gateway stops: put everything on disk, acknowledge it, then call `done`."""
        self.stopping = True
        self._saving.stop()
        self.outgoing.spill()
        self._settled.append(done)
        self._check_settled()

    def give_way(self) -> None:
        """A device comes with this Client Identifier under another identity; the broker lets only one be connected."""
        if self.visit is not None:
            self.visit.device.finish(
                EndReason.TAKEN_OVER,
                "a device with the same Client Identifier, but another user name or certificate, connected",
                code=_TAKEN_OVER,
            )
        if self._is_dialling:
            self._is_dialling = False
            self._link.cancel(self)
        self._drop_upstream(SessionEnd(EndReason.CLIENT_ID_IN_USE, "another device connected with its name"))

    def shut_out(self, refusal: Refusal) -> None:
        """The device is disabled: end its session, and leave the broker; the backlog waits."""
        if self._is_dialling:
            self._link.cancel(self)
        self.upstream_refused(refusal.reason, refusal.detail, (refusal.code_3, refusal.code_5))
        self._drop_upstream(SessionEnd(refusal.reason, refusal.detail))

    def dropped(self) -> None:
        """A person has dropped the messages; for a device that is away nothing more is published, not even its Will."""
        if self.visit is None:
            self.state.will = None
            self._will_at = float("inf")
            self._saving.save()
            self._check_over()

    def stop(self, *, discard_will: bool) -> None:
        """The gateway stops and the device's session has ended: leave the broker, too."""
        self.stopping = True
        self._saving.stop()
        if self._is_dialling:
            self._is_dialling = False
            self._link.cancel(self)
        upstream = self._upstream
        # The Will of a device that has left is kept here; that of a predecessor is the broker's alone.
        farewell = _DISCONNECT if discard_will or self._handover is None else self._handover.farewell
        if upstream is not None and self._is_up and farewell:
            upstream.write_last(farewell)
            if discard_will and self.state.will is not None:
                self.state.will = None
                self._saving.save()
        if upstream is not None:
            self._forget_upstream()
            upstream.close()

    # ---- the upstream

    def dials(self, dial: Dial) -> None:
        """This broker is dialled."""
        if self.visit is not None:
            self.visit.device.dials(dial)

    def upstream_verified(self, upstream: Connection, peer: Peer, treatment: Treatment) -> None:
        """There is a verified connection: now, and not before, CONNECT leaves."""
        if not self._is_dialling or self.stopping:
            upstream.abort()
            return
        self._is_dialling = False
        now = self._world.seconds()
        packet, treated = packet_of(treatment.connect, self._world.max_connect_size)
        self._treated = treated
        self.outgoing.pace_by(treatment.pace(self._world.seconds))
        self._upstream = upstream
        self._connack_due = now + self._world.connack
        self._lives_until = float("inf") if treatment.lives is None else now + treatment.lives
        self._reader = PacketReader(
            frozenset({PacketType.CONNACK}), self._world.max_connect_size, EndReason.UPSTREAM_PROTOCOL_ERROR
        )
        visit = self.visit
        if visit is not None:
            visit.device.verified(peer)
        limit = treatment.max_packet_size or min(self._world.max_packet_size, LARGEST_HELD)
        checked = self._world.check_bodies
        checker: Framer | BrokerInspector = treatment.from_broker(treated.version, limit, check_bodies=checked)
        if visit is None:
            checker = Framer(Sender.BROKER, treated.version, limit)
        self._from_broker = WholePackets(checker)
        self._sent_at = now
        self._has_asked = False
        self._was_answered = not self.state.connack_missing
        words = self._for_broker(packet, treated, limit)
        if self._was_answered and self.outgoing.has_released:
            # If the CONNACK is lost, nobody may take the new session that this makes for the old one, not even after a
            # crash.
            self.state.connack_missing = True
            self._saving.save(lambda: self._ask(upstream, words), lambda _: self._ask(upstream, words))
        else:
            self._ask(upstream, words)

    def _ask(self, upstream: Connection, connect: bytes) -> None:
        if self._upstream is upstream:
            self._has_asked = True
            upstream.write(connect)

    def upstream_failed(self, failure: SessionEnd, *, later: float = 0.0) -> None:
        """There is no broker now; `later` is how many seconds the next attempt has to wait at least."""
        self._is_dialling = False
        self.trouble = failure
        self._retry_at = self._world.seconds() + later
        self._offer_offline()

    def upstream_refused(self, reason: EndReason, detail: str, answer: tuple[int, int]) -> None:
        """Today's rules do not let this device's messages leave; the device is told, the backlog waits."""
        self._is_dialling = False
        self.trouble = SessionEnd(reason, detail)
        self._back_off()
        visit = self.visit
        if visit is not None:
            visit.device.finish(reason, detail, answer=None if visit.is_admitted else _refusal(visit.version, answer))

    def upstream_received(self, data: bytes) -> None:
        """Take bytes of the broker."""
        if self._reader is not None:
            self._reader.feed(data)
            self._read_connack()
        elif self._from_broker is not None:
            packets = self._from_broker
            try:
                for packet in packets.feed(data):
                    self._of_broker(packet)
                    if self._from_broker is not packets:
                        return
                if packets.error is not None:
                    raise packets.error
                if isinstance(packets.checker, BrokerInspector):
                    # What the rule withheld from the device is acknowledged in its place.
                    owed = packets.checker.take_owed()
                    if owed:
                        self._to_broker(owed)
            except PacketError as error:
                self._drop_upstream(SessionEnd(EndReason.UPSTREAM_PROTOCOL_ERROR, error.detail))
                return
            self._mind_broker()
            if packets.behind and self._from_broker is packets and self._upstream is not None:
                self._upstream.go_on_later()

    def upstream_broken(self, failure: SessionEnd) -> None:
        """The connection to the broker has come to an end."""
        if self._is_up and isinstance(failure, UpstreamFailure) and failure.is_orderly:
            self.outgoing.hung_up()
        self._drop_upstream(failure)

    def resume(self) -> None:
        """Deliver again after messages were set aside: a person, or the device itself, has come."""
        self.outgoing.aside_in_row = 0

    def upstream_full(self, is_full: bool) -> None:
        """The connection to the broker takes no more for now, or again."""
        if self._is_up:
            self.outgoing.full(is_full)

    # ---- the time

    def give_back(self, seconds: float, now: float) -> None:
        """Move the deadlines by `seconds` in which this process did not run, or by which the clock has jumped.

        Meanwhile both sides have sent what nobody has read.  Messages that wait for a PUBACK get no more time: to write
        them to disk does no harm.  Nor does the next PINGREQ: the broker has heard nothing meanwhile, and a Keep Alive
        goes on there.
        """
        if self.visit is not None:
            self.visit.heard = min(self.visit.heard + seconds, now)
        if self._pinged_at is not None:
            self._pinged_at = min(self._pinged_at + seconds, now)
        self._answered_at = min(self._answered_at + seconds, now)
        self.outgoing.last_progress = min(self.outgoing.last_progress + seconds, now)
        # It may have been set since the pause.
        self._connack_due = min(self._connack_due + seconds, now + self._world.connack)
        if self._handover is not None:
            until = min(self._handover.until + seconds, now + self.after)
            self._handover = attrs.evolve(self._handover, until=until)
        self._will_at += seconds
        if self._predecessor is not None:
            self._predecessor = attrs.evolve(self._predecessor, will_at=self._predecessor.will_at + seconds)

    def sweep(self, now: float) -> None:
        """Do what is due; called every second or so."""
        visit = self.visit
        if self._handover is not None and (now + SWEEP > self._handover.until or now >= self._lives_until):
            self._hand_over()
        if visit is not None:
            self._sweep_visit(visit, now)
        if self._is_up:
            self.outgoing.sweep(now, SWEEP)
        if self._upstream is not None:
            self._sweep_upstream(now)
        elif not self._is_dialling and now >= self._retry_at:
            self._dial()
        if now >= self._will_at:
            self._publish_will()
        self._check_over()

    def _sweep_visit(self, visit: Visit, now: float) -> None:
        if not visit.is_admitted:
            if now + SWEEP > visit.since + self.after:
                self._offer_offline()
            return
        limit = visit.keep_alive * 1.5  # MQTT 3.1.1 §3.1.2.10
        if visit.is_held:
            visit.heard = now
        elif limit and now - visit.heard > limit and not visit.device.unread:
            visit.device.finish(EndReason.KEEPALIVE_TIMEOUT, f"silent for {now - visit.heard:.0f} s")
            return
        if visit.pace is not None and visit.pace.paused:
            visit.pace.recovered(now)
        self._mind_device()

    def _sweep_upstream(self, now: float) -> None:
        # What has arrived is read before the broker is judged by its silence: this process may have been busy.
        is_silent = self._upstream is not None and not self._upstream.unread
        if not self._is_up:
            if now >= self._connack_due and is_silent:
                self._drop_upstream(SessionEnd(EndReason.UPSTREAM_SILENT, f"no CONNACK in {self._world.connack:g} s"))
            return
        if now >= self._lives_until:
            # The token expires; only the connection to the broker is renewed.
            self._leave_upstream(b"" if self._leaves_will() else _DISCONNECT)
            self._retry_at = 0.0
            self._dial()
        elif (
            self._pinged_at is not None
            and now - self._pinged_at > _PING_PATIENCE
            and is_silent
            and not self._is_broker_held
        ):
            self._drop_upstream(SessionEnd(EndReason.UPSTREAM_LOST, "no answer to PINGREQ"))
        elif self.outgoing.in_flight and now - self.outgoing.last_progress > _STUCK and is_silent:
            self._drop_upstream(SessionEnd(EndReason.UPSTREAM_LOST, f"nothing was acknowledged for {_STUCK:g} s"))
        elif self.visit is not None and self.visit.waiting and is_silent and now - self._answered_at > _STUCK:
            self._drop_upstream(SessionEnd(EndReason.UPSTREAM_LOST, f"no answer to SUBSCRIBE for {_STUCK:g} s"))
        elif self._pinged_at is None and (
            now - self._sent_at >= self._ping_interval or (self.outgoing.in_flight and not self.outgoing.live)
        ):
            self._ping(is_barrier=False)

    def _leaves_will(self) -> bool:
        """Whether a device that has left has a Will, which the broker publishes if there is no DISCONNECT."""
        if self.visit is not None or self.state.will is None or self._will_at < float("inf"):
            return False
        if self.state.will_delay:
            # The next connection of the session makes the broker forget it (MQTT 5.0 §3.1.3.2.2).
            self._will_at = self._world.seconds() + self.state.will_delay
        else:
            self.state.will = None
            self._saving.save()
        return True

    # ---- inside: the device

    def _save_visit(self, visit: Visit, *, forget_received: bool = False) -> None:
        visit.is_being_saved = True
        self._saving.save(lambda: self._saved(visit), lambda _: self._not_saved(visit), forget_received=forget_received)

    def _not_saved(self, visit: Visit) -> None:
        visit.is_being_saved = False

    def _saved(self, visit: Visit) -> None:
        visit.is_saved = True
        if self.visit is visit and not visit.is_admitted and not self._is_dialling and self._upstream is None:
            self._offer_offline()

    def _offer_offline(self) -> None:
        """Serve the device without its broker, if it waits for that and everything before it is durable."""
        visit = self.visit
        if visit is None or visit.is_admitted or self.stopping:
            return
        if self._store.failure is None and not visit.is_saved:
            if not visit.is_being_saved:
                # The disk did not take it then; now it takes writes again.
                self._save_visit(visit)
            return
        if self._store.failure is not None:
            visit.device.finish(
                EndReason.STORE_UNAVAILABLE,
                str(self._store.failure),
                answer=_refusal(visit.version, (3, ReasonCode.SERVER_UNAVAILABLE)),
            )
            return
        self._admit(visit, self.state.limits, session_present=visit.told_session_present)

    def _admit(self, visit: Visit, section: bytes, *, session_present: bool) -> None:
        properties = limits_of(section)
        visit.is_admitted = True
        self._predecessor = None
        visit.keep_alive = integer_of(properties, PropertyId.SERVER_KEEP_ALIVE, visit.connect.keep_alive)
        visit.heard = self._world.seconds()
        # A Topic Alias would have no meaning in a message that is sent much later, on another connection.
        visit.max_qos = integer_of(properties, PropertyId.MAXIMUM_QOS, 2)
        visit.may_retain = integer_of(properties, PropertyId.RETAIN_AVAILABLE, 1) == 1
        shown = without_properties(section, PropertyId.TOPIC_ALIAS_MAXIMUM, PropertyId.SERVER_REFERENCE)
        if visit.version is ProtocolVersion.MQTT_5_0:
            largest = min(visit.largest, integer_of(properties, PropertyId.MAXIMUM_PACKET_SIZE, visit.largest))
            shown = replace_property(shown or b"\0", PropertyId.MAXIMUM_PACKET_SIZE, largest.to_bytes(4, "big"))
        connack = connack_acceptance(visit.version, shown, session_present=session_present)
        rest = visit.device.admit(connack, offline=not self._is_up)
        if rest:
            self.device_received(rest)
        self._mind_device()

    def _mind_device(self) -> None:
        """Read the device, or not."""
        visit = self.visit
        if visit is None or not visit.is_admitted:
            return
        is_held = (
            self.outgoing.is_congested
            or self._is_device_full
            or bool(visit.waiting)
            or visit.releases >= _MOST_RELEASES
            or (visit.pace is not None and visit.pace.paused)
        )
        visit.is_held = _hold_or_release(visit.device, is_held, was_held=visit.is_held)

    def _from_device(self, visit: Visit, packet: bytes) -> None:
        packet_type = PacketType(packet[0] >> 4)
        if packet_type is PacketType.PUBLISH:
            read_publish(visit.version, packet[0], body_of(packet))
            message, identifier = read_message(visit.version, packet)
            visit.check_limits(message)
            self._note_status(message)
            self.outgoing.offer(message, identifier, visit)
        elif packet_type is PacketType.PUBREL:
            identifier = identifier_of(packet)
            visit.releases += 1
            self._store.release(self.backlog, identifier, lambda error: self._released(visit, identifier, error))
        elif packet_type is PacketType.SUBSCRIBE or packet_type is PacketType.UNSUBSCRIBE:
            self._requests.ask(visit, packet_type, packet, is_up=self._is_up)
        elif packet_type is PacketType.PINGREQ:
            visit.device.send(_PINGRESP)
        elif packet_type is PacketType.DISCONNECT:
            self._said_goodbye(visit, packet)
        elif packet_type is PacketType.AUTH:
            raise PacketError(EndReason.PROTOCOL_ERROR, ReasonCode.PROTOCOL_ERROR, "AUTH, which nobody asked for")
        else:
            self.incoming.from_device(packet)
            self._mind_broker()

    def _released(self, visit: Visit, identifier: int, error: StoreError | None) -> None:
        visit.releases -= 1
        if error is None:
            visit.acknowledge(PacketType.PUBCOMP, identifier)
        else:
            # A device does not repeat PUBREL on the same connection, and would wait forever.
            visit.not_stored(str(error))
        self._mind_device()

    def _said_goodbye(self, visit: Visit, packet: bytes) -> None:
        body = body_of(packet)
        with_will = bool(body) and body[0] == _WITH_WILL
        self._leave(visit, packet, with_will=with_will)
        visit.device.finish(EndReason.DEVICE_DISCONNECT)

    def _leave(self, visit: Visit, packet: bytes, *, with_will: bool = False) -> None:
        """The device is gone; `packet` is its DISCONNECT, empty if there was none."""
        self._end_visit(visit)
        self._farewell = packet
        lost = not packet or with_will
        state = self.state
        if not lost or not visit.is_admitted:
            # Nobody accepted a CONNECT that was not answered, nor the Will in it (MQTT 5.0 §3.1.2.5).
            state.will = None
        state.has_left = not self.stopping
        before, self._predecessor = self._predecessor, None
        if before is not None:
            state.will, state.will_delay, state.has_left = before.will, before.will_delay, before.has_left
            self._will_at, self._is_after_restart = before.will_at, not before.has_left
        if not is_persistent(visit.treated):
            state.has_session = False
        if lost and before is None and state.will is not None and not self._is_up and not self.stopping:
            self._will_at = self._world.seconds() + state.will_delay
        self._saving.save()
        if not self._is_up:
            # What is under way is for the device, with its Will.
            if self._is_dialling:
                self._is_dialling = False
                self._link.cancel(self)
            self._leave_upstream()
        self._check_over()

    def _end_visit(self, visit: Visit) -> None:
        self.visit = None
        visit.gone = True
        # The broker is read again, so that it can acknowledge what the device has left behind.
        self._is_device_full = False
        self.incoming.lost()
        self._mind_broker()
        self._requests.forget_of(visit)

    def _to_device(self, packet: bytes) -> None:
        if self.visit is not None and self.visit.is_admitted:
            self.visit.device.send(packet)

    def _note_status(self, message: Message) -> None:
        will = self.state.will
        if will is not None and message.retain and message.topic == will.topic:
            self._status = message
            # It follows whatever Will the broker has published.
            self._status_is_due = False

    def _publish_will(self) -> None:
        self._will_at = float("inf")
        will, self.state.will = self.state.will, None
        if will is not None:
            self._offer_own(will)
            self._saving.save()

    def _offer_own(self, message: Message) -> None:
        """Send a message on behalf of the device, so that the gateway learns that it arrived."""
        self.outgoing.offer(attrs.evolve(message, qos=max(message.qos, min(1, self.outgoing.facts.max_qos))), 0, None)

    # ---- inside: the broker

    def _dial(self) -> None:
        """Look for a broker, if there is anything to do for one."""
        if self.stopping or self._is_dialling or self._upstream is not None or self.is_over:
            return
        if self.visit is None and self.outgoing.is_idle:
            return
        if self.outgoing.aside_in_row >= MOST_ASIDE_IN_ROW:
            words = "the broker has closed the connection on several messages in a row: `mqtts-gateway store retry`"
            self.trouble = SessionEnd(EndReason.UPSTREAM_LOST, words)
            return
        # Before the scan has ended, only an upstream that is not LIVE could be used, and the scan takes seconds.
        if self.backlog.loading or not self._link.may_dial(self):
            self._offer_offline()
            return
        self._is_dialling = True
        self._link.dial(self)

    def _for_broker(self, packet: Packet, treated: Connect, largest: int) -> bytes:
        """Write the CONNECT for this connection of many; `largest` is the limit for the broker's packets in bytes."""
        changes = ConnectChanges()
        if treated.version is ProtocolVersion.MQTT_5_0:
            properties = without_properties(connect_properties(packet, treated), PropertyId.TOPIC_ALIAS_MAXIMUM)
            if self.visit is None:
                properties = replace_property(properties, PropertyId.RECEIVE_MAXIMUM, b"\0\1")
            if largest < (treated.maximum_packet_size or LARGEST_PACKET):
                properties = replace_property(properties, PropertyId.MAXIMUM_PACKET_SIZE, largest.to_bytes(4, "big"))
            # Only the first connection of a device session carries its Clean Start: a later one would wipe the
            # broker's queue.  3.x has no other way to say that nothing is to be kept.
            changes = ConnectChanges(clean_start=self.state.clean_pending, properties=properties)
        if self.visit is None:
            changes = attrs.evolve(changes, will=None)
        return rewrite_connect(packet, treated, changes, len(packet.raw) + _ADDED)

    def _read_connack(self) -> None:
        reader, treated = self._reader, self._treated
        if reader is None or treated is None:
            return
        try:
            packet = reader.next_packet()
            if packet is None:
                return
            connack = parse_connack(packet, treated.version)
        except PacketError as error:
            self._drop_upstream(SessionEnd(error.reason, error.detail))
            return
        if not connack.accepted:
            self._refused_by_broker(treated, connack.code, packet.raw)
            return
        section = connack_properties(packet) if treated.version is ProtocolVersion.MQTT_5_0 else b""
        self._reader = None
        self._accepted(treated, section, session_present=connack.session_present)
        rest = reader.take_rest()
        if rest:
            self.upstream_received(rest)

    def _accepted(self, treated: Connect, section: bytes, *, session_present: bool) -> None:
        properties = limits_of(section)
        self._is_up = True
        self.trouble = None
        visit, state = self.visit, self.state
        keep_alive = integer_of(properties, PropertyId.SERVER_KEEP_ALIVE, treated.keep_alive)
        self._ping_interval = keep_alive / 2 if keep_alive else _IDLE_PING
        limits = without_properties(section, PropertyId.ASSIGNED_CLIENT_IDENTIFIER)
        is_same = session_present and self._was_answered
        if not is_same:
            # Before `connack_missing` is cleared, so that a crash in between changes nothing.
            self.outgoing.publish_released_anew()
        if state.clean_pending or state.connack_missing or limits != state.limits:
            state.clean_pending = state.connack_missing = False
            state.limits = limits
            self._saving.save()
        if visit is not None:
            if visit.is_admitted and visit.is_first_upstream and session_present and not visit.told_session_present:
                self._is_up = False
                self._leave_upstream()
                state.has_session = True
                visit.device.finish(
                    EndReason.STORED_SESSION_DIFFERS,
                    "the broker kept a session; the device was told that there was none",
                )
                return
            visit.is_first_upstream = False
        self.outgoing.connect(
            Facts(
                treated.version,
                max(1, min(WINDOW, integer_of(properties, PropertyId.RECEIVE_MAXIMUM, WINDOW))),
                session_present,
                is_same,
                integer_of(properties, PropertyId.MAXIMUM_PACKET_SIZE, 0),
                integer_of(properties, PropertyId.MAXIMUM_QOS, 2),
                integer_of(properties, PropertyId.RETAIN_AVAILABLE, 1) == 1,
            )
        )
        self.incoming.connected(session_present=session_present)
        if visit is not None and not visit.is_admitted:
            self._admit(visit, section, session_present=session_present or visit.told_session_present)
        if not self._is_up:
            return
        if self.visit is not None:
            self._requests.restore(treated.version, session_present=session_present)
        self._mind_broker()
        if self._status_is_due and self._status is not None:
            # The broker has published the Will of a device that lives: what it overwrote is said again.
            self._status_is_due = False
            self.outgoing.live = False
            self._offer_own(self._status)

    def _refused_by_broker(self, treated: Connect, code: int, raw: bytes) -> None:
        if self._was_answered and self.state.connack_missing:
            # A CONNECT that is refused makes no session.
            self.state.connack_missing = False
            self._saving.save()
        is_5 = treated.version is ProtocolVersion.MQTT_5_0
        words = f"CONNACK 0x{code:02X}, {describe_connack(treated.version, code)}"
        failure = SessionEnd(EndReason.UPSTREAM_REFUSED, words)
        of_rule = (
            self.visit is not None
            and treated.password is not None
            and treated.password != (self.visit.connect.password)
        )
        is_of_credentials = code in (_CREDENTIALS_5 if is_5 else _CREDENTIALS_3)
        is_outage = code in (_OUTAGES_5 if is_5 else _OUTAGES_3) or (is_of_credentials and of_rule)
        self._drop_upstream(failure, is_outage=is_outage)
        visit = self.visit
        if visit is None and is_of_credentials:
            # Its own password is not tried again and again: the account might be locked.
            self._presented = None
        if visit is None or is_outage:
            return
        if visit.is_admitted:
            visit.device.finish(EndReason.UPSTREAM_REFUSED, words, code=code if is_5 else None)
        else:
            answer = raw if treated.version is visit.version else b"\x20\x02\0" + bytes((code,))
            visit.device.finish(EndReason.UPSTREAM_REFUSED, words, answer=answer)

    def _of_broker(self, packet: bytes) -> None:
        packet_type = PacketType(packet[0] >> 4)
        if packet_type in {PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBCOMP}:
            self._delay = 0.0
            self.outgoing.acknowledged(packet_type, identifier_of(packet), code_of(packet))
        elif packet_type in {PacketType.PUBLISH, PacketType.PUBREL}:
            # For a device that is away it stays the broker's: nothing is acknowledged.
            if self.visit is not None and self._handover is None:
                self.incoming.from_broker(packet)
        elif packet_type in {PacketType.SUBACK, PacketType.UNSUBACK}:
            version = self._treated.version if self._treated is not None else ProtocolVersion.MQTT_3_1_1
            if self._requests.take_answer(packet_type, packet, version, self.visit):
                self._answered_at = self._world.seconds()
        elif packet_type is PacketType.PINGRESP:
            is_barrier = self._pings.popleft() if self._pings else False
            self._pinged_at = self._world.seconds() if self._pings else None
            if is_barrier:
                self.outgoing.pong()
        elif packet_type is PacketType.DISCONNECT:
            body = body_of(packet)
            code = body[0] if body else 0
            words = disconnect_detail(code)
            visit = self.visit
            self._drop_upstream(SessionEnd(EndReason.UPSTREAM_DISCONNECT, words))
            if code == _TAKEN_OVER and visit is not None:
                # Somebody else has its name at the broker; to come back at once would throw that one out.
                visit.device.finish(EndReason.UPSTREAM_DISCONNECT, words)
        else:
            raise PacketError(EndReason.UPSTREAM_PROTOCOL_ERROR, ReasonCode.PROTOCOL_ERROR, packet_type.name)

    def _to_broker(self, packet: bytes) -> None:
        if self._upstream is not None and self._is_up:
            self._sent_at = self._world.seconds()
            self._upstream.write(packet)

    def _ping(self, *, is_barrier: bool) -> None:
        """Send a PINGREQ; the answer to one that `is_barrier` confirms what was sent before it."""
        self._pings.append(is_barrier)
        if self._pinged_at is None:
            self._pinged_at = self._world.seconds()
        self._to_broker(_PINGREQ)

    def _mind_broker(self) -> None:
        """Read the broker, or not."""
        if self._upstream is not None:
            is_held = self._is_device_full or self.incoming.is_congested
            self._is_broker_held = _hold_or_release(self._upstream, is_held, was_held=self._is_broker_held)

    def _leave_upstream(self, farewell: bytes = b"") -> None:
        """End the connection to the broker, with this DISCONNECT: another one follows, or nobody needs it."""
        upstream = self._upstream
        if upstream is None:
            return
        if self._is_up and farewell:
            upstream.write_last(farewell)
        self._forget_upstream()
        upstream.close()

    def _drop_upstream(self, failure: SessionEnd, *, is_outage: bool = True) -> None:
        """The connection to the broker is of no use any more."""
        upstream = self._upstream
        if upstream is None:
            return
        self.trouble = failure
        was_up = self._is_up
        if was_up and self.state.will is not None:
            if self.visit is not None:
                self._status_is_due = self._status is not None
            elif self._will_at == float("inf"):
                # It was to end as the device had left, which the broker may not have noticed; and the next connection
                # makes it forget a Will that is delayed (MQTT 5.0 §3.1.3.2.2).
                self._will_at = self._world.seconds() + self.state.will_delay
        self._forget_upstream()
        self._back_off()
        upstream.abort()
        if is_outage:
            self._offer_offline()

    def _forget_upstream(self) -> None:
        was_up, self._is_up = self._is_up, False
        if was_up:
            self.offline_since = self._world.seconds()
        if self._upstream is not None and not self._has_asked and self._was_answered:
            # CONNECT has not left.
            self.state.connack_missing = False
        self._upstream = self._handover = None
        self._reader = self._from_broker = None
        self._pinged_at = None
        self._pings.clear()
        self._is_broker_held = False
        self._treated = None
        if was_up:
            self.outgoing.lost()
            self.incoming.lost()
        self._requests.lost()

    def _back_off(self) -> None:
        """Wait before the next attempt, longer each time until the broker acknowledges something."""
        self._delay = min(_LAST_DELAY, max(_FIRST_DELAY, self._delay * 2))
        self._retry_at = self._world.seconds() + self._delay * (0.5 + 0.5 * self._world.uniform())

    # ---- inside: ends

    def _changed(self) -> None:
        self._mind_device()
        if not self.outgoing.in_flight:
            self._hand_over()
        self._check_settled()
        self._check_over()

    def _check_settled(self) -> None:
        if self._settled and self.outgoing.is_settled:
            settled, self._settled = self._settled, []
            for done in settled:
                done()

    def _check_over(self) -> None:
        """Once a device has left and nothing of it waits, its connection to the broker ends as the device left."""
        if self.visit is not None or self.is_over or not self.outgoing.is_idle or self.stopping:
            return
        upstream, farewell = self._upstream, self._farewell
        if upstream is not None:
            if not self._is_up:
                self._leave_upstream()
            else:
                if farewell:
                    upstream.write_last(farewell)
                if self.state.will is not None and self._will_at == float("inf"):
                    # The broker publishes it, since there is no DISCONNECT.
                    self.state.will = None
                    self._saving.save()
                self._forget_upstream()
                upstream.close()
        if self._will_at < float("inf"):
            return
        self.is_over = True
        self._saving.now()
        if self._is_dialling:
            self._is_dialling = False
            self._link.cancel(self)
        if not self.state.has_session and not self._store.received[self.backlog.name]:
            self._store.forget(self.backlog)
        self._link.over(self)

    def _remembered_keep_alive(self) -> int:
        if not self.state.connect:
            return 0
        return packet_of(self.state.connect, self._world.max_connect_size)[1].keep_alive


@attrs.frozen
class _Predecessor:
    """A device whose Will is due at `will_at`, in seconds, unless its session is resumed.

    `has_left` is false if it was there when the gateway stopped.
    """

    will: Message
    will_delay: float
    will_at: float
    has_left: bool


@attrs.frozen
class _Handover:
    """A device with Clean Start waits `until` then, in seconds, for what its predecessor has in flight.

    `farewell` is the predecessor's DISCONNECT, empty if there was none.
    """

    until: float
    farewell: bytes


def _hold_or_release(end: Connection | Device, is_held: bool, *, was_held: bool) -> bool:
    """Read one end or not, as `is_held` says; return that."""
    if is_held and not was_held:
        end.hold()
    elif was_held and not is_held:
        end.release()
    return is_held


def _refusal(version: ProtocolVersion, codes: tuple[int, int]) -> bytes:
    return connack_refusal(version, *codes)
