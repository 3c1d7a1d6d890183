"""The simulation of a long life: days of a gateway leave nothing behind, and what is made wrong with it is found."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from gateway.gateway import Gateway
from gateway.mqtt import inspector
from gateway.mqtt.inspector import BrokerInspector
from gateway.rules.presence import Presence
from gateway.session.pace import Pace
from gateway.session.session import Session
from tests.simulation.identities import Identities
from tests.simulation.long_life import live_long
from tests.simulation.run import report

Mutate = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    """Return the brokers' certificates."""
    return Identities(tmp_path_factory.mktemp("long-life"))


# Each kind of trouble comes in four hours once.
FEW_HOURS, MANY_HOURS = 4, 72


def test_a_life_of_a_few_hours_leaves_nothing_behind(identities: Identities) -> None:
    """Reloads, expiring tokens and certificates, names and clocks that change, flapping brokers, a stopped process."""
    outcome = live_long(1, identities, FEW_HOURS)
    assert not outcome.violations, report(outcome)


@pytest.mark.slow
def test_a_life_of_three_days_leaves_nothing_behind(identities: Identities) -> None:
    """The same for 72 hours."""
    outcome = live_long(1, identities, MANY_HOURS)
    assert not outcome.violations, report(outcome)


MUTANTS: dict[str, tuple[set[str], Mutate]] = {}


def mutant(*oracles: str) -> Callable[[Mutate], Mutate]:
    """Register a way to break the gateway that a long life shows, and the oracles that must notice it."""

    def register(mutate: Mutate) -> Mutate:
        MUTANTS[mutate.__name__] = (set(oracles), mutate)
        return mutate

    return register


@mutant("liveness")
def keeps_each_generation(patch: pytest.MonkeyPatch) -> None:
    """A reload leaves the old configuration in memory, with its certificates."""
    kept: list[Any] = []
    adopt = Gateway.adopt

    def keep(self: Gateway, generation: Any) -> None:
        kept.append(self.generation)
        adopt(self, generation)

    patch.setattr(Gateway, "adopt", keep)


@mutant("liveness")
def counts_devices_present_for_ever(patch: pytest.MonkeyPatch) -> None:
    """What is known of a device's presence stays when it has gone."""
    patch.setattr(Presence, "leave", lambda *_: None)


@mutant("end-to-end")
def pings_in_the_middle_of_a_packet(patch: pytest.MonkeyPatch) -> None:
    """The gateway's own PINGREQ goes out while a packet of the device is half passed on."""
    ping = Session._ping

    def impatient(self: Session, *arguments: Any) -> None:
        framer = self._from_device
        self._from_device = SimpleNamespace(at_boundary=True)  # type: ignore[assignment]
        try:
            ping(self, *arguments)
        finally:
            self._from_device = framer

    patch.setattr(Session, "_ping", impatient)


@mutant("end-to-end")
def hands_its_own_pingresp_to_the_device(patch: pytest.MonkeyPatch) -> None:
    """The answer to a PINGREQ of the gateway's reaches a device that has not asked."""
    drops = BrokerInspector._drops

    def generous(self: BrokerInspector, packet_type: Any) -> bool:
        drops(self, packet_type)
        return False

    patch.setattr(BrokerInspector, "_drops", generous)


@mutant("liveness")
def leaves_the_keep_alive_at_the_broker_to_the_device(patch: pytest.MonkeyPatch) -> None:
    """A rule lowers the Keep Alive, and nobody sends PINGREQs in time."""
    patch.setattr(Session, "_ping", lambda *_: None)


@mutant("end-to-end")
def permits_every_topic(patch: pytest.MonkeyPatch) -> None:
    """What a rule does not name passes."""
    patch.setattr(inspector, "judge_publish", lambda *_: None)


@mutant("liveness")
def lets_sessions_outlive_their_tokens(patch: pytest.MonkeyPatch) -> None:
    """A session goes on with a token that has expired."""
    treat = Session.treat
    patch.setattr(Session, "treat", lambda self, treatment: treat(self, attrs.evolve(treatment, lives=None)))


@mutant("end-to-end", "liveness")
def never_reads_on_after_a_pause(patch: pytest.MonkeyPatch) -> None:
    """A device that was too fast once is not read any more."""
    patch.setattr(Pace, "recovered", lambda *_: False)


@mutant("end-to-end", "liveness", "truth")
def measures_timeouts_by_the_time_of_day(patch: pytest.MonkeyPatch) -> None:
    """A clock that is set makes devices look silent, or heard in the future."""
    begin = Session.__init__
    offsets: list[float] = []

    def begin_by_the_day(self: Session, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        offsets.append(time.time() - self._seconds())
        self._seconds = lambda: time.time() - offsets[0]

    patch.setattr(Session, "__init__", begin_by_the_day)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_life_finds_a_broken_gateway(
    name: str, identities: Identities, monkeypatch: pytest.MonkeyPatch, logged_errors: list[dict[str, Any]]
) -> None:
    """What a short run does not show, a few hours with reloads do."""
    oracles, mutate = MUTANTS[name]
    mutate(monkeypatch)
    outcome = live_long(1, identities, FEW_HOURS)
    logged_errors.clear()
    assert oracles & {violation.oracle for violation in outcome.violations}, outcome.violations
