"""Log output that nobody reads: the relay goes on, lines are counted, and the process can be stopped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import Logger

from gateway.config import from_mapping
from gateway.ops.logs import LineObserver
from gateway.ops.metrics import Metrics
from gateway.ops.output import LIMIT, BackgroundOutput, stream_writer
from gateway.ops.status_words import verdict
from gateway.pieces import at_once
from gateway.tap import _Service
from tests import mqtt_packets as mqtt
from tests.harness import PATIENCE, Broker, BrokerConnection, Device, eventually
from tests.ports import free_port

PINGREQ, PINGRESP = b"\xc0\x00", b"\xd0\x00"


class Stuck:
    """An output that blocks from the first write on until it is told to go on."""

    def __init__(self) -> None:
        self.entered, self.free = threading.Event(), threading.Event()
        self.text = ""

    def write(self, text: str) -> None:
        """Write, once `free` is set."""
        self.entered.set()
        assert self.free.wait(PATIENCE)
        self.text += text


def test_a_blocked_output_does_not_block_and_what_is_lost_is_counted() -> None:
    """Lines that fit wait, in their order; the others are dropped, and the count is the next thing in the log."""
    stuck = Stuck()
    output = BackgroundOutput(stuck.write)
    log = Logger(namespace="gateway", observer=LineObserver(output, "text"))
    output.start()
    log.info("first")
    assert stuck.entered.wait(PATIENCE)
    count = 3 * LIMIT // 1000
    for number in range(count):
        log.info("{number} {filler}", number=number, filler="x" * 1000)
    assert output._size <= LIMIT
    assert output._lost > count // 2
    stuck.free.set()
    eventually(lambda: "log-lines-lost" in stuck.text or "were lost" in stuck.text, "the count")
    lines = stuck.text.splitlines()
    assert lines[0].endswith("first")
    numbers = [int(line.split()[2]) for line in lines[1:-1]]
    assert numbers == list(range(len(numbers)))
    assert f"{count - len(numbers)} log lines were lost" in lines[-1]
    log.info("as before")
    assert output.flush(PATIENCE)
    assert stuck.text.endswith("as before\n")


def test_an_output_that_fails_loses_lines_and_is_tried_again() -> None:
    """A full disk: no line about lost lines before there is room again, and then one."""
    written: list[str] = []
    full = True

    def write(text: str) -> None:
        if full:
            raise OSError(28, "No space left on device")
        written.append(text)

    output = BackgroundOutput(write)
    log = Logger(namespace="gateway", observer=LineObserver(output, "text"))
    output.start()
    for _ in range(3):
        log.info("lost")
        assert output.flush(PATIENCE)
    assert output._lost == 3
    full = False
    log.info("kept")
    eventually(lambda: len(written) == 2, "both lines")
    assert written[0].endswith("kept\n")
    assert "3 log lines were lost" in written[1]


def test_a_line_of_any_length_is_written_if_nothing_waits() -> None:
    """The limit is on what waits."""
    written: list[str] = []
    output = BackgroundOutput(written.append)
    output.start()
    output.write("x" * (2 * LIMIT) + "\n")
    assert output.flush(PATIENCE)
    assert len(written[0]) == 2 * LIMIT + 1


def test_a_file_is_rotated_between_two_lines() -> None:
    """Not while the thread writes to it."""
    stuck, done = Stuck(), threading.Event()
    output = BackgroundOutput(stuck.write)
    output.start()
    output.write("one\n")
    assert stuck.entered.wait(PATIENCE)
    output.call(done.set)
    assert not done.is_set()
    stuck.free.set()
    assert done.wait(PATIENCE)
    assert stuck.text == "one\n"


def test_a_pipe_that_another_process_made_non_blocking_loses_nothing() -> None:
    """O_NONBLOCK belongs to the description, which others share; partial writes are completed."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with os.fdopen(writing, "w", encoding="ascii") as stream:
        write = stream_writer(stream)
        size = 4 * fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ)
        thread = threading.Thread(target=write, args=("é" * size,))
        thread.start()
        got = b""
        while len(got) < 4 * size:
            got += os.read(reading, 65536)
        thread.join(PATIENCE)
    os.close(reading)
    assert got == rb"\xe9" * size
    memory = StringIO()
    stream_writer(memory)("in memory")
    assert memory.getvalue() == "in memory"


# ---- the whole process


def fill(descriptor: int) -> None:
    """Write until nothing more fits."""
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(descriptor, b"x" * size)


def full_pipe() -> tuple[int, int]:
    """Return the ends of a pipe that is full, the one to write to last."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    fill(writing)
    os.set_blocking(writing, True)
    return reading, writing


def stalled_journal() -> tuple[int, int]:
    """Return the ends of a stream socket like the journal's, of which nobody reads."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    fill(writing.fileno())
    writing.setblocking(True)
    return reading.detach(), writing.detach()


# A mount that hangs: every write to the log file blocks once the gateway listens.
HUNG = """
import threading
from twisted.python.logfile import LogFile
_written = LogFile.write
def _hang(self, data):
    before, listening, _ = data.partition("listening for plain MQTT")
    _written(self, before + listening)
    if listening:
        threading.Event().wait()
LogFile.write = _hang
"""
RUN = "import sys; from twisted.scripts.twistd import run; sys.argv[0] = 'twistd'; run()"


@pytest.fixture
def gateway_writing_to(
    tmp_path: Path, start_broker: Callable[..., Broker], ca_file: Path
) -> Iterator[Callable[..., Any]]:
    """Start a gateway whose standard output is a descriptor; return its process and its port."""
    processes: list[subprocess.Popen[bytes]] = []
    port = free_port()

    def start(output: int | None, *options: str, prelude: str = "") -> tuple[subprocess.Popen[bytes], int]:
        broker = start_broker(serve=serve)
        config = tmp_path / "gateway.toml"
        config.write_text(
            f'[[listen]]\nendpoint = "127.0.0.1:{port}"\n[[upstream]]\nhost = "localhost"\nport = {broker.port}\n'
            f'[tls]\nca_file = "{ca_file}"\n[drain]\nseconds = 0\n'
        )
        command = [sys.executable, "-c", f"{prelude}\n{RUN}", "-n", "--pidfile=", *options]
        command += ["mqtts-gateway", f"--config={config}"]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path)
        processes.append(process)
        eventually(lambda: listens(port), "the gateway listens")
        return process, port

    yield start
    for process in processes:
        process.kill()
        process.wait(PATIENCE)


def serve(connection: BrokerConnection) -> None:
    """Accept a session, and answer each PINGREQ."""
    connection.read_packet()
    connection.send(mqtt.connack())
    while connection.read_packet() == PINGREQ:
        connection.send(PINGRESP)


def listens(port: int) -> bool:
    """Say whether somebody accepts connections there."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("kind", ["pipe", "journal", "file"])
def test_sessions_go_on_and_sigterm_ends_it_although_nobody_reads_the_log(
    gateway_writing_to: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    """Each session and each end of one is a line; pings are answered all the while."""
    reading = writing = None
    if kind == "file":
        log = tmp_path / "log"
        process, port = gateway_writing_to(subprocess.DEVNULL, f"--logfile={log}", prelude=HUNG)
    else:
        reading, writing = full_pipe() if kind == "pipe" else stalled_journal()
        process, port = gateway_writing_to(writing)
    for number in range(3):
        with Device(port) as device:
            device.send(mqtt.connect(f"d{number}"))
            assert device.read(4) == mqtt.connack()
            device.send(PINGREQ)
            assert device.read(2) == PINGRESP
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == -signal.SIGTERM  # as twistd always ends
    for descriptor in (reading, writing):
        if descriptor is not None:
            os.close(descriptor)
    if kind == "file":
        assert '"d0"' not in log.read_text()


def test_lines_that_are_being_lost_are_shown_where_the_log_is_not_needed(reactor: Any) -> None:
    """How many in all, and whether it goes on: the log itself can only tell when it works again."""
    stuck = Stuck()
    output = BackgroundOutput(stuck.write)
    service = _Service(from_mapping({"upstream": [{"host": "localhost"}]}), reactor)
    assert service.lost_lines == (0, False)
    service.observer = LineObserver(output, "text")
    output.start()
    output.write("first\n")
    assert stuck.entered.wait(PATIENCE)
    for _ in range(2):
        output.write("x" * LIMIT + "\n")
    assert service.lost_lines == (2, True)
    document = at_once(service.sight.document())
    assert document["log"] == {"lines_lost": 2, "losing": True}
    assert any("2 lines are lost" in reason for reason in verdict(document).reasons)
    assert b"mqtts_gateway_log_lines_lost_total 2.0" in at_once(Metrics(service.sight).exposition(""))[0]
    stuck.free.set()
    eventually(lambda: service.lost_lines == (2, False), "it is written again")
    assert not any("lines are lost" in reason for reason in verdict(at_once(service.sight.document())).reasons)
