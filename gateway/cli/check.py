"""`mqtts-gateway check`: open a session step by step, with a remedy for each step that fails.

In: the flags of `twistd mqtts-gateway`.  Out: a report on stdout, and the exit status: 0, 1 if a step failed, 2 for
warnings under --strict.  With --files it does not use the network; the service runs it before a reload.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Coroutine, Mapping
from ipaddress import ip_address
from pathlib import Path
from random import random
from typing import Any, TypeAlias, TypeVar

from attrs import evolve, frozen
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.error import ReactorNotRunning
from twisted.internet.protocol import Factory
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from gateway import MADE
from gateway.cli.certificates import now
from gateway.cli.connected import listeners_of_gateway, why_not_to_connect
from gateway.cli.device_identity import NOT_ADMITTED, Guise, put_on, with_clean_session
from gateway.cli.files import file_steps
from gateway.cli.login import Login, make_login
from gateway.cli.openssl import s_client_command
from gateway.cli.places import Places
from gateway.cli.probe import Probe, upstream_steps
from gateway.cli.report import Report, Status, Step, TextView, complain
from gateway.cli.service_view import ServiceView
from gateway.cli.store_check import store_step
from gateway.config import TLS, Config, DeviceRule, Listener, Upstream
from gateway.config.algorithms import Algorithms
from gateway.config.flags import CONFIG, FLAGS, config_from
from gateway.config.listen import is_open_to_all, listening_at
from gateway.dial.dialler import Target
from gateway.dial.proxy import proxy_routes
from gateway.dial.websocket import websocket_routes
from gateway.errors import ConfigError
from gateway.net.listening import ListenFailed, listen
from gateway.net.network import ReactorNetwork
from gateway.net.transport import RelayReactor
from gateway.relay.core import engine
from gateway.rules.secrets import Programs
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import make_policies
from gateway.tls.trust import TLSPolicy

# Used without flags, if it exists.
_DEFAULT = Places(Path("/")).config
_Table = TypeVar("_Table", TLS, DeviceRule)
_Policies: TypeAlias = Mapping[Algorithms, TLSPolicy]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `check`."""
    gateway = parser.add_argument_group("the gateway (the options of `twistd mqtts-gateway`)")
    for flag in FLAGS:
        text = flag.help.replace("%", "%%")
        gateway.add_argument(flag.option, dest=flag.name, action="append", metavar=flag.value, help=text)
    login = parser.add_argument_group("the test session")
    login.add_argument("--client-id", metavar="ID", help="its Client Identifier (default: a random one)")
    login.add_argument("--device", metavar="ID", help="use this device's identity, as its rule says")
    login.add_argument(
        "--from", dest="address", metavar="ADDRESS", help="the address --device connects from (default: from its rule)"
    )
    login.add_argument("--listener", default="", metavar="NAME", help="the listener that --device connects to")
    login.add_argument(
        "--connect", action="store_true", help="send CONNECT also if the device is connected, which ends its session"
    )
    login.add_argument(
        "--status-password-file",
        type=Path,
        metavar="FILE",
        help="the file with the password of the running gateway's status, which says what is connected",
    )
    login.add_argument("--username", metavar="NAME", help="its user name (default: none)")
    login.add_argument("--password-file", metavar="FILE", help="the file with its password (default: none)")
    output = parser.add_argument_group("the report")
    output.add_argument("--files", action="store_true", help="check the configuration and its files only")
    output.add_argument("--offline", action="store_true", help="skip the steps that need the broker")
    output.add_argument("--quiet", action="store_true", help="show warnings and failures only")
    output.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    output.add_argument("--strict", action="store_true", help="exit with status 2 if there are warnings")


def run(arguments: argparse.Namespace) -> int:
    """Check and report; return the exit status."""
    try:
        login = make_login(_identifier(arguments), arguments.username, arguments.password_file)
        worn = None if arguments.device is None else _Worn(_address(arguments.address), arguments.listener)
    except ValueError as error:
        complain(str(error))
        return 1
    given = {flag.name: getattr(arguments, flag.name) or [] for flag in FLAGS}
    if not any(given.values()) and _DEFAULT.exists():
        given[CONFIG.name] = [str(_DEFAULT)]
    view = TextView(sys.stdout, quiet=arguments.quiet)
    report = Report((lambda _: None) if arguments.json else view.show)
    from twisted.internet import reactor  # imported late: the first import installs the reactor

    if arguments.files:
        examine_files(given, report, running=True)
    else:
        coroutine = examine(
            reactor,
            given,
            login,
            report,
            worn,
            offline=arguments.offline,
            connect_anyway=arguments.connect,
            status_password_file=arguments.status_password_file,
        )
        run_in_reactor(reactor, coroutine)
    view.end()
    if arguments.json:
        print(report.as_json(quiet=arguments.quiet, strict=arguments.strict))
    elif report.commands and not arguments.quiet:
        print("The same by hand:", *report.commands, sep="\n")
    return report.exit_status(strict=arguments.strict)


@frozen
class _Worn:
    """The device whose identity is used: its address and its listener."""

    address: str
    listener: str


def _identifier(arguments: argparse.Namespace) -> str | None:
    """Return the chosen Client Identifier.  Raises `ValueError`."""
    chosen: str | None = arguments.client_id
    device: str | None = arguments.device
    if device is None:
        if arguments.address is not None or arguments.listener:
            raise ValueError("--from and --listener require --device")
        return chosen
    if chosen is not None:
        raise ValueError("--client-id cannot be used with --device")
    return device


def _address(text: str | None) -> str:
    """Return the given IP address, or an empty string.  Raises `ValueError`."""
    if text is not None:
        try:
            ip_address(text)
        except ValueError:
            raise ValueError(f"--from: {text} is not an IP address") from None
    return text or ""


def run_in_reactor(reactor: Any, coroutine: Coroutine[Deferred[Any], Any, None]) -> None:
    """Run a coroutine to its end.  Raises what it raises, and `KeyboardInterrupt` if the reactor was stopped before.

    Like `twisted.internet.task.react`, which however treats an interruption as success.
    """
    results: list[object] = []

    def begin() -> None:
        task = Deferred.fromCoroutine(coroutine)
        reactor.addSystemEventTrigger("before", "shutdown", task.cancel)
        task.addBoth(results.append)
        task.addBoth(lambda _: stop())

    def stop() -> None:
        with contextlib.suppress(ReactorNotRunning):  # raised while it is stopping, too
            reactor.stop()

    reactor.callWhenRunning(begin)
    reactor.run()
    result = results[0] if results else None
    if isinstance(result, Failure):
        if result.check(CancelledError):
            raise KeyboardInterrupt
        result.raiseException()


def examine_files(
    given: dict[str, list[str]], report: Report, *, running: bool = False
) -> tuple[Config | None, _Policies | None]:
    """Check whether a gateway can start with this; return what sessions use, if so.

    `running` means that a gateway is expected to run, and to use its store.
    """
    try:
        config = config_from(given)
    except ConfigError as error:
        for problem in error.problems:
            report.add(Step("configuration", Status.FAIL, problem))
        _skip(["file"], "the configuration cannot be used", report)
        return None, None
    source = given[CONFIG.name][0] if given[CONFIG.name] else "the flags"
    counts = f"{_count(config.listen, 'listener')}, {_count(config.upstream, 'upstream')}"
    report.add(Step("configuration", Status.PASS, f"{source}: {counts}"))
    view = None
    if given[CONFIG.name] and os.geteuid() == 0:
        view = ServiceView.of(Path(source).absolute())
        obstacle = view.obstacle(Path(source)) if view is not None else ""
        if view is not None and obstacle:
            message = f"{source}: {view.unit} cannot read it: {obstacle}"
            report.add(Step("file", Status.FAIL, message, f"chmod o+r {source}; directories above it need o+x."))
    if view is not None:
        config = _with_files(config, view)
    policy = _files(config, view, report)
    store = store_step(config, view, with_lock=not running)
    if store is not None:
        report.add(store)
    return config, policy


async def examine(
    reactor: Any,
    given: dict[str, list[str]],
    login: Login,
    report: Report,
    worn: _Worn | None = None,
    *,
    offline: bool = False,
    connect_anyway: bool = False,
    status_password_file: Path | None = None,
) -> None:
    """Run all steps; if `offline`, only those that need no broker; with `worn`, as that device.

    With `connect_anyway`, CONNECT is sent also for a device that has a session; what has one, and which ports are the
    running gateway's own, is asked with the password in `status_password_file`.
    """
    config, policies = examine_files(given, report)
    if config is None:
        _skip(["listen"], "the configuration cannot be used", report)
        report.add(_clock())
        report.add(_engine(wanted=True))
        if not offline:
            _skip(upstream_steps(TLS()), "the configuration cannot be used", report)
        return
    relay = RelayReactor(reactor)
    relay.start()
    try:
        endpoints = [("listen", listener) for listener in config.listen]
        if config.status.endpoint:
            endpoints.append(("status", Listener(config.status.endpoint)))
        known: frozenset[str] | None = None
        for name, listener in endpoints:
            step, in_use = await _listen(relay, listener, name)
            if in_use:
                known = (
                    await deferToThread(listeners_of_gateway, config, status_password_file) if known is None else known
                )
                if listening_at(listener.endpoint) in known:
                    step = Step(name, Status.PASS, f"{listener.endpoint}: the running gateway listens there")
            report.add(step)
        report.add(_clock())
        report.add(_engine(wanted=config.relay.engine == "auto"))
        guise = None
        if worn is not None:
            guise = await put_on(config, login, worn.address, worn.listener, reactor, report.add)
        if offline:
            return
        if worn is not None and guise is None:
            for upstream in config.upstream:
                _skip(upstream_steps(config.tls), NOT_ADMITTED, report, upstream.address)
            return
        tls, shown = config.tls, policies
        if guise is not None and guise.device is not None and guise.policies is not None:
            shown = guise.policies
            tls = evolve(
                tls,
                client_cert=guise.device.client_cert,
                client_key=guise.device.client_key,
                client_key_password_file=guise.device.client_key_password_file,
                client_key_password_credential=guise.device.client_key_password_credential,
                renew_command=(),
                rotate_key=False,
            )
        try:
            proxies = dict(zip(config.upstream, proxy_routes(config, os.environ, random), strict=True))
            websockets = dict(zip(config.upstream, websocket_routes(config, Programs(reactor, reactor)), strict=True))
        except ConfigError as error:
            for problem in error.problems:
                report.add(Step("upstream", Status.FAIL, problem, "Correct the key, or the file that it names."))
            return
        stops = await _why_not_to_connect(config, login, worn, status_password_file, connect_anyway=connect_anyway)
        for upstream in _led_to(config, guise):
            if policies is None or shown is None:
                _skip(upstream_steps(config.tls), "the files cannot be used", report, upstream.address)
                continue
            algorithms = config.algorithms(upstream)
            policy, proxied, websocket = shown[algorithms], proxies[upstream], websockets[upstream]
            target = Target(upstream, Identity.of(upstream.verify_name), policy, proxied, websocket)
            network = ReactorNetwork(relay)
            probe = Probe(target, config, network, reactor, login, report.add, guise, stops)
            await probe.run()
            if probe.made_session:
                # Nothing of the test stays at the broker.
                clean = None if guise is None else with_clean_session(guise, config)
                await Probe(target, config, network, reactor, evolve(login, clean=True), lambda _: None, clean).run()
            client = policy.own or policy.client
            client_chain = client is not None and len(client.chain) > 1
            proxy = target.proxy.server if target.proxy is not None else None
            if proxy is None or proxy.scheme == "http":
                named = _has_names(report, upstream)
                report.commands.append(
                    s_client_command(
                        upstream, tls.offering(algorithms), proxy, client_chain=client_chain, has_names=named
                    )
                )
    finally:
        relay.stop()


async def _why_not_to_connect(
    config: Config, login: Login, worn: _Worn | None, status_password_file: Path | None, *, connect_anyway: bool
) -> str:
    """Say why the test ends before CONNECT; empty if it does not."""
    if login.chose_identifier and not connect_anyway:
        why: str = await deferToThread(why_not_to_connect, config, login.client_identifier, status_password_file)
        return f"{why}; with --connect it is sent all the same" if why else ""
    own = [device for device in config.device if device.enabled]
    only_own = config.devices.unknown == "refuse" and config.tls.client_cert is None and bool(own)
    if worn is None and not login.chose_identifier and only_own and all(device.client_cert for device in own):
        return "each device has a certificate of its own, and others are refused: use --device ID"
    return ""


def _with_files(config: Config, view: ServiceView) -> Config:
    """Return the configuration with the files in place of the service's credentials, which only the service has."""

    def read(table: _Table) -> _Table:
        path = view.credential_file(table.client_key_password_credential)
        if path is None:
            return table
        return evolve(table, client_key_password_file=path, client_key_password_credential="")

    return evolve(config, tls=read(config.tls), device=tuple(read(device) for device in config.device))


def _has_names(report: Report, upstream: Upstream) -> bool:
    """Say whether the certificate that the broker showed has names of hosts; also if it showed none."""
    for step in reversed(report.steps):
        if step.name == "certificate" and step.upstream == upstream.address and "names" in step.facts:
            return any(name.startswith(("DNS:", "IP:")) for name in step.facts["names"])
    return True


def _led_to(config: Config, guise: Guise | None) -> list[Upstream]:
    """Return the upstreams to try: all, or those of a device."""
    if guise is None:
        return list(config.upstream)
    names = guise.device.upstream if guise.device is not None else ()
    if not names:
        return [upstream for upstream in config.upstream if upstream.default]
    return [upstream for name in names for upstream in config.upstream if upstream.name == name]


def _files(config: Config, view: ServiceView | None, report: Report) -> _Policies | None:
    """Check the files, and load what sessions use; `None` if that fails."""
    failed = False
    for step in file_steps(config, view):
        report.add(step)
        failed = failed or step.status is Status.FAIL
    try:
        return make_policies(config)
    except ConfigError as error:
        if not failed:
            for problem in error.problems:
                report.add(Step("file", Status.FAIL, problem))
        return None


async def _listen(reactor: Any, listener: Listener, name: str) -> tuple[Step, bool]:
    """Check whether an endpoint can be opened; return the step, and whether something else listens there."""
    endpoint = listener.endpoint
    if endpoint.startswith("systemd:"):
        return Step(name, Status.SKIP, f"{endpoint}: systemd opens it and passes it to the service"), False
    try:
        port = listen(reactor, listener, Factory())
    except ListenFailed as error:
        message = f"{endpoint}: {error.cause}"
        if error.in_use:
            remedy = f"If the running gateway uses it, ignore this; otherwise {error.remedy}."
            return Step(name, Status.WARN, message, remedy), True
        # Without a status page, devices are served all the same.
        return Step(name, Status.WARN if name == "status" else Status.FAIL, message, error.remedy), False
    await maybeDeferred(port.stopListening)
    if is_open_to_all(endpoint):
        message = f"{endpoint} can be opened; every user of this machine can connect"
        return Step(name, Status.WARN, message, "Use mode=660 or narrower."), False
    return Step(name, Status.PASS, f"{endpoint} can be opened"), False


def _clock() -> Step:
    time = now()
    message = f"{time:%Y-%m-%d %H:%M} UTC"
    if time >= MADE:
        return Step("clock", Status.PASS, message)
    remedy = "Set the clock, for example by NTP: certificate dates are checked against it."
    return Step("clock", Status.FAIL, f"{message} is earlier than this version's release date", remedy)


def _engine(*, wanted: bool) -> Step:
    choice = engine(wanted=wanted)
    return Step("engine", Status.WARN if choice.remedy else Status.PASS, choice.words, choice.remedy)


def _skip(names: list[str], why: str, report: Report, upstream: str = "") -> None:
    for name in names:
        report.add(Step(name, Status.SKIP, why, upstream=upstream))


def _count(things: tuple[object, ...], kind: str) -> str:
    return f"{len(things)} {kind}{'s' if len(things) > 1 else ''}"
