"""Log output: text, systemd journal or JSON.

In: events of `twisted.logger`, and twistd's log options.  Out: an observer that writes lines to standard output or to
twistd's log file.

Only printable characters and line ends made here are written: untrusted text can neither move a cursor nor start a line
that looks like one of the gateway's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, TextIO

from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel, formatEvent, formatTime
from twisted.python.failure import Failure
from twisted.python.logfile import LogFile
from zope.interface import implementer

from gateway.ops.output import BackgroundOutput, stream_writer
from gateway.text import unprintable_escaped

Format = Literal["auto", "text", "journal", "json"]

# Priorities of syslog(3), which systemd strips from the start of each line (sd-daemon(3)).
_PRIORITIES = {
    LogLevel.debug: 7,
    LogLevel.info: 6,
    LogLevel.warn: 4,
    LogLevel.error: 3,
    LogLevel.critical: 2,
}
_PORT_WORDS = re.compile(r".+ starting on .+|\(.* Port .* Closed\)")
_MAX_LINE = 4096  # characters of a line and of a JSON field; a session record has a few hundred
# Event fields that repeat others, or are internal to Twisted.
_OF_TWISTED = frozenset({"message", "time", "system", "isError", "format", "line", "shown"})


@implementer(ILogObserver)
class LineObserver:
    """Writes each event as lines to `output`; `in_journal` says whether that is systemd's journal."""

    def __init__(self, output: BackgroundOutput, wanted: Format, *, in_journal: bool = False) -> None:
        self._output = output
        self._in_journal = in_journal
        self._log = Logger(namespace="gateway", observer=self)
        output.lost = self._report_lost
        self.output = output
        self.use(wanted)

    def start(self) -> None:
        """Write in a background thread from now on; see `BackgroundOutput.start`."""
        self._output.start()

    def finish(self) -> None:
        """Write what waits; see `BackgroundOutput.finish`."""
        self._output.finish()

    def use(self, wanted: Format) -> None:
        """Use this format from now on."""
        automatic = _journal if self._in_journal else _text
        self._lines = {"auto": automatic, "text": _text, "journal": _journal, "json": _json}[wanted]

    def __call__(self, event: LogEvent) -> None:
        """See `twisted.logger.ILogObserver`."""
        if event.get("log_namespace") == "log_legacy":
            if _PORT_WORDS.fullmatch(formatEvent(event)):
                return  # Twisted's own words about ports, which the gateway reports in its own
            event = event | {"log_namespace": "twisted"}
        lines = list(self._lines(event))
        if lines:
            self._output.write("".join([f"{unprintable_escaped(line)}\n" for line in lines]))

    def _report_lost(self, count: int) -> None:
        self._log.warn(
            "{count} log lines were lost: the log output was blocked or failed", event="log-lines-lost", count=count
        )


def make_observer(
    wanted: Format,
    twistd: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
    stdout: TextIO | None = None,
) -> LineObserver | None:
    """Return the observer for a format and twistd's options, or `None` if twistd must do the logging.

    That is the case with `--syslog` and `--logger`.
    """
    if twistd.get("syslog") or twistd.get("logger"):
        return None
    name = twistd.get("logfile") or ("-" if twistd.get("nodaemon") else "twistd.log")
    if name == "-":
        if not twistd.get("nodaemon"):
            return None  # twistd reports this error
        stream = sys.stdout if stdout is None else stdout
        if stream is None:
            return None
        output = BackgroundOutput(stream_writer(stream))
        return LineObserver(output, wanted, in_journal=is_journal(stream, environment))
    return LineObserver(_to_file(str(name)), wanted)


def is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Return whether a stream is systemd's journal: JOURNAL_STREAM has its device and inode (systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _LogFile(LogFile):
    """A log file that goes on when a rotation could not open the next file, for want of a descriptor for example."""

    def write(self, data: str) -> None:
        """Write text.  Raises `OSError`."""
        if self._file.closed:
            self._openFile()
        super().write(data)


def _to_file(name: str) -> BackgroundOutput:
    """Open the file that twistd would open; rotate it by size and on SIGUSR1, as twistd does."""
    file = _LogFile.fromFullPath(name)
    output = BackgroundOutput(file.write)

    def rotate(*_: object) -> None:
        # Imported late: twistd chooses the reactor.
        from twisted.internet import reactor

        # Not at once: the signal may have interrupted `output`.
        reactor.callFromThread(output.call, file.rotate)  # type: ignore[attr-defined]  # IReactorFromThreads

    if not signal.getsignal(signal.SIGUSR1):
        signal.signal(signal.SIGUSR1, rotate)
    return output


def _text(event: LogEvent) -> Iterator[str]:
    level = event.get("log_level")
    system = f"{event.get('log_namespace') or '-'}#{level.name if level is not None else '-'}"
    for index, line in enumerate(_message(event)):
        yield f"  {line}" if index else f"{_shown_second(event.get('log_time'))} [{system}] {line}"


def _shown_second(time: float | None) -> str:
    # The format shows whole seconds, and strftime is a large part of the cost of a line.
    return formatTime(None) if time is None else _shown_whole_second(int(time))


@lru_cache(maxsize=2)
def _shown_whole_second(time: int) -> str:
    return formatTime(time)


def _journal(event: LogEvent) -> Iterator[str]:
    level = event.get("log_level")
    prefix = f"<{_PRIORITIES[level] if level is not None else 6}>"
    for index, line in enumerate(_message(event)):
        # Each line is an entry of its own, so each has the priority; continuation lines are indented.
        yield f"{prefix}  {line}" if index else prefix + line


def _json(event: LogEvent) -> Iterator[str]:
    level, failure = event.get("log_level"), event.get("log_failure")
    time = datetime.fromtimestamp(event.get("log_time") or 0.0, UTC)
    own = {
        "time": time.isoformat(timespec="microseconds"),
        "level": level.name if level is not None else None,
        "namespace": event.get("log_namespace"),
        "message": formatEvent(event),
    }
    others = {name: value for name, value in event.items() if name not in own and name not in _OF_TWISTED}
    fields = own | {name: value for name, value in others.items() if not name.startswith("log_")}
    fields = {name: _cut(value) if isinstance(value, str) else value for name, value in fields.items()}
    if failure is not None:
        fields["traceback"] = "\n".join(_traceback(failure))
    yield json.dumps(fields, default=lambda value: _cut(str(value)), skipkeys=True)


def _message(event: LogEvent) -> list[str]:
    """Return the lines of an event's text and of its traceback, if any."""
    # Most lines are session records, which are formatted already.
    text = event["line"] if event.get("log_format") == "{line}" else formatEvent(event)
    lines = _cut(text).split("\n") if text else []
    failure = event.get("log_failure")
    if failure is not None:
        lines += _traceback(failure)
    return lines


def _traceback(failure: Failure) -> list[str]:
    """Return the lines of a traceback, of which the last may hold text from a device."""
    return [_cut(line) for line in failure.getTraceback().rstrip("\n").split("\n")]


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_LINE else f"{text[:_MAX_LINE]}…"
