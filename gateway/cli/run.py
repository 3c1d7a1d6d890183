"""`mqtts-gateway run`: the gateway in the foreground, with the flags of `check`.

In: a command line.  Out: `twistd -n --pidfile= mqtts-gateway` with the same flags, in this process.
"""

from __future__ import annotations

import argparse
import sys

from gateway.config.flags import FLAGS, config_from, explained
from gateway.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; they are those of `check` and of `twistd mqtts-gateway`."""
    for flag in FLAGS:
        text = flag.help.replace("%", "%%")
        parser.add_argument(flag.option, dest=flag.name, action="append", metavar=flag.value, help=text, default=[])


def run(arguments: argparse.Namespace) -> int:
    """Run until SIGTERM or Ctrl-C.  Returns 1 if the configuration cannot be used; does not return otherwise."""
    given = {flag.name: list(getattr(arguments, flag.name)) for flag in FLAGS}
    try:
        config_from(given)
    except ConfigError as error:
        print(f"mqtts-gateway: {explained(error)}", file=sys.stderr)
        return 1
    # Imported late: twistd chooses the reactor.
    from twisted.scripts.twistd import run as run_twistd

    words = [word for flag in FLAGS for value in given[flag.name] for word in (flag.option, value)]
    sys.argv = ["twistd", "--nodaemon", "--pidfile=", "mqtts-gateway", *words]
    run_twistd()
    return 0
