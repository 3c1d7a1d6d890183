"""`mqtts-gateway reload`: have a running gateway read its configuration again, and wait for the result.

In: the gateway's reload socket.  Out: status 0 and a warning for each rule that cannot be used, or the problems and
status 1.

For `systemctl reload`, whose output goes to the journal, the gateway's own lines there say all this.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from gateway.cli.report import complain
from gateway.ops.logs import is_journal
from gateway.ops.reload_port import DONE, NAME
from gateway.text import printable, unprintable_escaped

_DEFAULT_DIRECTORY = "/run/mqtts-gateway"
# systemd's own limit for a reload is 90 s (TimeoutStartSec=).
_PATIENCE = 85.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    directory = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or _DEFAULT_DIRECTORY
    parser.add_argument(
        "--socket",
        type=Path,
        default=Path(directory) / NAME,
        metavar="PATH",
        help="the gateway's reload socket (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Request a reload; return the exit status."""
    try:
        answer = _ask(arguments.socket)
    except TimeoutError:
        complain(f"the gateway has not answered within {_PATIENCE:.0f} s; its log says what came of the reload")
        return 1
    except OSError as error:
        complain(f"cannot reach the gateway at {printable(str(arguments.socket))}: {error.strerror or error}")
        return 1
    result, *lines = answer.splitlines() or [""]
    if not result:
        complain("the gateway gave no answer")
    elif not is_journal(sys.stderr, os.environ):
        _tell(result, [unprintable_escaped(line) for line in lines])
    return 0 if result == DONE else 1


def _tell(result: str, lines: list[str]) -> None:
    if result == DONE:
        for line in lines:
            complain(f"warning: {line}")
        if lines:
            remedy = "Correct what each line names; after changing a rule, reload again"
            complain(f"the devices of these rules are refused. {remedy}")
        return
    complain("reload refused, previous configuration still active")
    for line in lines:
        complain(f"  {line}")


def _ask(path: Path) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE)
        connection.connect(str(path))
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts).decode(errors="replace")
