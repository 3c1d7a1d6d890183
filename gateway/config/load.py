"""Loads a `Config`.

In: a TOML file, flags or a mapping.  Out: `Config`, or `ConfigError` with one line for each problem.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import attrs

from gateway.config.anchor import Anchor
from gateway.config.devices import BrokenRule, DeviceRule, anchored, cross_problems
from gateway.config.directory import RuleFiles, file_label, read_directory
from gateway.config.profiles import profiled, with_profile
from gateway.config.schema import TLS, Config, Upstream
from gateway.config.structure import structure, structure_device
from gateway.config.tables import read_table
from gateway.errors import ConfigError
from gateway.pieces import Pause, let_go, no_pause


def load_file(path: Path, environment: Mapping[str, str] = os.environ, known: RuleFiles | None = None) -> Config:
    """Read a TOML file (UTF-8); relative paths in it start at its directory, see `Anchor`. Raises ConfigError.

    `environment` says where the service's credentials are (CREDENTIALS_DIRECTORY, systemd.exec(5)).
    `known` has the rules for devices that were read before.  With it, as the gateway itself loads the file, a rule file
    that cannot be used becomes a `BrokenRule` and is no error.
    """
    table = read_table(path, "`mqtts-gateway init` writes a configuration to start from")
    return _made(table, Anchor.of(path.absolute().parent, environment.get("CREDENTIALS_DIRECTORY", "")), known)


def from_mapping(mapping: Mapping[str, Any], base: Path | None = None) -> Config:
    """Make a Config from the contents of a TOML file.

    Relative paths start at `base`, which is the current directory if None. Raises ConfigError.
    """
    return _made(mapping, Anchor.of(Path.cwd() if base is None else base))


def from_flags(
    *,
    listen: Sequence[str] = (),
    upstream: Sequence[str] = (),
    server_name: Sequence[str] = (),
    ca_file: Sequence[str] = (),
    client_cert: str | None = None,
    client_key: str | None = None,
    client_key_password_file: str | None = None,
    crl_file: Sequence[str] = (),
    alpn: Sequence[str] = (),
    pin: Sequence[str] = (),
    allow: Sequence[str] = (),
    proxy: str | None = None,
    status: str | None = None,
) -> Config:
    """Make a Config from command-line flags; flags not given keep their defaults.

    `upstream` holds `HOST[:PORT]`; `server_name` one name for all of them, or as many as there are upstreams. Relative
    paths start at the current directory. Raises ConfigError, whose lines name the flags.
    """
    tls = {
        "ca_file": list(ca_file),
        "client_cert": client_cert,
        "client_key": client_key,
        "client_key_password_file": client_key_password_file,
        "crl_file": list(crl_file),
        "alpn": list(alpn),
        "pin": list(pin),
    }
    upstreams = [_split_upstream(text) for text in upstream]
    if proxy is not None:
        for table in upstreams:
            table["proxy"] = proxy
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
    if status is not None:
        mapping["status"] = {"endpoint": f"127.0.0.1:{status}" if status.isdecimal() else status}
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
    """Return the commented configuration that `mqtts-gateway init` writes."""
    return resources.files("gateway.config").joinpath("template.toml").read_text(encoding="utf-8")


def _split_upstream(text: str) -> dict[str, Any]:
    """Split `HOST[:PORT]`; a bare IPv6 address, with its many colons, is all host."""
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*):([^:/]*)", text)
    if found is None:
        return {"host": text}
    host, port = found.groups()
    return {"host": host, "port": int(port) if re.fullmatch("[0-9]{1,9}", port) else port}


def _flag_line(problem: str) -> str:
    """Replace the dotted key by its flag."""
    key, _, message = problem.partition(": ")
    flag = [name for name in re.findall(r"[a-z_]+", key) if name in _FLAGS][-1]
    return f"--{flag.replace('_', '-')}: {'port: ' if key.endswith('.port') else ''}{message}"


# A file's name in front of a problem, as `file_label` writes it.
_LABEL = re.compile(r'"(?:[^"\\]|\\.)*"')
_FLAGS = frozenset(inspect.signature(from_flags).parameters)


def _made(mapping: Mapping[str, Any], anchor: Anchor, known: RuleFiles | None = None) -> Config:
    config = structure(profiled(mapping))
    upstreams = tuple(_anchored_upstream(upstream, anchor) for upstream in config.upstream)
    store = attrs.evolve(config.store, directory=config.store.directory and anchor(config.store.directory))
    status = attrs.evolve(
        config.status,
        server_cert=config.status.server_cert and anchor(config.status.server_cert),
        server_key=config.status.server_key and anchor(config.status.server_key),
    )
    config = attrs.evolve(config, upstream=upstreams, tls=_anchored(config.tls, anchor), store=store, status=status)
    return _with_devices(config, anchor, known)


def _anchored_upstream(upstream: Upstream, anchor: Anchor) -> Upstream:
    return attrs.evolve(
        upstream,
        request_file=upstream.request_file and anchor(upstream.request_file),
        proxy_password_file=upstream.proxy_password_file and anchor(upstream.proxy_password_file),
        proxy_ca_file=tuple(anchor(path) for path in upstream.proxy_ca_file),
    )


def _anchored(tls: TLS, anchor: Anchor) -> TLS:
    return attrs.evolve(
        tls,
        ca_file=tuple(anchor(path) for path in tls.ca_file),
        ca_dir=tls.ca_dir and anchor(tls.ca_dir),
        client_cert=tls.client_cert and anchor(tls.client_cert),
        client_key=tls.client_key and anchor(tls.client_key),
        client_key_password_file=tls.client_key_password_file and anchor(tls.client_key_password_file),
        crl_file=tuple(anchor(path) for path in tls.crl_file),
    )


def _with_devices(config: Config, anchor: Anchor, known: RuleFiles | None) -> Config:
    """Read the directory of rules; its files come before the configuration's own rules, which are the general ones."""
    own = [
        (label, attrs.evolve(anchored(device, anchor), name=device.name or label))
        for label, device in ((f"device[{index}]", device) for index, device in enumerate(config.device))
    ]
    directory = config.devices.directory
    profile = (config.devices.profile, config.upstream[0].host)
    in_files: list[tuple[Path, DeviceRule]] = []
    problems: list[str] = []
    if directory is not None:
        files, lenient = known or RuleFiles(), known is not None
        in_files, problems = read_directory(anchor(directory), anchor, profile, files, lenient=lenient)
    pause = no_pause if known is None else known.pause
    rules: list[tuple[str, DeviceRule]] = []
    for path, device in in_files:
        rules.append((file_label(path), device))
        pause()
    of_files = len(rules)
    rules += own
    everybody = with_profile(*profile, {})
    if everybody and config.devices.unknown == "pass" and not any(device.is_for_everybody for _, device in rules):
        # The broker's requirements hold for devices without a rule, too.
        name = f"devices.profile {config.devices.profile}"
        rules.append((name, attrs.evolve(structure_device(everybody), name=name)))
    names = ([upstream.name for upstream in config.upstream], [listener.name for listener in config.listen])
    problems += cross_problems(rules, *names, pause)
    problems += _default_problems(config, rules, pause)
    if known is not None and problems:
        rules, problems = _set_aside(rules, {label for label, _ in rules[:of_files]}, problems)
    if problems:
        raise ConfigError(problems)
    devices = attrs.evolve(config.devices, directory=directory and anchor(directory))
    found: list[DeviceRule] = []
    for _, device in rules:
        found.append(device)
        pause()
    let_go(in_files, pause)
    let_go(rules, pause)
    return attrs.evolve(config, devices=devices, device=tuple(found))


def _set_aside(
    rules: list[tuple[str, DeviceRule]], files: set[str], problems: list[str]
) -> tuple[list[tuple[str, DeviceRule]], list[str]]:
    """Make broken rules of those whose files have a problem; return the rules and the other problems."""
    of_files: dict[str, list[str]] = {}
    others: list[str] = []
    for problem in problems:
        label = _LABEL.match(problem)
        if label is not None and label[0] in files:
            of_files.setdefault(label[0], []).append(problem)
        else:
            others.append(problem)
    aside = [
        (label, BrokenRule.of(device, "; ".join(of_files[label])) if label in of_files else device)
        for label, device in rules
    ]
    return aside, others


def _default_problems(config: Config, rules: list[tuple[str, DeviceRule]], pause: Pause) -> list[str]:
    if any(upstream.default for upstream in config.upstream):
        return []
    lost: list[str] = []
    for label, device in rules:
        if not device.upstream and not isinstance(device, BrokenRule):
            lost.append(label)
        pause()
    if config.devices.unknown == "pass":
        lost.append("devices.unknown")
    return [f"{label}: no upstream has default = true, so these devices have no broker: name one" for label in lost]
