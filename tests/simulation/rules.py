"""Rules for devices in the simulation, and what they make of a CONNECT, written apart from the gateway's code.

In: a kind of rule.  Out: the `DeviceRule`, and the CONNECT that its broker must get.
"""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

from gateway.config import DeviceRule
from tests.simulation.packets import packets_of

KINDS = ("inspect", "pings", "pace", "token", "spoofed")
# The Keep Alive that devices with `pings` have at the broker, in seconds: the gateway pings in half of it, and gives a
# broker up that has answered nothing in twice that, which no model's pause may be taken for.
KEEP_ALIVE = 24
# A session with a token ends when so many seconds have passed, at the latest, and the sweep comes once a second.
TOKEN_LIFETIME = 10.0


def rule_for(kind: str, name: str, jwt_key: Path) -> DeviceRule:
    """Return the rule of a kind for the device called `name`."""
    rule = {"name": f"rule-{name}", "match_client_id": (name,)}
    if kind == "inspect":
        return DeviceRule(**rule, publish=(f"{name}/#",), subscribe=("#",))
    if kind == "pings":
        return DeviceRule(**rule, keep_alive_max=KEEP_ALIVE)
    if kind == "pace":
        return DeviceRule(**rule, packets_per_second=3.0, bytes_per_second=8000.0)
    if kind == "token":
        return DeviceRule(**rule, jwt_key_file=jwt_key, jwt_audience="plant", token_lifetime=TOKEN_LIFETIME)
    return DeviceRule(**rule, bound_to=(ip_network("10.9.9.9"),))


def is_presented(kind: str, own: bytes, password: bytes, presented: bytes) -> bool:
    """Say whether `presented` is the CONNECT that a rule makes of a device's `own`, whose password is `password`."""
    if kind not in {"pings", "token"}:
        return presented == own
    ((_, first, body),), ((_, now_first, now_body),) = packets_of(own), packets_of(presented)
    at = 2 + int.from_bytes(body[:2], "big") + 2
    if kind == "pings":
        keep_alive = min(int.from_bytes(body[at : at + 2], "big") or KEEP_ALIVE, KEEP_ALIVE)
        return (now_first, now_body) == (first, body[:at] + keep_alive.to_bytes(2, "big") + body[at + 2 :])
    # The password is the last field: a token has taken its place, three parts in base64.
    before, token = body[: -len(password) - 2], now_body[len(body) - len(password) :]
    return now_first == first and now_body.startswith(before) and token.count(b".") == 2


def name_in(connect_body: bytes) -> str:
    """Return the Client Identifier in the body of a CONNECT."""
    at = 2 + int.from_bytes(connect_body[:2], "big")
    is_5 = connect_body[at] & 0x7F == 5
    at += 4
    if is_5:
        at += 1 + connect_body[at]
    size = int.from_bytes(connect_body[at : at + 2], "big")
    return connect_body[at + 2 : at + 2 + size].decode()


def same_length(one: bytes | bytearray, other: bytes | bytearray) -> int:
    """Return how many bytes two streams have in common at their beginning."""
    if one == other[: len(one)]:
        return len(one)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def without_pings(data: bytes) -> bytes:
    """Return a stream without its PINGRESPs, of which the gateway keeps those that answer it."""
    kept, used = bytearray(), 0
    for end, first, _ in packets_of(data):
        if first != 0xD0:
            kept += data[used:end]
        used = end
    return bytes(kept + data[used:])


def pings_in(data: bytes, first: int) -> int:
    """Count the PINGREQs (0xC0) or PINGRESPs (0xD0) of a stream."""
    return sum(each == first for _, each, _ in packets_of(data))
