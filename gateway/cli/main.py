"""`mqtts-gateway`: run, check, setup, init, install, uninstall, reload, status, device, store, demo.

In: the command line.  Out: an exit status: 0; 1 for a failure, including a wrong command line; 130 if interrupted.
`check --strict` adds 2 for warnings; `status` adds 2 and 3 for problems of the gateway.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import Never

from gateway.ops.signals import note_early

if sys.argv[1:2] == ["run"]:
    # Before the other imports, which can take a second on a small machine: SIGHUP would end the gateway.
    note_early(signal.SIGHUP)

from gateway import __version__
from gateway.cli.report import complain
from gateway.config.flags import FLAGS
from gateway.text import capitalized

# Each is a module here with `add_arguments(parser)` and `run(arguments)`, imported on use: `demo` needs extra packages,
# and `init` does not need Twisted.
COMMANDS = {
    "run": "run the gateway in the foreground",
    "check": "test the configuration: open a session step by step",
    "setup": "ask for the broker and its certificates, test each answer, write the configuration",
    "init": "write a commented configuration",
    "install": "install this environment's gateway as a systemd service",
    "uninstall": "remove the service, keep its configuration",
    "reload": "have a running gateway read its configuration again, and wait for the result",
    "status": "show the state of a running gateway, or why a device is not connected",
    "device": "manage the directory of device rules",
    "store": "list, export or delete messages that wait on disk for a broker",
    "demo": "run a demo on this machine alone",
}
_INTERRUPTED = 130  # what shells report for a program that SIGINT ended


class _Parser(argparse.ArgumentParser):
    """Exits with 1 on a wrong command line; argparse's own 2 means warnings here."""

    def error(self, message: str) -> Never:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: {message}\n")


def console(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand with `arguments`, those of the process by default; return the exit status."""
    if sys.stdout is None:
        complain("standard output is closed")
        return 1
    # A terminal may be unable to show some characters, such as those of a certificate's subject; escape them.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # TextIO does not declare it
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        complain("interrupted")
        return _INTERRUPTED
    except OSError as error:
        # Most likely of standard output: the commands handle errors of the files they read and write.
        if not isinstance(error, BrokenPipeError):
            complain(f"cannot continue: {error.strerror or error}")
        # Python would raise it again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def command_line(loaded: Collection[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return the parser.  Only the commands in `loaded` have their options: each takes the import of its module."""
    parser = _Parser(prog="mqtts-gateway", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mqtts-gateway {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{capitalized(summary)}.", allow_abbrev=False)
        command.set_defaults(own_parser=command, hint="")
        if name in loaded:
            module = import_module(f"gateway.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _run(arguments: Sequence[str]) -> int:
    parser = command_line(arguments[:1])
    try:
        if arguments and arguments[0].partition("=")[0] in {flag.option for flag in FLAGS}:
            parser.error(f"name a command first, such as: mqtts-gateway run {shlex.join(arguments)}")
        parsed, unknown = parser.parse_known_args(arguments)
        if unknown:
            # argparse itself shows the usage of the whole program.
            parsed.own_parser.error(f"unrecognized arguments: {shlex.join(unknown)}{parsed.hint}")
    except SystemExit as end:
        # argparse has printed its answer already.
        return int(end.code or 0)
    status: int = parsed.run(parsed)
    return status


if __name__ == "__main__":
    sys.exit(console())
