"""The names of brokers, in the one spelling that certificates and resolvers use.

In: a host as written by a person (DNS name in any script, IPv4, IPv6).  Out: lower-case A-labels, or a
canonical address.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

import idna

from gateway.config.value_words import quoted
from gateway.text import printable

_ZONE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Underscores are not allowed in host names (RFC 952), but container networks and home routers assign such names.
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
# Resolvers take a name that ends in a number for an IPv4 address ("127.1", "0x7f.1"): it is never a DNS name.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


# Called for each session, with the few configured brokers.
@lru_cache(maxsize=32)
def normalise_name(text: str) -> str:
    """Return the name to verify (RFC 9525 §6.1): lower-case A-labels without trailing dot, or an IP address.

    IDNA 2008 with the mapping of UTS 46 (RFC 5891, RFC 5895). An IPv6 address may stand in brackets.
    Raises ValueError with the reason.
    """
    return _address(_unbracketed(text)) or _dns_name(text)


@lru_cache(maxsize=32)
def connect_name(text: str) -> str:
    """Return the name to resolve: as `normalise_name`, but a trailing dot (no search list) and an IPv6 zone are kept.

    Raises ValueError with the reason.
    """
    host, percent, zone = _unbracketed(text).partition("%")
    if percent:
        address = _address(host)
        if ":" not in address or not _ZONE.fullmatch(zone):
            raise ValueError(f"{quoted(text)} is not an IPv6 address with a zone, such as fe80::1%eth0")
        return f"{address}%{zone}"
    name = normalise_name(text)
    return f"{name}." if text.endswith(".") else name


def is_address(name: str) -> bool:
    """Say whether a normalised name is an IP address."""
    return bool(_address(name))


def _unbracketed(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _address(text: str) -> str:
    """Return the canonical form of an IP address without zone, or "" if `text` is not an address."""
    try:
        return "" if "%" in text else str(ipaddress.ip_address(text))
    except ValueError:
        return ""


def _dns_name(text: str) -> str:
    if not text:
        raise ValueError("the name is empty")
    if "://" in text:
        raise ValueError(f"{quoted(text)} is a URL: give the host only")
    if re.fullmatch(r"(\[.*\]|[^:]*):[0-9]*", text):
        raise ValueError(f"{quoted(text)} contains a port: give host and port separately")
    if ":" in text or text.startswith("["):
        raise ValueError(f"{quoted(text)} is not an IPv6 address")
    if "*" in text:
        raise ValueError(f"{quoted(text)} contains a wildcard: those are for certificates only")
    try:
        mapped = text.lower() if text.isascii() else idna.uts46_remap(text, std3_rules=False)
        name = ".".join(_a_label(label, text) for label in mapped.removesuffix(".").split("."))
    except (idna.IDNAError, UnicodeError) as error:
        raise ValueError(f"{quoted(text)} is not a DNS name (IDNA: {printable(str(error), 80)})") from None
    if len(name) > 253:
        raise ValueError(f"{quoted(text)} is not a DNS name: it has {len(name)} characters, above the maximum of 253")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        raise ValueError(f"{quoted(text)} is neither an IPv4 address nor a DNS name: DNS names do not end in a number")
    return name


def _a_label(label: str, text: str) -> str:
    """Return the A-label of one label (RFC 5890 §2.3.2.1); an ASCII label is only checked."""
    if not label.isascii():
        return idna.alabel(label).decode("ascii")
    if not label:
        raise ValueError(f"{quoted(text)} is not a DNS name: it has an empty label")
    if not _LABEL.fullmatch(label):
        raise ValueError(
            f"{quoted(text)} is not a DNS name: {quoted(label)} may only hold 1 to 63 letters, digits and inner hyphens"
        )
    if label.startswith("xn--"):
        idna.ulabel(label)  # raises for an invalid A-label
    return label
