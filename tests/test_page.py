"""The status page as a person sees it: in a browser, on a phone, without JavaScript, with devices that mean ill."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from importlib import resources
from pathlib import Path

import pytest

from gateway.cli.status import overview
from gateway.ops.status_words import Level, Verdict, clock, duration, number, size, verdict, where_devices_connect
from gateway.ops.web.chart import Line, chart
from gateway.ops.web.markup import Markup, element, together
from gateway.pieces import at_once
from tests import mqtt_packets as mqtt
from tests.browser import Browser, Tab
from tests.harness import Broker, Device, RunningGateway, eventually
from tests.pki import certify
from tests.test_status import HOSTILE, ask, connected, status_port

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]
WIDTHS = (380, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for all tests of this file."""
    with Browser() as started:
        yield started


class Plant:
    """A gateway with devices of all kinds: connected, on the way, gone, hostile, with long names; a bad broker, too."""

    def __init__(self, start_gateway: StartGateway, start_broker: StartBroker, ca_file: Path) -> None:
        wrong = start_broker(tls=certify(names=["DNS:elsewhere.example"], valid_for=5).server())
        self.port = start_broker().port
        upstreams = [{"host": "localhost", "port": wrong.port}, {"host": "localhost", "port": self.port}]
        self.gateway = start_gateway(
            upstream=upstreams,
            ca_file=ca_file,
            failover={"retry_first": 60, "retry_max": 60},
            listen=[{"endpoint": "127.0.0.1:0", "name": "hall 3"}],
            status={"endpoint": "127.0.0.1:0"},
        )
        names = [f"device-{number}" for number in range(1, 31)] + ["x" * 60_000, "w" * 200, f"{HOSTILE} here"]
        self.devices = {name: connected(self.gateway, name) for name in names}
        self.devices["waiting"] = Device(self.gateway.port)
        for name in ("device-17", "device-18"):
            self.devices.pop(name).close()
        connected(self.gateway, HOSTILE).close()
        faulty = self.devices.pop("device-19")
        faulty.send(b"\x00\x00")
        faulty.read_to_end()
        faulty.close()
        self.gateway.wait_ended(4)
        for _ in range(3):
            self.gateway.call(self.gateway.service.ledger.sample)
        self.url = f"http://localhost:{status_port(self.gateway)}/"

    def close(self) -> None:
        for device in self.devices.values():
            device.close()


@pytest.fixture
def plant(start_gateway: StartGateway, start_broker: StartBroker, ca_file: Path) -> Iterator[Plant]:
    """A gateway with much to see."""
    made = Plant(start_gateway, start_broker, ca_file)
    yield made
    made.close()


# Elements that reach out of the window, whatever hides the overflow; what is for screen readers only is clipped.
_OUTSIDE = """
[...document.body.querySelectorAll('*')].filter(each => {
  const box = each.getBoundingClientRect();
  return box.width > 0 && !each.closest('thead') && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(each => `${each.tagName} ${each.className} ${each.getBoundingClientRect().right}`)
"""
# Texts that are cut off by their own box.
_CUT = """
[...document.body.querySelectorAll('p, b, small, span, th, td, h1, h2, li, a, dt, dd')].filter(each =>
  each.offsetWidth > 1 && !each.closest('thead') && each.scrollWidth > each.clientWidth + 1
  && getComputedStyle(each).display !== 'inline'
).map(each => `${each.tagName} ${each.textContent.slice(0, 80)}`)
"""


@pytest.mark.parametrize("path", ["", "?q=device-17", "?q=nobody", "?show=connected", "?show=silent"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_reaches_out_of_the_window(browser: Browser, plant: Plant, width: int, path: str) -> None:
    """No sideways scrolling, on a phone either, whatever devices call themselves; nothing is cut off."""
    with Tab(browser, width, javascript=False) as tab:
        tab.open(plant.url + path)
        assert tab.evaluate("innerWidth") == width
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(_OUTSIDE) == []
        assert tab.evaluate(_CUT) == []
        assert tab.complaints() == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_essentials_need_no_javascript(browser: Browser, plant: Plant, width: int, tmp_path: Path) -> None:
    """State, upstreams with the last error in words, certificates with days left, sessions with their step, lines."""
    with Tab(browser, width, javascript=False) as tab:
        tab.open(plant.url)
        text = tab.text
        for essential in (
            "The gateway works, but something needs attention",
            "certificate name localhost",
            "backing off, next attempt in",
            "tls-untrusted-chain",
            "Set tls.ca_file to the CA that issued it",
            "days left",
            "not connected: malformed-packet",
            "Correct the settings or firmware of the device",
            "connecting: waiting for CONNECT",
            "hall 3",
        ):
            assert essential in text
        times = tab.evaluate("[...document.querySelectorAll('time')].map(each => each.textContent)")
        assert times
        assert all(time.endswith(" UTC") for time in times)
        lines = tab.evaluate("[...document.querySelectorAll('svg')].map(each => each.getAttribute('aria-label'))")
        assert [line.partition(",")[0] for line in lines] == ["Sessions", "Messages", "Failures"]
        assert "now 30, highest 30" in lines[0]
        drawn = tab.evaluate("document.querySelector('polyline').getBoundingClientRect().height")
        assert drawn >= 0
        assert tab.evaluate("document.querySelector('meta[http-equiv=refresh]').content") == "30"
        tab.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000


def test_why_a_device_is_silent_is_found_without_javascript(browser: Browser, plant: Plant) -> None:
    """Typed into the form and sent: the answer stands right below, with what to do."""
    with Tab(browser, 380, javascript=False) as tab:
        tab.open(plant.url)
        tab.evaluate("document.getElementById('q').value = 'DEVICE-17'; document.querySelector('button').click()")
        tab.wait_loaded()
        assert tab.evaluate("location.search") == "?q=DEVICE-17"
        assert tab.evaluate("document.getElementById('q').value") == "DEVICE-17"
        found = tab.evaluate("document.getElementById('devices').innerText")
        for words in ("1 device with", "not connected: device-lost", "What to do: Check the device's power"):
            assert words in found
        # Nothing but the verdict and the search stands before it.
        assert tab.evaluate("document.getElementById('devices').previousElementSibling.tagName") == "FORM"


def test_a_device_that_was_never_here_is_said_to_be_so(browser: Browser, plant: Plant) -> None:
    """With where it should have come to."""
    with Tab(browser, 380, javascript=False) as tab:
        tab.open(f"{plant.url}?q=nobody")
        found = tab.evaluate("document.getElementById('devices').innerText")
        assert "0 devices with" in found
        assert "The device does not reach this gateway" in found
        assert f"127.0.0.1:{plant.gateway.port}" in found


def test_pages_and_kinds_are_links(browser: Browser, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, a page has fifty of them."""
    monkeypatch.setattr("gateway.ops.sight.PER_PAGE", 10)
    with Tab(browser, 380, javascript=False) as tab:
        tab.open(f"{plant.url}?limit=10")
        first = tab.evaluate("document.querySelectorAll('.devices tbody tr').length")
        tab.evaluate("[...document.querySelectorAll('.kinds a')].find(each => each.text.startsWith('Not')).click()")
        tab.wait_loaded()
        silent = tab.evaluate("[...document.querySelectorAll('.devices .badge')].map(each => each.textContent)")
        assert first == 10
        assert len(silent) == 4
        assert all(words.startswith("not connected: ") for words in silent)


def test_not_connected_is_one_number(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """In the overview, the filter, on a terminal: devices that left in order or failed long ago are in all of them."""
    gateway = start_gateway(upstream=start_broker().port, status={"endpoint": "127.0.0.1:0"})
    for name in ("lost", "long gone"):
        connected(gateway, name).close()
    with connected(gateway, "left") as device:
        device.send(mqtt.disconnect())
        device.read_to_end()
    gateway.wait_ended(3)
    next(end for end in gateway.service.ledger.ends() if end.client_identifier == "long gone").ended -= 3600
    searched = ask(gateway, "/status?q=left").json
    assert (searched["not_connected"], searched["absent"], searched["devices"]["counts"]["silent"]) == (3, 1, 1)
    page = ask(gateway, "/").text
    assert "<dt>Not connected</dt><dd><b>3</b><small>1 failed in the last 15 min</small>" in page
    assert ">Not connected 3</a>" in page
    assert "0 connected, 0 connecting, 3 not connected" in "\n".join(overview(ask(gateway).json))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("192.0.2.7:1883", "192.0.2.7:1883"),
        ("0.0.0.0:1883", "edge-box:1883 (any address of this machine)"),
        ("[::]:1883", "edge-box:1883 (any address of this machine)"),
        ("[::1]:1883", "[::1]:1883 (from this machine only)"),
        ("[fe80::1%eth0]:1883", "[fe80::1%eth0]:1883"),
        ("/run/mqtt.sock", "the UNIX socket /run/mqtt.sock"),
        ("local", "the UNIX socket local"),
    ],
)
def test_where_a_device_connects(address: str, words: str) -> None:
    """By an address that it can use; a listener's own may be every one, or one that only this machine reaches."""
    assert where_devices_connect({"host": "edge-box", "listeners": [{"name": "", "address": address}]}) == words


def test_at_first_it_says_where_to_point_a_device(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Until the broker has accepted one; whether or not the broker was verified before."""
    gateway = start_gateway(
        upstream=start_broker().port,
        listen=[{"endpoint": "127.0.0.1:0", "name": "hall 3"}, {"endpoint": "[::1]:0"}],
        status={"endpoint": "127.0.0.1:0"},
    )
    listeners = gateway.service.ports
    where = f"127.0.0.1:{gateway.port} (listener hall 3, from this machine only) or [::1]:{listeners[1].getHost().port}"

    def shown() -> Verdict:
        return verdict(gateway.call(lambda: at_once(gateway.service.sight.document())))

    assert shown().reasons == [f"Point a device at {where} (from this machine only), with plain MQTT (no TLS)."]
    (upstream,) = gateway.service.gateway.upstreams
    upstream.verified_at = 0.0  # as after a probe
    assert (shown().level, len(shown().reasons)) == (Level.WELL, 1)
    connected(gateway, "device-17").close()
    gateway.wait_ended()
    assert not any("Point a device" in reason for reason in shown().reasons)


def test_many_devices_fit_on_a_phone(browser: Browser, plant: Plant) -> None:
    """A row has few lines, and says all once it is unfolded; sections without anything to attend to are one line."""
    heights = "[...document.querySelectorAll('.devices tbody tr')].map(each => each.offsetHeight)"
    click = "[...document.querySelectorAll('nav a')].find(each => each.text.startsWith('{}')).click()"
    with Tab(browser, 380, javascript=False) as tab:
        tab.open(f"{plant.url}?q=device-1")
        assert len(tab.evaluate(heights)) == 11
        assert max(tab.evaluate(heights)) < 90
        assert not tab.evaluate(f"{_fold('Certificates')}.open")
        # One of the two brokers fails.
        assert tab.evaluate(f"{_fold('Upstreams')}.open")
        summary = tab.evaluate(f"{_fold('Upstreams')}.querySelector('summary').innerText")
        assert summary.split(" ", 1) == ["Upstreams", "1 not available, 1 serving"]
        device = f"{_fold('device device-19')}.closest('tr')"
        assert "Upstream:" not in tab.evaluate(f"{device}.innerText")
        tab.evaluate(f"{_fold('device device-19')}.querySelector('summary').click()")
        unfolded = tab.evaluate(f"{device}.innerText")
        assert "Correct the settings or firmware of the device" in unfolded
        assert f"localhost:{plant.port}" in unfolded
        # Each link changes one thing, but the silent ones begin with the longest silence.
        for link, query in (
            ("Name", "?q=device-1&sort=name"),
            ("Connected 8", "?q=device-1&show=connected&sort=name"),
            ("Connected but", "?q=device-1&show=quiet&sort=data"),
            ("Not connected", "?q=device-1&show=silent"),
        ):
            tab.evaluate(click.format(link))
            tab.wait_loaded()
            assert tab.evaluate("location.search") == query
        names = tab.evaluate("[...document.querySelectorAll('.devices .name')].map(each => each.textContent)")
        assert sorted(names) == ["device-17", "device-18", "device-19"]


def test_hostile_names_are_text(browser: Browser, plant: Plant) -> None:
    """No script runs, no element comes into being, nothing is read backwards; not from the search either."""
    with Tab(browser, 1280) as tab:
        for path in ("", "?q=%3Cscript%3Ealert(1)%3C/script%3E%22'%26%E2%80%AE"):
            tab.open(plant.url + path)
            assert tab.evaluate("document.scripts.length") == 1
            assert tab.evaluate("document.querySelectorAll('[onerror], [onclick], iframe, img').length") == 0
            assert tab.complaints() == []
            assert "\u202e" not in tab.text
        tab.open(f"{plant.url}?q=%3Cscript%3E")
        assert r"<script>alert(1)</script>" in tab.text
        assert r"\x1b[2J\u202egnp\u2028\x85" in tab.text


def test_nothing_is_loaded_from_anywhere(browser: Browser, plant: Plant) -> None:
    """One request is the whole page."""
    with Tab(browser, 1280) as tab:
        tab.open(plant.url)
        assert [url for url in tab.requested() if url != plant.url and not url.endswith("/favicon.ico")] == []
        assert tab.evaluate("performance.getEntriesByType('resource').length") == 0


def test_with_javascript_the_page_keeps_itself_current(browser: Browser, plant: Plant) -> None:
    """Times are local, a search that is typed and what is folded are left alone; it says when the gateway is gone."""
    with Tab(browser, 1280, zone="Asia/Kolkata") as tab:
        tab.open(f"{plant.url}?q=device-2")
        assert len(tab.evaluate(_TIMES)) >= 5
        for name in ("Certificates", "device device-2"):
            tab.evaluate(f"{_fold(name)}.querySelector('summary').click()")
        tab.evaluate(f"{_fold('Upstreams')}.querySelector('summary').click()")
        tab.evaluate(f"{_fold('device device-2')}.querySelector('summary').focus()")
        assert all(_is_in_kolkata(*each) for each in tab.evaluate(_TIMES))
        tab.evaluate("document.getElementById('q').value = 'being typed'")
        plant.devices.pop("device-2").close()

        def devices() -> str:
            words: str = tab.evaluate("document.getElementById('devices').innerText")
            return words

        eventually(lambda: "not connected: device-lost" in devices(), "the device is shown as gone")
        assert tab.evaluate("document.getElementById('q').value") == "being typed"
        # Those were folded, this one was not; and the keyboard is where it was.
        assert tab.evaluate(f"[{_fold('Certificates')}.open, {_fold('device device-2')}.open]") == [True, True]
        assert tab.evaluate(f"[{_fold('Upstreams')}.open, {_fold('device device-20')}.open]") == [False, False]
        assert tab.evaluate("document.activeElement.parentElement.dataset.name") == "device device-2"
        assert all(_is_in_kolkata(*each) for each in tab.evaluate(_TIMES))
        assert not tab.evaluate("document.getElementById('stale').checkVisibility()")
        assert tab.complaints() == []
        plant.close()
        plant.gateway.stop()
        eventually(lambda: tab.evaluate("document.getElementById('stale').checkVisibility()"), "it says so")
        assert re.match(
            r"No answer from the gateway since \d\d:\d\d:\d\d GMT\+5:30\.$",
            tab.evaluate("document.getElementById('stale').innerText"),
        )


def _fold(name: str) -> str:
    """Return an expression for a part that folds."""
    return f"[...document.querySelectorAll('details')].find(each => each.dataset.name === '{name}')"


_TIMES = "[...document.querySelectorAll('time')].map(each => [each.dateTime, each.textContent, each.title])"


def _is_in_kolkata(moment: str, shown: str, title: str) -> bool:
    """Whether a moment is shown as a clock in India shows it, with the zone; and in UTC, to compare it with the log."""
    at = datetime.fromisoformat(moment)
    local = at.astimezone(timezone(timedelta(hours=5, minutes=30)))
    # Only around midnight is there a date.
    return shown.endswith(f"{local:%H:%M:%S} GMT+5:30") and title.endswith(f"{at.astimezone(UTC):%H:%M:%S} UTC")


def test_times_say_their_zone_and_their_date_unless_it_is_today() -> None:
    """In UTC, as without JavaScript, and in any other zone."""
    east = timezone(timedelta(hours=3), "EAT")
    assert clock("2026-01-01T22:00:00+00:00", "2026-01-01T23:00:00+00:00") == "22:00:00 UTC"
    assert clock("2025-12-31T22:00:00+00:00", "2026-01-01T23:00:00+00:00") == "2025-12-31 22:00:00 UTC"
    assert clock("2026-01-01T20:00:00+00:00", "2026-01-01T23:00:00+00:00", east) == "2026-01-01 23:00:00 EAT"
    assert clock("2026-01-01T21:00:00+00:00", "2026-01-01T23:00:00+00:00", east) == "00:00:00 EAT"


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_by_day_and_by_night(browser: Browser, plant: Plant, dark: bool) -> None:
    """Every text has a contrast of 4.5 to 1 to what is behind it (WCAG 2.1, 1.4.3)."""
    with Tab(browser, 1280, dark=dark) as tab:
        tab.open(plant.url)
        dim = tab.evaluate("""
(() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return { r, g, b, a }; };
  const light = ({ r, g, b }) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = each => {
    for (; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if (colour.a === 1) return colour;
    }
    return { r: 255, g: 255, b: 255 };
  };
  const dim = [];
  for (const each of document.body.querySelectorAll('*')) {
    const speaks = [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!speaks || !each.offsetWidth) continue;
    const [a, b] = [light(parse(getComputedStyle(each).color)), light(behind(each))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) dim.push(`${each.tagName}.${each.className} ${ratio.toFixed(2)} ${each.textContent.slice(0, 40)}`);
  }
  return dim;
})()
""")
        assert dim == []
        back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", back))) < 64) is dark


def test_it_can_be_read_aloud(browser: Browser, plant: Plant) -> None:
    """A language, one first heading, headings in tables, a label for the field, words for each drawing."""
    with Tab(browser, 380) as tab:
        tab.open(plant.url)
        assert tab.evaluate("document.documentElement.lang") == "en"
        assert tab.evaluate("document.querySelectorAll('h1').length") == 1
        assert tab.evaluate("document.querySelector('label').control.id") == "q"
        # On a phone, where they are no tables to the eye.
        assert tab.evaluate(
            "[...document.querySelectorAll('table')].every(each => each.querySelector('th[scope=col]'))"
        )
        assert tab.evaluate("[...document.querySelectorAll('table, tr, td')].every(each => each.getAttribute('role'))")
        assert tab.evaluate("[...document.querySelectorAll('svg')].every(each => each.getAttribute('aria-label'))")


def test_a_page_is_small_however_many_devices_there_are(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Fifty of them, with the longest names that MQTT permits."""
    gateway = start_gateway(upstream=start_broker().port, status={"endpoint": "127.0.0.1:0"})
    for number_ in range(60):
        connected(gateway, f"{number_:03}" + "\x1b" * 60_000).close()
    gateway.wait_ended(60)
    page = ask(gateway, "/")
    assert page.text.count('<th scope="row" role="rowheader"><b class="name"') == 50
    assert len(page.body) < 200_000


# ---- the parts


def test_markup_escapes_whatever_is_not_markup() -> None:
    """Texts, attributes, quotes; what reverses the reading order, and what is no character."""
    made = element(
        "p", "<b>&", element("i", "x"), None, 5, title='"><script>', class_="a", data_name=True, hidden=False
    )
    assert made == '<p title="&quot;&gt;&lt;script&gt;" class="a" data-name>&lt;b&gt;&amp;<i>x</i>5</p>'
    assert together("\u202e\ud800\x1b", Markup("<br>")) == r"\u202e\ud800\x1b<br>"
    assert together("a\u202eb").encode()


def test_a_line_is_drawn_from_right_to_left_in_time() -> None:
    """The latest value stands at the right edge, one of fifteen minutes ago at the left; the top is a round number."""
    moments = ["2026-01-01T11:45:00+00:00", "2026-01-01T11:52:30+00:00", "2026-01-01T12:00:00+00:00"]
    drawn = chart(Line("Sessions", "connected", [0, 30, 15]), moments, "2026-01-01T12:00:00+00:00")
    assert '<polyline points="0.0,80.0 150.0,34.4 300.0,57.2" class="line"/>' in drawn
    assert "now 15, highest 30, lowest 0" in drawn
    assert "top 50" in drawn
    assert "no values" in chart(Line("Sessions", "connected", []), [], "2026-01-01T12:00:00+00:00")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (86400, "1 day"),
        (360000, "4 days 4 h"),
    ],
)
def test_durations_have_the_units_that_matter(seconds: float, words: str) -> None:
    """Nobody counts the seconds of a day."""
    assert duration(seconds) == words


def test_sizes_and_numbers_are_short() -> None:
    """In powers of 1024, and with their thousands apart."""
    assert [size(each) for each in (0, 1023, 1024, 10 * 1024, 5 * 1024**3, 3 * 1024**4)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "10 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert number(1234567) == "1,234,567"


def test_style_and_script_are_part_of_the_package() -> None:
    """They are read from it, and neither names an address."""
    for name in ("page.css", "page.js"):
        text = resources.files("gateway.ops.web").joinpath(name).read_text("utf-8")
        assert not re.search(r"https?:|url\(|@import|//[a-z]+\.", text)
        assert "</" not in text
