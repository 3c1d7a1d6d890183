"""One gateway that lives for days: devices come and go while everything around it changes.

In: a seed, a number of virtual hours.  Out: an `Outcome`, as of the short runs.  Each hour has a reload, with rules
that come and go; certificates and tokens expire, names lead elsewhere, brokers flap, the process is stopped for
minutes, and the time of day jumps.
The oracles watch all the time as in the short runs; at the end nothing may be left: no session, descriptor, count,
delayed call, and no generation but the last.
"""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any
from unittest.mock import patch

import attrs

from gateway.config import TLS, Config, Drain, Failover, Listener, Pacing, Upstream
from gateway.errors import EndReason
from gateway.gateway import Gateway
from gateway.prepared import free
from gateway.reception import Helpers
from gateway.session.record import SessionRecord
from gateway.tls.tickets import Tickets
from tests import mqtt_packets as mqtt
from tests.simulation.identities import Identities
from tests.simulation.models import Broker, Device
from tests.simulation.network import Link, Name, Route, VirtualNetwork, VirtualRelay, Weather, make_address
from tests.simulation.rules import KINDS, pings_in, rule_for
from tests.simulation.world import GONE, OrderedSessions, Outcome, World, judge

_HOUR = 3600.0
_DEVICES_AN_HOUR = 10
# Seconds in which no device's Keep Alive can pass: the shortest is 8, of which half more is allowed.
_SOON = 9.0
# The longest that what a device has sent may take to its broker, paces included, in seconds.
_ARRIVES_WITHIN = 60.0
# The furthest that the time of day jumps, in seconds: a box without a clock starts years ago.
_FURTHEST_JUMP = 5 * 365 * 86_400.0


def live_long(seed: int, identities: Identities, hours: int) -> Outcome:
    """Run one life."""
    life = LongLife(seed, identities, hours)
    # Whoever asks for the time of day gets that of the life; what is asked by default was chosen at the import.
    with patch("time.time", life.time_of_day), patch.object(Tickets.__init__, "__defaults__", (life.time_of_day,)):
        return judge(life)


class LongLife(World):
    """A world whose gateway lives for hours."""

    def __init__(self, seed: int, identities: Identities, hours: int) -> None:
        super().__init__(seed, identities)
        # The time of day when it begins, which the certificates are made for, and by how much it is wrong now.
        self._dawn, self._jumped = time.time(), 0.0
        self.hours = hours
        self.most_steps *= hours
        # What a short run leaves to its seed.
        self.calm, self.flooded, self.balanced, self.ruled = True, False, False, True
        self.stop_at = self.change_at = None
        self.away_until = self.found_by = 0.0
        self.drain = Drain(seconds=2.0)
        self.relay = VirtualRelay(self.clock, self.fork("relay"))
        self.relay.after_turn = self._watch_session
        self.network = VirtualNetwork(self.clock, self.poller, self._make_link, self.relay)
        self.brokers = [Broker(self, index, self.fork(f"broker {index}")) for index in range(2)]
        for broker in self.brokers:
            self._settle(broker, 1)
        self._kinds = [*KINDS[:4], ""]
        self._names = [f"device-{number}" for number in range(hours * _DEVICES_AN_HOUR)]
        self.config = self._configured(0)
        self.gateway = self._gateway()
        sessions = OrderedSessions()
        self.sessions_ever = sessions.ever
        self.gateway.sessions = sessions  # type: ignore[assignment]
        self.factory = self.gateway.factory(self.config.listen[0])
        self.generations: list[weakref.ref[Any]] = [weakref.ref(self.gateway.generation)]
        self.devices = []
        # When the process went on, for devices that had sent something while it was stopped.
        self._went_on: dict[str, float] = {}
        # When the process last went on after it had been stopped.
        self._went_on_at = -_ARRIVES_WITHIN

    @property
    def settled(self) -> float:
        return self.hours * _HOUR

    # ---- what there is

    def time_of_day(self) -> float:
        """Return what the machine takes for the time, in seconds since the epoch."""
        return self._dawn + self.now + self._jumped

    def _gateway(self) -> Gateway:
        return Gateway(
            self.config,
            self.clock,
            self.network,
            self.journal,
            1000,
            uniform=self.fork("life's jitter").random,
            helpers=Helpers(now=self.time_of_day),
        )

    def _configured(self, hour: int) -> Config:
        """Return the configuration of an hour: rules of the devices that come in it and in those before and after."""
        near = range(max(0, hour - 6) * _DEVICES_AN_HOUR, min(self.hours, hour + 2) * _DEVICES_AN_HOUR)
        return Config(
            listen=(Listener("1883"),),
            upstream=tuple(Upstream(host=broker.host) for broker in self.brokers),
            tls=TLS(ca_file=(self.identities.ca_file,)),
            failover=Failover(retry_first=1.0, retry_max=30.0),
            pacing=Pacing(new_sessions_per_second=(0.0, 50.0)[hour % 2]),
            drain=self.drain,
            device=tuple(
                rule_for(kind, self._names[number], self.identities.jwt_key)
                for number in near
                if (kind := self.rule_of(number))
            ),
        )

    def _settle(self, broker: Broker, turn: int) -> None:
        """Let a broker be a right one, at addresses that depend on `turn`."""
        broker.kind, broker.good, broker.reachable = "right", True, True
        hosts = [f"10.7.{self.brokers.index(broker)}.{turn % 200 + at}" for at in (1, 2)]
        for host in hosts:
            self.network.routes[host] = Route("accept", 0.01, broker.accept)
        self.network.names[broker.host] = Name(0.02, tuple(make_address(host) for host in hosts))
        broker._hosts = hosts

    def _make_link(self, is_device: bool) -> Link:
        random = self.fork(f"link {len(self.links)}")
        weather = Weather(delay=(0.0, 0.02), segment=random.choice((100, 1460)), harsh=random.random() < 0.5)
        link = Link(self.clock, random, weather, None)
        self.links.append(link)
        if not is_device:
            self.upstream_links.append(link)
        return link

    # ---- the course of it

    def live(self) -> None:
        """Let it all happen."""
        self.gateway.start()
        for hour in range(self.hours):
            random = self.fork(f"hour {hour}")
            for _ in range(_DEVICES_AN_HOUR):
                device = Device(self, len(self.devices), self.fork(f"device {len(self.devices)}"))
                device.opening, device.authenticates = "connect", False
                # Most stay for hours, so that whatever changes around them finds them there.
                device.ending = "stay" if random.random() < 0.6 else device.ending
                device.start = hour * _HOUR + random.uniform(0, _HOUR)
                self.devices.append(device)
                self.clock.schedule(device.start, device.connect)
                stays = random.uniform(_ARRIVES_WITHIN + 1, 3 * _HOUR)
                self.clock.schedule(device.start + _ARRIVES_WITHIN, self._judge_served, device)
                self.clock.schedule(device.start + stays, device.leave)
                if device.rule == "pace":
                    self.clock.schedule(device.start + 20, self._publish_fast, device)
                if device.is_pinged_for:
                    # Half a packet, for longer than the gateway may leave the broker without a word.
                    packet = mqtt.publish(f"{device.name}/slow", bytes(200), version=device.version)
                    self.clock.schedule(device.start + 20, self._publish_slowly, device, packet)
            self.clock.schedule((hour + random.random()) * _HOUR, self._reload, hour)
            self.clock.schedule((hour + random.random()) * _HOUR, self._trouble, hour)
            self.clock.schedule((hour + random.random()) * _HOUR, self._stop_for, 200.0)
            # Set wrong in one hour, and right in the next.
            jumped = 0.0 if hour % 2 else random.uniform(-1, 1) * _FURTHEST_JUMP
            self.clock.schedule((hour + random.random()) * _HOUR, self._set_clock, jumped)
        self.clock.schedule(1.0, self._watch_deadlines)
        self._run(self.settled + 3 * _HOUR)
        self._leave()
        self._run(self.over + 3 * _HOUR)
        self._judge_life()

    @property
    def over(self) -> float:
        return self.settled + GONE

    def _leave(self) -> None:
        for device in self.devices:
            device.leave()
        for connection in self.connections:
            connection.leave()

    def _reload(self, hour: int) -> None:
        self.note("gateway", f"reloads in hour {hour}")
        if hour % 4 == 0:
            # A CA's file that was written again, with the same in it: what was verified by the old one is over.
            self.identities.ca_file.write_bytes(self.identities.ca_file.read_bytes())
        self.config = self._configured(hour)
        if hour % 5 == 4:
            self.config = attrs.evolve(self.config, upstream=self.config.upstream[::-1])
        prepared = self.gateway.prepare(self.config)
        self.generations.append(weakref.ref(prepared))
        self.gateway.adopt(self.gateway.made(prepared))
        free(prepared)  # as the service does

    def _trouble(self, hour: int) -> None:
        broker = self.brokers[hour % 2]
        kind = ("flaps", "certificate", "names", "nobody")[hour % 4]
        self.note("world", f"trouble in hour {hour}: {kind}")
        if kind == "flaps":
            for time in range(0, 600, 60):
                self.clock.schedule(time, broker.be_away, 30.0)
        elif kind == "certificate":
            broker.kind, broker.good = "expired", False
            self.clock.schedule(900.0, self._settle, broker, hour)
        elif kind == "names":
            before = self.network.names[broker.host]
            self.network.names[broker.host] = Name(None if hour % 2 else 0.02, ())
            self.clock.schedule(300.0, self.network.names.__setitem__, broker.host, before)
            self.clock.schedule(600.0, self._settle, broker, hour)
        else:
            for each in self.brokers:
                each.be_away(120.0)

    def _set_clock(self, jumped: float) -> None:
        self.note("world", f"the time of day is wrong by {jumped:.0f} s")
        self._jumped = jumped

    def _stop_for(self, seconds: float) -> None:
        """Stop the process; devices go on, so that what they have said meanwhile waits in the kernel."""
        for device in self.devices:
            here = device.connected and device.here and device.accepted
            if here and device._waiting is None and not device.disconnected:
                # Sent now, and delivered when the process has been stopped.
                self.clock.schedule(0.5, device.say, mqtt.pingreq())
                self._went_on[device.name] = self.now + 0.5 + seconds
        self._went_on_at = self.now + 0.5 + seconds
        self.clock.schedule(0.5, self.clock.stall, seconds)

    def _publish_slowly(self, device: Device, packet: bytes) -> None:
        if device.connected and device.here and device.accepted:
            device._publish_slowly(packet[:50], packet[50:])

    def _publish_fast(self, device: Device) -> None:
        for _ in range(10):
            if device.connected and device.here and device.accepted:
                device._publish()

    # ---- what is judged of each device, and at the end

    def _judge_served(self, device: Device) -> None:
        """Some time after a device has come, or the process has gone on, all it has sent is at its broker."""
        if self.now - self._went_on_at < _ARRIVES_WITHIN:
            self.clock.schedule(_ARRIVES_WITHIN, self._judge_served, device)
            return
        connection = next((each for each in self.connections if each.device is device), None)
        if connection is None or not connection.accepted or connection.left or not device.here:
            return
        paused = device.paused or connection.paused
        if not device.violated and not device.disconnected and not paused and device.rule != "token":
            missing = len(device.sent) - len(connection.received)
            self.expect(missing <= 4, "end-to-end", f"{device.name}: {missing} bytes have not arrived")
        if device.is_pinged_for and not connection.device_pings:
            self.expect(connection.own_pings, "liveness", f"nobody has kept {device.name}'s Keep Alive at its broker")

    def _judge_life(self) -> None:
        gateway = self.gateway
        served = sum(device.accepted for device in self.devices)
        self.expect(served > 0.6 * len(self.devices), "liveness", f"{served} of {len(self.devices)} were served")
        wronged = [
            record.client_identifier
            for record in self.journal.ended
            if record.reason is EndReason.KEEPALIVE_TIMEOUT
            and 0 <= self._ended(record) - self._went_on.get(record.client_identifier, self.now) <= _SOON
        ]
        self.expect(not wronged, "liveness", f"ended as silent, though what they said was waiting: {wronged}")
        for device in self.devices:
            asked, answered = pings_in(device.sent, 0xC0), pings_in(device.received, 0xD0)
            self.expect(answered <= asked, "end-to-end", f"{device.name} got {answered} PINGRESPs for {asked}")
        tokens = [name for name in self._names if self.rule_of(int(name.removeprefix("device-"))) == "token"]
        longest = max(
            (each.duration or 0.0 for each in self.journal.ended if each.client_identifier in tokens), default=0
        )
        # It may have waited for a broker before its token was made, and the process may have been stopped meanwhile.
        self.expect(longest <= 300.0, "liveness", f"a session with a token of 10 s lived for {longest:.0f} s")
        presence = gateway.presence
        kept = {**vars(presence), **vars(presence.holders)}
        left = {name: value for name, value in kept.items() if isinstance(value, dict | set) and value}
        # Rates are kept for a minute after the last CONNECT.
        self.expect(not left, "liveness", f"still present: {left}")
        dialler = gateway.generation.dialler
        dialler.stop()
        dialler.sweep = lambda: None  # type: ignore[method-assign]
        self._run(self.over + 3 * _HOUR + 120)
        gc.collect()
        generations = [ref for ref in self.generations if ref() is not None]
        self.expect(len(generations) == 1, "liveness", f"{len(generations)} generations are left")
        if not self.violations:
            self._judge_nothing_left()

    @staticmethod
    def _ended(record: SessionRecord) -> float:
        """Return when a session ended, on the clock of the world."""
        return record.started - 1000.0 + (record.duration or 0.0)
