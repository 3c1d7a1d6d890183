"""`mqtts-gateway device enable`, `disable`: change a device's rule.

In: a Client Identifier.  Out: an edited rule file that the gateway can load, and the next step.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.cli.device_files import DeviceProblem, Files, Writer, edited
from gateway.cli.device_rules import Rules
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
        command = f"mqtts-gateway device add {shlex.quote(printable(name))} --set enabled=false"
        raise DeviceProblem(f"{problem}. To refuse it, add a rule: {command}") from None
    if not device.enabled:
        print(f"{path}: the device is disabled already")
    else:
        change(rules, path, {"enabled": False})
    print(f"next: {rules.next_step}; this ends the device's session, and the gateway then refuses it (device-disabled)")
    return 0


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
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceProblem(f"{path} cannot be read: {error}") from None
    try:
        writer.replace(path, edited(text, changes).encode())
    except DeviceProblem as problem:
        raise DeviceProblem(f"{path}: {problem}") from None
