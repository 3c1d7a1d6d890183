"""A gateway's whole life as a process: what systemd is told, what signals do, what changes and what stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import mqtt_packets as mqtt
from tests.balancers import Program
from tests.harness import PATIENCE, Broker, Device, eventually
from tests.processes import TWISTD, GatewayProcess, ServiceManager

ENDED_BY_SIGTERM = {0, -signal.SIGTERM}  # systemd takes both for an end in order
StartBroker = Callable[..., Broker]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    """What systemd would be."""
    manager = ServiceManager(tmp_path)
    yield manager
    manager.close()


def configured(directory: Path, port: int, ca_file: Path, more: str = "") -> Path:
    """Write a configuration with a broker on `port`."""
    path = directory / "gateway.toml"
    path.write_text(
        f'[[listen]]\nendpoint = "127.0.0.1:0"\n[[upstream]]\nhost = "localhost"\nport = {port}\n'
        f'[tls]\nca_file = "{ca_file}"\n{more}'
    )
    return path


def established(port: int, name: str = "sensor-1") -> Device:
    """A 5.0 device that has its CONNACK."""
    device = Device(port)
    device.send(mqtt.connect(name, version=5))
    header = device.read(2)
    answer = device.read(header[1])
    # Success, and after a limit on packets its announcement.
    assert (header[:1], answer[:2]) == (b"\x20", b"\x00\x00")
    return device


def test_a_whole_life(tmp_path: Path, manager: ServiceManager, start_broker: StartBroker, ca_file: Path) -> None:
    """Ready, a good reload, a bad one, the drain and the end: each told in its order, and meant."""
    broker = start_broker()
    config = configured(tmp_path, broker.port, ca_file)
    with GatewayProcess(tmp_path, "--config", str(config), manager=manager, watchdog=2) as gateway:
        assert manager.wait_for("READY")["STATUS"] == f"0 sessions; localhost:{broker.port} untried"
        assert manager.messages[0]["READY"] == "1", "nothing is said before it"
        old = established(gateway.ports[0])
        eventually(lambda: manager.status == f"1 session; localhost:{broker.port} serving", "the status follows")

        configured(tmp_path, broker.port, ca_file, "[limits]\nmax_packet_size = 256\n")
        gateway.signal(signal.SIGHUP)
        manager.wait_for("READY", "RELOADING", "READY")
        eventually(lambda: "reloaded: limits.max_packet_size\n" in gateway.text, "it is logged, too")
        new = established(gateway.ports[0])
        large = mqtt.publish(payload=bytes(1000), version=5)
        new.send(large)
        assert new.read_to_end()[:3:2] == b"\xe0\x95"
        new.close()

        config.write_text(config.read_text().replace("port = ", "prot = ").replace("256", "0"))
        gateway.signal(signal.SIGHUP)
        refused = manager.wait_for("READY", "RELOADING", "READY", "RELOADING", "READY")
        assert refused["STATUS"].startswith("reload refused")
        assert "upstream[0].prot: unknown key" in refused["STATUS"]
        assert "(and 1 more, see the log)" in refused["STATUS"]
        eventually(
            lambda: "still active: limits.max_packet_size: 0 is out of range" in gateway.text, "it is logged, too"
        )
        assert "still active: upstream[0].prot: unknown key: did you mean `port`?" in gateway.text
        established(gateway.ports[0]).close()
        eventually(lambda: manager.messages.count({"WATCHDOG": "1"}) >= 3, "the watchdog is fed")

        old.send(large)
        eventually(lambda: large in broker.received, "the first session stands, under its own limit")
        gateway.signal(signal.SIGTERM)
        stopping = manager.wait_for("READY", "RELOADING", "READY", "RELOADING", "READY", "STOPPING")
        assert stopping["STATUS"] == "stopping, 1 session left"
        assert stopping["EXTEND_TIMEOUT_USEC"] == "25000000"
        assert old.read_to_end()[:3:2] == b"\xe0\x8b"
        old.close()
        assert gateway.wait() in ENDED_BY_SIGTERM
    assert "Traceback" not in gateway.text
    assert manager.states()[-1] == "STOPPING"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_start_that_is_interrupted_ends_in_order(tmp_path: Path, ca_file: Path, name: str) -> None:
    """What it has opened is closed, and what it has logged is written."""
    # The process signals itself when it listens: the reactor does not run yet.
    code = (
        "import os, signal, socket\n"
        "real = socket.socket.listen\n"
        "def listen(self, *arguments):\n"
        "    real(self, *arguments)\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        f"socket.socket.listen = listen\n{TWISTD}"
    )
    options = ["-n", "--pidfile=", "mqtts-gateway", "--config", str(configured(tmp_path, 1, ca_file))]
    program = Program([sys.executable, "-c", code, *options], tmp_path / "log")
    try:
        assert program.wait_ended() == -signal.Signals[name]  # as twistd always ends
    finally:
        program.stop()
    assert "listening for plain MQTT" in program.log
    assert "stopping: no session is open" in program.log
    assert "Traceback" not in program.log


def test_it_is_not_ready_when_it_cannot_listen(tmp_path: Path, manager: ServiceManager, ca_file: Path) -> None:
    """Two listeners, one of which cannot be opened: systemd hears nothing but the end of the process."""
    config = configured(tmp_path, 1, ca_file)
    config.write_text('[[listen]]\nendpoint = "192.0.2.1:1883"\n' + config.read_text())
    with pytest.raises(AssertionError, match=r"cannot listen on 192\.0\.2\.1:1883"):
        GatewayProcess(tmp_path, "--config", str(config), manager=manager)
    assert manager.messages == []


def test_the_watchdog_is_not_fed_when_the_reactor_is_blocked(
    tmp_path: Path, manager: ServiceManager, ca_file: Path
) -> None:
    """Whatever holds the reactor up holds the pings up, and they go on when it goes on.

    What blocks it writes to the same socket before and after, so that the order is certain.
    """
    prelude = (
        "import os, signal, socket, time\n"
        "address = os.environ['NOTIFY_SOCKET']\n"
        "def block(*_):\n"
        "    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:\n"
        "        own.sendto(b'X_BLOCKED=1', address)\n"
        "        time.sleep(3)\n"
        "        own.sendto(b'X_BLOCKED=0', address)\n"
        "signal.signal(signal.SIGUSR1, block)\n"
    )
    options = ("--config", str(configured(tmp_path, 1, ca_file)))
    with GatewayProcess(tmp_path, *options, manager=manager, watchdog=2, prelude=prelude) as gateway:
        ping, blocked, unblocked = {"WATCHDOG": "1"}, {"X_BLOCKED": "1"}, {"X_BLOCKED": "0"}
        eventually(lambda: ping in manager.messages, "the first ping")
        gateway.signal(signal.SIGUSR1)
        eventually(lambda: unblocked in manager.messages, "the reactor goes on")
        eventually(lambda: manager.messages[-1] == ping, "and so do the pings")
        began, ended = manager.messages.index(blocked), manager.messages.index(unblocked)
        assert manager.messages[began + 1 : ended] == []


def test_nothing_depends_on_the_service_manager(tmp_path: Path, start_broker: StartBroker, ca_file: Path) -> None:
    """Its socket goes away while the gateway runs; reloads, sessions and the end are as before."""
    manager = ServiceManager(tmp_path)
    broker = start_broker()
    config = configured(tmp_path, broker.port, ca_file)
    with GatewayProcess(tmp_path, "--config", str(config), manager=manager, watchdog=2) as gateway:
        manager.wait_for("READY")
        manager.close()
        configured(tmp_path, broker.port, ca_file, "[drain]\nseconds = 0\n")
        gateway.signal(signal.SIGHUP)
        eventually(lambda: "reloaded: drain.seconds\n" in gateway.text, "the reload")
        device = established(gateway.ports[0])
        gateway.signal(signal.SIGTERM)
        assert device.read_to_end()[:3:2] == b"\xe0\x8b"
        device.close()
        assert gateway.wait() in ENDED_BY_SIGTERM
    assert "Traceback" not in gateway.text


def test_flags_are_reloaded_too(tmp_path: Path, start_broker: StartBroker, ca_file: Path) -> None:
    """Their relative paths mean the same as at the start, although twistd has gone to another directory."""
    (tmp_path / "ca.pem").write_bytes(ca_file.read_bytes())
    options = ("--upstream", f"localhost:{start_broker().port}", "--listen", "127.0.0.1:0", "--ca-file", "ca.pem")
    prelude = "import os, sys\nsys.argv[1:2] = ['-n', '--rundir=/']\n"
    with GatewayProcess(tmp_path, *options, prelude=prelude) as gateway:
        assert Path(f"/proc/{gateway.process.pid}/cwd").resolve() == Path("/")
        gateway.signal(signal.SIGHUP)
        eventually(lambda: "reloaded: " in gateway.text, "the reload")
        (tmp_path / "ca.pem").write_text("no certificate")
        gateway.signal(signal.SIGHUP)
        eventually(lambda: f"still active: tls.ca_file: {tmp_path}/ca.pem" in gateway.text, "the refusal")
        established(gateway.ports[0]).close()
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() in ENDED_BY_SIGTERM


def test_a_daemon_reloads_and_drains(tmp_path: Path, start_broker: StartBroker, ca_file: Path) -> None:
    """The process that stays in the background is the one that hears the signals."""
    broker = start_broker()
    config = configured(tmp_path, broker.port, ca_file)
    pid_file, log = tmp_path / "pid", tmp_path / "log"
    twistd = [sys.executable, str(Path(sys.executable).with_name("twistd"))]
    options = [f"--pidfile={pid_file}", f"--logfile={log}", "--rundir=/"]
    subprocess.run([*twistd, *options, "mqtts-gateway", "--config", str(config)], check=True, timeout=60)
    found = eventually(lambda: re.search(r"listening for plain MQTT on \S+:(\d+)\n", log.read_text()), "it listens")
    pid = int(pid_file.read_text())
    try:
        configured(tmp_path, broker.port, ca_file, "[drain]\nseconds = 0\n")
        os.kill(pid, signal.SIGHUP)
        eventually(lambda: "reloaded: drain.seconds\n" in log.read_text(), "the reload")
        device = established(int(found[1]))
    finally:
        os.kill(pid, signal.SIGTERM)
    assert device.read_to_end()[:3:2] == b"\xe0\x8b"
    device.close()
    eventually(lambda: not pid_file.exists(), "no PID file")
    assert "Traceback" not in log.read_text()


def is_refused(port: int) -> bool:
    """Whether nobody listens on a port."""
    try:
        Device(port).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_second_signal_ends_a_drain_at_once(tmp_path: Path, start_broker: StartBroker, ca_file: Path) -> None:
    """However long it was to take; who has not been told yet is told, also whose device does not close in turn."""
    broker = start_broker()
    config = configured(tmp_path, broker.port, ca_file, "[drain]\nseconds = 3600\n[timeouts]\nclose = 3600\n")
    with GatewayProcess(tmp_path, "--config", str(config)) as gateway:
        devices = [established(gateway.ports[0], f"sensor-{number}") for number in range(20)]
        gateway.signal(signal.SIGTERM)
        eventually(lambda: is_refused(gateway.ports[0]), "the drain has begun, and nobody is let in")
        assert gateway.process.poll() is None
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() in ENDED_BY_SIGTERM
        for device in devices:
            assert device.read_to_end()[:3:2] == b"\xe0\x8b"
            device.close()
    assert "Traceback" not in gateway.text


def test_a_look_up_that_hangs_does_not_keep_it(tmp_path: Path, start_broker: StartBroker, ca_file: Path) -> None:
    """`getaddrinfo` waits for a dead name server for as long as it likes; the process ends without it."""
    config = configured(tmp_path, start_broker().port, ca_file)
    prelude = (
        "import socket, time\n"
        "def hang(*_, **__):\n"
        "    print('hangs', flush=True)\n"
        "    time.sleep(3600)\n"
        "socket.getaddrinfo = hang\n"
    )
    with GatewayProcess(tmp_path, "--config", str(config), prelude=prelude) as gateway:
        device = Device(gateway.ports[0])
        device.send(mqtt.connect(version=5))
        eventually(lambda: "hangs\n" in gateway.text, "the look-up")
        gateway.signal(signal.SIGTERM)
        assert device.read_to_end()[3:4] == b"\x88"
        device.close()
        assert gateway.wait() in ENDED_BY_SIGTERM


def test_a_thread_that_hangs_does_not_keep_a_process_that_ends_by_itself() -> None:
    """Neither its pool nor Python waits for it."""
    script = (
        "import time; from twisted.python.threadpool import ThreadPool; "
        "from gateway.net.network import PatientlessThread; "
        "pool = ThreadPool(); pool.threadFactory = PatientlessThread; pool.start(); "
        "pool.callInThread(time.sleep, 3600); pool.stop()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)
