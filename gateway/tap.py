"""`twistd mqtts-gateway`: options in, service out.

In: the command line.  Out: a `GatewayService`, or a usage error that names everything that is wrong (exit status 1).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic

from twisted.application.service import IService
from twisted.python import usage

from gateway.config import Config
from gateway.errors import ConfigError
from gateway.flags import FLAGS, Flag, config_from, explained
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


def _handler(flag: Flag) -> Callable[[Options, str], None]:
    def take(options: Options, value: str) -> None:
        options.given.setdefault(flag.name, []).append(value)

    take.__doc__ = flag.help
    return take


for _flag in FLAGS:
    # What Twisted looks for: a method for each option, its docstring the help.  optParameters know no repetition.
    setattr(Options, f"opt_{_flag.name}", _handler(_flag))


class _Service(GatewayService):
    """The gateway as twistd runs it."""

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


def makeService(options: Options) -> IService:
    """Build the service.  A certificate or a key that cannot be used ends the process with status 1."""
    # Not at the top: twistd chooses the reactor after it has loaded this module.
    from twisted.internet import reactor

    # Twisted's clock is the time of day.  A box without a clock battery has it set by an hour or by years once NTP
    # answers, and every keepalive would have run out then, or no deadline would come until the clock had caught up.
    reactor.seconds = monotonic  # type: ignore[method-assign]  # that is the place for it
    try:
        return _Service(options.config, reactor)
    except ConfigError as error:
        # twistd has a traceback for any exception here, a UsageError too; nothing runs yet that would have to be ended.
        raise SystemExit(f"mqtts-gateway: {explained(error)}") from None
