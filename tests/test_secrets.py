"""Passwords from files, credentials and programs: what is read, and what is never waited for or shown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.process import reapAllProcesses
from twisted.internet.task import LoopingCall

from gateway.config.secret_files import SecretUnavailable, credential_path, read_secret
from gateway.rules.secrets import Programs, _OwnGroup
from tests.harness import PATIENCE, eventually

# ---- files


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"hunter2", b"hunter2"),
        (b"hunter2\n", b"hunter2"),
        (b"hunter2\r\n", b"hunter2"),
        (b"hunter2\r", b"hunter2\r"),
        (b"hunter2\n\n", b"hunter2\n"),
        (b" \0\xff ", b" \0\xff "),
        (bytes(65_535) + b"\r\n", bytes(65_535)),
    ],
)
def test_one_line_feed_at_the_end_is_no_part_of_a_password(content: bytes, password: bytes, tmp_path: Path) -> None:
    """Editors write it; everything else counts."""
    (tmp_path / "password").write_bytes(content)
    assert read_secret(tmp_path / "password") == password


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n", bytes(65_536), bytes(70_000)])
def test_what_is_no_password(content: bytes, tmp_path: Path) -> None:
    """Nothing at all, and more than MQTT can carry."""
    (tmp_path / "password").write_bytes(content)
    with pytest.raises(SecretUnavailable, match=r"empty|65535 bytes"):
        read_secret(tmp_path / "password")


def test_what_could_keep_the_gateway_waiting_is_not_read(tmp_path: Path) -> None:
    """A FIFO that nobody writes to, a device, a directory; and what is not there."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path, tmp_path / "nothing"):
        with pytest.raises(SecretUnavailable, match="cannot be read: "):
            read_secret(path)


def test_a_credential_is_where_systemd_says() -> None:
    """And without systemd there is none."""
    assert credential_path("broker", {"CREDENTIALS_DIRECTORY": "/run/c"}) == Path("/run/c/broker")
    with pytest.raises(SecretUnavailable, match="LoadCredential"):
        credential_path("broker", {})


# ---- programs


@pytest.fixture
def run(reactor: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that runs a program of Python's as the gateway would; it gives a value or an exception."""
    programs = Programs(reactor, reactor)
    # The reactor runs in a thread, where it hears of no signals.
    reaper = LoopingCall(reapAllProcesses)
    reactor.callFromThread(reaper.start, 0.01)
    children: list[Deferred[bytes]] = []

    def start(
        script: str,
        timeout: float = PATIENCE,
        wait: bool = True,
        interpreter: tuple[str, str] = (sys.executable, "-c"),
        **environment: str,
    ) -> Any:
        outcomes: list[Any] = []

        def begin() -> None:
            deferred = ensureDeferred(programs.run([*interpreter, script], environment, timeout))
            children.append(deferred)
            deferred.addBoth(outcomes.append)

        reactor.callFromThread(begin)
        if not wait:
            eventually(lambda: children, "a program")
            return children[-1], outcomes
        eventually(lambda: outcomes, "an outcome")
        return getattr(outcomes[0], "value", outcomes[0])

    yield start
    reactor.callFromThread(reaper.stop)


def test_a_program_writes_the_password(run: Callable[..., Any]) -> None:
    """Its standard output is the password; its standard error goes nowhere, and it has no standard input."""
    script = "import sys; sys.stderr.write('x' * 100_000); print('pass' + sys.stdin.read() + 'word')"
    assert run(script) == b"password"


def test_a_program_knows_the_device_by_its_environment_alone(run: Callable[..., Any]) -> None:
    """Nothing of the gateway's own environment gets there, and it starts at the root."""
    os.environ["MQTTS_TEST_SECRET"] = "hunter2"
    try:
        told = run("import os; print(sorted(os.environ), os.getcwd(), os.environ['CLIENT_ID'])", CLIENT_ID="$(id)")
    finally:
        del os.environ["MQTTS_TEST_SECRET"]
    # Python adds LC_CTYPE in some places.
    assert told.replace(b"'LC_CTYPE', ", b"") == b"['CLIENT_ID', 'LANG', 'PATH'] / $(id)"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('hunter2'); raise SystemExit(3)", "status 3"),
        ("import os; print('hunter2', flush=True); os.kill(os.getpid(), 15)", "signal 15"),
        ("pass", "empty"),
        ("print('hunter2' * 100_000)", "more than 65535 bytes"),
    ],
)
def test_a_program_that_fails(run: Callable[..., Any], script: str, words: str) -> None:
    """The reason is told, what it wrote is not."""
    outcome = run(script)
    assert isinstance(outcome, SecretUnavailable)
    assert words in str(outcome)
    assert "hunter2" not in str(outcome)


def test_a_program_whose_environment_cannot_be_encoded(run: Callable[..., Any]) -> None:
    """As "é" in a locale without it."""
    assert "cannot be started: 'utf-8' codec can't encode" in str(run("print('x')", CLIENT_ID="\ud800"))


def test_a_program_that_is_not_there(reactor: Any) -> None:
    """The reason is told."""
    outcomes: list[Any] = []
    reaper = LoopingCall(reapAllProcesses)
    reactor.callFromThread(reaper.start, 0.01)
    programs = Programs(reactor, reactor)
    reactor.callFromThread(lambda: ensureDeferred(programs.run(["/nowhere/x"], {}, PATIENCE)).addBoth(outcomes.append))
    eventually(lambda: outcomes, "an outcome")
    reactor.callFromThread(reaper.stop)
    assert isinstance(outcomes[0].value, SecretUnavailable)
    assert str(outcomes[0].value) == "/nowhere/x cannot be started: No such file or directory"


def test_a_program_starts_without_a_copy_of_this_process(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To copy a large process would hold up the event loop; only the three pipes are open in the program."""

    def fork() -> int:
        raise AssertionError("the process was copied")

    monkeypatch.setattr(os, "fork", fork)
    reading, writing = os.pipe()
    try:
        os.set_inheritable(writing, True)
        assert run("ls /proc/self/fd", interpreter=("/bin/sh", "-c")) == b"0\n1\n2\n3"  # 3 is the directory
    finally:
        os.close(reading)
        os.close(writing)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may still wait for somebody to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_that_takes_too_long_is_killed(run: Callable[..., Any], tmp_path: Path) -> None:
    """Also one that does not mind SIGTERM."""
    script = (
        "import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    deferred, outcomes = run(script, timeout=2.0, wait=False)
    eventually(lambda: outcomes, "an outcome")
    assert "took longer than 2 s" in str(outcomes[0].value)
    pid = int((tmp_path / "pid").read_text())
    eventually(lambda: not alive(pid), "the end of the program")
    assert deferred.called


@pytest.mark.parametrize("at_once", [False, True])
def test_nothing_is_left_of_a_program_whose_child_keeps_its_output(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """The program itself has ended, perhaps before it was watched; its group is killed, its pipes are closed."""
    start = subprocess.Popen

    def ended(*arguments: Any, **more: Any) -> Any:
        started: subprocess.Popen[bytes] = start(*arguments, **more)
        os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)
        return started

    if at_once:
        monkeypatch.setattr("gateway.rules.secrets.subprocess.Popen", ended)
    before = set(Path("/proc/self/fd").iterdir())
    # A shell starts quickly, so that the child is there within the time on a busy machine, too.
    outcome = run(f"sleep 600 & echo $! >'{tmp_path / 'pid'}'", timeout=2.0, interpreter=("/bin/sh", "-c"))
    assert "took longer than 2 s" in str(outcome)
    eventually(lambda: set(Path("/proc/self/fd").iterdir()) <= before, "the pipes closed")
    eventually(lambda: not alive(int((tmp_path / "pid").read_text())), "the end of the child")


@pytest.mark.parametrize("script", ["sleep 600; true", "exec >&-; sleep 600; true", "sleep 600 & wait"])
def test_a_program_is_killed_with_what_it_has_started(run: Callable[..., Any], tmp_path: Path, script: str) -> None:
    """Each attempt would leave a process behind, for ever."""
    named = script.replace("sleep", f"'{tmp_path}/napping'", 1)
    (tmp_path / "napping").symlink_to("/bin/sleep")
    outcome = run(named, timeout=1.0, interpreter=("/bin/sh", "-c"))
    assert "took longer than 1 s" in str(outcome)

    def napping() -> list[str]:
        lines = subprocess.run(["ps", "-eo", "args"], check=True, capture_output=True, text=True).stdout.splitlines()
        return [line for line in lines if line.startswith(f"{tmp_path}/napping")]

    eventually(lambda: not napping(), "the end of the child")


def test_what_a_program_leaves_running_ends_with_it(run: Callable[..., Any], tmp_path: Path) -> None:
    """Otherwise each CONNECT could leave one more process; output that a child writes at last still counts."""
    path = tmp_path / "pid"
    # cat ends when the gateway has closed its standard input, so when it has begun to watch the program.
    script = f"cat; sleep 600 >/dev/null 2>&1 & echo $! >'{path}'; (read line <'{tmp_path / 'go'}'; echo $line) &"
    os.mkfifo(tmp_path / "go")
    _, outcomes = run(script, wait=False, interpreter=("/bin/sh", "-c"))
    pid = int(eventually(lambda: path.exists() and path.read_text(), "the child"))
    with (tmp_path / "go").open("w") as go:
        go.write("password\n")
    eventually(lambda: outcomes, "an outcome")
    assert outcomes == [b"password"]
    eventually(lambda: not alive(pid), "the end of the child")


def test_a_daemon_that_a_program_starts_goes_on(run: Callable[..., Any], tmp_path: Path) -> None:
    """One that has a session of its own, as daemons have, does not belong to the program any more."""
    path = tmp_path / "pid"
    script = (
        "import os, pathlib, subprocess, sys; sys.stdin.read(); gone = subprocess.DEVNULL; "
        "daemon = subprocess.Popen(['/bin/sleep', '600'], start_new_session=True, stdout=gone, stderr=gone); "
        f"pathlib.Path({str(path)!r}).write_text(str(daemon.pid)); print('password')"
    )
    assert run(script) == b"password"
    pid = int(path.read_text())
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_programs_end_with_the_reactor(tmp_path: Path) -> None:
    """The gateway stops, or the user interrupts `check`."""
    path = tmp_path / "pid"
    command = ["/bin/sh", "-c", f"sleep 600 & echo $! >'{path}.new'; mv '{path}.new' '{path}'; wait"]
    script = (
        "import os; from twisted.internet import reactor, task; from twisted.internet.defer import ensureDeferred; "
        "from gateway.rules.secrets import Programs; "
        f"ensureDeferred(Programs(reactor, reactor).run({command!r}, {{}}, 600)); "
        f"task.LoopingCall(lambda: os.path.exists({str(path)!r}) and reactor.stop()).start(0.01, now=False); "
        "reactor.run()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)
    pid = int(path.read_text())
    eventually(lambda: not alive(pid), "the end of the child")


def test_a_program_before_a_person_keeps_its_terminal(reactor: Any) -> None:
    """In a group of its own it could not ask for a password there."""
    programs = Programs(reactor, reactor, shows_errors=True)
    reaper = LoopingCall(reapAllProcesses)
    outcomes: list[Any] = []

    def begin() -> None:
        reaper.start(0.01)
        ensureDeferred(programs.run([sys.executable, "-c", "import os; print(os.getpgid(0))"], {}, PATIENCE)).addBoth(
            outcomes.append
        )

    reactor.callFromThread(begin)
    eventually(lambda: outcomes, "an outcome")
    reactor.callFromThread(reaper.stop)
    assert outcomes == [str(os.getpgid(0)).encode()]


@pytest.mark.parametrize("first", ["pass", "os.setpgid(0, os.getpgid(os.getppid()))"])
def test_a_program_for_a_device_that_has_gone_is_killed(
    run: Callable[..., Any], reactor: Any, tmp_path: Path, first: str
) -> None:
    """Whoever waited for the password has given up.  A program can leave its group, and leave it empty."""
    path = tmp_path / "pid"
    script = (
        f"import os, pathlib, time; {first}; pathlib.Path({str(path)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    deferred, outcomes = run(script, wait=False)
    pid = int(eventually(lambda: path.exists() and path.read_text(), "the program"))
    reactor.callFromThread(deferred.cancel)
    eventually(lambda: outcomes, "an outcome")
    eventually(lambda: not alive(pid), "the end of the program")


def test_only_a_few_programs_run_at_a_time(run: Callable[..., Any], tmp_path: Path) -> None:
    """When all devices come back at once, each wants one."""
    script = (
        "import os, pathlib, time; "
        f"path = pathlib.Path({str(tmp_path)!r}, str(os.getpid())); path.touch(); time.sleep(0.2); "
        f"print(len(os.listdir({str(tmp_path)!r}))); path.unlink()"
    )
    waiting = [run(script, wait=False)[1] for _ in range(24)]
    eventually(lambda: all(waiting), "all outcomes")
    assert max(int(outcome[0]) for outcome in waiting) <= 8


def test_a_program_that_somebody_else_has_reaped_keeps_no_other_from_being_reaped() -> None:
    """Its number may belong to a stranger by now, so nothing is sent to it either."""
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    process = _OwnGroup.__new__(_OwnGroup)
    process.pid, process.pipes = ended.pid, {}
    process.reapProcess()
