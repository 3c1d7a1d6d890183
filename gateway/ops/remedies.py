"""Remedies that name the device they are for.

In: why a device's session ended, and its Client Identifier as people are shown it.  Out: what to do, with the command
for this device where there is one.
"""

from __future__ import annotations

import shlex

from gateway.errors import EndReason

_COMMANDS = {
    EndReason.DEVICE_DISABLED: "To let the device connect again, run `mqtts-gateway device enable {}`, then reload.",
    EndReason.DEVICE_UNKNOWN: "If the device is yours, run `mqtts-gateway device add {}`, then reload.",
}


def remedy_for(reason: EndReason, client_identifier: str) -> str:
    """Return what to do about `reason`; `client_identifier` is printable (`gateway.text.printable`), and may be cut.

    An identifier that is empty, escaped or cut cannot be typed, and one that begins with `-` would be an option: the
    remedy then names no device.
    """
    command = _COMMANDS.get(reason)
    is_typed = client_identifier and not client_identifier.startswith("-") and not {"\\", "…"} & set(client_identifier)
    return command.format(shlex.quote(client_identifier)) if command and is_typed else reason.remedy
