"""Whether a device has a session at the running gateway, for those who would disturb it.

In: the configuration, a Client Identifier.  Out: yes, no, or why that is not known.
"""

from __future__ import annotations

from urllib.parse import quote

from gateway.cli.status import CannotAsk, NeedsPassword, endpoint_at, fetch
from gateway.config import Config
from gateway.ops.status_words import CONNECTED
from gateway.text import printable

_MATCHES = 1000


def why_not_to_connect(config: Config, client_identifier: str) -> str:
    """Say why a CONNECT with a device's name should not be sent; empty if nothing speaks against it.

    A gateway that does not run, or that has no status endpoint, cannot be asked.
    """
    try:
        endpoint = endpoint_at(config.status.endpoint, config.status.server_cert, "the configuration")
        items = fetch(endpoint, f"?limit={_MATCHES}&q={quote(client_identifier)}")["devices"]["items"]
        names = {each["client_identifier"] for each in items if each["step"] in CONNECTED}
    except NeedsPassword:
        return "the gateway's status needs a password, so it is not known whether this device is connected"
    except (CannotAsk, KeyError, TypeError, AttributeError):
        return ""
    is_connected = printable(client_identifier) in names
    return "the device is connected now, and a second CONNECT would end its session" if is_connected else ""
