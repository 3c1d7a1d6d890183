"""Where devices connect: `[HOST:]PORT` or a Twisted server endpoint description.

In: the text of `listen.endpoint`.  Out: a Twisted description, checked as far as possible without Twisted.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Hashable, Iterator
from ipaddress import ip_address

from gateway.config.names import connect_name, is_address
from gateway.config.value_words import quoted

_SHORT = re.compile(r"(?:(?P<host>\[[^\]]*\]|[^:=\\]*):)?(?P<port>[0-9]+)")
_KIND = re.compile(r"[A-Za-z0-9_-]+")
_ARGUMENTS = {  # in their positional order
    "tcp": ("port", "interface", "backlog"),
    "tcp6": ("port", "backlog", "interface"),
    "unix": ("address", "mode", "backlog", "lockfile"),
}
# Connections that the kernel queues until they are accepted (capped by net.core.somaxconn).  When all devices reconnect
# at once, Twisted's default of 50 would make most of them wait a second or more to retry.
_BACKLOG = 1024
# Owner and group: the mode of a UNIX socket is all that decides who may connect.
_UNIX_MODE = "660"
_WRITE_BY_OTHERS = 0o002  # what connect(2) asks for, unix(7)
_REFUSED = {
    "haproxy": "it would trust anyone: leave it out of the endpoint, and list the load balancers in listen.proxies",
    "ssl": "devices speak plain MQTT to the gateway; those that speak TLS can connect to the broker directly",
    "tls": "devices speak plain MQTT to the gateway; those that speak TLS can connect to the broker directly",
    "stdio": "a single session on the standard streams is not a listener",
}


def describe_endpoint(text: str) -> str:
    r"""Return the Twisted description: `[::1]:1883` is `tcp:port=1883:backlog=1024:interface=\:\:1`.

    With port 0 the system chooses one. Raises ValueError with the reason.
    """
    short = _SHORT.fullmatch(text)
    if short is None or short["host"] in (*_ARGUMENTS, *_REFUSED):
        _check_description(text)
        kind, arguments = _parse(text)
        # Twisted's own default is 666.
        return text if kind != "unix" or "mode" in arguments else f"{text}:mode={_UNIX_MODE}"
    description = f"tcp:port={_port(short['port'])}:backlog={_BACKLOG}"
    return f"{description}:interface={_escaped(_interface(short['host']))}" if short["host"] else description


def endpoint_kind(text: str) -> str:
    """Return the kind of socket: `tcp`, `tcp6`, `unix`, or a plugin's. Raises ValueError as `describe_endpoint`."""
    return _parse(describe_endpoint(text))[0]


def endpoint_identity(text: str) -> Hashable:
    """Return a value that is equal for two endpoints that conflict; each port 0 is distinct.

    Raises ValueError as `describe_endpoint` does.
    """
    description = describe_endpoint(text)
    kind, arguments = _parse(description)
    match kind:
        case "unix":
            # POSIX gives a meaning of its own to two slashes at the beginning, and to no other number of them.
            return kind, posixpath.normpath("/" + arguments["address"].lstrip("/"))
        case "tcp" | "tcp6" if int(arguments["port"]) == 0:
            return object()
        case "tcp" | "tcp6":
            interface = arguments.get("interface", "::" if kind == "tcp6" else "")
            # Twisted treats an empty interface as the second.
            return int(arguments["port"]), _interface(interface or "0.0.0.0")  # noqa: S104  # compared, not listened on
        case _:
            return description


def listening_at(text: str) -> str:
    """Return the address of an endpoint as the gateway shows it, `HOST:PORT` or a path; "" if that is unknown.

    Raises ValueError as `describe_endpoint` does.
    """
    match endpoint_identity(text):
        case "unix", str(path):
            return path
        case int(port), str(host):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case _:
            return ""


def is_local(text: str) -> bool:
    """Say whether only this machine can connect to an endpoint: a loopback address, or a UNIX socket.

    For sockets from systemd, only the kind is known.  Raises ValueError as `describe_endpoint` does.
    """
    kind, arguments = _parse(describe_endpoint(text))
    match kind:
        case "unix":
            return True
        case "tcp" | "tcp6":
            interface = _interface(arguments.get("interface") or "::").partition("%")[0]
            return ip_address(interface).is_loopback
        case "systemd":
            return arguments.get("domain", arguments.get("1")) == "UNIX"
        case _:
            return False


def is_open_to_all(text: str) -> bool:
    """Say whether every user of this machine can connect to a UNIX socket; False for other endpoints.

    Raises ValueError as `describe_endpoint` does.
    """
    kind, arguments = _parse(describe_endpoint(text))
    return kind == "unix" and bool(int(arguments["mode"], 8) & _WRITE_BY_OTHERS)


def reachable_at(text: str) -> str | None:
    """Return where a local client reaches an endpoint, `http://HOST:PORT` or `unix:PATH`; None if that is unknown.

    Raises ValueError as `describe_endpoint` does.
    """
    kind, arguments = _parse(describe_endpoint(text))
    match kind:
        case "unix":
            return f"unix:{arguments['address']}"
        case "tcp" | "tcp6" if int(arguments["port"]):
            interface = _interface(arguments.get("interface") or ("::" if kind == "tcp6" else "0.0.0.0"))  # noqa: S104  compared
            host = {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(interface, interface)  # noqa: S104  compared
            return f"http://[{host}]:{arguments['port']}" if ":" in host else f"http://{host}:{arguments['port']}"
        case _:
            return None


def _check_description(text: str) -> None:
    kind, arguments = _parse(text)
    if not _KIND.fullmatch(kind) or ":" not in text:
        raise ValueError(f'{quoted(text)} is neither "PORT" nor "HOST:PORT" nor a Twisted endpoint description')
    if kind in _REFUSED:
        raise ValueError(f"{quoted(text)} cannot be used: {_REFUSED[kind]}")
    if kind not in _ARGUMENTS:
        return  # of a plugin: only Twisted knows its arguments
    for name in arguments:
        if name not in _ARGUMENTS[kind]:
            raise ValueError(f"{quoted(text)}: {kind} endpoints take {', '.join(_ARGUMENTS[kind])}, not {quoted(name)}")
    if not re.fullmatch(r"[0-9]{1,6}", arguments.get("backlog", "50")):
        raise ValueError(f"{quoted(text)}: the backlog is a number of connections")
    if kind == "unix":
        _check_unix(text, arguments)
    else:
        _port(arguments.get("port", ""))
        if arguments.get("interface"):
            _interface(arguments["interface"])


def _check_unix(text: str, arguments: dict[str, str]) -> None:
    address = arguments.get("address", "")
    if not address.startswith("/") or "\0" in address:
        raise ValueError(f"{quoted(text)}: a socket path must be absolute")
    if len(address.encode("utf-8", "surrogateescape")) > 107:  # sockaddr_un, unix(7)
        raise ValueError(f"{quoted(text)}: a socket path has at most 107 bytes")
    if not re.fullmatch(r"[0-7]{1,4}", arguments.get("mode", _UNIX_MODE)):
        raise ValueError(f"{quoted(text)}: the mode is an octal number such as 660")
    if arguments.get("lockfile", "1") not in ("0", "1"):
        raise ValueError(f"{quoted(text)}: lockfile is 0 or 1")


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > 65535:
        raise ValueError(f"{quoted(text)} is not a port (0 to 65535, where 0 is any free port)")
    return int(text)


def _interface(text: str) -> str:
    try:
        address = connect_name(text)
    except ValueError:
        address = ""
    if not is_address(address.partition("%")[0]):
        raise ValueError(f"{quoted(text)} is not an IP address: give the address of the interface to listen on")
    return address


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace(":", r"\:")


def _parse(description: str) -> tuple[str, dict[str, str]]:
    """Split a Twisted description into its kind and arguments; positional arguments get their names."""
    pieces = list(_pieces(description))
    kind = pieces[0][1]
    names = _ARGUMENTS.get(kind, ())
    places = (names[place] if place < len(names) else str(place + 1) for place in range(len(pieces)))
    return kind, {name if name is not None else next(places): value for name, value in pieces[1:]}


def _pieces(description: str) -> Iterator[tuple[str | None, str]]:
    """Split at colons into (name or None, value); a backslash escapes the next character."""
    name: str | None = None
    value = ""
    characters = iter(description)
    for character in characters:
        if character == ":":
            yield name, value
            name, value = None, ""
        elif character == "=" and name is None:
            name, value = value, ""
        else:
            value += next(characters, "") if character == "\\" else character
    yield name, value
