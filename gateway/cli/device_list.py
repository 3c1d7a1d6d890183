"""`mqtts-gateway device list`: each device with a rule, how it authenticates, and whether it is connected.

In: the rules; the status document of the running gateway, if it has one.  Out: lines, or JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.cli.certificates import expiry, now
from gateway.cli.device_files import identifier_of
from gateway.cli.device_rules import Rules
from gateway.cli.report import complain
from gateway.cli.status import CannotAsk, endpoint_at, fetch, with_password
from gateway.config import DeviceRule
from gateway.config.secret_files import SecretUnavailable
from gateway.ops.status_words import CONNECTED, Part, ago, clock, device_state, duration, in_state_since, is_shut_out
from gateway.text import printable
from gateway.tls.trust import read_chain

_PER_PAGE = 1000
_SOURCES = {
    "sas_key_file": "SAS tokens",
    "jwt_key_file": "JSON Web Tokens",
    "password_file": "a password from a file",
    "password_credential": "a password from a credential",
    "password_command": "a password from a program",
}


def list_devices(rules: Rules, arguments: argparse.Namespace) -> int:
    """List all devices that have a rule."""
    seen = _seen(rules, arguments.password_file)
    found = [(device, _facts(path, device, seen)) for path, device in rules.devices()]
    if arguments.json:
        print(json.dumps([facts for _, facts in found], indent=2))
        return 0
    for device, facts in found:
        state = _state_words(device, seen, facts["client_id"])
        print("  ".join(filter(None, (_who(facts["client_id"]), facts["identity"], state))))
    print(f"{len(found)} devices in {rules.directory}", file=sys.stderr)
    if pending := _pending(rules):
        print(f"requests without a rule: {printable(', '.join(pending), 400)}", file=sys.stderr)
    return 0


def _pending(rules: Rules) -> list[str]:
    """Return the names of the certificate signing requests whose devices have no rule."""
    requests = sorted(path.name for path in rules.directory.glob("*.csr.pem"))
    return [name for name in requests if not (rules.directory / f"{name.removesuffix('.csr.pem')}.toml").exists()]


def identity_words(device: DeviceRule) -> str:
    """Describe how the device authenticates to the broker."""
    return _identity(device)[0]


def _identity(device: DeviceRule) -> tuple[str, int | None]:
    """Return the words of `identity_words`, and for how many days the device's certificate is still valid."""
    parts, days = [], None
    if device.client_cert is not None:
        try:
            certificate = read_chain(device.client_cert, device.passphrase.read())[0]
        except (ValueError, SecretUnavailable) as error:
            parts.append(f"certificate {device.client_cert} {error}")
        else:
            _, words = expiry(certificate)
            days = (certificate.not_valid_after_utc - now()).days
            parts.append(f"certificate {printable(certificate.subject.rfc4514_string())}, {words}")
    parts += [words for key, words in _SOURCES.items() if getattr(device, key)]
    if not parts:
        # A password that the gateway checks is not meant for the broker.
        passes = not device.lan_password and device.credentials == "pass"
        parts.append("the device's own credentials" if passes else "no credentials of its own")
    return " and ".join(parts), days


def _who(patterns: list[str]) -> str:
    """Name the devices that a rule is for."""
    if not patterns:
        return "every device"
    names = [(pattern, identifier_of(pattern)) for pattern in patterns]
    return printable(", ".join(f"every {pattern}" if name is None else name for pattern, name in names))


def _facts(path: Path, device: DeviceRule, seen: Mapping[str, Part] | None) -> dict[str, Any]:
    identity, days = _identity(device)
    patterns = list(device.match_client_id)
    item = _item(seen, patterns)
    return {
        "client_id": patterns,
        "file": str(path),
        "identity": identity,
        "certificate_days": days,
        "enabled": device.enabled,
        "connected": None if seen is None or not _is_one(patterns) else item is not None and item["step"] in CONNECTED,
        "since": None if item is None else in_state_since(item)[0],
        "heard_seconds_ago": None if item is None else item["heard_seconds_ago"],
    }


def _state_words(device: DeviceRule, seen: Mapping[str, Part] | None, patterns: list[str]) -> str:
    words = [] if device.enabled else ["disabled"]
    item = _item(seen, patterns)
    if item is not None and is_shut_out(item):
        # Enabled again, it may not have come back yet, or the gateway has not been reloaded.
        refused = "last refused as disabled" if device.enabled else "last refused"
        words.append(f"{refused} {ago(item['seconds'])}")
    elif item is not None and item["step"] in {"ended", "refused"}:
        end, (moment, _) = item["end"], in_state_since(item)
        last = "" if end["established"] else "last try "
        when = f"{clock(moment, now().isoformat(), None)} ({last}{ago(end['seconds_ago'])})"
        words.append(f"not connected since {when}: {end['reason']}")
    elif item is not None:
        heard = item["heard_seconds_ago"]
        last = "" if heard is None else f", last heard {ago(heard)}"
        words.append(f"{device_state(item)} for {duration(item['seconds'])}{last}")
    elif seen is not None and _is_one(patterns):
        words.append("not seen lately")
    return printable(", ".join(words), 400)


def _is_one(patterns: list[str]) -> bool:
    return len(patterns) == 1 and identifier_of(patterns[0]) is not None


def _item(seen: Mapping[str, Part] | None, patterns: list[str]) -> Part | None:
    if not seen or not _is_one(patterns):
        return None
    return seen.get(printable(identifier_of(patterns[0]) or ""))


def _seen(rules: Rules, password_file: Path | None) -> dict[str, Part] | None:
    """Return what the running gateway knows of devices, by Client Identifier; `None` if it cannot be asked."""
    items: dict[str, Part] = {}
    try:
        status = rules.config.status
        endpoint = endpoint_at(status.endpoint, status.server_cert, str(rules.file))
        endpoint = with_password(endpoint, password_file)
        page = pages = 1
        while page <= pages:
            devices = fetch(endpoint, f"?limit={_PER_PAGE}&page={page}")["devices"]
            for each in devices["items"]:
                name = each["client_identifier"]
                if name not in items or each["step"] in CONNECTED:
                    items[name] = each
            pages, page = devices["pages"], page + 1
    except CannotAsk as problem:
        complain(f"it is not known which devices are connected: {problem}")
        return None
    except (KeyError, TypeError, AttributeError):
        complain("it is not known which devices are connected: the gateway is of another version")
        return None
    return items
