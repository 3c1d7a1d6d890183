"""The status document in words, the same on the page and on a terminal.

In: the document of `gateway.ops.sight`, or parts of it.  Out: sentences, durations, a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from enum import IntEnum
from ipaddress import ip_address
from typing import Any

from attrs import frozen

from gateway.text import capitalized

Part = Mapping[str, Any]

SCHEMA = 1
"""Version of the document: raised when a field is removed or changes its meaning, not for new fields."""

_STEPS = {
    "wait-connect": "connecting: waiting for CONNECT",
    "dialling": "connecting: dialling the broker",
    "wait-connack": "connecting: waiting for the broker's CONNACK",
    "relaying": "connected",
    "stored": "connected; its messages are stored if no broker is available",
    "ended": "not connected",
    "refused": "refused",
}
CONNECTED = frozenset({"relaying", "stored"})
"""The steps of devices that are connected."""

_DISABLED = "device-disabled"  # the end of a device that an operator has disabled
_STATES = {"left alone": "backing off"}
_CERTIFICATES = {
    "own": "the gateway's own",
    "ca": "CA",
    "broker": "of broker",
    "device": "of rule",
    "page": "of the status page",
}
_SOON_FULL = 86_400  # seconds
SILENT_FOR_LONG = 300
"""Seconds after which a connected device that sends nothing, or nothing but pings, is silent."""


class Level(IntEnum):
    """Severity; UNTRIED if nothing has happened yet that could be judged."""

    UNTRIED = -1
    WELL = 0
    ATTENTION = 1
    DOWN = 2


@frozen
class Verdict:
    """The gateway's status in one line, and each problem."""

    level: Level
    line: str
    reasons: list[str]


def verdict(document: Part) -> Verdict:
    """Return the overall verdict: DOWN if no device can be served, ATTENTION if there is a problem to look at."""
    reasons = [
        f"Upstream {upstream['address']}: {upstream_words(upstream)}"
        for upstream in document["upstreams"]
        if not upstream["open"]
    ]
    reasons += [
        f"{certificate_name(certificate)}: {certificate_words(certificate)}. {certificate['remedy']}"
        for certificate in document["certificates"]
        if certificate["state"] != "valid"
    ]
    reasons += device_certificate_lines(document)
    reasons += refused_rule_lines(document)
    reasons += renewal_lines(document)
    reasons += [capitalized(words) for words in document["reloads"]["wanting"]]
    if document["log"]["losing"]:
        reasons.append(
            f"The log output is blocked or fails: {number(document['log']['lines_lost'])} lines are lost. "
            "Check the disk or the journal, or what reads the gateway's standard output."
        )
    absent = _absent(document)
    is_new = not document["sessions"]["started"] and not connected(document)
    if is_new:
        absent.append(f"Point a device at {where_devices_connect(document)}, with plain MQTT (no TLS).")
    # The configuration permits them by name, so they are shown, but are no problem to look at.
    absent += weak_cipher_lines(document)
    if not document["alive"]:
        return Verdict(Level.DOWN, "The event loop is stuck; timeouts are not enforced", reasons)
    stored, steps = document.get("store"), document["sessions"]["by_step"]
    if stored is not None:
        reasons = [*store_problems(stored), *reasons]
    is_outage = bool(document["upstreams"]) and not any(each["open"] for each in document["upstreams"])
    if is_outage and stored is not None and not stored["failure"] and steps.get("stored"):
        line = "No broker is available; messages of some devices are stored"
        if not document["unserved"]:
            line = "No broker is available; the devices' messages are stored"
        return Verdict(Level.ATTENTION, line, absent + reasons)
    if not document["ready"]:
        words = document["unready"]
        return Verdict(Level.DOWN, f"Devices cannot connect: {words.partition(':')[0]}", reasons)
    if document["failing"] and not connected(document):
        return Verdict(Level.DOWN, "No device is connected, and sessions fail", reasons + absent)
    if stored is not None and stored["failure"]:
        return Verdict(Level.ATTENTION, "Messages cannot be stored", reasons + absent)
    if document["unserved"] > document["recovered"]:
        return Verdict(Level.ATTENTION, "Some devices cannot connect", absent + reasons)
    if reasons or document["unserved"]:
        return Verdict(Level.ATTENTION, "The gateway works, but something needs attention", reasons + absent)
    if not is_new:
        return Verdict(Level.WELL, "The gateway works", absent)
    if any(each["verified"] is not None for each in document["upstreams"]):
        return Verdict(Level.WELL, "The gateway works, but no device has connected yet", absent)
    return Verdict(
        Level.UNTRIED, "No device has connected yet, and the gateway has not connected to a broker yet", absent
    )


def store_problems(stored: Part) -> list[str]:
    """Return what needs attention about the store, the most urgent first."""
    problems = []
    if stored["failure"]:
        problems.append(
            f"The store cannot write: {stored['failure']}. Without a broker, devices get no acknowledgement. "
            "Free space on the disk, or repair it."
        )
    unreadable = stored["unreadable"]
    if unreadable["devices"]:
        some = "one device" if unreadable["devices"] == 1 else f"{number(unreadable['devices'])} devices"
        problems.append(f"Stored messages of {some} cannot be read, and wait: {unreadable['failure']}. Check the disk.")
    full = stored.get("full_in_seconds")
    if full is not None and full < _SOON_FULL:
        problems.append(
            f"The store will be full in {duration(full)} at this rate. Restore the broker, or raise store.max_size."
        )
    if stored["set_aside"]:
        problems.append(
            f"{number(stored['set_aside'])} stored messages are set aside, because the broker refused them. "
            "`mqtts-gateway store list` names the devices."
        )
    if stored["damaged_files"]:
        problems.append(
            f"The store was damaged, and messages may be lost: {stored['newest_damaged_file']} in its directory is the "
            "damaged file. Check the disk, and remove the file when you no longer need it."
        )
    return problems


def store_lines(stored: Part) -> list[str]:
    """Describe the store: what waits, since when, and what comes of it."""
    if not stored["messages"]:
        line = "Nothing waits."
    else:
        line = (
            f"{number(stored['messages'])} messages wait, {size(stored['bytes'])} of {size(stored['limit_bytes'])}; "
            f"the oldest is {duration(stored['oldest_seconds'] or 0)} old."
        )
    lines = [line]
    if stored.get("outage_seconds") is not None:
        lines.append(f"Devices have been served without a broker for {duration(stored['outage_seconds'])}.")
    if stored.get("delivered_in_seconds") is not None:
        lines.append(f"All will be delivered in {duration(stored['delivered_in_seconds'])} at this rate.")
    elif stored.get("full_in_seconds") is not None:
        lines.append(f"The store will be full in {duration(stored['full_in_seconds'])} at this rate.")
    dropped = sum(stored["dropped"].values())
    lines.append(
        f"Since the start: {number(stored['stored'])} stored, {number(stored['delivered'])} delivered, "
        f"{number(dropped)} dropped."
    )
    return lines


def backlog_words(backlog: Part) -> str:
    """Say what becomes of a backlog, or why it waits."""
    where = "connected" if backlog["connected"] else "not connected"
    if backlog["phase"] == "draining":
        return f"{where}; being delivered"
    return f"{where}; waiting" + (f": {backlog['trouble']}" if backlog["trouble"] else "")


def connected(document: Part) -> int:
    """Return how many devices are connected."""
    steps: Mapping[str, int] = document["sessions"]["by_step"]
    return sum(steps.get(step, 0) for step in CONNECTED)


def device_certificate_lines(document: Part) -> list[str]:
    """Name the devices' certificates that have expired, expire soon or are not valid yet; the first of them."""
    certificates = document["device_certificates"]
    lines = [f"{certificate_name(each)}: {certificate_words(each)}. {each['remedy']}" for each in certificates["due"]]
    more = sum(count for state, count in certificates["count"].items() if state != "valid") - len(lines)
    return [*lines, f"{number(more)} more devices' certificates need attention."] if more > 0 else lines


def refused_rule_lines(document: Part) -> list[str]:
    """Name the rules that cannot be used; the first of them."""
    refused = document["refused_rules"]
    lines = [
        f"Rule {each['rule']} cannot be used, so its devices are refused: {each['problem']}"
        for each in refused["first"]
    ]
    more = refused["count"] - len(lines)
    return [*lines, f"{number(more)} more rules cannot be used."] if more > 0 else lines


def renewal_lines(document: Part) -> list[str]:
    """Name the certificates whose renewal fails; the first of them."""
    renewals = document.get("renewals")
    if renewals is None:
        return []
    lines = [
        f"{capitalized(each['whose'])} cannot be renewed: {each['problem']}. "
        "Run `mqtts-gateway device renew` to see why."
        for each in renewals["first"]
    ]
    more = renewals["failing"] - len(lines)
    return [*lines, f"{number(more)} more certificates cannot be renewed."] if more > 0 else lines


def weak_cipher_lines(document: Part) -> list[str]:
    """Name the configured ciphers that are weaker than the defaults."""
    return [f"{each['key']}: weaker than the defaults: {each['cipher']}." for each in document["weak_ciphers"]]


def _absent(document: Part) -> list[str]:
    """Say how many devices failed lately and are not connected, and why; those that could not connect apart."""
    count, unserved = document["absent"], document["unserved"]
    if not count:
        return []
    devices, have = ("1 device", "has") if count == 1 else (f"{number(count)} devices", "have")
    why = _most_frequent(document["absent_reasons"])
    lines = [f"{devices} failed in the last 15 minutes and {have} not come back; {why}."]
    if 0 < unserved < count:
        why = _most_frequent(document["unserved_reasons"])
        lines.append(f"{number(unserved)} of them could not connect; {why}.")
    return lines


def _most_frequent(reasons: Mapping[str, int]) -> str:
    reason = max(reasons, key=reasons.__getitem__)
    return f"the reason is {reason}" if len(reasons) == 1 else f"the most frequent reason is {reason}"


def is_untried(upstream: Part) -> bool:
    """Whether nothing is known of a broker: it has neither been verified nor failed."""
    return bool(upstream["open"]) and upstream["state"] == "untried"


def upstream_words(upstream: Part) -> str:
    """Describe the state of a broker."""
    failure = upstream["last_failure"]
    if upstream["open"]:
        return "not tried yet" if is_untried(upstream) else "serving"
    words = shown_state(upstream["state"])
    if upstream["retry_in_seconds"]:
        words += f", next attempt in {duration(upstream['retry_in_seconds'])}"
    if failure is not None:
        detail = f" ({failure['detail']})" if failure["detail"] else ""
        words += f". {failure['meaning'].rstrip('.')}{detail}. {failure['remedy']}"
    return words


def shown_state(state: str) -> str:
    """Return a broker's state in the words that people are shown; the state itself is for programs."""
    return _STATES.get(state, state)


def certificate_name(certificate: Part) -> str:
    """Return the name of a certificate."""
    name = _CERTIFICATES.get(certificate["role"], certificate["role"])
    named = certificate["upstream"] or certificate["rule"]
    where = f" {named}" if named else ""
    return f"Certificate ({name}{where}) {certificate['subject']}"


def certificate_words(certificate: Part) -> str:
    """Describe how long a certificate is valid."""
    date = certificate["not_after"][:10]
    days = certificate["days_left"]
    if certificate["state"] == "expired":
        return f"expired on {date}"
    if certificate["state"] == "not yet valid":
        return "not yet valid: check this machine's clock"
    return f"{days} {'day' if days == 1 else 'days'} left, until {date}"


def device_name(device: Part) -> str:
    """Return a device's name: its Client Identifier, or its address without the port."""
    return str(device["client_identifier"]) or f"at {device['device_address'].rpartition(':')[0]}"


def device_state(device: Part) -> str:
    """Describe the state of a device in a few words."""
    end = device["end"]
    if is_shut_out(device):
        return "disabled"
    if device["step"] in {"ended", "refused"} and end is not None:
        return f"{_STEPS[device['step']]}: {end['reason']}"
    return _STEPS[device["step"]]


def in_state_since(device: Part) -> tuple[str, int]:
    """Return since when a device is connected, connecting or not connected: the moment, and how many seconds ago."""
    end = device["end"]
    if device["step"] not in {"ended", "refused"} or end is None or "absent_since" not in end:
        return device["since"], device["seconds"]  # a gateway of an earlier version has no `absent_since`
    return end["absent_since"], end["absent_seconds"]


def is_shut_out(device: Part) -> bool:
    """Whether a device is not connected because an operator has disabled it."""
    return bool(device["step"] == "ended" and device["end"]["reason"] == _DISABLED)


def device_words(device: Part) -> list[str]:
    """Describe why a device is not connected, and what to do."""
    end, lines = device["end"], []
    if device["step"] in {"ended", "refused"}:
        lines.append(f"{end['meaning'].rstrip('.')}{_detail(end)}.")
        if is_shut_out(device):
            lines.append(end["remedy"])
        elif not end["in_order"]:
            lines.append(f"What to do: {end['remedy']}")
        _, absent = in_state_since(device)
        if absent > end["seconds_ago"]:
            lines.append(f"Its last try was {ago(end['seconds_ago'])}.")
        lines += _times(end)
        return lines
    if device["held_back"]:
        lines.append("The gateway is not reading from it now, because the broker does not keep up.")
    elif device["data_seconds_ago"] is not None and device["data_seconds_ago"] >= SILENT_FOR_LONG:
        is_pinging = device["heard_seconds_ago"] is not None and device["heard_seconds_ago"] < SILENT_FOR_LONG
        only = "nothing but pings" if is_pinging else "nothing"
        lines.append(f"It has sent {only} for {duration(device['data_seconds_ago'])}.")
    if end is not None and not end["in_order"]:
        # Once it is connected again, there is nothing to do.
        remedy = "" if device["step"] in CONNECTED else f" {end['remedy']}"
        lines.append(f"Its last session ended {ago(end['seconds_ago'])}: {end['reason']}{_detail(end)}.{remedy}")
    if end is not None:
        lines += _times(end)
    return lines


def identity_words(certificate: str, username: str, client_identifier: str) -> str:
    """Say who a device is at the broker, in printable text; "" if nothing but its own names is known."""
    named = (("", certificate), ("user name ", username), ("Client Identifier ", client_identifier))
    return ", ".join(f'{what}"{name}"' if what else name for what, name in named if name)


def device_identity(device: Part) -> str:
    """Say who a device is at the broker; "" if nothing but its own names is known."""
    fields = ("upstream_certificate", "upstream_username", "upstream_client_identifier")
    return identity_words(*(device.get(field, "") for field in fields))


def where_devices_connect(document: Part) -> str:
    """Name the listeners as devices reach them."""
    return " or ".join(_reached_at(each, document["host"]) for each in document["listeners"]) or "nowhere"


def _reached_at(listener: Part, host: str) -> str:
    address, name = listener["address"], listener["name"]
    ip, _, port = address.rpartition(":")
    notes = [f"listener {name}"] if name else []
    try:
        parsed = ip_address(ip.strip("[]").partition("%")[0])
    except ValueError:
        address = f"the UNIX socket {address}"
    else:
        if parsed.is_unspecified:
            address = f"{host}:{port}"
            notes.append("any address of this machine")
        elif parsed.is_loopback:
            notes.append("from this machine only")
    return f"{address} ({', '.join(notes)})" if notes else address


def unknown_words(document: Part) -> list[str]:
    """Describe what it means that a device is unknown."""
    remembered = duration(document["devices"]["remembered_seconds"])
    lines = [
        f"No matching session is open, and none has ended within the last {_one_left_out(remembered)}.",
        "The device does not reach this gateway, or uses another name.",
        "Check its power, its network, and that it is configured with this gateway's address.",
        f"Devices must connect to {where_devices_connect(document)}.",
    ]
    without_name = sum(1 for each in document["lately"] if each["reason"] in {"not-mqtt", "connect-timeout"})
    if without_name or document["sessions"]["refused"]:
        lines.append("Some connections ended before CONNECT: search for the device's IP address.")
    return lines


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: `45 s`, `3 min`, `2 h 5 min`, `4 days 3 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    shown = "1 day" if days == 1 else f"{days} days"
    return f"{shown} {hours} h" if hours else shown


def ago(seconds: float) -> str:
    """Return how long ago something happened."""
    return "just now" if seconds < 1 else f"{duration(seconds)} ago"


def size(count: float) -> str:
    """Return a size in bytes, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number(count: float) -> str:
    """Return a count with thousands separators."""
    return f"{count:,.0f}"


def clock(moment: str, now: str, zone: tzinfo | None = UTC) -> str:
    """Return an ISO 8601 moment in a time zone (None: this machine's): the time and the zone, the date unless today."""
    at, today = (datetime.fromisoformat(each).astimezone(zone) for each in (moment, now))
    return at.strftime("%H:%M:%S %Z" if at.date() == today.date() else "%Y-%m-%d %H:%M:%S %Z")


def _detail(end: Part) -> str:
    return f" ({end['detail']})" if end["detail"] else ""


def _times(end: Part) -> list[str]:
    if end["times"] < 2:
        return []
    return [
        f"{number(end['times'])} sessions ended in the last {_one_left_out(duration(max(1, end['times_seconds'])))}."
    ]


def _one_left_out(words: str) -> str:
    """Say `minute` for `1 min`."""
    return {"1 s": "second", "1 min": "minute", "1 h": "hour", "1 day": "day"}.get(words, words)
