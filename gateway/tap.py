"""`twistd mqtts-gateway`: options in, service out.

In: the command line.  Out: a `GatewayService`, or a usage error that names everything that is wrong (exit status 1).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from twisted.application.service import IService
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver
from twisted.python import usage

from gateway.config import Config
from gateway.config.flags import FLAGS, Flag, config_from, explained
from gateway.errors import ConfigError
from gateway.net.network import PatientlessThread
from gateway.ops.logs import LineObserver, make_observer
from gateway.ops.notify import Notifier
from gateway.ops.signals import call_on_signal
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
        self.given: dict[str, list[str]] = {}
        self.config: Config

    def postOptions(self) -> None:
        """Make the `Config`.  Raises `UsageError` with all problems."""
        try:
            self.config = config_from(self.given)
        except ConfigError as error:
            raise usage.UsageError(explained(error)) from None
        # A reload reads the same files, and a daemon's directory is another.
        for flag in FLAGS:
            if flag.is_path and flag.name in self.given:
                self.given[flag.name] = [str(Path.cwd() / path) for path in self.given[flag.name]]


def _handler(flag: Flag) -> Callable[[Options, str], None]:
    def take(options: Options, value: str) -> None:
        options.given.setdefault(flag.name, []).append(value)

    take.__doc__ = flag.help
    return take


for _flag in FLAGS:
    # What Twisted looks for: a method for each option, its docstring the help.  optParameters know no repetition.
    setattr(Options, f"opt_{_flag.name}", _handler(_flag))


class _Service(GatewayService):
    """The gateway as twistd runs it, and what signals do to it."""

    observer: LineObserver | None = None

    def setServiceParent(self, parent: Any) -> None:
        """Be part of the application that twistd runs, and be the one to write its log."""
        super().setServiceParent(parent)
        if self.observer is not None:
            # Where twistd looks for an observer, unless it was told --logger.
            parent.setComponent(ILogObserver, self.observer)

    def privilegedStartService(self) -> None:
        """Open the listeners; one that cannot be opened ends the process with status 1."""
        try:
            super().privilegedStartService()
        except ConfigError as error:
            # The exception has to pass through twistd, so that its PID file goes and so that the process that waits for
            # a daemon's start hears of it; a SystemExit would leave that one waiting.  But this is no mistake of the
            # program's: what is written at the end are these words, not a traceback.
            words = explained(error)
            sys.excepthook = lambda *_: sys.stderr.write(f"{words}\n")
            raise

    def change(self, config: Config) -> list[str]:
        """Take another configuration, and write the log as it says.  Raises `ConfigError`."""
        changed = super().change(config)
        if self.observer is not None:
            self.observer.use(config.log.format)
        return changed

    def startService(self) -> None:
        """Begin; from now on SIGHUP is a reload."""
        super().startService()
        call_on_signal(self._reactor, signal.SIGHUP, self.reload)

    def stopService(self) -> Deferred[Any]:
        """Drain; from now on SIGTERM and SIGINT end it at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            call_on_signal(self._reactor, number, self.stop_at_once)
        return super().stopService()


def makeService(options: Options) -> IService:
    """Build the service.  A certificate or a key that cannot be used ends the process with status 1."""
    # Not at the top: twistd chooses the reactor after it has loaded this module.
    from twisted.internet import reactor

    # Twisted's clock is the time of day.  A box without a clock battery has it set by an hour or by years once NTP
    # answers, and every keepalive would have run out then, or no deadline would come until the clock had caught up.
    reactor.seconds = monotonic  # type: ignore[method-assign]  # that is the place for it
    reactor.getThreadPool().threadFactory = PatientlessThread  # type: ignore[attr-defined]  # every reactor has one
    notifier = Notifier.from_environment(os.environ, os.getpid())
    try:
        service = _Service(options.config, reactor, notifier=notifier, reread=lambda: config_from(options.given))
    except ConfigError as error:
        # twistd has a traceback for any exception here, a UsageError too; nothing runs yet that would have to be ended.
        raise SystemExit(f"mqtts-gateway: {explained(error)}") from None
    service.observer = make_observer(options.config.log.format, getattr(options, "parent", None) or {})
    return service
