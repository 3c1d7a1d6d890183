"""`mqtts-gateway device enable`, `disable`, `set-password`, `move`: change a device's rule.

In: a Client Identifier.  Out: an edited rule file that the gateway can load, and the next step.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.cli.device_files import SECRET, SECRET_OF_GROUP, DeviceProblem, Files, Writer, as_argument, edited
from gateway.cli.device_rules import Rules
from gateway.cli.device_table import SALT_SIZE
from gateway.config import DeviceRule
from gateway.config.devices import BrokenRule
from gateway.config.passwords import hash_password
from gateway.disk import read_file
from gateway.rules.rules import LONGEST_MATCHED, Rule
from gateway.text import printable


def enable(rules: Rules, arguments: argparse.Namespace) -> int:
    """Let a device connect again."""
    path, device = rules.find(arguments.client_id)
    if device.enabled:
        print(f"{path}: the device is enabled already")
        return 0
    change(rules, path, {"enabled": None})
    print(f"next: {rules.next_step}; the device can then connect")
    return 0


def disable(rules: Rules, arguments: argparse.Namespace) -> int:
    """Have a device refused, without losing anything of its rule."""
    name = arguments.client_id
    try:
        path, device = rules.find(name)
    except DeviceProblem as problem:
        if Files.of(rules.directory, name).rule.exists():
            raise
        raise DeviceProblem(f"{problem}. {_how_to_refuse(rules, name)}") from None
    if not device.enabled:
        print(f"{path}: the device is disabled already")
    else:
        change(rules, path, {"enabled": False})
    print(f"next: {rules.next_step}; this ends the device's session, and the gateway then refuses it (device-disabled)")
    return 0


def _how_to_refuse(rules: Rules, name: str) -> str:
    """Say how a device without a rule of its own in the directory is refused."""
    for order, device in enumerate(rules.config.device):
        rule = Rule.of(device, order)
        if not isinstance(device, BrokenRule) and len(name) <= LONGEST_MATCHED and rule.matches_name(name):
            alone = "" if rule.is_exact else "; to refuse this device alone, write a rule for it before that one"
            return f"The rule {printable(device.name)} matches it: set enabled = false there{alone}"
    return f"To refuse it, add a rule: {refusing_command(rules, name)}"


def refusing_command(rules: Rules, name: str) -> str:
    """Return the command that has a device without a rule refused, and its session ended, from the next reload on."""
    return f"mqtts-gateway device add {as_argument(name)} --set enabled=false --config {shlex.quote(str(rules.file))}"


def change(rules: Rules, path: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a rule, or remove those whose value is `None`.

    Raises `DeviceProblem`, or `ConfigError` if the gateway would refuse the result; the file is then as before.
    """
    with Writer.all_or_nothing() as writer:
        rewrite(path, changes, writer)
        rules.check_all()
    print(f"changed {path}")


def rewrite(path: Path, changes: Mapping[str, Any], writer: Writer) -> None:
    """Set keys of a rule.  Raises `DeviceProblem`."""
    try:
        text = read_file(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceProblem(f"{path} cannot be read: {error}") from None
    try:
        writer.replace(path, edited(text, changes).encode())
    except DeviceProblem as problem:
        raise DeviceProblem(f"{path}: {problem}") from None


def move(rules: Rules, arguments: argparse.Namespace) -> int:
    """Let a device use other brokers, or connect from another address."""
    given = {"upstream": arguments.upstream, "bound_to": arguments.bound_to}
    changes = {key: values or None for key, values in given.items() if values is not None}
    if not changes:
        raise DeviceProblem("name where to: --upstream NAME, --bound-to NETWORK, or both")
    path, _ = rules.find(arguments.client_id)
    change(rules, path, changes)
    print(
        f"next: {rules.check_command(arguments.client_id)}, then {rules.next_step}. "
        "An established session goes on as it is until the device reconnects"
    )
    return 0


def set_password(rules: Rules, arguments: argparse.Namespace) -> int:
    """Set the password that the device must send, or the one that the gateway sends to the broker for it."""
    path, device = rules.find(arguments.client_id)
    if arguments.broker:
        return _set_broker_password(rules, path, device, Files.of(rules.directory, arguments.client_id).password)
    password = hash_password(ask_password("Device password"), os.urandom(SALT_SIZE))
    change(rules, path, {"lan_password": password})
    print(f"next: {rules.next_step}; then set the same password in the device. An established session goes on")
    return 0


def _set_broker_password(rules: Rules, path: Path, device: DeviceRule, file: Path) -> int:
    others = [key for key in device.sources if key != "password_file"]
    if others:
        raise DeviceProblem(f"{path} has {others[0]}, so the password has another source: remove that key first")
    password = ask_password("Password for the broker")
    if b"\r" in password or b"\n" in password:
        raise DeviceProblem("the password contains a line end")
    named, group = device.password_file, rules.key_group
    with Writer.all_or_nothing() as writer:
        if named is not None and named.exists():
            writer.replace(named, password + b"\n")
        else:
            file = named or file
            writer.write(file, password + b"\n", SECRET if group is None else SECRET_OF_GROUP, group)
        if named is None:
            rewrite(path, {"password_file": file.name}, writer)
        rules.check_all()
    print(f"wrote {named or file}")
    name = "" if device.username else "; the device must send a user name, or set username in the rule"
    if named is None:
        print(f"changed {path}")
        print(f"next: {rules.next_step}{name}")
    else:
        print(f"{rules.after_replacing(named)}{name}")
    return 0


def ask_password(prompt: str) -> bytes:
    """Prompt on a terminal, otherwise read a line from stdin; an argument would be visible to every user."""
    if sys.stdin.isatty():
        password = getpass.getpass(f"{prompt}: ")
        if getpass.getpass("Repeat password: ") != password:
            raise DeviceProblem("the passwords do not match")
    else:
        password = sys.stdin.readline().removesuffix("\n").removesuffix("\r")
    if not password:
        raise DeviceProblem("the password is empty")
    return password.encode("utf-8", "surrogateescape")
