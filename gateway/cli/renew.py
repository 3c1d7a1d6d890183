"""`mqtts-gateway device renew`: renew certificates now, by hand or from a timer.

In: a configuration, a Client Identifier.  Out: replaced files, a line for each certificate, an exit status.
"""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from random import random
from typing import Any

from attrs import evolve
from twisted.internet.threads import deferToThreadPool

from gateway.cli import device_reissue
from gateway.cli.check import run_in_reactor
from gateway.cli.device_files import DeviceProblem, exact_pattern
from gateway.cli.device_rules import Rules
from gateway.cli.report import complain
from gateway.cli.service_view import ServiceView
from gateway.config import Config, load_file
from gateway.config.devices import BrokenRule
from gateway.dial.dialler import Dialler, Target
from gateway.dial.health import accounts
from gateway.dial.proxy import proxy_routes
from gateway.errors import UpstreamFailure
from gateway.net.network import ReactorNetwork
from gateway.net.transport import RelayReactor
from gateway.ops.renewal import OWN, Renewer, whose
from gateway.rules.secrets import Programs
from gateway.text import printable, unprintable_escaped
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import make_policies
from gateway.tls.renewal import Renewable, RenewalFailed, due_at, read_held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `device renew`."""
    parser.add_argument(
        "client_id", metavar="ID", nargs="?", help="the Client Identifier, or the name of a rule (default: [tls])"
    )
    parser.add_argument("--ca-cert", metavar="FILE", help="issue the device's certificate from this CA, for its key")
    parser.add_argument("--ca-key", metavar="FILE", help="the private key of --ca-cert")
    parser.add_argument("--days", type=int, default=730, help="its validity in days (default: %(default)s)")
    parser.add_argument("--cert", metavar="FILE", help="install this certificate, issued for the device's key")
    parser.add_argument("--due", action="store_true", help="renew all certificates that are due, [tls] included")


def run(arguments: argparse.Namespace) -> int:
    """Renew; return 0, or 1 if a certificate was not renewed."""
    if device_reissue.is_asked_for(arguments):
        return device_reissue.reissue(Rules.of(Path(arguments.config)), arguments)
    config = _as_service(load_file(Path(arguments.config)), Path(arguments.config).absolute())
    status = 0
    chosen = _due(config) if arguments.due else [_chosen(config, arguments.client_id)]
    if arguments.due and arguments.client_id is not None:
        raise DeviceProblem("ID and --due cannot be used together")
    if not chosen:
        print("no certificate is due")
        return 0

    async def renew(reactor: Any) -> None:
        nonlocal status
        relay = RelayReactor(reactor)
        relay.start()
        dialler = _dialler(config, relay, reactor)
        renewer = Renewer(
            programs=Programs(reactor, reactor, shows_errors=True),
            in_thread=lambda work: deferToThreadPool(reactor, reactor.getThreadPool(), work),
            now=lambda: datetime.now(UTC),
            current=lambda: (config, dialler),
        )
        try:
            for name, table in chosen:
                try:
                    renewed = await renewer.renew(table)
                except RenewalFailed as problem:
                    complain(f"{whose(name)}: {unprintable_escaped(str(problem), 2000)}")
                    status = 1
                else:
                    print(f"{whose(name)}: renewed, valid until {renewed.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
        finally:
            dialler.stop()
            relay.stop()

    from twisted.internet import reactor  # imported late: the first import installs the reactor

    run_in_reactor(reactor, renew(reactor))
    return status


def _as_service(config: Config, file: Path) -> Config:
    """Return the configuration with the files in place of the service's credentials, which only the service has."""
    view = ServiceView.of(file)

    def read(table: Any) -> Any:
        path = None if view is None else view.credential_file(table.client_key_password_credential)
        if path is None:
            return table
        return evolve(table, client_key_password_file=path, client_key_password_credential="")

    return evolve(config, tls=read(config.tls), device=tuple(read(device) for device in config.device))


def _chosen(config: Config, client_identifier: str | None) -> tuple[str, Renewable]:
    """Return what to renew.  Raises `DeviceProblem`."""
    if client_identifier is None:
        if not config.tls.renew_command:
            raise DeviceProblem("[tls] has no renew_command. Set one, or name a device")
        return OWN, config.tls
    pattern = exact_pattern(client_identifier)
    for device in config.device:
        if not isinstance(device, BrokenRule) and (
            device.match_client_id == (pattern,) or device.name == client_identifier
        ):
            if not device.renew_command:
                raise DeviceProblem(
                    f'the rule for "{printable(client_identifier)}" has no renew_command. Set one; or, if '
                    "`device add` or `device import` wrote the rule, give the new certificate with --cert, or the CA "
                    "with --ca-cert and --ca-key"
                )
            return device.name, device
    raise DeviceProblem(f'there is no rule for "{printable(client_identifier)}", and none has this name')


def _due(config: Config) -> list[tuple[str, Renewable]]:
    """Return what is due, and what cannot be read: to renew it says why."""
    tables: list[tuple[str, Renewable]] = [
        (OWN, config.tls),
        *((device.name, device) for device in config.device if not isinstance(device, BrokenRule)),
    ]
    now = datetime.now(UTC)
    due: list[tuple[str, Renewable]] = []
    for name, table in tables:
        if not table.renew_command:
            continue
        try:
            is_due = now >= due_at(read_held(table).leaf)
        except RenewalFailed:
            is_due = True
        if is_due:
            due.append((name, table))
    return due


def _dialler(config: Config, relay: RelayReactor, reactor: Any) -> Dialler:
    policies = make_policies(config)
    proxies = proxy_routes(config, os.environ, random)
    targets = [
        Target(upstream, Identity.of(upstream.verify_name), policies[config.algorithms(upstream)], proxy)
        for upstream, proxy in zip(config.upstream, proxies, strict=True)
    ]
    vias = [proxy.health if proxy is not None else None for proxy in proxies]
    healths = accounts(config.upstream, config.failover, random, (), vias, judged_alike=False)
    return Dialler(targets, healths, ReactorNetwork(relay), reactor, config, _Silent(), reactor)


class _Silent:
    """See `gateway.dial.dialler.DialJournal`: the result says what failed."""

    def passed_over(self, upstream: str, failure: UpstreamFailure) -> None:
        """No session is served."""

    def left_alone(self, upstream: str, failure: UpstreamFailure, seconds: float) -> None:
        """The failure is part of the result."""

    def serves_again(self, upstream: str) -> None:
        """The result says it."""
