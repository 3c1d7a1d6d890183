"""`mqtts-gateway device renew` with a certificate at hand, or with the CA's key: no `renew_command` is needed.

In: a Client Identifier; a CA, or an issued certificate.  Out: a replaced certificate, and the next step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cryptography.x509.oid import NameOID

from gateway.cli.device_files import Authority, DeviceProblem, certificate_pem, now, public_pem
from gateway.cli.device_rules import Rules
from gateway.text import printable
from gateway.tls.renewal import Held, RenewalFailed, checked_chain, key_for, read_held, replace


def is_asked_for(arguments: argparse.Namespace) -> bool:
    """Whether `device renew` was given a CA or a certificate.  Raises `DeviceProblem` for options that do not fit."""
    by_ca = [arguments.ca_cert, arguments.ca_key]
    if not any([*by_ca, arguments.cert]):
        return False
    if None in by_ca and any(by_ca):
        raise DeviceProblem("--ca-cert and --ca-key must be used together")
    if any(by_ca) and arguments.cert:
        raise DeviceProblem("--ca-cert and --cert cannot be combined")
    if arguments.client_id is None or arguments.due:
        raise DeviceProblem("--ca-cert and --cert renew one device: name it, and leave out --due")
    if arguments.days < 1:
        raise DeviceProblem(f"--days {arguments.days}: must be at least 1")
    return True


def reissue(rules: Rules, arguments: argparse.Namespace) -> int:
    """Replace the certificate of a device; its key stays.  Raises `DeviceProblem`."""
    _, device = rules.find(arguments.client_id)
    try:
        held = read_held(device)
        key = key_for(held.identity, rotate=False)
        if arguments.cert:
            new = public_pem(Path(arguments.cert))
        else:
            authority = Authority.read(Path(arguments.ca_cert), Path(arguments.ca_key))
            new = certificate_pem(authority.issue(key, _common_name(held), arguments.days, now()))
        chain = checked_chain(new, key, held.leaf, now())
        replace(held, chain, None)
    except RenewalFailed as problem:
        raise DeviceProblem(str(problem)) from None
    print(f"wrote {held.file}, valid until {chain[0].not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    print(f"kept the previous one as {held.file}.old")
    print(rules.after_replacing(held.file))
    print(f"next: {rules.check_command(arguments.client_id)}")
    return 0


def _common_name(held: Held) -> str:
    subject = held.leaf.subject
    names = [str(each.value) for each in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or len(list(subject)) != 1:
        raise DeviceProblem(
            f"the subject of {held.file} is {printable(subject.rfc4514_string())}, not a common name alone: "
            "have it renewed where it was issued, and use --cert"
        )
    return names[0]
