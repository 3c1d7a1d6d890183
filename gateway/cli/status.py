"""`mqtts-gateway status`: the state of a running gateway, and why a device is not connected.

In: the address of a status endpoint, or the configuration that names it.  Out: the content of the status page as lines;
an exit status: 0 if all is well (with --device: if it is connected), 1 if the gateway does not answer, 2 if something
needs attention, 3 if devices cannot be served (with --device: if it is not connected).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import ssl
import sys
import textwrap
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from attrs import evolve, field, frozen

from gateway.cli.report import complain
from gateway.config import load_file
from gateway.config.listen import reachable_at
from gateway.config.passwords import hash_password
from gateway.config.secret_files import SecretUnavailable, read_secret
from gateway.config.tables import read_table
from gateway.errors import ConfigError
from gateway.ops.status_words import (
    CONNECTED,
    SCHEMA,
    Level,
    Part,
    ago,
    backlog_words,
    certificate_name,
    certificate_words,
    clock,
    connected,
    device_identity,
    device_name,
    device_state,
    device_words,
    duration,
    in_state_since,
    is_untried,
    number,
    store_lines,
    unknown_words,
    upstream_words,
    verdict,
)
from gateway.text import printable, unprintable_escaped

_DEFAULT = "http://127.0.0.1:9883"
_NAMED = ("endpoint", "server_cert")  # keys of [status]
_PATIENCE = 10.0  # seconds
# A gateway that is asked too often says so, to spare the relay.
_RETRY_AFTER = 2.0  # seconds
_MOST_RETRIES = 3
_LARGEST = 64 * 1024 * 1024  # bytes; a thousand devices are one
_CANNOT_ASK = 1
_EXIT = {Level.UNTRIED: 0, Level.WELL: 0, Level.ATTENTION: 2, Level.DOWN: 3}
_NOT_CONNECTED = 3
_SHOWN = 20  # devices, unless told otherwise
_MATCHES = 5  # devices of which everything is said
_COLOURS = {"good": "32", "wait": "33", "bad": "31", "strong": "1", "faint": "2"}  # SGR codes (ECMA-48 §8.3.117)
_LEVELS = {Level.UNTRIED: "strong", Level.WELL: "good", Level.ATTENTION: "wait", Level.DOWN: "bad"}
_BARS = "▁▂▃▄▅▆▇█"
_CLEAR = "\033[H\033[2J\033[3J"


class CannotAsk(Exception):
    """The gateway does not answer; the message says why and what to do."""


class NeedsPassword(CannotAsk):
    """The gateway answers those only who send its password."""


@frozen
class Endpoint:
    """The status endpoint: a UNIX socket's path, or a URL; its password; what to trust if not the platform's CAs."""

    shown: str
    path: str = ""
    url: str = ""
    password: bytes | None = field(default=None, repr=False)
    context: ssl.SSLContext | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `status`."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--config", metavar="FILE", help="use the status.endpoint of this configuration")
    where.add_argument(
        "--url",
        metavar="URL",
        help=f"use this endpoint: http://HOST:PORT or unix:/PATH/OF/SOCKET (default: {_DEFAULT})",
    )
    parser.add_argument(
        "--ca-file", metavar="FILE", type=Path, help="with --url https://…: trust the CAs in this file (PEM)"
    )
    parser.add_argument(
        "--password-file", metavar="FILE", type=Path, help="read the endpoint's password from this file"
    )
    parser.add_argument(
        "--hash-password", action="store_true", help="ask for a password, print its hash for status.password, and exit"
    )
    parser.add_argument(
        "--device", metavar="ID", type=_name, help="show the state of a device, or why it is not connected"
    )
    parser.add_argument(
        "--devices", metavar="N", type=_count, default=_SHOWN, help=f"how many devices to list (default: {_SHOWN})"
    )
    parser.add_argument("--json", action="store_true", help="print the gateway's JSON document")
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_interval,
        nargs="?",
        const=2.0,
        help="repeat every SECONDS (default: 2) until interrupted",
    )


def run(arguments: argparse.Namespace) -> int:
    """Fetch and print; return the exit status."""
    if arguments.hash_password:
        return _hash()
    try:
        endpoint = _endpoint(arguments)
    except ConfigError as error:
        for problem in error.problems:
            complain(problem)
        return _CANNOT_ASK
    except CannotAsk as error:
        complain(str(error))
        return _CANNOT_ASK
    if arguments.watch is None:
        return _once(endpoint, arguments)
    # Ends by a signal.
    while True:
        if sys.stdout.isatty():
            print(_CLEAR, end="")
        _once(endpoint, arguments)
        sys.stdout.flush()
        time.sleep(arguments.watch)


def _hash() -> int:
    # It imports much that is not needed to ask a gateway.
    from gateway.cli.device_change import ask_password
    from gateway.cli.device_files import DeviceProblem
    from gateway.cli.device_table import SALT_SIZE

    try:
        password = ask_password("Password of the status page")
    except DeviceProblem as problem:
        complain(str(problem))
        return _CANNOT_ASK
    print(hash_password(password, os.urandom(SALT_SIZE)))
    return 0


def _once(endpoint: Endpoint, arguments: argparse.Namespace) -> int:
    try:
        document = fetch(endpoint, _query(arguments))
        status, lines = _answer(document, arguments.device)
    except CannotAsk as error:
        sys.stdout.flush()
        complain(str(error))
        return _CANNOT_ASK
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        complain(f"{endpoint.shown} does not answer as a gateway of this version does")
        return _CANNOT_ASK
    if arguments.json:
        print(json.dumps(document, indent=1))
    else:
        print("\n".join(lines))
    return status


def _answer(document: Part, device: str | None) -> tuple[int, list[str]]:
    """Return the exit status and what is printed."""
    if device is None:
        return _EXIT[verdict(document).level], list(overview(document))
    # The gateway puts an exact match first.
    items = document["devices"]["items"]
    is_connected = bool(items) and items[0]["step"] in CONNECTED
    return 0 if is_connected else _NOT_CONNECTED, list(_about(document, device))


# ---- fetching


def _endpoint(arguments: argparse.Namespace) -> Endpoint:
    if arguments.config is None:
        endpoint = _parsed(arguments.url or _DEFAULT)
        if arguments.ca_file is not None:
            endpoint = evolve(endpoint, context=_trusting(arguments.ca_file))
    else:
        endpoint = endpoint_at(*_named_in(Path(arguments.config)), arguments.config)
    return with_password(endpoint, arguments.password_file)


def with_password(endpoint: Endpoint, file: Path | None) -> Endpoint:
    """Return the endpoint with the password in `file`, if there is one.  Raises `CannotAsk`."""
    if file is None:
        return endpoint
    parts = urlsplit(endpoint.url)
    if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
        raise CannotAsk(f"{endpoint.shown} would get the password in plain text: use https")
    try:
        return evolve(endpoint, password=read_secret(file))
    except SecretUnavailable as problem:
        raise CannotAsk(str(problem)) from None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def endpoint_at(named: str, certificate: Path | None, config: str) -> Endpoint:
    """Return the endpoint that `status.endpoint` of a configuration names, with its certificate.  Raises `CannotAsk`.

    With TLS, that certificate is the one to expect, whatever names it has: the address is a local one.
    """
    if not named:
        raise CannotAsk(
            f'{config} has no status endpoint: write endpoint = "127.0.0.1:9883" under [status], and reload the gateway'
        )
    where = reachable_at(named)
    if where is None:
        raise CannotAsk(f"{named} is resolved by the running gateway: give the address with --url")
    if certificate is None or not where.startswith("http:"):
        return _parsed(where)
    return evolve(_parsed(where.replace("http:", "https:", 1)), context=_expecting(certificate))


def _trusting(file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(file))
    except (OSError, ssl.SSLError) as error:
        raise CannotAsk(f"--ca-file: {file} cannot be used: {error.strerror or error}") from None


def _expecting(file: Path) -> ssl.SSLContext:
    # Imported only if needed: they load OpenSSL once more.
    from cryptography.hazmat.primitives.serialization import Encoding

    from gateway.tls.trust import read_chain

    try:
        leaf = read_chain(file)[0]
    except ValueError as error:
        raise CannotAsk(f"status.server_cert: {file} {error}") from None
    context = ssl.create_default_context(cadata=leaf.public_bytes(Encoding.DER))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _named_in(path: Path) -> tuple[str, Path | None]:
    """Return status.endpoint and server_cert, even of an invalid configuration: then is when status is needed."""
    try:
        status = load_file(path).status
    except ConfigError as error:
        table = read_table(path, "").get("status")
        endpoint, certificate = (table.get(key) if isinstance(table, dict) else None for key in _NAMED)
        try:
            usable = isinstance(endpoint, str) and reachable_at(endpoint) is not None
        except ValueError:
            usable = False
        if not usable or any(problem.startswith("status") for problem in error.problems):
            raise
        for problem in error.problems:
            complain(problem)
        return str(endpoint), path.absolute().parent / str(certificate) if certificate else None
    return status.endpoint, status.server_cert


def _parsed(text: str) -> Endpoint:
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        return Endpoint(f"unix:{path}", path=path)
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise CannotAsk(f"--url: {unprintable_escaped(text)} is neither http://HOST:PORT nor unix:/PATH")
    return Endpoint(text.rstrip("/"), url=text.rstrip("/"))


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_PATIENCE)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_PATIENCE)
        self.sock.connect(self._path)


def _ask(endpoint: Endpoint, query: str) -> tuple[int, bytes]:
    """Return the status and the body of an answer."""
    with closing(_connection(endpoint)) as connection:
        path = f"{urlsplit(endpoint.url).path}/status{query}"
        headers = {"Accept": "application/json"}
        if endpoint.password is not None:
            # RFC 7617 §2; the gateway takes any user name.
            headers["Authorization"] = f"Basic {b64encode(b'status:' + endpoint.password).decode()}"
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(_LARGEST)


def _query(arguments: argparse.Namespace) -> str:
    if arguments.device is not None:
        return f"?limit={max(_MATCHES, arguments.devices)}&q={quote(arguments.device)}"
    return f"?limit={arguments.devices}"


def fetch(endpoint: Endpoint, query: str) -> dict[str, Any]:
    """Return the status document with the devices that `query` selects.  Raises `CannotAsk`."""
    try:
        status, body = _ask(endpoint, query)
        for _ in range(_MOST_RETRIES):
            if status != http.client.TOO_MANY_REQUESTS:
                break
            time.sleep(_RETRY_AFTER)
            status, body = _ask(endpoint, query)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise CannotAsk(
            f"{endpoint.shown} does not answer: {unprintable_escaped(reason)}; check that the gateway runs and has "
            "[status] endpoint in its configuration; use --config FILE or --url for another endpoint"
        ) from None
    if status == http.client.UNAUTHORIZED:
        raise NeedsPassword(
            f"{endpoint.shown} needs a password: name the file that holds it with --password-file"
            if endpoint.password is None
            else f"{endpoint.shown} refuses the password: it is not the one whose hash is status.password"
        )
    if status != http.client.OK:
        words = body[:200].decode("utf-8", "replace").strip()
        raise CannotAsk(f"{endpoint.shown} answers {status}: {unprintable_escaped(words)}")
    try:
        document: dict[str, Any] = json.loads(body)
        schema = document["schema"]
    except (ValueError, KeyError, TypeError):
        raise CannotAsk(f"{endpoint.shown} is not a gateway: another service listens there") from None
    if schema != SCHEMA:
        raise CannotAsk(
            f"{endpoint.shown} is a gateway of another version (its document has schema {schema!r}, this command "
            f"knows {SCHEMA}): use the command that was installed with it, or read the endpoint itself"
        )
    return document


def _connection(endpoint: Endpoint) -> http.client.HTTPConnection:
    if endpoint.path:
        return _UnixConnection(endpoint.path)
    parts = urlsplit(endpoint.url)
    if parts.scheme == "https":
        context = endpoint.context
        return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=_PATIENCE, context=context)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_PATIENCE)


# ---- printing


def overview(document: Part) -> Iterator[str]:
    """Yield the lines that describe the gateway."""
    sessions = document["sessions"]
    history, devices = document["history"], document["devices"]
    yield from _verdict(document)
    yield ""
    connecting = sessions["open"] - connected(document)
    yield _row(
        "Sessions",
        f"{number(connected(document))} connected, {number(connecting)} connecting, "
        f"{number(document['not_connected'])} not connected; {number(sessions['limit'])} at most",
        _drawn([each["sessions"] for each in history]),
    )
    rates = [each["packets"] / (each["seconds"] or 1) for each in history]
    yield _row("Messages", f"{rates[-1] if rates else 0:.1f} a second, both ways", _drawn(rates))
    failures = sum(each["count"] for each in document["lately"])
    yield _row("Failures", f"{number(failures)} in the last 15 min", _drawn([each["failures"] for each in history]))
    yield from _heading("Upstreams")
    for upstream in document["upstreams"]:
        kind = "faint" if is_untried(upstream) else "good" if upstream["open"] else "bad"
        words = f"{upstream['address']}, certificate name {upstream['verify_name']}: {upstream_words(upstream)}"
        yield from _item(words, kind)
        failure = upstream["last_failure"]
        if upstream["open"] and failure is not None:
            yield from _below(f"last failure {ago(failure['seconds_ago'])}: {failure['reason']}")
    certificates = [*document["certificates"], *document["device_certificates"]["due"]]
    if certificates:
        yield from _heading("Certificates")
    for certificate in certificates:
        kind = {"valid": "good", "ends soon": "wait"}.get(certificate["state"], "bad")
        yield from _item(f"{certificate_name(certificate)}: {certificate_words(certificate)}", kind)
    stored = document.get("store")
    if stored is not None:
        yield from _heading("Stored messages")
        for line in store_lines(stored):
            yield from _item(line, "wait" if stored["messages"] or stored["failure"] else "good")
        for each in stored["backlogs"][:_SHOWN]:
            words = f"{each['client_identifier']}: {number(each['messages'])} messages, {backlog_words(each)}"
            yield from _below(words)
    if document["lately"]:
        yield from _heading("Why sessions ended in the last 15 minutes")
    for each in document["lately"]:
        yield from _item(f"{each['reason']}, {_times(each['count'])}: {each['meaning']}", "bad")
        yield from _below(f"-> {each['remedy']}")
    if devices["items"]:
        yield from _heading("Devices")
    width = min(40, max((len(device_name(each)) for each in devices["items"]), default=0))
    for each in devices["items"]:
        yield _device(each, width)
    left = devices["matching"] - len(devices["items"])
    if left > 0:
        yield _coloured(f"  and {number(left)} more: --devices N lists more, --device ID finds one", "faint")


def _about(document: Part, wanted: str) -> Iterator[str]:
    devices = document["devices"]
    judged = verdict(document)
    if judged.level is Level.DOWN:
        yield from _verdict(document)
        yield ""
    if not devices["items"]:
        yield _coloured(_safe(f"{wanted} is unknown"), "bad")
        for line in unknown_words(document):
            yield from _wrapped(line, "  ")
        return
    exact = {wanted, printable(wanted)}
    similar = {name.casefold() for name in exact}
    shown = (
        [each for each in devices["items"] if each["client_identifier"] in exact]
        or [each for each in devices["items"] if each["client_identifier"].casefold() in similar]
        or devices["items"][:_MATCHES]
    )
    for each in shown:
        yield _coloured(_safe(f"{device_name(each)}: {device_state(each)}"), _kind(each))
        traffic = each["traffic"]
        facts = [
            f"at {each['device_address']}",
            f"{_when(each)} ({clock(in_state_since(each)[0], document['time'], None)})",
            f"upstream {each['upstream']}" if each["upstream"] else "",
            f"there as {identity}" if (identity := device_identity(each)) else "",
            f"{_packets(traffic['packets_up'])} to the broker and {number(traffic['packets_down'])} from it",
            f"last heard {ago(each['heard_seconds_ago'])}" if each["heard_seconds_ago"] is not None else "",
            f"last data {ago(each['data_seconds_ago'])}" if each["data_seconds_ago"] is not None else "",
        ]
        yield from _wrapped(", ".join(filter(None, facts)), "  ")
        for line in device_words(each):
            yield from _wrapped(line, "  ")
    left = devices["matching"] - len(shown)
    if left > 0:
        yield _coloured(f"{number(left)} more {'matches' if left == 1 else 'match'} by name or address", "faint")


def _packets(count: int) -> str:
    return f"{number(count)} packet{'' if count == 1 else 's'}"


def _verdict(document: Part) -> Iterator[str]:
    judged = verdict(document)
    yield _coloured(_safe(judged.line), _LEVELS[judged.level])
    for reason in judged.reasons:
        yield from _wrapped(reason, "  ", "- ")
    up, now = duration(document["uptime_seconds"]), document["time"]
    yield _coloured(
        _safe(f"{document['host']}, version {document['version']}, up {up}, as of {clock(now, now, None)}"),
        "faint",
    )
    if "engine" in document:
        yield _coloured(_safe(document["engine"]["words"]), "faint")


def _device(device: Part, width: int) -> str:
    name = _safe(device_name(device))
    name = name if len(name) <= width else f"{name[: width - 1]}…"
    state = _coloured(_safe(device_state(device)), _kind(device))
    return f"  {name:<{width}}  {state}, {_when(device)}, {_safe(device['device_address'])}"


def _when(device: Part) -> str:
    _, seconds = in_state_since(device)
    return ago(seconds) if device["step"] in {"ended", "refused"} else f"for {duration(seconds)}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{number(count)} times"


def _kind(device: Part) -> str:
    if device["step"] in CONNECTED:
        return "good"
    if device["step"] in {"ended", "refused"}:
        return "faint" if device["end"]["in_order"] else "bad"
    return "wait"


def _row(name: str, words: str, drawn: str) -> str:
    return f"{name:<10}{words}" + (f"  {drawn}" if drawn else "")


def _heading(text: str) -> Iterator[str]:
    yield ""
    yield _coloured(text, "strong")


def _item(words: str, kind: str) -> Iterator[str]:
    mark = {"good": "ok", "wait": "!!", "faint": "--"}.get(kind, "XX")
    first, *others = _wrapped(words, "     ") or [""]
    yield f"  {_coloured(mark, kind)} {first.strip()}"
    yield from others


def _below(words: str) -> Iterator[str]:
    yield from _wrapped(words, "     ")


def _wrapped(words: str, indent: str, mark: str = "") -> list[str]:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    return textwrap.wrap(
        _safe(words),
        max(40, width),
        initial_indent=indent + mark,
        subsequent_indent=indent + " " * len(mark),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _drawn(values: Sequence[float]) -> str:
    """Return a bar chart in one line, if the terminal has such characters."""
    if not values or not (sys.stdout.encoding or "").lower().startswith("utf"):
        return ""
    groups = [values[at : at + 3] for at in range(0, len(values), 3)]
    means = [sum(group) / len(group) for group in groups]
    top = max(means) or 1
    return "".join(_BARS[min(len(_BARS) - 1, int(mean / top * len(_BARS)))] for mean in means)


def _coloured(text: str, kind: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{_COLOURS[kind]}m{text}\033[0m"


def _safe(text: str) -> str:
    """Escape unprintable characters, in case the endpoint is not a gateway."""
    return unprintable_escaped(text)


# ---- options


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a device, or leave out --device to see all")
    return text


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= 1000:
        raise argparse.ArgumentTypeError("0 to 1000")
    return count


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.2 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("0.2 to 3600 seconds")
    return seconds
