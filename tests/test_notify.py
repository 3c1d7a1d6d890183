"""What systemd is told: the protocol of sd_notify(3), on a real socket and a virtual clock."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.logger import formatEvent, globalLogPublisher

from gateway.ops.notify import Notifier
from tests.harness import eventually
from tests.processes import ServiceManager


@pytest.fixture
def clock() -> Clock:
    """A clock that starts at 1000 s."""
    clock = Clock()
    clock.advance(1000.5)
    return clock


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServiceManager]:
    """A service manager behind either kind of address."""
    manager = ServiceManager(tmp_path, abstract=request.param == "abstract")
    yield manager
    manager.close()


def told(manager: ServiceManager, count: int) -> list[dict[str, str]]:
    """Wait for so many messages, and return them all."""
    eventually(lambda: len(manager.messages) >= count, lambda: f"{count} messages, so far {manager.messages}")
    return manager.messages


def test_each_moment_has_its_message(manager: ServiceManager, clock: Clock) -> None:
    """Ready, a reload with the time at which it began, ready again, the end and how long it may take."""
    notifier = Notifier(manager.address, seconds=clock.seconds)
    notifier.ready("0 sessions")
    notifier.reloading()
    notifier.ready("0 sessions; reload refused")
    notifier.stopping("stopping", 25.0)
    notifier.close()
    assert told(manager, 4) == [
        {"READY": "1", "STATUS": "0 sessions"},
        {"RELOADING": "1", "MONOTONIC_USEC": "1000500000"},
        {"READY": "1", "STATUS": "0 sessions; reload refused"},
        {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "25000000", "STATUS": "stopping"},
    ]


def test_a_status_is_told_when_it_changes(manager: ServiceManager, clock: Clock) -> None:
    """And cannot smuggle in another message, whatever names are in it."""
    notifier = Notifier(manager.address, seconds=clock.seconds)
    notifier.ready("0 sessions")
    for status in ("0 sessions", "1 session", "1 session", "evil\nMAINPID=1\\"):
        notifier.alive(status, 1.0)
    notifier.close()
    assert told(manager, 3) == [
        {"READY": "1", "STATUS": "0 sessions"},
        {"STATUS": "1 session"},
        {"STATUS": "evil\\nMAINPID=1\\\\"},
    ]


@pytest.mark.parametrize(("watchdog", "pings"), [(20.0, 7), (4.0, 31), (2.0, 61), (0.5, 61), (0.0, 0)])
def test_the_watchdog_is_fed_at_half_of_its_time(tmp_path: Path, clock: Clock, watchdog: float, pings: int) -> None:
    """The calls come every second for a minute: never later than half its time, where that is possible at all."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.setblocking(False)
        notifier = Notifier(str(tmp_path / "notify"), watchdog, clock.seconds)
        fed = 0
        for _ in range(61):
            notifier.alive("", 1.0)
            clock.advance(1.0)
            with contextlib.suppress(BlockingIOError):
                fed += heard.recv(100) == b"WATCHDOG=1"
        notifier.close()
    assert fed == pings


def test_the_environment_says_whom_to_tell(tmp_path: Path) -> None:
    """Its variables are gone afterwards, so that nothing that is started from here speaks for the gateway."""
    manager = ServiceManager(tmp_path)
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "42", "HOME": "/"}
    notifier = Notifier.from_environment(environment, 42)
    assert environment == {"HOME": "/"}
    notifier.alive("", 1.0)
    assert told(manager, 1) == [{"WATCHDOG": "1"}]
    notifier.close()
    manager.close()


@pytest.mark.parametrize(
    "watchdog",
    [{}, {"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "43"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}],
)
def test_a_watchdog_of_nobodys_or_of_another_process_is_not_fed(tmp_path: Path, watchdog: dict[str, str]) -> None:
    """WATCHDOG_PID says whose it is."""
    manager = ServiceManager(tmp_path)
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.address, **watchdog}, 42)
    notifier.alive("", 1.0)
    notifier.ready("the end")
    assert told(manager, 1) == [{"READY": "1", "STATUS": "the end"}]
    notifier.close()
    manager.close()


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1", "/nonexistent/notify", "@nobody", "/" + "x" * 200])
def test_without_a_socket_nothing_happens(address: str, clock: Clock) -> None:
    """None was given, it is of no kind that is known, or nobody is there."""
    notifier = Notifier(address, 10.0, clock.seconds)
    notifier.ready("")
    notifier.reloading()
    notifier.alive("1 session", 1.0)
    notifier.stopping("", 1.0)
    notifier.close()
    notifier.alive("2 sessions", 1.0)


def test_what_must_be_heard_is_said_again(tmp_path: Path, clock: Clock) -> None:
    """A manager that is away for a moment, or whose queue is full, still gets READY and the watchdog's ping."""
    address = tmp_path / "notify"
    notifier = Notifier(str(address), 20.0, clock.seconds)
    notifier.ready("0 sessions")
    notifier.alive("0 sessions", 1.0)
    manager = ServiceManager(tmp_path)
    notifier.alive("0 sessions", 1.0)
    assert told(manager, 2) == [{"READY": "1", "STATUS": "0 sessions"}, {"WATCHDOG": "1"}]
    manager.close()

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as slow:
        slow.bind(str(address))
        slow.settimeout(1)
        for count in range(10_000):
            notifier.alive(f"{count} sessions", 1.0)
        notifier.stopping("stopping", 1.0)
        queued = []
        while not queued or not queued[-1].startswith(b"STOPPING=1"):
            queued.append(slow.recv(1000))
            notifier.alive("stopping", 1.0)
        assert len(queued) < 10_000
    notifier.close()


def test_a_message_that_cannot_be_sent_is_one_line_of_the_log(tmp_path: Path, clock: Clock) -> None:
    """It has several lines itself."""
    lines: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        lines.append(formatEvent(event))

    notifier = Notifier(str(tmp_path / "nobody"), 0.0, clock.seconds)
    globalLogPublisher.addObserver(observe)
    try:
        notifier.ready("0 sessions")
    finally:
        globalLogPublisher.removeObserver(observe)
        notifier.close()
    assert [line.partition("(")[2] for line in lines if "systemd" in line] == ["READY=1, STATUS=0 sessions)"]


def test_the_clock_of_reloads_is_systemds(tmp_path: Path) -> None:
    """CLOCK_MONOTONIC, which Python's monotonic() is on Linux."""
    manager = ServiceManager(tmp_path)
    before = time.clock_gettime(time.CLOCK_MONOTONIC)
    notifier = Notifier(manager.address)
    notifier.reloading()
    after = time.clock_gettime(time.CLOCK_MONOTONIC)
    assert before - 1e-5 <= int(told(manager, 1)[0]["MONOTONIC_USEC"]) / 1e6 <= after
    notifier.close()
    manager.close()


def test_its_descriptor_is_not_inherited(tmp_path: Path) -> None:
    """Nor is one opened when there is nobody to tell."""
    before = set(Path("/proc/self/fd").iterdir())
    Notifier()
    assert set(Path("/proc/self/fd").iterdir()) == before
    notifier = Notifier(str(tmp_path / "notify"))
    assert notifier._socket is not None
    assert not notifier._socket.get_inheritable()
    notifier.close()
