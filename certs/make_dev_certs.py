#!/usr/bin/env python3
"""Makes a development CA, a broker's certificate and devices' certificates.

In: names, a directory.  Out: PEM files, and the lines of configuration that use them.  Needs trustme.

The CA's own key is never written: nobody can issue more certificates in its name, and a new set is one command away.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

try:
    import trustme
except ImportError:
    sys.exit("trustme is missing: pip install trustme, or '.[demo]' in a clone")

_DEFAULT_NAMES = ("localhost", "127.0.0.1", "::1")
_DEFAULT_DIRECTORY = Path(__file__).parent / "dev"
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,61}[A-Za-z0-9]|[A-Za-z0-9]")


def main() -> int:
    """Make what the command line asks for; return the exit status."""
    arguments = _parser().parse_args()
    directory: Path = arguments.out
    try:
        files = _make(arguments.broker or _DEFAULT_NAMES, arguments.device, arguments.days)
    except ValueError as error:
        print(f"cannot issue a certificate for such a name: {error}", file=sys.stderr)
        return 1
    try:
        present = [name for name in files if (directory / name).exists()]
        if present:
            print(
                f"{directory} already holds {', '.join(present)}: nothing is overwritten; "
                "remove them or choose another --out",
                file=sys.stderr,
            )
            return 1
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in files.items():
            _write(directory / name, content)
    except OSError as error:
        print(f"{error.filename or directory}: {error.strerror}", file=sys.stderr)
        return 1
    _explain(directory, arguments.device)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a development CA, a broker's certificate and devices' ones.")
    parser.add_argument(
        "--broker",
        action="append",
        metavar="NAME",
        help=f"a host name or IP address of the broker; repeatable (default: {', '.join(_DEFAULT_NAMES)})",
    )
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        type=_device,
        metavar="NAME",
        help="make a client certificate with this common name as well; repeatable",
    )
    parser.add_argument("--out", type=Path, default=_DEFAULT_DIRECTORY, metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--days", type=_days, default=365, metavar="N", help="how long broker and devices are valid (default: 365)"
    )
    return parser


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a device: use up to 63 letters, digits and hyphens")
    return text


def _days(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 3650):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days: use 1 to 3650")
    return int(text)


def _make(names: list[str] | tuple[str, ...], devices: list[str], days: int) -> dict[str, bytes]:
    """Return the files' contents by name.  Raises `ValueError` for a name that no certificate can carry."""
    now = datetime.now(UTC)
    # The hour is for clocks that are slow.  Without a beginning trustme says 2000, and `mqtts-gateway check` warns of a
    # certificate that has most of its life behind it.
    valid = {"not_before": now - timedelta(hours=1), "not_after": now + timedelta(days=days)}
    ca = trustme.CA(organization_name="mqtts-gateway", organization_unit_name="development CA")
    files = {"ca.pem": ca.cert_pem.bytes()}
    files |= _leaf("broker", ca.issue_cert(*names, common_name="broker", **valid))
    for device in devices:
        files |= _leaf(f"device-{device}", ca.issue_cert(device, common_name=device, **valid))
    return files


def _leaf(name: str, certificate: trustme.LeafCert) -> dict[str, bytes]:
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    return {f"{name}.pem": chain, f"{name}.key": certificate.private_key_pem.bytes()}


def _write(path: Path, content: bytes) -> None:
    """Create a file, a key only for its owner's eyes.  Raises `OSError`, also if it exists."""
    mode = 0o600 if path.suffix == ".key" else 0o644
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def _explain(directory: Path, devices: list[str]) -> None:
    where = directory.absolute()
    print(f"made in {where}; keep the keys on this machine")
    print(f"\nfor mosquitto:\n  certfile {where}/broker.pem\n  keyfile {where}/broker.key")
    if devices:
        print(f"  cafile {where}/ca.pem\n  require_certificate true")
    print(f'\nfor the gateway:\n  [tls]\n  ca_file = ["{where}/ca.pem"]')
    for device in devices[:1]:
        print(f'  client_cert = "{where}/device-{device}.pem"\n  client_key = "{where}/device-{device}.key"')


if __name__ == "__main__":
    sys.exit(main())
