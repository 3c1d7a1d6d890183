"""Proxies on the way to a broker: which one, if any.

In: the keys of an upstream, the process's environment.  Out: a `ProxyServer`, or `None` for a direct connection;
ValueError for what is not the URL of a proxy.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Literal, Self, get_args
from urllib.parse import unquote, urlsplit

from attrs import field, frozen

from gateway.config.names import connect_name, is_address
from gateway.config.value_words import quoted

Scheme = Literal["http", "https", "socks5"]
ENVIRONMENT = "environment"
_SCHEMES: tuple[str, ...] = get_args(Scheme)
_USUAL_PORTS: Mapping[str, int] = {"http": 3128, "https": 443, "socks5": 1080}
# RFC 1929 §2 counts both in one byte; RFC 7617 §2 has no limit, but no proxy wants more.
_LONGEST_CREDENTIAL = 255


@frozen
class ProxyServer:
    """A proxy: how it is spoken to, where it is, and who the gateway is to it.

    `username` is "" where the proxy needs none.  `password` is never shown.
    """

    scheme: Scheme
    host: str
    port: int
    username: str = ""
    password: str = field(default="", repr=False)

    @classmethod
    def of(cls, url: str) -> Self:
        """Read `SCHEME://[USER[:PASSWORD]@]HOST[:PORT]`.  Raises ValueError, which shows no password."""
        scheme, separator, _ = url.partition("://")
        if not separator or scheme not in _SCHEMES:
            shown = quoted(scheme) if separator else "a value without ://"
            raise ValueError(f"{shown} is not the URL of a proxy: use http://, https:// or socks5://")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise ValueError("not a URL: check the host and the port") from None
        if parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError("the URL of a proxy ends after its port")
        if port == 0:
            raise ValueError("port 0 is not a port (1 to 65535)")
        username, password = unquote(parts.username or ""), unquote(parts.password or "")
        check_credential(username)
        check_credential(password)
        return cls(scheme, connect_name(host), port or _USUAL_PORTS[scheme], username, password)  # type: ignore[arg-type]  # checked above

    @property
    def address(self) -> str:
        """`SCHEME://HOST:PORT` for people, with brackets around IPv6 and without credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def check_credential(text: str) -> None:
    """Refuse a user name or password that a proxy cannot be told.  The text is not shown."""
    if len(text.encode()) > _LONGEST_CREDENTIAL:
        raise ValueError(f"longer than {_LONGEST_CREDENTIAL} bytes, which no proxy accepts")
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError("contains a control character, which no proxy accepts")


def check_proxy_url(text: str) -> None:
    """Refuse what is neither "", "environment" nor the URL of a proxy without credentials."""
    if text and text != ENVIRONMENT:
        server = ProxyServer.of(text)
        if server.username or server.password:
            raise ValueError("credentials do not belong in the URL: use proxy_username and proxy_password_file")


def check_no_proxy(entry: str) -> None:
    """Refuse an entry that could never match."""
    if entry == "*" or _network(entry) is not None:
        return
    try:
        connect_name(entry.removeprefix("*").removeprefix("."))
    except ValueError:
        raise ValueError(f"{quoted(entry)} is not a host name, a suffix such as .example.com, or a network") from None


def is_direct(host: str, entries: Iterable[str]) -> bool:
    """Whether `host`, a normalised name or address, is reached without a proxy.

    An entry is a name, which also covers everything below it, with or without a leading dot (as curl does); an address
    or a network, for hosts that are addresses; or `*` for all.
    """
    name = host.removesuffix(".")
    address = ipaddress.ip_address(name.partition("%")[0]) if is_address(name.partition("%")[0]) else None
    for entry in entries:
        if entry == "*":
            return True
        if (network := _network(entry)) is not None:
            if address is not None and address in network:
                return True
            continue
        suffix = entry.removeprefix("*").removeprefix(".").removesuffix(".").lower()
        if address is None and suffix and (name == suffix or name.endswith(f".{suffix}")):
            return True
    return False


def from_environment(environment: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the URL of the proxy for TLS connections, or "", and the entries of what is reached without it.

    Lower-case names come first, as in curl.
    """
    url = environment.get("https_proxy") or environment.get("HTTPS_PROXY") or ""
    without = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    # A proxy without a scheme is an HTTP proxy (curl(1)).
    return (f"http://{url}" if url and "://" not in url else url), [
        entry for entry in re.split(r"[,\s]+", without) if entry
    ]


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text.strip("[]"), strict=False)
    except ValueError:
        return None
