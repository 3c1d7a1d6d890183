"""`twistd mqtts-gateway`: options in, service out.

In: the command line.  Out: a `GatewayService`, or a usage error that lists every problem (exit status 1).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from twisted.application.service import IService
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver
from twisted.python import usage

from gateway.config import Config
from gateway.config.directory import RuleFiles
from gateway.config.flags import FLAGS, Flag, config_from, explained
from gateway.disk import all_read
from gateway.errors import ConfigError
from gateway.net.network import PatientlessThread
from gateway.ops.logs import LineObserver, make_observer
from gateway.ops.notify import Notifier
from gateway.ops.signals import call_on_signal, note_early
from gateway.pieces import Pauses
from gateway.prepared import Prepared
from gateway.service import GatewayService


class Options(usage.Options):
    """The command line of `twistd mqtts-gateway`; its options are the `FLAGS`."""

    synopsis = "[options]"
    longdesc = (
        "Accepts plain MQTT from devices and gives each session a TLS connection of its own to the broker, "
        "verified before a single MQTT byte leaves. Either --config FILE, or --upstream and the other options; "
        "`mqtts-gateway init` writes a commented FILE."
    )

    def __init__(self) -> None:
        super().__init__()
        # A renewed certificate must not end a gateway that is starting.
        note_early(signal.SIGHUP)
        self.given: dict[str, list[str]] = {}
        self.config: Config
        self.known = RuleFiles()

    def postOptions(self) -> None:
        """Make the `Config`.  Raises `UsageError` with all problems."""
        try:
            with all_read():
                self.config = config_from(self.given, self.known)
        except ConfigError as error:
            raise usage.UsageError(explained(error)) from None
        # A reload reads the same files, and a daemon changes its working directory.
        for flag in FLAGS:
            if flag.is_path and flag.name in self.given:
                self.given[flag.name] = [str(Path.cwd() / path) for path in self.given[flag.name]]


def _handler(flag: Flag) -> Callable[[Options, str], None]:
    def take(options: Options, value: str) -> None:
        options.given.setdefault(flag.name, []).append(value)

    take.__doc__ = flag.help
    return take


for _flag in FLAGS:
    # Twisted wants a method per option, with the help as its docstring.  optParameters cannot be repeated.
    setattr(Options, f"opt_{_flag.name}", _handler(_flag))


class _Service(GatewayService):
    """The gateway as twistd runs it, with its signal handlers."""

    observer: LineObserver | None = None

    @property
    def lost_lines(self) -> tuple[int, bool]:
        """See `GatewayService.lost_lines`."""
        output = None if self.observer is None else self.observer.output
        return (0, False) if output is None else (output.lost_lines, output.is_losing)

    def setServiceParent(self, parent: Any) -> None:
        """Join the application that twistd runs, and write its log."""
        super().setServiceParent(parent)
        if self.observer is not None:
            # twistd looks for an observer here, unless --logger is given.
            parent.setComponent(ILogObserver, self.observer)

    def privilegedStartService(self) -> None:
        """Open the listeners; if one cannot be opened, the process ends with status 1."""
        if threading.current_thread() is threading.main_thread():
            # As the reactor does, but only once it runs.  Until then they would end the process at once, and log lines
            # that wait to be written would be lost.
            signal.signal(signal.SIGTERM, self._reactor.sigTerm)
            signal.signal(signal.SIGINT, self._reactor.sigInt)
        try:
            super().privilegedStartService()
        except ConfigError as error:
            # The exception must pass through twistd, which then removes its PID file and tells the process that waits
            # for the daemon to start; a SystemExit would leave that one waiting.  It is no internal error, so these
            # words are printed at the end instead of a traceback.
            words = explained(error)
            sys.excepthook = lambda *_: sys.stderr.write(f"{words}\n")
            raise

    def adopt(self, prepared: Prepared) -> None:
        """Change to another configuration and its log format.  Raises `ConfigError`."""
        super().adopt(prepared)
        if self.observer is not None:
            self.observer.use(prepared.config.log.format)

    def startService(self) -> None:
        """Start; from now on SIGHUP reloads."""
        super().startService()
        if self.observer is not None:
            # Not before: twistd has become a daemon by now, and threads do not survive the fork.
            self.observer.start()
            # twistd ends by the signal that stopped it, so exit handlers do not run.
            self._reactor.addSystemEventTrigger("after", "shutdown", self.observer.finish)
        call_on_signal(self._reactor, signal.SIGHUP, self.reload)

    def stopService(self) -> Deferred[Any]:
        """Drain; from now on SIGTERM and SIGINT end everything at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            call_on_signal(self._reactor, number, self.stop_at_once)
        return super().stopService()


def _runtime_directory() -> Path | None:
    """Return the directory that systemd has made for the service (RuntimeDirectory=, systemd.exec(5)), if any."""
    first = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(first) if first else None


def makeService(options: Options) -> IService:
    """Build the service.  A certificate or key that cannot be used ends the process with status 1."""
    # Not at the top: twistd installs the reactor after it has loaded this module.
    from twisted.internet import reactor

    # Twisted's clock is the time of day.  On a box without a clock battery, NTP may move that by years, and every
    # keepalive would have expired at once, or no timeout would fire until the clock had caught up.
    reactor.seconds = monotonic  # type: ignore[method-assign]  # the documented place
    reactor.getThreadPool().threadFactory = PatientlessThread  # type: ignore[attr-defined]  # every reactor has one
    notifier = Notifier.from_environment(os.environ, os.getpid())
    try:
        options.known.pause = Pauses()
        reread = partial(config_from, options.given, options.known)
        with all_read():
            service = _Service(
                options.config, reactor, notifier=notifier, reread=reread, runtime_directory=_runtime_directory()
            )
    except ConfigError as error:
        # twistd prints a traceback for any exception here, even a UsageError; nothing runs yet that needs stopping.
        raise SystemExit(f"mqtts-gateway: {explained(error)}") from None
    twistd = getattr(options, "parent", None) or {}
    service.observer = make_observer(options.config.log.format, twistd)
    if service.observer is not None and twistd.get("nodaemon"):
        service.observer.start()
    return service
