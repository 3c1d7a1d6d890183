"""From what a person wrote to a `Config`.

In: a TOML file, flags or a mapping.  Out: `Config`, or `ConfigError` with one line for each thing that is wrong.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import attrs

from gateway.config.schema import TLS, Config
from gateway.config.structure import structure
from gateway.config.words import quoted
from gateway.errors import ConfigError
from gateway.text import printable

_LARGEST_FILE = 1_048_576  # bytes; whoever names a device or a disk image by mistake gets an answer


def load_file(path: Path) -> Config:
    """Read a TOML file (UTF-8); relative paths in it start at its directory. Raises ConfigError."""
    shown = quoted(str(path), limit=4096)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError as error:
        remedy = "`mqtts-gateway init FILE` writes one"
        raise ConfigError([f"{shown} cannot be read: {error.strerror}; {remedy}"]) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError([f"{shown} cannot be read: {reason}"]) from None
    if len(content) > _LARGEST_FILE:
        raise ConfigError([f"{shown} is no configuration: it is larger than {_LARGEST_FILE} bytes"])
    try:
        text = content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{shown} is not UTF-8: see line {line}"]) from None
    if not text.strip():
        raise ConfigError([f"{shown} is empty: `mqtts-gateway init` writes a configuration to start from"])
    return from_mapping(_parse_toml(text, shown), path.absolute().parent)


def from_mapping(mapping: Mapping[str, Any], base: Path | None = None) -> Config:
    """Make a Config of what a TOML file holds.

    Relative paths start at `base`, which is the current directory if None. Raises ConfigError.
    """
    config = structure(mapping)
    return attrs.evolve(config, tls=_anchored(config.tls, Path.cwd() if base is None else base))


def from_flags(
    *,
    listen: Sequence[str] = (),
    upstream: Sequence[str] = (),
    server_name: Sequence[str] = (),
    ca_file: Sequence[str] = (),
    client_cert: str | None = None,
    client_key: str | None = None,
    crl_file: Sequence[str] = (),
    alpn: Sequence[str] = (),
    pin: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> Config:
    """Make the same Config of command-line flags; what is not given keeps its default.

    `upstream` holds `HOST[:PORT]`; `server_name` one name for all of them, or as many as there are upstreams. Relative
    paths start at the current directory. Raises ConfigError, whose lines name the flags.
    """
    tls = {
        "ca_file": list(ca_file),
        "client_cert": client_cert,
        "client_key": client_key,
        "crl_file": list(crl_file),
        "alpn": list(alpn),
        "pin": list(pin),
    }
    upstreams = [_split_upstream(text) for text in upstream]
    problems = []
    if len(server_name) in (1, len(upstreams)):
        names = list(server_name) * (len(upstreams) if len(server_name) == 1 else 1)
        for table, name in zip(upstreams, names, strict=True):
            table["server_name"] = name
    elif server_name:
        problems.append(
            f"server_name: {len(server_name)} names for {len(upstreams)} upstreams: give one for all, or one for each"
        )
    mapping: dict[str, Any] = {
        "upstream": upstreams,
        "tls": {key: value for key, value in tls.items() if value is not None and value != []},
    }
    if listen:
        mapping["listen"] = [{"endpoint": text} for text in listen]
    if allow:
        mapping["admission"] = {"allow": list(allow)}
    try:
        config = from_mapping(mapping)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems:
        raise ConfigError([_flag_line(problem) for problem in problems])
    return config


def template_text() -> str:
    """Give the commented configuration that `mqtts-gateway init` writes."""
    return resources.files("gateway.config").joinpath("template.toml").read_text(encoding="utf-8")


def _parse_toml(text: str, shown: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = printable(str(error))
        if found := re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message):
            message = f"line {found[2]}, column {found[3]}: {found[1]}"
        else:  # "(at end of document)", which is no place that one could go to
            last = text.rstrip().count("\n") + 1
            message = f"line {last}, at the end: {message.partition(' (at end')[0]}"
        raise ConfigError([f"{shown} is not TOML: {message}"]) from None
    except ValueError:  # Python refuses to read whole numbers of more than 4300 digits
        raise ConfigError([f"{shown} is no configuration: it holds a number that is absurdly long"]) from None
    except RecursionError:
        raise ConfigError([f"{shown} is no configuration: it is nested too deeply"]) from None


def _split_upstream(text: str) -> dict[str, Any]:
    """Split `HOST[:PORT]`; a bare IPv6 address, with its many colons, is all host."""
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*):([^:/]*)", text)
    if found is None:
        return {"host": text}
    host, port = found.groups()
    return {"host": host, "port": int(port) if re.fullmatch("[0-9]{1,9}", port) else port}


def _flag_line(problem: str) -> str:
    """Name the flag instead of the dotted key that it stands for."""
    key, _, message = problem.partition(": ")
    flag = [name for name in re.findall(r"[a-z_]+", key) if name in _FLAGS][-1]
    return f"--{flag.replace('_', '-')}: {'port: ' if key.endswith('.port') else ''}{message}"


_FLAGS = frozenset(inspect.signature(from_flags).parameters)


def _anchored(tls: TLS, base: Path) -> TLS:
    """Make every path absolute, so that it means the same after a daemon has changed its directory."""
    return attrs.evolve(
        tls,
        ca_file=tuple(base / path for path in tls.ca_file),
        ca_dir=tls.ca_dir and base / tls.ca_dir,
        client_cert=tls.client_cert and base / tls.client_cert,
        client_key=tls.client_key and base / tls.client_key,
        crl_file=tuple(base / path for path in tls.crl_file),
    )
