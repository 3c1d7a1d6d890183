"""What the running gateway has, for those who would disturb it: a device's session, its listeners.

In: the configuration, a Client Identifier.  Out: yes, no, or why that is not known; addresses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from gateway.cli.status import CannotAsk, NeedsPassword, endpoint_at, fetch, with_password
from gateway.config import Config
from gateway.config.listen import listening_at
from gateway.ops.status_words import CONNECTED
from gateway.text import printable

_MATCHES = 1000


def why_not_to_connect(config: Config, client_identifier: str, password_file: Path | None) -> str:
    """Say why a CONNECT with a device's name should not be sent; empty if nothing speaks against it.

    A gateway that does not run, or that has no status endpoint, cannot be asked.  `password_file` has its password.
    """
    try:
        items = _ask(config, f"?limit={_MATCHES}&q={quote(client_identifier)}", password_file)["devices"]["items"]
        names = {each["client_identifier"] for each in items if each["step"] in CONNECTED}
    except NeedsPassword:
        return (
            "the gateway's status needs its password (--status-password-file), so it is not known whether this device "
            "is connected"
        )
    except (CannotAsk, KeyError, TypeError, AttributeError):
        return ""
    is_connected = printable(client_identifier) in names
    return "the device is connected now, and a second CONNECT would end its session" if is_connected else ""


def listeners_of_gateway(config: Config, password_file: Path | None) -> frozenset[str]:
    """Return where the running gateway listens, its status endpoint included, as `HOST:PORT` or the path of a socket.

    Empty if it does not run, has no status endpoint, or asks for another password than that in `password_file`.
    """
    try:
        listeners = {str(each["address"]) for each in _ask(config, "?limit=0", password_file)["listeners"]}
    except (CannotAsk, KeyError, TypeError, AttributeError):
        return frozenset()
    return frozenset(listeners | {listening_at(config.status.endpoint)})


def _ask(config: Config, query: str, password_file: Path | None) -> dict[str, Any]:
    """Return the status document of the running gateway.  Raises `CannotAsk`."""
    endpoint = endpoint_at(config.status.endpoint, config.status.server_cert, "the configuration")
    return fetch(with_password(endpoint, password_file), query)
