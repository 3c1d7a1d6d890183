"""Which broker a session is led to, when, and what it is told if there is none: the dialler on a virtual clock.

What it does on real sockets is in `test_outage.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

from gateway.config import from_mapping
from gateway.dial.dialler import Dialler, Target
from gateway.dial.health import UpstreamState, accounts
from gateway.errors import EndReason, UpstreamFailure
from gateway.ops.journal import Journal
from gateway.relay.device import DeviceProtocol
from gateway.relay.upstream import UpstreamProtocol
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import make_policy
from tests.harness import ServerTLS
from tests.test_sides import MemoryBroker, RememberingSession, Transport, addresses, device_side, transport_of


class Plant:
    """Brokers that refuse, hang or serve as the test wants, and a dialler before them.

    `brokers` says what each host does.  Time stands still but for `pass_time`, which lets a sweep come each second.
    """

    def __init__(self, ca_file: Path, server_tls: ServerTLS, *hosts: str, **sections: Any) -> None:
        hosts = hosts or ("one.example",)
        upstream = [{"host": host, "server_name": "localhost"} for host in hosts]
        config = from_mapping({"upstream": upstream, "tls": {"ca_file": str(ca_file)}, **sections})
        policy = make_policy(config.tls)
        self.brokers = dict.fromkeys(hosts, "serve")
        self.dialled: Counter[str] = Counter()
        self.resolved: Counter[str] = Counter()
        self.connections: list[tuple[UpstreamProtocol, MemoryBroker]] = []
        self.clock = Clock()
        self.told: list[tuple[str, str]] = []
        self._context = server_tls.context()
        self._next_sweep = 1.0
        self.dialler = Dialler(
            [Target(upstream, Identity.of(upstream.verify_name), policy) for upstream in config.upstream],
            accounts(config.upstream, config.failover, lambda: 1.0),
            self,
            self.clock,
            config,
            Listening(self.told, self.clock),
            self.clock,
        )
        self.health = dict(zip(hosts, self.dialler.upstreams, strict=True))

    # ---- the network

    def resolve(self, host: str, port: int) -> Deferred[list[Any]]:
        """See `Network.resolve`."""
        del port
        self.resolved[host] += 1
        return succeed(addresses(host))

    def endpoint(self, address: Any) -> Any:
        """See `Network.endpoint`."""
        return Way(self, address.host)

    def serve(self, protocol: Any) -> None:
        """Shake hands, a moment later."""
        protocol.makeConnection(Transport())
        broker = MemoryBroker(self._context)
        self.connections.append((protocol, broker))
        self.clock.callLater(0, broker.talk, protocol)

    # ---- devices

    def session(self) -> tuple[Any, Deferred[None]]:
        """A session that wants its broker now."""
        session: Any = RememberingSession()
        return session, self.dialler.dial(session, device_side(session))

    def comes(self) -> str:
        """Let a device come and wait for its answer; return the host that serves it, or why none does."""
        session, _ = self.session()
        self.clock.advance(0)
        return self.answer(session)

    def answer(self, session: Any) -> str:
        """Return what a session was told: a host, a reason, or that it waits."""
        (failure,) = session.named("upstream_failed") or (None,)
        if failure is not None:
            return str(failure.reason)
        return str(session.dial.upstream.partition(":")[0]) if session.named("upstream_verified") else "waits"

    def pass_time(self, seconds: float) -> None:
        """Let time pass, an eighth of a second at a time, with the sweep each second."""
        for _ in range(round(seconds * 8)):
            self.clock.advance(0.125)
            if self.clock.seconds() >= self._next_sweep:
                self._next_sweep += 1.0
                self.dialler.sweep()
                self.clock.advance(0)


class Listening(Journal):
    """A journal whose words about upstreams are kept."""

    def __init__(self, told: list[tuple[str, str]], clock: Clock) -> None:
        super().__init__(clock.seconds)
        self._told = told

    def passed_over(self, upstream: str, failure: UpstreamFailure) -> None:
        self._told.append((f"{upstream} passed over", str(failure.reason)))

    def left_alone(self, upstream: str, failure: UpstreamFailure, seconds: float) -> None:
        self._told.append((f"{upstream} left alone for {seconds:g} s", str(failure.reason)))

    def serves_again(self, upstream: str) -> None:
        self._told.append((f"{upstream} serves again", ""))


class Way:
    """The way to one broker."""

    def __init__(self, plant: Plant, host: str) -> None:
        self._plant = plant
        self._host = host

    def connect(self, factory: Any) -> Deferred[Any]:
        self._plant.dialled[self._host] += 1
        does = self._plant.brokers[self._host]
        if does == "refuse":
            return fail(error.ConnectionRefusedError())
        if does == "hang":
            return Deferred()
        if does == "mistake":
            return succeed(17)
        protocol = factory.buildProtocol(None)
        if does == "plaintext":
            protocol.makeConnection(Transport())
            self._plant.clock.callLater(0, protocol.dataReceived, b"HTTP/1.1 400 Bad Request\r\n\r\n")
        else:
            self._plant.serve(protocol)
        return succeed(protocol)


StartPlant = Callable[..., Plant]


@pytest.fixture
def plant(ca_file: Path, server_tls: ServerTLS) -> StartPlant:
    """Return a function that makes plants; unless told otherwise nothing is paced."""

    def make(*hosts: str, **sections: Any) -> Plant:
        sections.setdefault("pacing", {"new_sessions_per_second": 0})
        return Plant(ca_file, server_tls, *hosts, **sections)

    return make


# ---- one broker


def test_while_the_only_broker_is_left_alone_devices_are_told_at_once(plant: StartPlant) -> None:
    """With the reason of the one dial that failed, in fixed words, and no dial of their own."""
    own = plant()
    own.brokers["one.example"] = "refuse"
    assert own.comes() == "tcp-refused"
    session, _ = own.session()
    (failure,) = session.named("upstream_failed")
    assert failure.reason is EndReason.TCP_REFUSED
    assert failure.detail.endswith("; backing off")
    assert session.dial.upstream == "one.example:8883"
    assert own.dialled == {"one.example": 1}
    assert own.told == [("one.example:8883 left alone for 1 s", "tcp-refused")]


def test_while_all_brokers_are_left_alone_the_last_one_gives_the_reason(plant: StartPlant) -> None:
    """With what each of them failed at, and no dial."""
    own = plant("one.example", "two.example")
    own.brokers |= {"one.example": "refuse", "two.example": "plaintext"}
    own.comes()
    dialled = dict(own.dialled)
    session, _ = own.session()
    (failure,) = session.named("upstream_failed")
    assert failure.reason is EndReason.TLS_NOT_TLS
    assert "one.example:8883: tcp-refused" in failure.detail
    assert "two.example:8883: tls-not-tls" in failure.detail
    assert own.dialled == dialled


def test_a_device_that_comes_when_the_only_broker_is_due_tries_it(plant: StartPlant) -> None:
    """One; the others are told at once, also while it hangs.  When it serves again, all are served."""
    own = plant(failover={"retry_first": 0.5})
    own.brokers["one.example"] = "refuse"
    own.comes()
    own.brokers["one.example"] = "hang"
    own.clock.advance(0.5)
    trying, dialling = own.session()
    assert own.answer(trying) == "waits"
    assert own.health["one.example"].state is UpstreamState.BEING_TRIED
    assert [own.comes() for _ in range(3)] == ["tcp-refused"] * 3
    assert own.dialled == {"one.example": 2}
    dialling.cancel()
    own.brokers["one.example"] = "serve"
    assert [own.comes() for _ in range(3)] == ["one.example"] * 3
    assert own.told[-1] == ("one.example:8883 serves again", "")


def test_when_no_device_comes_the_gateway_tries_the_broker_itself(plant: StartPlant) -> None:
    """Up to the verified channel; not one MQTT byte is sent, and the connection is closed in order."""
    own = plant()
    own.brokers["one.example"] = "refuse"
    own.comes()
    own.brokers["one.example"] = "serve"
    own.pass_time(2)
    ((protocol, broker),) = own.connections
    assert own.health["one.example"].state is UpstreamState.SERVING
    transport = transport_of(protocol)
    assert transport.half_closed
    broker.talk(protocol)
    assert broker.received == b""
    assert broker.ended_cleanly
    assert not transport.aborted
    protocol.connectionLost()
    own.pass_time(10)
    assert own.dialled == {"one.example": 2}
    assert not own.clock.getDelayedCalls()


def test_a_broker_that_does_not_close_after_a_trial_is_cut_off(plant: StartPlant) -> None:
    """After `timeouts.close`, to the precision of the sweep."""
    own = plant(timeouts={"close": 2.0})
    own.brokers["one.example"] = "refuse"
    own.comes()
    own.brokers["one.example"] = "serve"
    own.pass_time(2)
    ((protocol, _),) = own.connections
    assert not transport_of(protocol).aborted
    own.pass_time(3)
    assert transport_of(protocol).aborted


def test_a_broker_that_stays_away_is_tried_less_and_less_often(plant: StartPlant) -> None:
    """At 1, 2, 4, 8 … seconds' distance up to the maximum; the log has one line for all of it."""
    own = plant(failover={"retry_first": 1.0, "retry_max": 8.0})
    own.brokers["one.example"] = "refuse"
    own.comes()
    times = []
    for _ in range(50):
        before = own.dialled["one.example"]
        own.pass_time(1)
        if own.dialled["one.example"] > before:
            times.append(round(own.clock.seconds()))
    assert times == [1, 3, 7, 15, 23, 31, 39, 47]
    assert len(own.told) == 1


def test_a_trial_that_finds_another_reason_is_news(plant: StartPlant) -> None:
    """The machine is back, and then something else listens on the port."""
    own = plant()
    own.brokers["one.example"] = "refuse"
    own.comes()
    own.brokers["one.example"] = "plaintext"
    own.pass_time(1)
    assert [why for _, why in own.told] == ["tcp-refused", "tls-not-tls"]


def test_a_mistake_in_a_trial_ends_no_trials(plant: StartPlant, logged_errors: list[dict[str, Any]]) -> None:
    """It is logged, and the broker is tried again."""
    own = plant()
    own.brokers["one.example"] = "refuse"
    own.comes()
    own.brokers["one.example"] = "mistake"
    own.pass_time(1)
    assert logged_errors
    logged_errors.clear()
    own.brokers["one.example"] = "serve"
    own.pass_time(1)
    assert own.health["one.example"].state is UpstreamState.SERVING


def test_a_mistake_in_a_dial_ends_the_session(plant: StartPlant, logged_errors: list[dict[str, Any]]) -> None:
    """It is logged, the session is told what it was, and the broker is not blamed; a dial that is given up is none."""
    own = plant()
    own.brokers["one.example"] = "mistake"
    session, _ = own.session()
    own.clock.advance(0)
    assert session.named("fail") == ["AttributeError"]
    assert len(logged_errors) == 1
    logged_errors.clear()
    assert own.health["one.example"].is_open
    own.brokers["one.example"] = "hang"
    session, dialling = own.session()
    dialling.cancel()
    assert session.named("fail") == []
    assert not logged_errors


@pytest.mark.parametrize("when", ["trying", "closing"])
def test_a_stop_leaves_nothing_of_a_trial(plant: StartPlant, when: str) -> None:
    """Whether it is still under way or only to be closed."""
    own = plant()
    own.brokers["one.example"] = "refuse"
    own.comes()
    own.brokers["one.example"] = "hang" if when == "trying" else "serve"
    own.pass_time(1)
    assert own.dialled == {"one.example": 2}
    own.dialler.stop()
    assert not own.clock.getDelayedCalls()
    assert not own.dialler.trials
    assert all(transport_of(protocol).aborted for protocol, _ in own.connections)
    assert own.health["one.example"].is_open == (when == "closing")


def test_a_session_that_gives_up_while_it_tries_the_broker_does_not_keep_the_place(plant: StartPlant) -> None:
    """The next one may try."""
    own = plant()
    own.brokers["one.example"] = "refuse"
    own.comes()
    own.clock.advance(1)
    own.brokers["one.example"] = "hang"
    own.session()[1].cancel()
    own.brokers["one.example"] = "serve"
    assert own.comes() == "one.example"


def test_the_name_is_resolved_anew_for_each_dial(plant: StartPlant) -> None:
    """For sessions and for trials: a broker that moves is found."""
    own = plant()
    for count in range(1, 4):
        own.comes()
        assert own.resolved == {"one.example": count}
    own.brokers["one.example"] = "refuse"
    own.comes()
    own.pass_time(1)
    assert own.resolved == {"one.example": 5}


# ---- several


def test_a_broker_that_failed_costs_the_next_session_nothing(plant: StartPlant) -> None:
    """The first session waits for it, the second goes to the next broker at once; the log tells of both."""
    own = plant("one.example", "two.example", timeouts={"tcp": 10.0})
    own.brokers["one.example"] = "hang"
    session, _ = own.session()
    own.clock.advance(9.9)
    assert own.answer(session) == "waits"
    own.clock.advance(0.1)
    own.clock.advance(0)
    assert own.answer(session) == "two.example"
    assert own.comes() == "two.example"
    assert own.dialled == {"one.example": 1, "two.example": 2}
    assert own.told == [
        ("one.example:8883 left alone for 1 s", "tcp-timeout"),
        ("one.example:8883 passed over", "tcp-timeout"),
        ("one.example:8883 passed over", "tcp-timeout"),
    ]


def test_no_device_waits_for_a_broker_that_is_tried_again(plant: StartPlant) -> None:
    """As long as another serves, the gateway finds out by itself, and devices go to the other."""
    own = plant("one.example", "two.example")
    own.brokers["one.example"] = "refuse"
    assert own.comes() == "two.example"
    own.brokers["one.example"] = "hang"
    own.clock.advance(1.0)
    assert own.health["one.example"].is_due(own.clock.seconds())
    assert own.comes() == "two.example"
    own.pass_time(1)
    assert own.health["one.example"].state is UpstreamState.BEING_TRIED
    assert own.comes() == "two.example"
    # Ten seconds to give up, two to wait, ten to give up, four to wait.
    own.pass_time(25)
    assert own.dialled["one.example"] == 3
    own.pass_time(1)
    assert own.dialled["one.example"] == 4


def test_new_sessions_return_to_the_preferred_broker_when_it_is_verified(plant: StartPlant) -> None:
    """Not before; those that stand elsewhere stay where they are."""
    own = plant("one.example", "two.example")
    own.brokers["one.example"] = "refuse"
    standing, _ = own.session()
    own.clock.advance(0)
    assert own.answer(standing) == "two.example"
    own.brokers["one.example"] = "serve"
    assert own.comes() == "two.example"
    own.pass_time(2)
    assert own.comes() == "one.example"
    assert own.answer(standing) == "two.example"
    assert not standing.named("upstream_broken")
    assert not standing.named("stop")


def test_when_all_are_left_alone_the_first_that_is_due_is_tried(plant: StartPlant) -> None:
    """In the order of preference, each once at most; devices that come meanwhile are told at once."""
    own = plant("one.example", "two.example", "three.example", failover={"retry_first": 5.0})
    own.brokers |= {"one.example": "refuse", "two.example": "refuse", "three.example": "refuse"}
    assert own.comes() == "tcp-refused"
    assert own.dialled == {"one.example": 1, "two.example": 1, "three.example": 1}
    session, _ = own.session()
    (failure,) = session.named("upstream_failed")
    assert all(f"{host}:8883: tcp-refused" in failure.detail for host in own.brokers)
    assert sum(own.dialled.values()) == 3
    own.brokers["two.example"] = "serve"
    own.clock.advance(5)
    assert own.comes() == "two.example"
    assert own.dialled == {"one.example": 2, "two.example": 2, "three.example": 1}


def test_the_waiting_of_a_session_is_bounded(plant: StartPlant) -> None:
    """However many brokers there are and whatever becomes of them meanwhile, each is dialled once at most."""
    own = plant("one.example", "two.example", timeouts={"tcp": 3.0}, failover={"retry_first": 0.001})
    own.brokers |= {"one.example": "hang", "two.example": "hang"}
    session, _ = own.session()
    own.clock.pump([0.125] * 48)
    assert own.answer(session) == "tcp-timeout"
    assert own.dialled == {"one.example": 1, "two.example": 1}
    assert own.clock.seconds() == pytest.approx(6.0)


# ---- at a pace


def paced(plant: StartPlant, rate: float = 10, queue_seconds: float = 10, **more: Any) -> Plant:
    return plant(pacing={"new_sessions_per_second": rate, "queue_seconds": queue_seconds}, **more)


def test_a_storm_is_led_to_the_broker_at_the_pace(plant: StartPlant) -> None:
    """Three thousand come at once: in no second more dials than the rate, those beyond the queue are told at once."""
    own = paced(plant, rate=200, queue_seconds=10)
    own.brokers["one.example"] = "hang"
    sessions = [own.session()[0] for _ in range(3000)]
    answers = Counter(own.answer(session) for session in sessions)
    assert answers == {"waits": 2020, "too-many-new-sessions": 980}
    per_second = []
    for _ in range(9):
        before = own.dialled["one.example"]
        own.clock.pump([0.01] * 100)
        per_second.append(own.dialled["one.example"] - before)
    assert all(195 <= count <= 200 for count in per_second)
    assert sum(own.dialled.values()) <= 20 + 9 * 200


def test_who_cannot_be_dialled_for_does_not_wait_for_a_turn(plant: StartPlant) -> None:
    """A device whose brokers are all left alone is told at once, and takes no turn from anybody."""
    own = paced(plant, rate=1)
    own.brokers["one.example"] = "refuse"
    assert own.comes() == "tcp-refused"
    assert own.comes() == "tcp-refused"
    assert own.dialler.pacer.waiting == 0


def test_those_that_wait_when_the_broker_fails_are_told_soon(plant: StartPlant) -> None:
    """Their turns are of no use to them any more, and are over one after the other at once."""
    own = paced(plant, rate=8, timeouts={"tcp": 1.0})
    own.brokers["one.example"] = "hang"
    sessions = [own.session()[0] for _ in range(80)]
    own.clock.pump([0.125] * 8)
    assert own.answer(sessions[0]) == "tcp-timeout"
    # Those that were dialled for meanwhile wait as long as the first did.
    own.clock.pump([0.125] * 8)
    assert Counter(own.answer(session) for session in sessions) == {"tcp-timeout": 80}
    assert own.dialled["one.example"] <= 10


def test_a_session_that_ends_while_it_waits_is_never_dialled_for(plant: StartPlant) -> None:
    """And those behind it move up."""
    own = paced(plant, rate=1)
    own.comes()
    _, waiting = own.session()
    behind, _ = own.session()
    waiting.cancel()
    own.clock.advance(1)
    own.clock.advance(0)
    assert own.answer(behind) == "one.example"
    assert own.dialled == {"one.example": 2}


def test_a_device_that_has_left_while_it_waited_is_not_dialled_for(
    plant: StartPlant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read meanwhile, so it is looked at when its turn comes; the turn goes to the next."""
    own = paced(plant, rate=1)
    own.comes()
    left, _ = own.session()
    behind, _ = own.session()
    calls: list[DeviceProtocol] = []

    def has_left(self: DeviceProtocol) -> bool:
        calls.append(self)
        return len(calls) == 1

    monkeypatch.setattr(DeviceProtocol, "has_left", has_left)
    own.clock.pump([1, 0, 0])
    assert own.answer(left) == "device-lost"
    assert own.answer(behind) == "one.example"
    assert own.dialled == {"one.example": 2}
