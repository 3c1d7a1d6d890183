"""The status page: the status document as HTML that needs nothing else.

In: the document of `gateway.ops.sight`.  Out: one HTML page with its style, and a script that only refreshes it.
Without JavaScript the page is complete, and the browser reloads it.
"""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from importlib import resources
from typing import Any
from urllib.parse import urlencode

from gateway.ops.status_words import (
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
    size,
    store_lines,
    unknown_words,
    upstream_words,
    verdict,
)
from gateway.ops.web.chart import Line, chart
from gateway.ops.web.markup import Child, Markup, element, together
from gateway.pieces import Pieces, slices
from gateway.text import capitalized

_STYLE = resources.files(__package__).joinpath("page.css").read_text("utf-8")
_SCRIPT = resources.files(__package__).joinpath("page.js").read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        f"style-src {_hash(_STYLE)}",
        f"script-src {_hash(_SCRIPT)}",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)

_ROWS_AT_A_TIME = 10  # rows of devices that are made in one turn of the event loop
# Stands for those rows until all else is made.  No text can look like it: the less-than sign would be escaped.
_ROWS = Markup("<!--rows-->")
_NAME = 64  # characters of a Client Identifier shown in a row

_CLASSES = {Level.UNTRIED: "untried", Level.WELL: "well", Level.ATTENTION: "attention", Level.DOWN: "down"}
_SHOWN = {
    "all": "All",
    "silent": "Not connected",
    "connecting": "Connecting",
    "connected": "Connected",
    "quiet": "Connected but silent",
}
_SORTS = {"state": "State", "name": "Name", "data": "Longest silence"}
# If a search finds no more devices than this, all is said of each.
_FEW = 3


def page(document: Part) -> Pieces[bytes]:
    """Make the page; the rows of devices apart, since each element copies what is in it."""
    judged = verdict(document)
    devices = document["devices"]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # With JavaScript the page is refreshed in place, without disturbing a search that is being typed.
        element("noscript", element("meta", http_equiv="refresh", content="30")),
        element("title", f"{_mark(judged.level)}{document['host']}: MQTTS gateway"),
        element("style", Markup(_STYLE)),
    )
    searching = bool(devices["query"]) or devices["show"] != "all" or devices["sort"] != "state" or devices["page"] > 1
    sections = []
    for make in (_now, _history, _why, _upstreams, _store, _certificates):
        sections.append(make(document))
        yield
    rows: list[bytes] = []
    is_open = bool(devices["query"]) and devices["matching"] <= _FEW
    for some in slices(devices["items"], _ROWS_AT_A_TIME):
        shown = (_device(each, document["time"], is_open=is_open) for each in some)
        rows.append(together(*_rows(_OF_DEVICES, shown)).encode())
        yield
    listed = element("div", _devices(document), id="devices")
    body = element(
        "body",
        element("header", element("h1", "MQTTS gateway ", element("span", document["host"], class_="host"))),
        element(
            "main",
            element("div", _verdict(judged), id="verdict"),
            _search(devices),
            listed if searching else None,
            element("div", *sections, id="state"),
            None if searching else listed,
        ),
        element("footer", _footer(document), id="footer"),
        element(
            "p", "No answer from the gateway since ", element("span", ""), ".", id="stale", role="alert", hidden=True
        ),
        element("script", Markup(_SCRIPT)),
    )
    yield
    before, _, after = f"<!doctype html>\n{element('html', head, body, lang='en')}\n".partition(_ROWS)
    return b"".join((before.encode(), *rows, after.encode()))


def _mark(level: Level) -> str:
    return {Level.ATTENTION: "! ", Level.DOWN: "DOWN "}.get(level, "")


def _verdict(judged: Any) -> Markup:
    return element(
        "section",
        element("h2", judged.line),
        element("ul", *(element("li", reason) for reason in judged.reasons)) if judged.reasons else None,
        class_=f"verdict {_CLASSES[judged.level]}",
        role="status",
    )


def _search(devices: Part) -> Markup:
    return element(
        "form",
        element("label", "Find a device", for_="q"),
        element(
            "input",
            type="search",
            id="q",
            name="q",
            value=devices["query"],
            placeholder="Client Identifier or IP address",
            autocomplete="off",
            spellcheck="false",
            maxlength=256,
        ),
        element("button", "Find"),
        role="search",
        method="get",
        action="?",
    )


# ---- the state


def _now(document: Part) -> Markup:
    sessions, history = document["sessions"], document["history"]
    latest = history[-1] if history else None
    rate = latest["packets"] / latest["seconds"] if latest and latest["seconds"] else 0
    failures = sum(each["count"] for each in document["lately"])
    tiles = [
        ("Connected", number(connected(document)), f"of {number(sessions['limit'])} at most"),
        ("Connecting", number(sessions["open"] - connected(document)), "not accepted by the broker yet"),
        ("Not connected", number(document["not_connected"]), f"{number(document['absent'])} failed in the last 15 min"),
        ("Messages", f"{rate:.0f}/s" if rate >= 10 or not rate else f"{rate:.1f}/s", "MQTT packets, both ways"),
        ("Failures", number(failures), "sessions in the last 15 min"),
    ]
    return element(
        "section",
        element("h2", "Now"),
        element(
            "dl",
            *(
                element("div", element("dt", name), element("dd", element("b", value), element("small", note)))
                for name, value, note in tiles
            ),
            class_="tiles",
        ),
    )


def _why(document: Part) -> Markup:
    rows = [
        [
            together(_badge(each["reason"], "failing")),
            number(each["count"]),
            number(each["devices"]),
            together(
                element("p", each["meaning"]),
                element("p", "Latest: ", each["detail"], class_="detail") if each["detail"] else None,
                element("p", "What to do: ", each["remedy"], class_="remedy"),
            ),
        ]
        for each in document["lately"]
    ]
    return _section(
        "Why sessions ended in the last 15 minutes",
        ", ".join(f"{each['reason']} {number(each['count'])}" for each in document["lately"][:_FEW])
        or "none, except by the device's own DISCONNECT",
        _table(("Reason", "Ends", "Devices (last end)", "What it means"), rows, numeric=(1, 2)) if rows else None,
        is_open=bool(rows),
    )


def _upstreams(document: Part) -> Markup:
    rows, kinds = [], Counter[str]()
    for each in document["upstreams"]:
        failure = each["last_failure"]
        said = None
        if failure is not None:
            detail = f": {failure['detail']}" if failure["detail"] else ""
            said = together(
                element("p", f"{failure['reason']}{detail}, {ago(failure['seconds_ago'])}"),
                element("p", failure["meaning"], " ", failure["remedy"], class_="remedy") if not each["open"] else None,
            )
        words = upstream_words(each) if each["open"] else upstream_words(each).partition(". ")[0]
        kind = "idle" if is_untried(each) else "serving" if each["open"] else "failing"
        kinds[words if each["open"] else "not available"] += 1
        rows.append(
            [
                together(element("b", each["address"]), element("small", f"certificate name {each['verify_name']}")),
                _badge(words, kind),
                _time(each["verified"], document["time"]) if each["verified"] else "never",
                said or "none",
            ]
        )
    return _section(
        "Upstreams",
        ", ".join(f"{number(count)} {kind}" for kind, count in kinds.items()) or "none",
        _table(("Broker", "State", "Last verified", "Last failure"), rows) if rows else None,
        is_open=not all(each["open"] for each in document["upstreams"]),
    )


def _store(document: Part) -> Markup | None:
    stored = document["store"]
    if stored is None:
        return None
    rows = [
        [
            element("b", each["client_identifier"][:_NAME], class_="name", title=each["identity"]),
            _badge(each["phase"], "waiting" if each["phase"] == "draining" else "failing"),
            number(each["messages"]),
            size(each["bytes"]),
            duration(each["oldest_seconds"]),
            backlog_words(each),
        ]
        for each in stored["backlogs"]
    ]
    headings = ("Device", "State", "Messages", "Size", "Oldest", "Why it waits")
    first, *others = store_lines(stored)
    return _section(
        "Stored messages",
        first,
        together(
            *(element("p", line) for line in others),
            _table(headings, rows, numeric=(2, 3)) if rows else None,
        ),
        is_open=bool(rows or stored["failure"]),
    )


def _certificates(document: Part) -> Markup:
    kinds = {"valid": "serving", "ends soon": "waiting"}
    shown = [*document["certificates"], *document["device_certificates"]["due"]]
    rows = [
        [
            together(element("b", certificate_name(each).partition(") ")[0].partition("(")[2])),
            each["subject"],
            together(
                _badge(certificate_words(each), kinds.get(each["state"], "failing")),
                element("p", each["remedy"], class_="remedy") if each["remedy"] else None,
            ),
        ]
        for each in shown
    ]
    if not rows:
        nothing = "none yet: the broker's appears after the first session; the platform's CAs are not listed"
        return _section("Certificates", nothing, None, is_open=False)
    return _section(
        "Certificates",
        "the first to expire: " + certificate_words(min(shown, key=lambda each: each["not_after"])),
        _table(("Certificate", "Subject", "Validity"), rows),
        is_open=any(each["state"] != "valid" for each in shown),
    )


def _history(document: Part) -> Markup:
    history = document["history"]

    def line(name: str, unit: str, values: Iterable[float]) -> Markup:
        return chart(Line(name, unit, list(values)), [each["ended"] for each in history], document["time"])

    charts = [
        line("Sessions", "connected", (each["sessions"] for each in history)),
        line("Messages", "packets per second", (each["packets"] / (each["seconds"] or 1) for each in history)),
        line("Failures", "in 10 seconds", (each["failures"] for each in history)),
    ]
    latest = f"{number(history[-1]['sessions'])} sessions" if history else "no values in the first ten seconds"
    return _section("The last 15 minutes", latest, element("div", *charts, class_="charts"), is_open=True)


# ---- devices


_OF_DEVICES = ("Device", "State", "Since", "Last data", "Upstream", "To the broker", "From the broker")


def _devices(document: Part) -> Markup:
    devices = document["devices"]
    query = devices["query"]
    matching = devices["matching"]
    many = "device" if matching == 1 else "devices"
    title = f"{number(matching)} {many} with “{query}”" if query else "Devices"
    if not matching and query:
        content = together(*(element("p", line) for line in unknown_words(document)))
    elif not matching:
        content = element("p", "None.")
    else:
        content = _framed(_OF_DEVICES, [_ROWS], class_="devices")
    return element(
        "section",
        element("h2", title),
        element("p", element("a", "Show all", href="?")) if query else None,
        _kinds(devices),
        _sorts(devices) if devices["matching"] > 1 else None,
        content,
        _pages(devices),
    )


def _device(device: Part, now: str, *, is_open: bool) -> Sequence[Child]:
    kind = {"relaying": "serving", "stored": "serving", "ended": "failing", "refused": "failing"}.get(
        device["step"], "waiting"
    )
    if device["step"] == "ended" and device["end"]["in_order"]:
        kind = "idle"
    where = " ".join(filter(None, (device["device_address"], device["listener"] and f"({device['listener']})")))
    name = device_name(device)
    traffic = device["traffic"]

    def passed(direction: str) -> Markup:
        packets, count = traffic[f"packets_{direction}"], traffic[f"bytes_{direction}"]
        return together(element("b", number(packets)), element("small", f"packets, {size(count)}"))

    facts = [f"session {device['session']}" if device["session"] else "", f"MQTT {device['protocol_version']}"]
    identity = device_identity(device)
    known = [f"At the broker it is {identity}."] if identity and device["upstream"] else []
    lines = [*device_words(device), *known, capitalized(", ".join(facts if device["protocol_version"] else facts[:1]))]
    more = together(
        *(element("p", line, class_="remedy" if line.startswith("What to do") else None) for line in lines if line)
    )
    data = device["last_data"]
    since, seconds = in_state_since(device)
    return [
        together(
            element("b", name if len(name) <= _NAME else f"{name[:_NAME]}…", class_="name", title=name),
            element("small", where),
        ),
        _fold(f"device {name}", _badge(device_state(device), kind), more, is_open=is_open),
        together(
            element("b", ago(seconds) if kind in {"failing", "idle"} else duration(seconds)),
            element("small", _time(since, now)),
        ),
        together(element("b", ago(device["data_seconds_ago"])), element("small", _time(data, now))) if data else None,
        device["upstream"] or "none yet",
        passed("up"),
        passed("down"),
    ]


def _kinds(devices: Part) -> Markup:
    links = []
    for name, word in _SHOWN.items():
        # Of devices that are connected but silent, the longest silence is what matters.
        sort = "data" if name == "quiet" else devices["sort"] if devices["show"] != "quiet" else "state"
        current = "page" if devices["show"] == name else None
        target = _target(devices, show=name, sort=sort)
        links.append(element("a", f"{word} {number(devices['counts'][name])}", href=target, aria_current=current))
    return element("nav", *links, aria_label="Which devices", class_="kinds")


def _sorts(devices: Part) -> Markup:
    links = [
        element("a", word, href=_target(devices, sort=name), aria_current="true" if devices["sort"] == name else None)
        for name, word in _SORTS.items()
    ]
    return element("nav", element("span", "Sort by"), *links, aria_label="Sort by", class_="sorts")


def _target(devices: Part, **changed: str | int) -> str:
    """Return where the same devices are listed, but for what is changed; from the first page on, unless that is."""
    usual = {"q": "", "show": "all", "sort": "state", "page": 1}
    arguments = {"q": devices["query"], "show": devices["show"], "sort": devices["sort"], **changed}
    return "?" + urlencode({key: value for key, value in arguments.items() if value != usual[key]})


def _pages(devices: Part) -> Markup | None:
    last, current = devices["pages"], devices["page"]
    if last <= 1:
        return None

    def link(word: str, target: int) -> Markup:
        if not 1 <= target <= last or target == current:
            return element("span", word)
        return element("a", word, href=_target(devices, page=target))

    parts: list[Child] = [link("First", 1), link("Previous", current - 1)]
    parts.append(element("span", f"Page {number(current)} of {number(last)}"))
    parts += [link("Next", current + 1), link("Last", last)]
    return element("nav", *parts, aria_label="Pages", class_="pages")


def _footer(document: Part) -> Markup:
    where = ", ".join(listener["address"] for listener in document["listeners"]) or "nowhere"
    now, reloads = document["time"], document["reloads"]
    refused = f", {reloads['refused']} refused" if reloads["refused"] else ""
    lost = f"; {number(document['log']['lines_lost'])} log lines lost" if document["log"]["lines_lost"] else ""
    return together(
        element("p", "As of ", _time(now, now), f". Listening on {where}."),
        element(
            "p",
            f"Version {document['version']}, running since ",
            _time(document["started"], now),
            f" ({duration(document['uptime_seconds'])}), {reloads['done']} configuration reloads{refused}; "
            f"{document['engine']['words']}{lost}.",
        ),
        element(
            "p",
            element("a", "As JSON", href="status"),
            " ",
            element("a", "Metrics", href="metrics"),
        ),
    )


# ---- parts


def _time(moment: str, now: str) -> Markup:
    """Show a moment in UTC; the script shows it in the zone of the browser."""
    return element("time", clock(moment, now), datetime=moment)


def _badge(text: str, kind: str) -> Markup:
    return element("span", text, class_=f"badge {kind}")


def _section(title: str, summary: str, content: Markup | None, *, is_open: bool) -> Markup:
    """Make a section that folds to a line; one without content is that line."""
    line = together(element("h2", title), " ", element("span", summary, class_="summary"))
    if content is None:
        return element("section", line, class_="folding")
    return element("section", _fold(title, line, content, is_open=is_open), class_="folding")


def _fold(name: str, summary: Markup, content: Markup, *, is_open: bool) -> Markup:
    """Make a part that folds; the script keeps it as the reader has left it, by its name."""
    return element("details", element("summary", summary), content, open=is_open, data_name=name)


def _table(headings: Sequence[str], rows: Iterable[Sequence[Child]], numeric: Sequence[int] = ()) -> Markup:
    """Make a table; on a narrow screen each row is a card, and each cell has its heading."""
    return _framed(headings, _rows(headings, rows, numeric))


def _rows(headings: Sequence[str], rows: Iterable[Sequence[Child]], numeric: Sequence[int] = ()) -> list[Markup]:

    def cell(index: int, content: Child) -> Markup:
        # The roles remain when the style no longer displays a table.
        class_ = "number" if index in numeric else None
        if index == 0:
            return element("th", content, scope="row", role="rowheader")
        return element("td", content, data_name=headings[index], role="cell", class_=class_)

    return [element("tr", *(cell(index, each) for index, each in enumerate(row)), role="row") for row in rows]


def _framed(headings: Sequence[str], body: Iterable[Markup], class_: str | None = None) -> Markup:
    head = element("tr", *(element("th", each, scope="col", role="columnheader") for each in headings), role="row")
    return element(
        "table",
        element("thead", head, role="rowgroup"),
        element("tbody", *body, role="rowgroup"),
        role="table",
        class_=class_,
    )
