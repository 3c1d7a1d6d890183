"""`mqtts-gateway reload`: have a running gateway read its configuration again, and wait for the result.

In: the gateway's reload socket.  Out: nothing and status 0, or the problems and status 1.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

from gateway.cli.report import complain
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
    result, *problems = answer.splitlines() or [""]
    if result == DONE:
        return 0
    complain("reload refused, previous configuration still active" if result else "the gateway gave no answer")
    for problem in problems:
        complain(f"  {unprintable_escaped(problem)}")
    return 1


def _ask(path: Path) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE)
        connection.connect(str(path))
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts).decode(errors="replace")
