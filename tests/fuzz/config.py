"""The configuration: any bytes are a configuration that can be used, or are refused in words."""

from __future__ import annotations

import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gateway.config import Config, changed_keys, load_file
from gateway.config import load as load_module
from gateway.errors import ConfigError
from gateway.rules.rules import Rules

_UPSTREAM = b'[[upstream]]\nhost = "b.example"\n'

SEEDS = (
    _UPSTREAM,
    _UPSTREAM + b"port = 8883\nserver_name = 'x.example'\n[tls]\nca_file = ['a.pem']\nmin_version = '1.2'\n",
    _UPSTREAM + b'[[listen]]\nendpoint = "tcp:1883"\nproxies = ["10.0.0.0/8"]\n[admission]\nallow = ["::/0"]\n',
    _UPSTREAM + b'[[device]]\nmatch_client_id = ["a*", "b"]\nmatch_pattern = "x(?P<n>[0-9]+)"\nclient_id = "{n}"\n',
    _UPSTREAM + b'[[device]]\npublish = ["t/#"]\npublish_prefix = "p/"\nmax_qos = 1\nbound_to = "10.0.0.1"\n',
    _UPSTREAM + b"[timeouts]\ntcp = 1e999\n[limits]\nmax_packet_size = 256\n[status]\nendpoint = 'unix:/run/x'\n",
    _UPSTREAM + b"[devices]\nunknown = 'refuse'\nprofile = 'aws'\n[pacing]\nnew_sessions_per_second = nan\n",
    b"upstream = [{host = '[::1]', port = 0}]\n[log]\nformat = 'json'\n",
    b"\xef\xbb\xbf" + _UPSTREAM,
    b'upstream = {host = "b.example"}\nlisten = 1\n',
    b'"key\\u0041" = 1\n' + _UPSTREAM,
)


def _load(path: Path) -> Config | list[str]:
    try:
        return load_file(path, {})
    except ConfigError as error:
        return error.problems


def check(data: bytes) -> None:
    """Load a file twice, and make rules of what it says."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "gateway.toml"
        path.write_bytes(data)
        found, again = _load(path), _load(path)
    if isinstance(found, list):
        assert found == again
        assert found
        for line in found:
            assert line
            assert line.isprintable(), f"a line that is not printable: {line!r}"
            assert len(line) < 4000
        return
    table = tomllib.loads(data.decode("utf-8-sig"))
    # Two that say the same are the same, so that a reload changes nothing.
    assert isinstance(again, Config)
    assert "nan" in repr(table) or (again == found and not changed_keys(found, again))
    _is_usable(found)
    rules = list(Rules(found))
    assert len(rules) == len(found.device)


def _is_usable(config: Config) -> None:
    """Check what all that uses a configuration relies on."""
    assert config.upstream
    for upstream in config.upstream:
        assert upstream.host
        assert 1 <= upstream.port <= 65_535
    assert config.limits.max_packet_size >= 256
    for section in (config.timeouts, config.pacing, config.failover, config.drain):
        for name in section.__slots__ if hasattr(section, "__slots__") else ():
            value: Any = getattr(section, name, 0)
            assert not isinstance(value, float) or 0 <= value < 1e12, f"{name} is {value}"


def takes_any_port() -> None:
    """A port may be any number."""
    structure = load_module.structure

    def faulty(mapping: Any) -> Any:
        tables = mapping.get("upstream")
        ports = (
            [each.pop("port", None) for each in tables if isinstance(each, dict)] if isinstance(tables, list) else []
        )
        config = structure(mapping)
        for each, port in zip(config.upstream, ports, strict=False):
            if isinstance(port, int):
                object.__setattr__(each, "port", port)
        return config

    load_module.structure = faulty


def believes_that_tables_are_tables() -> None:
    """What should be a list of tables is taken for one before it is looked at."""
    structure = load_module.structure

    def faulty(mapping: Any) -> Any:
        for table in mapping.get("upstream", ()):
            table.get("host")
        return structure(mapping)

    load_module.structure = faulty


FAULTS = (takes_any_port, believes_that_tables_are_tables)
