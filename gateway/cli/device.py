"""`mqtts-gateway device`: manage the directory of device rules.

In: a command line; a CSV file of devices.  Out: files in the directory, the next step, an exit status.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from gateway.cli import device_change, renew
from gateway.cli.device_files import (
    KEY_TYPES,
    PUBLIC,
    Authority,
    DeviceProblem,
    Files,
    Writer,
    as_argument,
    certificate_pem,
    check_common_name,
    exact_pattern,
    request_pem,
    rule_text,
    sync_directories,
)
from gateway.cli.device_list import identity_words, list_devices
from gateway.cli.device_reissue import issue_identity, write_key
from gateway.cli.device_rules import Rules
from gateway.cli.device_table import SALT_SIZE, NewDevice, Problems, read_table, value_of
from gateway.cli.report import complain
from gateway.config import DeviceRule
from gateway.config.devices import cross_problems
from gateway.config.passwords import hash_password
from gateway.config.structure import structure_device
from gateway.errors import ConfigError, Refusal
from gateway.rules.rules import Rule
from gateway.text import capitalized, printable
from gateway.tls.trust import read_certificates, read_private_key

_CONFIG = "/etc/mqtts-gateway/gateway.toml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `device`."""
    commands = parser.add_subparsers(metavar="ACTION", required=True)

    def command(name: str, action: Callable[[Rules, argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        each = commands.add_parser(name, help=summary, description=f"{capitalized(summary)}.", allow_abbrev=False)
        each.add_argument("--config", default=_CONFIG, metavar="FILE", help=f"the configuration (default: {_CONFIG})")
        each.set_defaults(
            run_device=lambda arguments: action(Rules.of(Path(arguments.config)), arguments), own_parser=each
        )
        return each

    add = command("add", _add, "write a device's rule, optionally with a key and a certificate")
    _identifier(add)
    _identity(add)
    add.add_argument("--cert", metavar="FILE", help="the certificate issued for the request made by --csr")
    add.add_argument("--common-name", metavar="NAME", help="common name of the certificate (default: ID)")
    add.add_argument("--lan-password", action="store_true", help="require a password from the device (prompted)")
    add.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a key of the rule, with its value as in TOML; repeatable",
    )
    listing = command("list", list_devices, "list devices with a rule, and whether each is connected")
    listing.add_argument("--json", action="store_true", help="output JSON")
    listing.add_argument(
        "--password-file", metavar="FILE", type=Path, help="read the status endpoint's password from this file"
    )
    listing.set_defaults(hint=". To show one device: mqtts-gateway device show ID")
    show = command("show", _show, "show one device's rule and certificate")
    _identifier(show)
    disabling = command("disable", device_change.disable, "refuse a device and end its session, and keep its rule")
    _identifier(disabling)
    enabling = command("enable", device_change.enable, "let a disabled device connect again")
    _identifier(enabling)
    password = command("set-password", device_change.set_password, "set the password that the device must send")
    _identifier(password)
    password.add_argument(
        "--broker", action="store_true", help="set the password for the broker instead, in a file of its own"
    )
    moving = command("move", device_change.move, "let a device use other brokers, or connect from another address")
    _identifier(moving)
    moving.add_argument(
        "--upstream", metavar="NAME", nargs="*", help="names of the upstreams to use; without a name, the default ones"
    )
    moving.add_argument(
        "--bound-to",
        metavar="NETWORK",
        nargs="*",
        help="the only networks or addresses that it may connect from; without one, all",
    )
    remove = command("remove", _remove, "remove a device's rule")
    _identifier(remove)
    remove.add_argument(
        "--keys", action="store_true", help="also delete its key, request, certificate and password permanently"
    )
    importing = command("import", _import, "add devices from a CSV file, all or none")
    importing.add_argument(
        "file", metavar="CSV", help="columns: id (the Client Identifier), password, common_name, and keys of rules"
    )
    importing.add_argument("--dry-run", action="store_true", help="show what would be added, and write nothing")
    _identity(importing)
    summary = "renew a certificate: with the rule's renew_command, a CA, or an issued certificate"
    renewing = commands.add_parser("renew", help=summary, description=f"{capitalized(summary)}.", allow_abbrev=False)
    renewing.add_argument("--config", default=_CONFIG, metavar="FILE", help=f"the configuration (default: {_CONFIG})")
    renew.add_arguments(renewing)
    renewing.set_defaults(run_device=renew.run, own_parser=renewing)


def _identifier(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("client_id", metavar="ID", help="the Client Identifier")


def _identity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csr", action="store_true", help="make a key and a certificate signing request")
    parser.add_argument("--ca-cert", metavar="FILE", help="make a key and issue a certificate from this CA")
    parser.add_argument("--ca-key", metavar="FILE", help="the private key of --ca-cert")
    parser.add_argument("--days", type=int, default=730, help="validity in days (default: %(default)s)")
    parser.add_argument("--key-type", choices=KEY_TYPES, default=KEY_TYPES[0], help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 1 on failure."""
    try:
        status: int = arguments.run_device(arguments)
    except (ConfigError, Problems) as error:
        for problem in error.problems:
            complain(problem)
        return 1
    except DeviceProblem as error:
        complain(str(error))
        return 1
    return status


def _add(rules: Rules, arguments: argparse.Namespace) -> int:
    issuer = _issuer(arguments)
    table = _set_keys(arguments.set)
    if arguments.lan_password:
        table["lan_password"] = hash_password(device_change.ask_password("Device password"), os.urandom(SALT_SIZE))
    identifier = arguments.client_id
    new = NewDevice(identifier, arguments.common_name or identifier, table)
    with Writer.all_or_nothing() as writer:
        if arguments.cert is not None:
            _with_certificate(rules, new, Path(arguments.cert), writer)
        else:
            _with_identity(rules, new, issuer, arguments, writer)
        rules.check_all()
    for path in writer.written:
        print(f"wrote {path}")
    if issuer is None and not arguments.csr:
        _tell_missing(rules, [new])
    request = shlex.quote(str(Files.of(rules.directory, identifier).request))
    _tell_next(rules, arguments, f"have {request} signed, then run", as_argument(identifier))
    return 0


def _import(rules: Rules, arguments: argparse.Namespace) -> int:
    """Add all devices in a file, or none if there is a problem with any of them."""
    devices, remarks = read_table(Path(arguments.file))
    for remark in remarks:
        print(remark, file=sys.stderr)
    issuer = _issuer(arguments)
    if arguments.dry_run:
        return _show_import(rules, devices, issuer, arguments)
    with Writer.all_or_nothing() as writer:
        _each(devices, arguments, lambda new: _with_identity(rules, new, issuer, arguments, writer))
        rules.check_all()
    print(f"{len(devices)} devices added; wrote {len(writer.written)} files in {rules.directory}")
    if issuer is None and not arguments.csr:
        _tell_missing(rules, [new for _, new in devices])
    _tell_next(rules, arguments, f"have each *.csr.pem in {rules.directory} signed, then run for each", "ID")
    return 0


def _each(
    devices: list[tuple[int, NewDevice]], arguments: argparse.Namespace, do: Callable[[NewDevice], object]
) -> None:
    """Do something with each device.  Raises `Problems` with the problems of all, by line."""
    problems = []
    for line, new in devices:
        try:
            do(new)
        except (DeviceProblem, ConfigError) as error:
            lines = error.problems if isinstance(error, ConfigError) else [str(error)]
            problems += [f"{arguments.file}: line {line}: {problem}" for problem in lines]
    if problems:
        raise Problems(problems)


def _show_import(
    rules: Rules, devices: list[tuple[int, NewDevice]], issuer: Authority | None, arguments: argparse.Namespace
) -> int:
    """Check everything that can be checked without writing, and show what would be added."""
    checked: list[tuple[str, DeviceRule]] = []

    def check(new: NewDevice) -> None:
        files = Files.of(rules.directory, new.client_identifier)
        _refuse_a_second(rules, new.client_identifier, files)
        if issuer is not None or arguments.csr:
            check_common_name(new.common_name)
        text = _check_rule(rules, new, new.table)
        checked.append((files.rule.name, structure_device(rules.filled(tomllib.loads(text)))))

    _each(devices, arguments, check)
    config = rules.config
    names = ([each.name for each in config.upstream], [each.name for each in config.listen])
    if problems := cross_problems(checked, *names):
        raise Problems(problems)
    for (_, new), (file, _) in zip(devices, checked, strict=True):
        keys = "".join(f", {key} = {_shown(key, value)}" for key, value in new.table.items())
        print(f'would add "{printable(new.client_identifier)}" as {file}{keys}')
    print(f"{len(devices)} devices would be added; nothing was written")
    return 0


def _with_identity(
    rules: Rules, new: NewDevice, issuer: Authority | None, arguments: argparse.Namespace, writer: Writer
) -> None:
    """Write a device's files: with a request, with a certificate from `issuer`, or only the rule."""
    files = Files.of(rules.directory, new.client_identifier)
    _refuse_a_second(rules, new.client_identifier, files)
    if issuer is None and not arguments.csr:
        _write_rule(rules, new, files, {}, writer)
        return
    if issuer is None:
        key = write_key(rules, files, arguments.key_type, writer)
        writer.write(files.request, request_pem(key, new.common_name), PUBLIC)
        # No rule yet: without its certificate, the device would use the gateway's.
        _check_rule(rules, new, new.table)
        return
    identity = issue_identity(rules, files, issuer, new.common_name, arguments.days, arguments.key_type, writer)
    _write_rule(rules, new, files, identity, writer)


def _with_certificate(rules: Rules, new: NewDevice, source: Path, writer: Writer) -> None:
    """Write the rule of a device whose certificate has been issued."""
    files = Files.of(rules.directory, new.client_identifier)
    _refuse_a_second(rules, new.client_identifier, files)
    try:
        chain = read_certificates(source)
    except ValueError as error:
        raise DeviceProblem(f"{source} {error}") from None
    try:
        key = read_private_key(files.key)
    except ValueError as error:
        named = as_argument(new.client_identifier)
        raise DeviceProblem(f"{files.key} {error}. Use `device add {named} --csr` to make it") from None
    if chain[0].public_key() != key.public_key():
        raise DeviceProblem(f"the first certificate in {source} does not match the key in {files.key}")
    writer.write(files.certificate, b"".join(certificate_pem(each) for each in chain), PUBLIC)
    _write_rule(rules, new, files, {"client_cert": files.certificate.name, "client_key": files.key.name}, writer)


def _write_rule(rules: Rules, new: NewDevice, files: Files, identity: Mapping[str, Any], writer: Writer) -> None:
    table = {**identity, **new.table}
    writer.write(files.rule, _check_rule(rules, new, table).encode(), PUBLIC)


def _check_rule(rules: Rules, new: NewDevice, table: Mapping[str, Any]) -> str:
    """Return the text of a device's rule, which can be read and matches the device.  Raises what is wrong with it."""
    text = rule_text(new.client_identifier, table)
    rule = Rule.of(structure_device(rules.filled(tomllib.loads(text))), 0)
    try:
        matches = rule.matches_name(new.client_identifier)
    except Refusal as refusal:
        raise DeviceProblem(refusal.detail) from None
    if not matches:
        raise DeviceProblem(f'match_pattern does not match "{printable(new.client_identifier)}"')
    return text


def _refuse_a_second(rules: Rules, client_identifier: str, files: Files) -> None:
    if not client_identifier:
        raise DeviceProblem("the Client Identifier is empty")
    if files.rule.exists():
        raise DeviceProblem(f'"{printable(client_identifier)}" already has a rule: {files.rule}')
    pattern = exact_pattern(client_identifier)
    if any(device.match_client_id == (pattern,) for device in rules.config.device):
        raise DeviceProblem(f'"{printable(client_identifier)}" already has a rule, in another file')


def _issuer(arguments: argparse.Namespace) -> Authority | None:
    given = [name for name in ("csr", "ca_cert", "cert") if getattr(arguments, name, None)]
    if len(given) > 1:
        raise DeviceProblem("--csr, --ca-cert and --cert cannot be combined")
    if (arguments.ca_cert is None) != (arguments.ca_key is None):
        raise DeviceProblem("--ca-cert and --ca-key must be used together")
    if arguments.days < 1:
        raise DeviceProblem(f"--days {arguments.days}: must be at least 1")
    if arguments.ca_cert is None:
        return None
    return Authority.read(Path(arguments.ca_cert), Path(arguments.ca_key))


def _set_keys(pairs: list[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` pairs."""
    table: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise DeviceProblem(f"--set {printable(pair)}: must be KEY=VALUE")
        if key.strip() in table:
            raise DeviceProblem(f"--set {printable(key.strip())}: give it once")
        table[key.strip()] = value_of(value.strip())
    return table


def _show(rules: Rules, arguments: argparse.Namespace) -> int:
    path, device = rules.find(arguments.client_id)
    shown = {"rule": str(path), "identity": identity_words(device)}
    default = DeviceRule()
    for field in attrs.fields(DeviceRule):
        value = getattr(device, field.name)
        if value != getattr(default, field.name) and field.name != "name":
            shown[field.name] = _shown(field.name, value)
    width = max(map(len, shown))
    for key, words in shown.items():
        print(f"{key:<{width}}  {words}")
    return 0


def _shown(key: str, value: Any) -> str:
    if key == "lan_password":
        return "set"
    if isinstance(value, bool):
        return str(value).lower()  # as in TOML
    if key in {"password_command", "renew_command"}:
        return f"{value[0]} with {len(value) - 1} arguments"
    if isinstance(value, tuple | list):
        return ", ".join(printable(str(each)) for each in value)
    return printable(str(value))


def _remove(rules: Rules, arguments: argparse.Namespace) -> int:
    files = Files.of(rules.directory, arguments.client_id)
    beside = [each for each in (files.key, files.request, files.certificate, files.password) if each.exists()]
    try:
        path, device = rules.find(arguments.client_id)
    except DeviceProblem as problem:
        if not beside or files.rule.exists():
            raise
        return _remove_left(rules, arguments, beside, problem)
    _delete([path, *beside] if arguments.keys else [path])
    for each in beside if not arguments.keys else []:
        print(f"kept {each}; use --keys to delete it")
    others = [other for file, other in rules.devices() if file != path] if device.client_cert is not None else []
    has_certificate = files.certificate in beside or (
        device.client_cert is not None and all(device.client_cert != other.client_cert for other in others)
    )
    revoke = "; then revoke the device's certificate at its CA" if has_certificate else ""
    print(f"next: {rules.next_step}{revoke}")
    refusing = device_change.refusing_command(rules, arguments.client_id)
    if rules.config.devices.unknown == "pass":
        print(f"the device can still connect, as one without a rule; to refuse it: {refusing}, then reload")
    elif device.enabled:
        print(f"an established session goes on; to end it: {refusing}, then reload. Then remove this rule, too")
    return 0


def _remove_left(rules: Rules, arguments: argparse.Namespace, left: list[Path], problem: DeviceProblem) -> int:
    """Delete the files of a device without a rule, such as those of a pending request.  Raises `DeviceProblem`."""
    for device in rules.config.device:
        for each in (device.client_cert, device.client_key, device.password_file):
            if each in left:
                raise DeviceProblem(f"{problem}, and the rule {printable(device.name)} uses {each}")
    if not arguments.keys:
        names = ", ".join(each.name for each in left)
        raise DeviceProblem(f"{problem}. To delete its other files permanently, use --keys: {names}")
    _delete(left)
    return 0


def _delete(files: list[Path]) -> None:
    for each in files:
        try:
            each.unlink()
        except OSError as error:
            raise DeviceProblem(f"{each} cannot be removed: {error.strerror}") from None
        print(f"removed {each}")
    sync_directories(files)


def _tell_missing(rules: Rules, devices: list[NewDevice]) -> None:
    """Warn of new rules without a certificate where others have one, and of files that such a rule does not use."""
    config, at = rules.config, f"--config {shlex.quote(str(rules.file))}"
    bare = []
    for new in devices:
        device = structure_device(rules.filled(new.table))
        if device.client_cert is not None or device.sources or not device.enabled:
            continue
        files, name = Files.of(rules.directory, new.client_identifier), as_argument(new.client_identifier)
        if files.certificate.exists() and files.key.exists():
            complain(
                f"warning: the rule does not use {files.certificate} and its key. To use them: mqtts-gateway device "
                f"remove {name} {at}, then mqtts-gateway device add {name} {at} --set client_cert="
                f"{shlex.quote(files.certificate.name)} --set client_key={shlex.quote(files.key.name)}"
            )
        else:
            bare.append(name)
    if bare and config.tls.client_cert is None and any(device.client_cert is not None for device in config.device):
        name, which = (bare[0], "this one has") if len(bare) == 1 else ("ID", "these have")
        complain(
            f"warning: other rules have a certificate and {which} none: a broker that requires one refuses the device. "
            f"To issue one: mqtts-gateway device renew {name} --ca-cert ca.pem --ca-key ca-key.pem {at}. For an "
            f"external CA: `device remove {name}`, then `device add {name} --csr`"
        )


def _tell_next(rules: Rules, arguments: argparse.Namespace, first: str, name: str) -> None:
    """Print the next command; for requests, `first` says what to do before, and `name` is that of the device."""
    if arguments.csr:
        print(f"next: {first}: mqtts-gateway device add {name} --config {rules.file} --cert FILE")
        return
    print(f"next: mqtts-gateway check --files --config {rules.file}, then {rules.next_step}")
