"""How the log is written: prefixes, JSON, tracebacks, and nothing that could forge a line or move a cursor."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import attrs
import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger
from twisted.python import logfile

from gateway.errors import EndReason, UpstreamFailure
from gateway.ops.journal import Journal
from gateway.ops.logs import LineObserver, is_journal, make_observer
from gateway.ops.output import BackgroundOutput
from tests.harness import Broker, Device, eventually
from tests.mqtt_packets import connect, disconnect
from tests.test_journal import FIELDS, HOSTILE, RECORD

FOREGROUND = {"nodaemon": True, "logfile": None, "syslog": False, "logger": None}
FORMATS = ("text", "journal", "json")


class Written:
    """What an observer writes of what a logger is told."""

    def __init__(self, written: Any) -> None:
        self.text = ""
        self.log = Logger(namespace="gateway", observer=LineObserver(BackgroundOutput(self._write), written))

    def _write(self, text: str) -> None:
        self.text += text

    @property
    def lines(self) -> list[str]:
        assert self.text.endswith("\n")
        return self.text[:-1].split("\n")


def boom(log: Logger, message: str = "broken") -> None:
    """Log a failure with a traceback."""

    def fail() -> None:
        raise ValueError(message)

    try:
        fail()
    except ValueError:
        log.failure("a mistake")


def test_text_has_time_and_level() -> None:
    """As twistd writes it."""
    written = Written("text")
    written.log.warn("careful, {what}", what="there")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} \[gateway#warn\] careful, there", written.lines[0])


@pytest.mark.parametrize(("level", "priority"), [("debug", 7), ("info", 6), ("warn", 4), ("error", 3), ("critical", 2)])
def test_the_journal_gets_priorities_and_no_times(level: str, priority: int) -> None:
    """It has a clock of its own; `journalctl -p warning` finds what is one."""
    written = Written("journal")
    getattr(written.log, level)("listening")
    assert written.lines == [f"<{priority}>listening"]


def test_each_line_of_a_traceback_has_its_priority() -> None:
    """Otherwise all but the first would be told as information."""
    written = Written("journal")
    boom(written.log)
    assert len(written.lines) > 3
    assert written.lines[0] == "<2>a mistake"
    assert all(line.startswith("<2>  ") for line in written.lines[1:])
    assert written.lines[-1].endswith("ValueError: broken")


def test_a_traceback_is_set_in_for_people() -> None:
    """So that it is seen what belongs to it."""
    written = Written("text")
    boom(written.log)
    assert all(line.startswith("  ") for line in written.lines[1:])
    assert "ValueError: broken" in written.lines[-1]


def test_json_is_an_object_a_line_with_every_field() -> None:
    """Those of a session's record under their names, beside time, level and the words for people."""
    written = Written("json")
    Journal(Clock().seconds, written.log).session_ended(RECORD)
    (line,) = written.lines
    fields = json.loads(line)
    assert {name: fields[name] for name in FIELDS} == FIELDS
    assert fields["event"] == "session-end"
    assert fields["level"] == "info"
    assert fields["message"].startswith("session 7 ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", fields["time"])
    assert not [name for name in fields if name.startswith("log_")]


def test_json_holds_a_traceback_and_what_json_does_not_know() -> None:
    """One line all the same, and what tells of the event itself cannot be overwritten by its fields."""
    written = Written("json")
    boom(written.log)
    written.log.info("odd", path=Path("/x"), namespace="mine")
    first, second = (json.loads(line) for line in written.lines)
    assert first["traceback"].rstrip().endswith("ValueError: broken")
    assert (second["path"], second["namespace"]) == ("/x", "gateway")


@pytest.mark.parametrize("written_as", FORMATS)
def test_what_is_hostile_forges_no_line_and_moves_no_cursor(written_as: str) -> None:
    """In a record, in a text that nobody escaped, in a traceback: nothing that does not print leaves."""
    written = Written(written_as)
    journal = Journal(Clock().seconds, written.log)
    journal.session_ended(attrs.evolve(RECORD, client_identifier=HOSTILE, detail=HOSTILE))
    written.log.info("raw {text}", text=HOSTILE)
    boom(written.log, HOSTILE)
    for line in written.lines:
        assert line.isprintable()
        if written_as == "json":
            json.loads(line)
        # What stood on a line of its own is set in, so that it cannot pass for an event.
        assert not re.match(r"(<\d>)?session 8", line)


@pytest.mark.parametrize("written_as", FORMATS)
def test_no_text_of_a_device_makes_a_long_line(written_as: str) -> None:
    """A Client Identifier of 64 KiB, and what else may hold one: a few hundred bytes a record, in every format."""
    written = Written(written_as)
    journal, name = Journal(Clock().seconds, written.log), "\U000e0001" * 16_000
    record = attrs.evolve(RECORD, client_identifier=name, detail=name)
    failure = UpstreamFailure(EndReason.TLS_EXPIRED, name)
    journal.session_started(record)
    journal.session_ended(record)
    journal.session_ended(attrs.evolve(record, peer=None))
    journal.refused(EndReason.NOT_MQTT, "192.0.2.1:1", name)
    journal.passed_over("a.example:8883", failure)
    journal.left_alone("a.example:8883", failure, 1.0)
    assert len(written.lines) == 6
    # Twelve bytes for each character that JSON escapes.
    assert max(map(len, written.lines)) < 15_000
    written.text = ""
    written.log.info("unexpected: {what}", what=name)
    boom(written.log, name)
    assert max(map(len, written.lines)) < 150_000


def test_an_event_without_words_is_no_line() -> None:
    """Twisted has some of them."""
    written = Written("text")
    written.log.info("")
    assert written.text == ""


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Any]:
    """A file for standard output."""
    with (tmp_path / "out").open("w+", encoding="ascii") as file:
        yield file


def stream_of(file: Any) -> str:
    """Say what systemd would call this stream."""
    status = os.fstat(file.fileno())
    return f"{status.st_dev}:{status.st_ino}"


def test_the_journal_is_known_by_its_stream(output: Any) -> None:
    """JOURNAL_STREAM is inherited by whatever the service starts, so it must be this very stream."""
    assert is_journal(output, {"JOURNAL_STREAM": stream_of(output)})
    assert not is_journal(output, {"JOURNAL_STREAM": "1:2"})
    assert not is_journal(output, {})
    assert not is_journal(StringIO(), {"JOURNAL_STREAM": "1:2"})


@pytest.mark.parametrize(
    ("wanted", "in_journal", "expected"),
    [
        ("auto", True, r"<6>hello"),
        ("auto", False, r"\d{4}-.* \[gateway#info\] hello"),
        ("text", True, r"\d{4}-.* \[gateway#info\] hello"),
        ("journal", False, r"<6>hello"),
        ("json", True, r'\{"time": .*"hello".*\}'),
    ],
)
def test_the_format_is_chosen_by_where_it_goes_unless_one_is_wanted(
    output: Any, wanted: Any, in_journal: bool, expected: str
) -> None:
    """`auto` looks whether standard output is the journal; others are what they are."""
    environment = {"JOURNAL_STREAM": stream_of(output)} if in_journal else {}
    observer = make_observer(wanted, FOREGROUND, environment, output)
    assert observer is not None
    log = Logger(namespace="gateway", observer=observer)
    log.info("hello")
    # A terminal may lack characters.
    log.info("gr\u00fc\u00df")
    output.seek(0)
    first, second = output.read().splitlines()
    assert re.fullmatch(expected, first)
    assert r"gr\xfc\xdf" in second or r"gr\u00fc\u00df" in second


def test_another_configuration_changes_the_format(output: Any) -> None:
    """Also back to the one that is chosen by where it goes."""
    observer = make_observer("auto", FOREGROUND, {"JOURNAL_STREAM": stream_of(output)}, output)
    assert observer is not None
    log = Logger(namespace="gateway", observer=observer)
    for wanted in ("json", "auto", "text"):
        observer.use(wanted)
        log.info("hello")
    output.seek(0)
    assert [line[0] for line in output.read().splitlines()] == ["{", "<", "2"]


@pytest.mark.parametrize("option", [{"syslog": True}, {"logger": print}, {"nodaemon": False, "logfile": "-"}])
def test_what_twistd_is_told_is_left_to_it(option: dict[str, Any]) -> None:
    """Its own options for the log go on to mean what they mean."""
    assert make_observer("json", FOREGROUND | option, {}, StringIO()) is None


def test_a_log_file_is_written_in_the_format_too(tmp_path: Path) -> None:
    """And SIGUSR1 goes on to rotate it, which without a handler would end the process."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        observer = make_observer("json", FOREGROUND | {"logfile": str(tmp_path / "log")}, {})
        assert observer is not None
        Logger(namespace="gateway", observer=observer).info("hello \u2028")
        assert signal.getsignal(signal.SIGUSR1) not in {signal.SIG_DFL, None}
        observer._output._write.__self__.close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert json.loads((tmp_path / "log").read_text())["message"] == "hello \u2028"


def test_a_log_file_outlives_a_rotation_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor for the next file, lines are lost only until there is one."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        observer = make_observer("text", FOREGROUND | {"logfile": str(tmp_path / "log")}, {})
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert observer is not None
    output = observer.output
    file = output._write.__self__
    output.write("first\n")
    with monkeypatch.context() as patched:
        patched.setattr(logfile, "open", Mock(side_effect=OSError(errno.EMFILE, "words")), raising=False)
        for attempt in (file.rotate, lambda: output.write("lost\n")):
            with pytest.raises(OSError, match="words"):
                attempt()
    output.write("second\n")
    file.close()
    assert [(tmp_path / name).read_text() for name in ("log.1", "log")] == ["first\n", "second\n"]


def twistd(tmp_path: Path, start_broker: Callable[..., Broker], ca_file: Path, configured: str, *options: str) -> str:
    """Run a gateway for one session of a hostile device; return what it wrote."""
    broker = start_broker()
    config = tmp_path / "gateway.toml"
    config.write_text(
        f'[[listen]]\nendpoint = "127.0.0.1:0"\n[[upstream]]\nhost = "localhost"\nport = {broker.port}\n'
        f'[tls]\nca_file = "{ca_file}"\n[log]\nformat = "{configured}"\n'
    )
    path = tmp_path / "out"
    program = Path(sys.executable).with_name("twistd")
    with path.open("w+") as out:
        process = subprocess.Popen(
            [program, "-n", "--pidfile=", *options, "mqtts-gateway", f"--config={config}"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"JOURNAL_STREAM": stream_of(out)},
            cwd=tmp_path,
        )
    logs = [path, tmp_path / "log"]

    def log() -> str:
        return "".join(each.read_text() for each in logs if each.exists())

    try:
        found = eventually(lambda: re.search(r"listening for plain MQTT on 127\.0\.0\.1:(\d+)", log()), "it listens")
        with Device(int(found[1])) as device:
            device.send(connect("a\x1b[2J\u202eb") + disconnect())
            device.read_to_end()
        eventually(lambda: "device-disconnect" in log(), "the record")
        config.write_text(config.read_text().replace(f'"{configured}"', '"json"'))
        process.send_signal(signal.SIGHUP)
        eventually(lambda: '"event": "reloaded"' in log(), "the reload is told as JSON")
    finally:
        process.terminate()
        process.wait(20)
    return log()


def test_under_systemd_twistd_writes_priorities(
    tmp_path: Path, start_broker: Callable[..., Broker], ca_file: Path
) -> None:
    """From the first line on, by itself; a reload may ask for another format."""
    text = twistd(tmp_path, start_broker, ca_file, "auto")
    assert not re.search(r"starting on|Port \d+ Closed", text)
    lines = text.splitlines()
    changed = next(index for index, line in enumerate(lines) if line.startswith("{"))
    assert changed > 5
    assert all(re.match(r"<\d>", line) for line in lines[:changed])
    assert all(json.loads(line) for line in lines[changed:])
    (end,) = (line for line in lines if "device-disconnect" in line)
    assert end.startswith("<6>session 1 127.0.0.1:")
    assert r"a\x1b[2J\u202eb" in end


def test_twistd_writes_json_if_the_configuration_says_so(
    tmp_path: Path, start_broker: Callable[..., Broker], ca_file: Path
) -> None:
    """Every line is an object."""
    records = [json.loads(line) for line in twistd(tmp_path, start_broker, ca_file, "json").splitlines()]
    (end,) = (record for record in records if record.get("event") == "session-end")
    assert end["client_identifier"] == "a\x1b[2J\u202eb"


def test_twistds_own_option_for_a_file_still_counts(
    tmp_path: Path, start_broker: Callable[..., Broker], ca_file: Path
) -> None:
    """What goes to a file is for people, wherever standard output goes."""
    text = twistd(tmp_path, start_broker, ca_file, "auto", f"--logfile={tmp_path / 'log'}")
    assert "[gateway#info] session 1 " in text
    assert (tmp_path / "out").read_text() == ""


def test_twisteds_words_about_ports_are_left_out() -> None:
    """The gateway says in its own what it listens on; other old-style messages are told as Twisted's."""
    written = Written("text")
    observer = LineObserver(BackgroundOutput(written._write), "text")
    observer({"log_namespace": "log_legacy", "log_format": "{x}", "x": "_HTTP (StatusSite) starting on 9883"})
    observer({"log_namespace": "log_legacy", "log_format": "{x}", "x": "(TCP Port 9883 Closed)"})
    assert written.text == ""
    observer({"log_namespace": "log_legacy", "log_format": "{x}", "x": "Received SIGTERM, shutting down."})
    assert written.text.endswith(" [twisted#-] Received SIGTERM, shutting down.\n")
