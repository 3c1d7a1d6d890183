"""Remedies that name the device they are for.

In: why a device's session ended, and its Client Identifier as people are shown it.  Out: what to do, with the command
for this device where there is one.
"""

from __future__ import annotations

import re
import shlex

from gateway.errors import EndReason

_COMMAND = re.compile("(`mqtts-gateway device [a-z]+ )ID`")


def remedy_for(reason: EndReason, client_identifier: str) -> str:
    """Return what to do about `reason`; `client_identifier` is printable (`gateway.text.printable`), and may be cut.

    An identifier that is empty, escaped or cut cannot be typed, and one that begins with `-` would be an option: the
    remedy then names no device.
    """
    is_typed = client_identifier and not client_identifier.startswith("-") and not {"\\", "…"} & set(client_identifier)
    if not is_typed:
        return reason.remedy
    return _COMMAND.sub(lambda match: f"{match[1]}{shlex.quote(client_identifier)}`", reason.remedy)
