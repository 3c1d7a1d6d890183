"""`mqtts-gateway init`: write a commented configuration.

In: a path.  Out: the file, and the next steps.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from gateway.cli.report import complain
from gateway.config import Upstream, from_flags, template_text
from gateway.errors import ConfigError

_DEFAULT = "mqtts-gateway.toml"
_HOST = 'host = "broker.example.com"\n'
_PORT = "#port = 8883\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `init`."""
    parser.add_argument(
        "file", nargs="?", default=_DEFAULT, metavar="FILE", help=f"where to write, - for stdout (default: {_DEFAULT})"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    parser.add_argument("--upstream", metavar="HOST[:PORT]", help="the broker to fill in")


def run(arguments: argparse.Namespace) -> int:
    """Write the configuration; return 0, or 1 on failure."""
    text = template_text()
    if arguments.upstream is not None:
        try:
            text = filled_in(text, from_flags(upstream=[arguments.upstream]).upstream[0])
        except ConfigError as error:
            for problem in error.problems:
                complain(problem)
            return 1
    if arguments.file == "-":
        sys.stdout.write(text)
        return 0
    path = Path(arguments.file)
    try:
        _write(path, text, force=arguments.force)
    except (OSError, ValueError) as error:
        complain(f"{path} {_what_is_wrong(path, error)}")
        return 1
    print(_next_steps(path, host_is_set=arguments.upstream is not None))
    return 0


def filled_in(text: str, upstream: Upstream) -> str:
    """Return the template with the broker's address instead of the example."""
    # A validated host needs no escaping in TOML.
    text = text.replace(_HOST, f'host = "{upstream.host}"\n', 1)
    port = f"port = {upstream.port}\n"
    return text if f"#{port}" == _PORT else text.replace(_PORT, port, 1)


def _write(path: Path, text: str, *, force: bool) -> None:
    """Write a file that is readable by all: it contains no secret, and the service has its own user."""
    if force:
        # In place, so that a link, a device, the owner and the mode stay as they are.
        path.write_text(text, encoding="utf-8")
        return
    with path.open("x", encoding="utf-8") as file:
        try:
            os.fchmod(file.fileno(), 0o644)  # whatever the umask is
            file.write(text)
            file.flush()
        except OSError:
            path.unlink()
            raise


def _what_is_wrong(path: Path, error: OSError | ValueError) -> str:
    # With `x`, open() reports an existing directory the same way.
    if isinstance(error, FileExistsError | IsADirectoryError) and path.is_dir():
        return "is a directory: name a file in it"
    if isinstance(error, FileExistsError):
        return "already exists; use --force to overwrite it"
    cause = error.strerror if isinstance(error, OSError) else error
    if isinstance(error, FileNotFoundError) and not path.parent.exists():
        return f"cannot be written: {cause}; create the directory first: mkdir -p {shlex.quote(str(path.parent))}"
    return f"cannot be written: {cause}"


def _next_steps(path: Path, *, host_is_set: bool) -> str:
    file = shlex.quote(str(path))
    return "\n".join(
        [
            f"wrote {path}; next:",
            *([] if host_is_set else [f"  edit {file}: set at least host under [[upstream]]"]),
            f"  mqtts-gateway check --config {file}",
            f"  twistd --nodaemon --pidfile= mqtts-gateway --config {file}",
        ]
    )
