"""The flags of `twistd mqtts-gateway` and of `mqtts-gateway check`: the same, from one list.

In: flags as given, each with all its values.  Out: `Config`, or `ConfigError` with every problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from gateway.config import Config, from_flags, load_file
from gateway.config.directory import RuleFiles
from gateway.errors import ConfigError


@frozen
class Flag:
    """One flag: its name as `from_flags` calls it, the word for its value, what it does."""

    name: str
    value: str
    meaning: str
    repeatable: bool = True

    @property
    def option(self) -> str:
        """How it is written on a command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def is_path(self) -> bool:
        """Whether its values are paths of files."""
        return self.value == "FILE"

    @property
    def help(self) -> str:
        """What it does, for people."""
        return f"{self.meaning} Repeatable." if self.repeatable else self.meaning


CONFIG = Flag("config", "FILE", "Read everything from this TOML file.", repeatable=False)

FLAGS = (
    CONFIG,
    Flag("listen", "ENDPOINT", "Where devices connect: [HOST:]PORT or a Twisted endpoint description. Default: 1883."),
    Flag("upstream", "HOST[:PORT]", "The broker; if there are several, in order of preference. Default port: 8883."),
    Flag("ca_file", "FILE", "Trust the certificates in this PEM file, and no others. Default: the platform's roots."),
    Flag("client_cert", "FILE", "Show this certificate (PEM, with its chain) to the broker.", repeatable=False),
    Flag("client_key", "FILE", "The key of --client-cert (PEM). Default: it is in the same file.", repeatable=False),
    Flag(
        "client_key_password_file",
        "FILE",
        "The passphrase of --client-key, or of a PKCS #12 file, is in this file.",
        repeatable=False,
    ),
    Flag("server_name", "NAME", "Verify the broker as this name, and send it as SNI. Once for all, or once for each."),
    Flag("crl_file", "FILE", "Refuse certificates that these CRLs (PEM) revoke; every CA in the chain needs one."),
    Flag(
        "proxy",
        "URL",
        "Connect through this proxy: http://, https:// or socks5://HOST[:PORT]; `environment` reads HTTPS_PROXY.",
        repeatable=False,
    ),
    Flag("alpn", "PROTOCOL", "Require this application protocol of the broker."),
    Flag("pin", "sha256/BASE64", "Require this public key in the broker's chain."),
    Flag(
        "status",
        "[HOST:]PORT",
        "Serve the status page and metrics here: a port of loopback, or a UNIX socket. Default: nowhere.",
        repeatable=False,
    ),
    Flag("allow", "NETWORK", "Admit devices from this network, and no others. Default: loopback and private networks."),
)


def config_from(given: Mapping[str, Sequence[str]], known: RuleFiles | None = None) -> Config:
    """Return the `Config` for the flags, which may include `config`; a flag with no values was not given.

    `known` has the rules for devices that were read before.
    Raises `ConfigError` with all problems.
    """
    values = {name: list(of_flag) for name, of_flag in given.items() if of_flag}
    problems = [
        f"{flag.option}: give it once" for flag in FLAGS if not flag.repeatable and len(values.get(flag.name, ())) > 1
    ]
    if CONFIG.name in values:
        problems += [
            f"{flag.option}: not allowed together with --config; put it into the file"
            for flag in FLAGS
            if flag.name in values and flag is not CONFIG
        ]
    elif "upstream" not in values:
        problems.append("no broker is configured: give --config FILE, or --upstream HOST[:PORT]")
    if problems:
        raise ConfigError(problems)
    if CONFIG.name in values:
        return load_file(Path(values[CONFIG.name][0]), known=known)
    arguments: dict[str, Any] = {
        flag.name: values[flag.name] if flag.repeatable else values[flag.name][0]
        for flag in FLAGS
        if flag.name in values
    }
    return from_flags(**arguments)


def explained(error: ConfigError) -> str:
    """Return all problems as lines."""
    return "the configuration cannot be used:\n" + "\n".join(f"  {problem}" for problem in error.problems)
