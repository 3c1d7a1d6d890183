"""What people see of the store: status document, verdict, page, terminal, metrics."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest

from gateway import stored_devices
from gateway.cli.status import overview
from gateway.config import load_file
from gateway.config.directory import RuleFiles
from gateway.errors import EndReason, Refusal
from gateway.ops.metrics import Metrics
from gateway.ops.status_words import Level, verdict
from gateway.ops.web.page import page
from gateway.pieces import Chores, at_once, in_turns
from gateway.session.drain_pace import TICK
from gateway.store.database import StoreError
from gateway.store.forecast import Forecast
from tests import mqtt_packets as mqtt
from tests.harness import Device, RunningGateway, eventually
from tests.pki import CLIENT, certify, certify_ca
from tests.turn_clock import TurnClock


@pytest.fixture
def gateway(reactor: Any, tmp_path: Path) -> Iterator[RunningGateway]:
    """A gateway whose broker is not there, with a store."""
    made = RunningGateway(
        reactor,
        1,
        ca_file=None,
        store={"directory": str(tmp_path / "store"), "after": 2},
        device=[{"match_client_id": "d*", "bound_to": ["127.0.0.0/8"], "store": True}],
    )
    yield made
    made.stop()


@pytest.fixture
def device(gateway: RunningGateway) -> Iterator[Device]:
    """A device that has published a message without a broker."""
    with Device(gateway.port) as made:
        made.send(mqtt.connect("d<1>") + mqtt.publish(payload=b"x", qos=1, packet_identifier=1))
        assert made.read(8)[4:] == b"\x40\2\0\1"
        yield made


def seen(gateway: RunningGateway) -> dict[str, Any]:
    """Return the status document."""
    document: dict[str, Any] = gateway.call(lambda: at_once(gateway.service.sight.document()))
    return document


def test_an_outage_in_which_all_is_stored_needs_attention_only(gateway: RunningGateway, device: Device) -> None:
    """No device is refused."""
    del device
    eventually(lambda: seen(gateway)["store"]["outage_seconds"] is not None, "the outage is known")
    document = seen(gateway)
    assert document["unready"]
    assert document["sessions"]["by_step"]["stored"] == 1
    assert document["devices"]["counts"]["connected"] == 1
    (backlog,) = document["store"]["backlogs"]
    assert (backlog["client_identifier"], backlog["messages"], backlog["phase"]) == ("d<1>", 1, "offline")
    assert backlog["connected"]
    assert "tcp-refused" in backlog["trouble"]
    judged = verdict(document)
    assert judged.level is Level.ATTENTION
    assert "stored" in judged.line


@pytest.mark.parametrize(
    ("names", "unknown", "ready"),
    [((), "pass", True), (("d*",), "refuse", True), (("d*",), "pass", False)],
)
def test_without_a_broker_the_gateway_is_ready_if_it_stores_for_every_device(
    gateway: RunningGateway, device: Device, names: tuple[str, ...], unknown: str, *, ready: bool
) -> None:
    """A load balancer that took it for down would cut off devices that are served."""
    del device
    stored_rule = {"match_client_id": list(names), "bound_to": ["127.0.0.0/8"], "store": True}
    gateway.change(device=[stored_rule], devices={"unknown": unknown})
    eventually(lambda: not any(each["open"] for each in seen(gateway)["upstreams"]), "the broker is not there")
    assert seen(gateway)["ready"] is ready
    assert verdict(seen(gateway)).level is Level.ATTENTION
    stored = gateway.service.gateway.stored
    assert stored is not None
    stored.store.failure = StoreError("no space")
    assert "no broker" in seen(gateway)["unready"]
    gateway.change(device=[stored_rule, {**stored_rule, "match_client_id": ["e*"], "store": False}])
    stored.store.failure = None
    assert not seen(gateway)["ready"]


def test_a_stored_device_that_is_disabled_is_ended_and_its_messages_wait(
    gateway: RunningGateway, device: Device
) -> None:
    """Also without a session: its messages do not leave before it is enabled."""
    rule = {"match_client_id": ["d*"], "bound_to": ["127.0.0.0/8"], "store": True}
    gateway.change(device=[{**rule, "enabled": False}])
    assert device.read_to_end() == b""
    assert gateway.wait_ended().reason is EndReason.DEVICE_DISABLED
    (backlog,) = seen(gateway)["store"]["backlogs"]
    assert (backlog["messages"], backlog["connected"]) == (1, False)
    assert "device-disabled" in backlog["trouble"]
    with Device(gateway.port) as again:
        again.send(mqtt.connect("d<1>"))
        assert again.read(4)[3] == 5


@pytest.mark.parametrize("breaks", ["certificate", "rule file"])
def test_messages_of_a_device_whose_rule_breaks_name_the_rule(
    reactor: Any, tmp_path: Path, logged_errors: list[Any], breaks: str
) -> None:
    """They wait for a repair; that its identity at the broker is not known any more is no more than a consequence."""
    rules = tmp_path / "rules"
    rules.mkdir()
    certificate = rules / "d1.pem"
    certify(certify_ca(), subject="d1", names=(), purposes=(CLIENT,)).write(certificate)
    rule = 'match_client_id = "d1"\nclient_cert = "d1.pem"\nstore = true\nbound_to = "127.0.0.0/8"\n'
    (rules / "d1.toml").write_text(rule)
    gateway = RunningGateway(
        reactor,
        1,
        ca_file=None,
        store={"directory": str(tmp_path / "store"), "after": 2},
        devices={"directory": str(rules)},
    )
    main = tmp_path / "gateway.toml"
    main.write_text(
        '[[listen]]\nendpoint = "127.0.0.1:0"\n[[upstream]]\nhost = "localhost"\nport = 1\n'
        f'[store]\ndirectory = "{tmp_path / "store"}"\nafter = 2\n[devices]\ndirectory = "{rules}"\n'
    )
    gateway.service.reread = lambda: load_file(main, known=RuleFiles())
    try:
        with Device(gateway.port) as device:
            device.send(mqtt.connect("d1") + mqtt.publish(payload=b"x", qos=1, packet_identifier=1))
            assert device.read(8)[4:] == b"\x40\2\0\1"
            broken = certificate if breaks == "certificate" else rules / "d1.toml"
            broken.write_text("garbage" if breaks == "certificate" else f"{rule}max_qos = 7\n")
            assert not gateway.call(gateway.service.reload)
            gateway.call(lambda: gateway.service.gateway.stored.change("retry", "d1"))
            assert device.read_to_end() == b""
        ended = gateway.wait_ended()
        assert ended.reason is EndReason.DEVICE_RULE_BROKEN
        assert "rule d1: " in ended.detail
        (backlog,) = seen(gateway)["store"]["backlogs"]
        assert (backlog["messages"], "device-rule-broken" in backlog["trouble"]) == (1, True)
        logged_errors.clear()
    finally:
        gateway.stop()


def test_other_devices_that_are_refused_are_not_passed_over(gateway: RunningGateway, device: Device) -> None:
    """The line says that some messages are stored, and not all."""
    del device
    with Device(gateway.port) as other:
        other.send(mqtt.connect("other"))
        assert other.read(4)[3] == 3
    gateway.wait_ended()
    judged = verdict(seen(gateway))
    assert judged.level is Level.ATTENTION
    assert "some devices" in judged.line


def test_a_disk_that_fails_in_an_outage_is_down(gateway: RunningGateway, device: Device) -> None:
    """Nothing is served then."""
    del device
    stored = gateway.service.gateway.stored
    assert stored is not None
    document = seen(gateway)
    stored.store.failure = StoreError("no space")
    failing = seen(gateway)
    assert verdict(failing).level is Level.DOWN
    assert "no space" in verdict(failing).reasons[0]
    document["store"]["full_in_seconds"] = 3600
    assert any("full in 1 h" in reason for reason in verdict(document).reasons)


def test_messages_that_cannot_be_read_and_damaged_files_are_shown(
    gateway: RunningGateway, device: Device, logged_errors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By log, status, page and metrics; nobody would look for a backlog that waits in silence."""
    del device
    stored = gateway.service.gateway.stored
    assert stored is not None
    (name,) = stored.sessions
    (Path(stored.store.config.directory or "") / "store.db.damaged-20260101T000000").touch()
    stored.store._listed = -1000.0
    stored.store.unreadable[name] = StoreError("disk I/O error")
    eventually(lambda: seen(gateway)["store"]["damaged_files"] == 1, "the file is listed")
    document = seen(gateway)
    reasons = "\n".join(verdict(document).reasons)
    assert "Stored messages of one device cannot be read, and wait: disk I/O error" in reasons
    assert "store.db.damaged-20260101T000000" in reasons
    metrics = gateway.call(lambda: at_once(Metrics(gateway.service.sight).exposition(""))[0]).decode()
    assert "mqtts_gateway_store_unreadable 1.0" in metrics
    assert "mqtts_gateway_store_damaged_files 1.0" in metrics
    eventually(lambda: bool(logged_errors), "it is logged")
    assert logged_errors.pop()["event"] == "store-unreadable"
    info = Mock()
    monkeypatch.setattr(stored_devices._log, "info", info)
    stored.store.unreadable.clear()
    eventually(lambda: info.called, "so is the end")
    assert info.call_args.kwargs["event"] == "store-readable"


def test_page_and_terminal_show_the_backlog(gateway: RunningGateway, device: Device) -> None:
    """Names of devices are escaped."""
    del device
    document = seen(gateway)
    assert b"d&lt;1&gt;" in at_once(page(document))
    assert b"Stored messages" in at_once(page(document))
    lines = list(overview(document))
    assert any("d<1>: 1 messages" in line for line in lines)


def test_a_forecast_says_when_the_store_is_full_or_empty() -> None:
    """At the rate of late."""
    forecast = Forecast()
    assert forecast.until_full(1000) is None
    for second in range(0, 100, 10):
        assert forecast.is_due(second)
        forecast.note(second, second * 5)
        assert not forecast.is_due(second + 9)
    assert forecast.until_full(1450) == pytest.approx(200)
    assert forecast.until_empty() is None
    for step in range(5):
        forecast.note(100 + step * 10, 450 - step * 100)
    assert forecast.until_empty() == pytest.approx(5)


def test_a_few_connections_are_checked_in_each_turn(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a question to the kernel; nobody is checked any more once all is stopped."""
    stored = gateway.service.gateway.stored
    assert stored is not None
    clock, checked = TurnClock(), list[str]()
    monkeypatch.setattr(stored_devices, "_CHECKED_AT_A_TIME", 2)

    def check() -> None:
        connections = [Mock(check=lambda _, name=name: checked.append(name), closed_at=None) for name in "abcde"]
        with monkeypatch.context() as patch:
            patch.setattr(stored, "_chores", Chores(clock.callLater))
            patch.setattr(stored, "_connections", set(connections))
            for _ in range(2):
                stored._check_at = 0.0
                stored.sweep(5.0)
            while clock.calls:
                counts.append(len(checked))
                clock.turn()

    counts = list[int]()
    gateway.call(check)
    assert sorted(checked) == list("abcde")
    assert [count for count, _ in groupby(counts)] == [0, 2, 4, 5]


def test_backlogs_that_wait_for_their_turn_get_it_after_a_tick(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One timer for all that wait, not the next sweep; none once the gateway stops."""
    stored = gateway.service.gateway.stored
    assert stored is not None
    clock, sent = TurnClock(), list[str]()

    def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(stored, "_clock", clock)
            pace = stored._drain_pace
            while pace.may_send(lambda: sent.append("first")):
                pass
            assert not pace.may_send(lambda: sent.append("second"))
            (timer,) = clock.calls
            assert timer.getTime() == TICK
            clock.rightNow += TICK
            patch.setattr(pace, "_tokens", 5.0)
            clock.turn()
            assert sent == ["first", "second"]
            patch.setattr(stored, "_stopping", True)
            while pace.may_send(lambda: None):
                pass
            assert not clock.calls

    gateway.call(run)


def test_a_few_stored_devices_begin_and_stop_in_each_turn(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, logged_errors: list[Any]
) -> None:
    """Each may read the disk, dial, or close a connection; a stop is over when the last of them has stopped."""
    stored = gateway.service.gateway.stored
    assert stored is not None
    clock, begun, stopped, changed = TurnClock(), list[str](), list[str](), list[bool]()
    monkeypatch.setattr(stored_devices, "_CHANGED_AT_A_TIME", 2)
    counts = []

    def stop(name: str) -> None:
        stopped.append(name)
        if name == "b":
            raise ZeroDivisionError

    def run() -> None:
        backlogs = [MagicMock(__len__=lambda _: 1) for _ in "abcde"]
        for backlog, name in zip(backlogs, "abcde", strict=True):
            backlog.name = name
        store = MagicMock(states={}, __iter__=lambda _: iter(backlogs))
        with monkeypatch.context() as patch:
            patch.setattr(stored, "_clock", clock)
            patch.setattr(stored, "store", store)
            patch.setattr(stored, "_begin", begun.append)
            in_turns(clock.callLater, stored._begin_waiting())
            while clock.calls:
                counts.append(len(begun))
                clock.turn()
            patch.setattr(stored, "sessions", {name: Mock(stop=lambda name=name, **_: stop(name)) for name in "abcde"})
            patch.setattr(stored, "_connections", set())
            patch.setattr(stored, "_changed", lambda: changed.append(stored.are_gone))
            patch.setattr(stored, "_stopping", False)
            stored.stop(discard_wills=False)
            while clock.calls:
                counts.append(len(stopped))
                assert not stored.are_gone
                clock.turn()
        stored._stopping = stored._are_stopped = False

    gateway.call(run)
    assert counts == [2, 4, 5, 2, 4]
    assert logged_errors.pop()["log_failure"].check(ZeroDivisionError)
    assert begun == stopped == list("abcde")
    assert changed == [True]


def test_an_error_in_one_stored_device_leaves_the_others_alone(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, logged_errors: list[Any]
) -> None:
    """They are begun after the scan, and ended when they are disabled."""
    stored = gateway.service.gateway.stored
    assert stored is not None
    done: list[str] = []

    def do(name: str) -> None:
        done.append(name)
        if name == "a":
            raise ZeroDivisionError

    def device(name: str) -> Mock:
        made = Mock(shut_out=lambda _: do(name), presented=lambda: (None, None))
        made.name = name
        return made

    def run() -> None:
        backlogs = [MagicMock(__len__=lambda _: 1) for _ in "abc"]
        for backlog, name in zip(backlogs, "abc", strict=True):
            backlog.name = name
        rules = Mock(match=Mock(side_effect=Refusal(EndReason.DEVICE_DISABLED, "", 5, 0x87)))
        with monkeypatch.context() as patch:
            patch.setattr(stored, "store", MagicMock(states={}, __iter__=lambda _: iter(backlogs)))
            patch.setattr(stored, "_begin", do)
            at_once(stored._begin_waiting())
            patch.setattr(stored, "sessions", {name: device(name) for name in "abc"})
            at_once(stored.end_disabled(rules, 10))

    gateway.call(run)
    assert done == list("abcabc")
    assert [logged_errors.pop()["log_failure"].type for _ in range(2)] == [ZeroDivisionError] * 2


def test_a_sweep_of_stored_devices_goes_on_in_the_next_turn_when_some_have_changed(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To begin a dial or end a visit costs much more than to look."""
    stored = gateway.service.gateway.stored
    assert stored is not None
    told = list[str]()
    monkeypatch.setattr(stored_devices, "_CHANGED_AT_A_TIME", 2)

    def device(name: str) -> Mock:
        def sweep(now: float) -> None:
            del now
            told.append(name)
            if name.isupper():
                made.visit = None

        made = Mock(given_back=0.0, phase=None, visit="visit", sweep=sweep)
        made.name = name
        return made

    def sweep() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(stored, "sessions", {name: device(name) for name in "abCDEf"})
            pieces = stored._sweep_all()
            next(pieces)
            assert told == ["a", "b", "C", "D"]
            at_once(pieces)

    gateway.call(sweep)
    assert told == list("abCDEf")


def test_stored_devices_get_lost_time_back_a_few_at_a_time(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each before it is judged, and all of it, if the process is stopped again in the middle of a round."""
    stored = gateway.service.gateway.stored
    assert stored is not None
    clock, told = TurnClock(), list[str]()
    monkeypatch.setattr(stored_devices, "_SWEPT_AT_A_TIME", 1)

    def device(name: str) -> Mock:
        return Mock(
            given_back=0.0,
            phase=None,
            give_back=lambda seconds, _: told.append(f"{name} +{seconds:g}"),
            sweep=lambda _: told.append(f"{name} swept"),
        )

    def sweep() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(stored, "_chores", Chores(clock.callLater))
            patch.setattr(stored, "sessions", {name: device(name) for name in "abc"})
            stored.give_back(60.0)
            assert not told
            stored.sweep(5.0)
            while not told:
                clock.turn()
            stored.give_back(5.0)
            while clock.calls:
                clock.turn()
            stored.sweep(5.0)
            while len(told) < len(expected):
                clock.turn()

    expected = ["a +60", "a swept", "b +65", "b swept", "c +65", "c swept", "a +5", "a swept"]
    gateway.call(sweep)
    assert told == expected
