"""`mqtts-gateway`: check, init, install, uninstall, status, device, demo.

In: the command line.  Out: an exit status: 0; 1 if something failed, a wrong command line included; 130 if the user
interrupted.  `check --strict` has 2 for warnings; `status` has 2 and 3 for how the gateway is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Never

from gateway import __version__
from gateway.cli.report import complain

# Each is a module here with `add_arguments(parser)` and `run(arguments)`, imported only if it is asked for: `demo`
# needs packages that others do not, and `init` has no use for Twisted.
_COMMANDS = {
    "check": "go the way of a session and say what works",
    "init": "write a commented configuration",
    "install": "make this environment's gateway a service of systemd",
    "uninstall": "take the service away, and keep its configuration",
    "status": "say how a running gateway is, or why a device is silent",
    "device": "keep the directory of rules for devices",
    "demo": "show everything on this machine alone",
}
_INTERRUPTED = 130  # what shells give a program that SIGINT ended


class _Parser(argparse.ArgumentParser):
    """Ends with status 1 when the command line is wrong; argparse has 2, which here means warnings."""

    def error(self, message: str) -> Never:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: {message}\n")


def console(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand with `arguments`, those of the process by default; return the exit status."""
    if sys.stdout is None:
        complain("standard output is closed")
        return 1
    # A terminal may lack characters, such as those of a certificate's subject; that is no reason to stop.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # TextIO does not declare it
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        complain("interrupted")
        return _INTERRUPTED
    except OSError as error:
        # Standard output's, most likely: the commands handle the errors of what they read and write themselves.
        if not isinstance(error, BrokenPipeError):
            complain(f"cannot go on: {error.strerror or error}")
        # Python would meet it again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(arguments: Sequence[str]) -> int:
    parser = _Parser(prog="mqtts-gateway", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mqtts-gateway {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
        if arguments[:1] == [name]:
            module = import_module(f"gateway.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as end:
        # argparse's way to say that it has answered already.
        return int(end.code or 0)
    status: int = parsed.run(parsed)
    return status


if __name__ == "__main__":
    sys.exit(console())
