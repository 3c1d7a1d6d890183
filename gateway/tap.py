"""`twistd mqtts-gateway`: options in, service out.

In: the command line.  Out: a `GatewayService`, or a usage error that names everything that is wrong (exit status 1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.application.service import IService
from twisted.python import usage

from gateway.config import Config, from_flags, load_file
from gateway.errors import ConfigError
from gateway.service import GatewayService


class Options(usage.Options):
    """The command line of `twistd mqtts-gateway`."""

    synopsis = "[options]"
    longdesc = (
        "Accepts plain MQTT from devices and gives each session a TLS connection of its own to the broker, "
        "verified before a single MQTT byte leaves. Either --config FILE, or --upstream and the other options; "
        "`mqtts-gateway init` writes a commented FILE."
    )

    def __init__(self) -> None:
        super().__init__()
        self._flags: dict[str, list[str]] = {}
        self.config: Config

    def _add(self, flag: str, value: str) -> None:
        self._flags.setdefault(flag, []).append(value)

    def opt_config(self, path: str) -> None:
        """Read everything from this TOML file."""
        self._add("config", path)

    def opt_listen(self, endpoint: str) -> None:
        """Where devices connect: [HOST:]PORT or a Twisted endpoint description. Repeatable. Default: 1883."""
        self._add("listen", endpoint)

    def opt_upstream(self, address: str) -> None:
        """The broker: HOST[:PORT]. Repeatable, in order of preference. Default port: 8883."""
        self._add("upstream", address)

    def opt_ca_file(self, path: str) -> None:
        """Trust the certificates in this PEM file, and no others. Repeatable. Default: the platform's roots."""
        self._add("ca_file", path)

    def opt_client_cert(self, path: str) -> None:
        """Show this certificate (PEM, with its chain) to the broker."""
        self._add("client_cert", path)

    def opt_client_key(self, path: str) -> None:
        """The key of --client-cert (PEM). Default: it is in the same file."""
        self._add("client_key", path)

    def opt_server_name(self, name: str) -> None:
        """Verify the broker as this name, and send it as SNI. Once for all upstreams, or once for each."""
        self._add("server_name", name)

    def opt_crl_file(self, path: str) -> None:
        """Refuse certificates that these CRLs (PEM) revoke; every CA in the chain needs one. Repeatable."""
        self._add("crl_file", path)

    def opt_alpn(self, name: str) -> None:
        """Demand this application protocol of the broker. Repeatable."""
        self._add("alpn", name)

    def opt_pin(self, pin: str) -> None:
        """Demand this public key in the broker's chain: sha256/BASE64. Repeatable."""
        self._add("pin", pin)

    def opt_allow(self, network: str) -> None:
        """Let devices from this network in, and no others. Repeatable. Default: loopback and private networks."""
        self._add("allow", network)

    def postOptions(self) -> None:
        """Make the `Config`.  Raises `UsageError` with all problems."""
        try:
            self.config = config_from(self._flags)
        except ConfigError as error:
            raise usage.UsageError(explained(error)) from None


def config_from(flags: dict[str, Any]) -> Config:
    """Return the `Config` that flags give, `config` among them.  Raises `ConfigError`."""
    if "config" not in flags:
        return from_flags(**flags)
    others = sorted(flag for flag in flags if flag != "config")
    problems = [f"--{flag.replace('_', '-')}: not together with --config; put it into the file" for flag in others]
    if len(flags["config"]) > 1:
        problems.append("--config: give one file")
    if problems:
        raise ConfigError(problems)
    return load_file(Path(flags["config"][0]))


def explained(error: ConfigError) -> str:
    """Return all problems as lines."""
    return "the configuration cannot be used:\n" + "\n".join(f"  {problem}" for problem in error.problems)


def makeService(options: Options) -> IService:
    """Build the service.  Raises `UsageError` if a certificate or a key cannot be used."""
    # Not at the top: twistd chooses the reactor after it has loaded this module.
    from twisted.internet import reactor

    try:
        return GatewayService(options.config, reactor)
    except ConfigError as error:
        raise usage.UsageError(explained(error)) from None
