"""Certificates issued here by a CA, and `mqtts-gateway device renew` without a `renew_command`.

In: a Client Identifier; a CA, or an issued certificate.  Out: a new or replaced certificate, and the next step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cryptography.x509.oid import NameOID

from gateway.cli.device_change import rewrite
from gateway.cli.device_files import (
    KEY_TYPES,
    LONGEST_COMMON_NAME,
    PUBLIC,
    SECRET,
    SECRET_OF_GROUP,
    Authority,
    DeviceProblem,
    Files,
    Writer,
    as_argument,
    certificate_pem,
    key_pem,
    make_key,
    now,
    public_pem,
)
from gateway.cli.device_rules import Rules
from gateway.text import printable
from gateway.tls.renewal import Held, RenewalFailed, checked_chain, key_for, read_held, replace
from gateway.tls.trust import PrivateKey


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
    path, device = rules.find(arguments.client_id)
    if device.client_cert is None:
        return _issue_first(rules, path, arguments)
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


def _issue_first(rules: Rules, path: Path, arguments: argparse.Namespace) -> int:
    """Give a device whose rule has no certificate a key and a certificate.  Raises `DeviceProblem`."""
    identifier = arguments.client_id
    if arguments.cert:
        named = as_argument(identifier)
        raise DeviceProblem(
            f"{path} has no client_cert, so there is no key to which {arguments.cert} could belong. Use `device remove "
            f"{named}`, then `device add {named} --csr`; or let this command issue the certificate, with --ca-cert and "
            "--ca-key"
        )
    if len(identifier) > LONGEST_COMMON_NAME:
        named = as_argument(identifier)
        raise DeviceProblem(
            f"a common name has at most {LONGEST_COMMON_NAME} characters, and this device's name has "
            f"{len(identifier)}. Use `device remove {named}`, then `device add {named} --common-name NAME` with "
            "--ca-cert and --ca-key"
        )
    authority = Authority.read(Path(arguments.ca_cert), Path(arguments.ca_key))
    files = Files.of(rules.directory, identifier)
    with Writer.all_or_nothing() as writer:
        identity = issue_identity(rules, files, authority, identifier, arguments.days, KEY_TYPES[0], writer)
        rewrite(path, identity, writer)
        rules.check_all()
    for each in writer.written:
        print(f"wrote {each}")
    print(f"changed {path}")
    print(f"next: {rules.next_step}, then {rules.check_command(identifier)}")
    return 0


def write_key(rules: Rules, files: Files, key_type: str, writer: Writer) -> PrivateKey:
    """Make a device's key and write it.  Raises `DeviceProblem`."""
    key, group = make_key(key_type), rules.key_group
    writer.write(files.key, key_pem(key), SECRET if group is None else SECRET_OF_GROUP, group)
    return key


def issue_identity(
    rules: Rules, files: Files, authority: Authority, common_name: str, days: int, key_type: str, writer: Writer
) -> dict[str, str]:
    """Write a new key and its certificate; return the keys of the rule that name them.  Raises `DeviceProblem`."""
    key = write_key(rules, files, key_type, writer)
    certificate = authority.issue(key, common_name, days, now())
    writer.write(files.certificate, certificate_pem(certificate), PUBLIC)
    return {"client_cert": files.certificate.name, "client_key": files.key.name}


def _common_name(held: Held) -> str:
    subject = held.leaf.subject
    names = [str(each.value) for each in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or len(list(subject)) != 1:
        raise DeviceProblem(
            f"the subject of {held.file} is {printable(subject.rfc4514_string())}, not a common name alone: "
            "have it renewed where it was issued, and use --cert"
        )
    return names[0]
