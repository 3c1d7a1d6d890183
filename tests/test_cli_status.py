"""`mqtts-gateway status`: the page's content on a terminal, the answer to "why is device 17 silent", exit statuses."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from gateway.cli.main import console
from gateway.cli.status import overview
from gateway.config.listen import reachable_at
from gateway.errors import EndReason
from gateway.ops.status_words import SCHEMA, unknown_words
from gateway.ops.web.page import page
from gateway.pieces import at_once
from gateway.text import printable
from tests import mqtt_packets as mqtt
from tests.harness import PATIENCE, Broker, Device, RunningGateway, eventually
from tests.pki import certify
from tests.ports import free_port
from tests.test_status import HOSTILE, connected, devices, start, status_port
from tests.tools import as_from_a_terminal

__all__ = ["devices", "start"]  # fixtures

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]
Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str]) -> Ask:
    """Return a function that runs the command: its exit status, standard output, standard error."""

    def run(*arguments: str, gateway: RunningGateway | None = None) -> tuple[int, str, str]:
        where = [] if gateway is None else ["--url", f"http://127.0.0.1:{status_port(gateway)}"]
        status = console(["status", *where, *arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return run


def silent(gateway: RunningGateway, name: str) -> None:
    """A device that is not served."""
    with Device(gateway.port) as device:
        device.send(mqtt.connect(name))
        device.read_to_end()


def test_it_says_what_the_page_says(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], ask: Ask
) -> None:
    """State, upstreams, certificates, why sessions ended, devices: each with a line, and status 0 if all is well."""
    broker = start_broker()
    gateway = start(upstream=broker.port)
    devices.append(connected(gateway, "device-16"))
    connected(gateway, "device-17").close()
    gateway.wait_ended()
    gateway.call(gateway.service.ledger.sample)
    status, out, err = ask(gateway=gateway)
    assert (status, err) == (0, "")
    for words in (
        "The gateway works\n  - 1 device failed in the last 15 minutes and has not come back",
        "; the reason is device-lost.",
        "1 connected, 0 connecting, 1 not connected",
        f"ok localhost:{broker.port}, certificate name localhost: serving",
        "ok Certificate (CA) ",
        "days left",
        "device-lost, once: The device closed",
        "-> Check the device's power and network",
        "device-17  not connected: device-lost, ",
        "device-16  connected, for ",
    ):
        assert words in out
    assert "\x1b" not in out


def test_what_was_not_tried_is_neither_well_nor_bad(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], ask: Ask
) -> None:
    """Neither on the terminal nor on the page: not the gateway at first, not a second broker that nobody needed."""
    gateway = start(upstream=[{"host": "localhost", "port": start_broker().port} for _ in range(2)])

    def shown() -> tuple[str, str]:
        document = gateway.call(lambda: at_once(gateway.service.sight.document()))
        return "\n".join(overview(document)), at_once(page(document)).decode()

    assert ask(gateway=gateway)[0] == 0
    terminal, html = shown()
    assert (terminal.count("-- localhost:"), terminal.count(": not tried yet")) == (2, 2)
    assert 'class="verdict untried"' in html
    assert html.count('<span class="badge idle">not tried yet</span>') == 2
    devices.append(connected(gateway, "device-16"))
    terminal, html = shown()
    assert (terminal.count("-- localhost:"), terminal.count("ok localhost:")) == (1, 1)
    assert 'class="verdict well"' in html
    assert '<span class="badge serving">serving</span>' in html
    assert html.count('<span class="badge idle">not tried yet</span>') == 1


def test_what_wants_attention_is_status_2(
    start: StartGateway, start_broker: StartBroker, ask: Ask, tmp_path: Path
) -> None:
    """A certificate that ends soon, while devices are served."""
    root = certify(subject="root", ca=True, names=(), purposes=(), valid_for=400)
    (tmp_path / "ca.pem").write_bytes(root.pem)
    gateway = start(upstream=start_broker(tls=certify(root, valid_for=9).server()).port, ca_file=tmp_path / "ca.pem")
    assert ask(gateway=gateway)[0] == 0
    connected(gateway, "a").close()
    status, out, _ = ask(gateway=gateway)
    assert status == 2
    assert out.startswith("The gateway works, but something needs attention\n")
    assert re.search(r"!! Certificate \(of broker localhost:\d+\) CN=broker: 7 days left, until \d{4}-", out)
    assert "on the broker" in out


def test_devices_that_cannot_be_served_are_status_3(start: StartGateway, ask: Ask) -> None:
    """With the upstream's last error in words and what to do."""
    gateway = start(upstream=1, failover={"retry_first": 60, "retry_max": 60})
    silent(gateway, "device-17")
    status, out, _ = ask(gateway=gateway)
    assert status == 3
    assert out.startswith("Devices cannot connect: no broker is available\n")
    assert "XX localhost:1, certificate name localhost: backing off, next attempt in " in out
    assert EndReason.TCP_REFUSED.remedy in " ".join(out.split())


# ---- a device


def test_why_is_device_17_silent(start: StartGateway, start_broker: StartBroker, ask: Ask) -> None:
    """In words: what became of it, when, how often, what to do; status 3, since it is not connected."""
    wrong = certify(names=["DNS:elsewhere.example"])
    gateway = start(upstream=start_broker(tls=wrong.server()).port, failover={"retry_first": 0.001, "retry_max": 0.001})
    for name in ("device-17", "device-170", "device-17"):
        silent(gateway, name)
    gateway.wait_empty()
    status, out, err = ask("--device", "device-17", gateway=gateway)
    assert (status, err) == (3, "")
    words = " ".join(out.split())
    assert "device-17: not connected: tls-untrusted-chain" in words
    assert "chain does not end at a trusted root" in words
    assert "What to do: Set tls.ca_file" in words
    assert "2 sessions ended in the last " in words
    assert "device-170" not in words
    assert "1 more matches by name or address" in words


@pytest.fixture
def in_nairobi(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The time zone of this machine, three hours ahead of UTC."""
    monkeypatch.setenv("TZ", "EAT-3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_nairobi")
def test_times_are_local_and_say_their_zone(start: StartGateway, start_broker: StartBroker, ask: Ask) -> None:
    """That of the gateway and those of a device."""
    gateway = start(upstream=start_broker().port)
    connected(gateway, "device-17").close()
    gateway.wait_ended()
    document = gateway.call(lambda: at_once(gateway.service.sight.document()))
    as_of = datetime.fromisoformat(document["time"]).astimezone(timezone(timedelta(hours=3)))
    assert f"as of {as_of:%H:%M:%S} EAT" in "\n".join(overview(document))
    _, out, _ = ask("--device", "device-17", gateway=gateway)
    assert re.search(r"\((\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d EAT\)", out)


def test_a_device_that_is_connected_is_status_0(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], ask: Ask
) -> None:
    """When it was heard, what passed; and that it keeps coming and going, if it does."""
    gateway = start(upstream=start_broker().port)
    for _ in range(2):
        connected(gateway, "device-17").close()
        eventually(lambda: not gateway.service.gateway.sessions, "it is gone")
    devices.append(connected(gateway, "device-17"))
    status, out, _ = ask("--device", "DEVICE-17", gateway=gateway)
    words = " ".join(out.split())
    assert status == 0
    assert words.startswith("device-17: connected at 127.0.0.1:")
    assert " 1 packet to the broker and 1 from it" in words
    assert "last heard " in words
    assert "Its last session ended" in words
    assert "2 sessions ended in the last " in words


def test_a_device_that_the_broker_does_not_take_from(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], ask: Ask
) -> None:
    """It is connected and sends, and still nothing arrives: the broker does not read."""
    release = threading.Event()

    def serve(connection: Any) -> None:
        connection.read_packet()
        connection.send(mqtt.connack())
        release.wait(PATIENCE)
        connection.read_to_end()

    gateway = start(upstream=start_broker(serve=serve).port)
    devices.append(connected(gateway, "device-17"))
    device = devices[0].socket
    device.setblocking(False)
    packet = mqtt.publish(payload=b"x" * 60_000)
    (session,) = gateway.service.gateway.sessions

    def choked() -> bool:
        with suppress(BlockingIOError):
            device.send(packet)
        return session.held_back

    eventually(choked, "the broker does not keep up")
    _, out, _ = ask("--device", "device-17", gateway=gateway)
    assert "The gateway is not reading from it now, because the broker does not keep up." in " ".join(out.split())
    release.set()
    devices[0].reset()
    gateway.wait_empty()


def test_a_device_that_was_never_here(start: StartGateway, ask: Ask) -> None:
    """What that means, and where it should have come to."""
    gateway = start(upstream=1)
    status, out, _ = ask("--device", "device-17", gateway=gateway)
    assert status == 3
    assert out.startswith("device-17 is unknown\n")
    assert f"Devices must connect to 127.0.0.1:{gateway.port} (from this machine only)." in out
    assert "The device does not reach this gateway" in out


def test_who_was_turned_away_is_found_by_address(start: StartGateway, ask: Ask) -> None:
    """It never said what it is called."""
    gateway = start(upstream=1, admission={"allow": "10.0.0.0/8"})
    with Device(gateway.port) as device:
        device.read_to_end()
    status, out, _ = ask("--device", "127.0.0.1", gateway=gateway)
    assert status == 3
    assert "at 127.0.0.1: refused: network-not-allowed" in out
    assert "admission.allow" in out
    assert "search for the device's IP address" in ask("--device", "device-17", gateway=gateway)[1]


def test_hostile_names_cannot_move_a_cursor(start: StartGateway, start_broker: StartBroker, ask: Ask) -> None:
    """Neither a device's, nor one that was asked for."""
    gateway = start(upstream=start_broker().port)
    connected(gateway, HOSTILE).close()
    gateway.wait_ended()
    for arguments in ([], ["--device", "pump-3"], ["--device", "\x1b[2J\u202e"]):
        _, out, err = ask(*arguments, gateway=gateway)
        assert all(line.isprintable() for line in (out + err).splitlines())
        assert r"\x1b[2J" in out


# ---- where to ask


@pytest.mark.parametrize("name", ["plant\\pump", "\x1b[2J pump"])
def test_a_device_is_found_by_its_name_and_by_what_is_shown_of_it(
    start: StartGateway, start_broker: StartBroker, ask: Ask, name: str
) -> None:
    """Connected or not, and no other whose name begins so: of one that has left, only what is shown is remembered."""
    gateway = start(upstream=start_broker().port)
    with closing(connected(gateway, name)), closing(connected(gateway, f"{name} 2")):
        for text in (name, printable(name)):
            status, out, _ = ask("--device", text, gateway=gateway)
            assert (status, out.startswith(f"{printable(name)}: connected")) == (0, True)
    gateway.wait_ended(2)
    for text in (name, printable(name)):
        status, out, _ = ask("--device", text, gateway=gateway)
        assert (status, out.startswith(f"{printable(name)}: not connected")) == (3, True)
        assert f"{printable(name)} 2: " not in out


@pytest.mark.parametrize(("wanted", "other"), [("s ", "s"), ("s", "s "), ("  ", "a"), ("pump", "PUMP")])
def test_a_device_with_exactly_this_name_is_meant(
    start: StartGateway, start_broker: StartBroker, ask: Ask, wanted: str, other: str
) -> None:
    """White space at its end, and the case of its letters, are part of a name."""
    gateway = start(upstream=start_broker().port)
    connected(gateway, wanted).close()
    gateway.wait_ended()
    with closing(connected(gateway, other)):
        assert ask("--device", wanted, gateway=gateway)[0] == 3
    gateway.wait_ended(2)
    with closing(connected(gateway, wanted)):
        status, out, _ = ask("--device", wanted, gateway=gateway)
        assert (status, out.startswith(f"{wanted}: connected")) == (0, True)
        assert f"{other}: not connected" not in out.splitlines()


def test_no_device_has_an_empty_name_here(ask: Ask) -> None:
    """It would match every device."""
    status, out, err = ask("--device", "")
    assert (status, out) == (1, "")
    assert "--device: it is empty; name a device" in err


def config(path: Path, *lines: str) -> str:
    """Write a configuration."""
    path.write_text("\n".join(['[[upstream]]\nhost = "a"', *lines]))
    return str(path)


def test_the_configuration_says_where_to_ask(start: StartGateway, ask: Ask, tmp_path: Path) -> None:
    """A port, or a UNIX socket; `--json` is what came."""
    gateway = start(upstream=1)
    path = config(tmp_path / "a.toml", f'[status]\nendpoint = "127.0.0.1:{status_port(gateway)}"')
    status, out, _ = ask("--config", path, "--json")
    assert (status, json.loads(out)["schema"]) == (0, SCHEMA)
    unix = tmp_path / "s.sock"
    start(upstream=1, status={"endpoint": f"unix:{unix}"})
    path = config(tmp_path / "b.toml", f'[status]\nendpoint = "unix:{unix}:mode=600"')
    assert ask("--config", path)[0] == 0
    assert ask("--url", f"unix:{unix}")[0] == 0


def test_a_configuration_that_cannot_be_used_still_says_where_to_ask(
    start: StartGateway, ask: Ask, tmp_path: Path
) -> None:
    """After a reload that was refused, the file is one that cannot be used, and the gateway runs all the same."""
    endpoint = f'[status]\nendpoint = "127.0.0.1:{status_port(start(upstream=1))}"'
    path = config(tmp_path / "a.toml", f"{endpoint}\n[drain]\nsecond = 3")
    status, out, err = ask("--config", path, "--json")
    assert (status, json.loads(out)["schema"]) == (0, SCHEMA)
    assert "drain.second: unknown key" in err
    for unusable in ("[status]\nendpoint = 9883", '[status]\nendpoint = "no:where"', "[[status]]", "[status]\n[drain"):
        status, out, err = ask("--config", config(tmp_path / "b.toml", unusable))
        assert (status, out) == (1, "")
        assert err


@pytest.mark.parametrize(
    ("endpoint", "where"),
    [
        ("127.0.0.1:9883", "http://127.0.0.1:9883"),
        ("[::1]:9883", "http://[::1]:9883"),
        ("9883", "http://127.0.0.1:9883"),
        ("[::]:9883", "http://[::1]:9883"),
        ("tcp6:9883", "http://[::1]:9883"),
        ("192.168.7.1:80", "http://192.168.7.1:80"),
        ("unix:/run/s:mode=600", "unix:/run/s"),
        ("127.0.0.1:0", None),
        ("systemd:domain=UNIX:name=s", None),
    ],
)
def test_where_an_endpoint_is_found(endpoint: str, where: str | None) -> None:
    """From this machine; nobody can know the port that the system chose."""
    assert reachable_at(endpoint) == where


def test_without_an_endpoint_it_says_how_to_get_one(ask: Ask, tmp_path: Path) -> None:
    """In one line each, with status 1."""
    for lines, words in (
        ([], 'has no status endpoint: write endpoint = "127.0.0.1:9883" under [status]'),
        (['[status]\nendpoint = "127.0.0.1:0"'], "give the address with --url"),
        (['[status]\nendpoint = "9883"'], "status.endpoint: "),
    ):
        status, out, err = ask("--config", config(tmp_path / "c.toml", *lines))
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert words in err
    for url in ("gopher://x", "127.0.0.1", "http://", "http://a:b"):
        status, out, err = ask("--url", url)
        assert (status, out) == (1, "")
        assert "is neither http://HOST:PORT nor unix:/PATH" in err


def test_the_password_comes_from_a_file(
    start: StartGateway, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash is made from standard input; it is never sent in plain text to another machine, and never printed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("correct horse\n"))
    status, out, _ = ask("--hash-password")
    assert status == 0
    gateway = start(upstream=1, status={"endpoint": "127.0.0.1:0", "password": out.strip()})
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("correct horse\n")
    wrong.write_text("battery staple\n")
    assert ask("--password-file", str(right), gateway=gateway)[0] == 0
    for arguments, words in (
        ([], "--password-file"),
        (["--password-file", str(wrong)], "refuses the password"),
        (["--password-file", str(tmp_path / "none")], "cannot be read"),
    ):
        status, out, err = ask(*arguments, gateway=gateway)
        assert (status, out) == (1, "")
        assert words in err
        assert "staple" not in err
    status, _, err = ask("--url", "http://192.0.2.1:9883", "--password-file", str(right))
    assert (status, "plain text" in err) == (1, True)


def test_it_asks_with_tls(start: StartGateway, ask: Ask, tmp_path: Path) -> None:
    """With --config it expects the certificate there, whatever its names; with --url, one of a CA that it is given."""
    for name, names in (("status", ["DNS:edge-box.example"]), ("other", ["DNS:localhost"])):
        certify(subject=name, names=names).write(tmp_path / f"{name}.pem")
    port = free_port()
    status = {"endpoint": f"127.0.0.1:{port}", "server_cert": str(tmp_path / "status.pem")}
    gateway = start(upstream=1, status=status)
    config = tmp_path / "gateway.toml"

    def configured(certificate: str) -> str:
        config.write_text(
            f'upstream = [{{ host = "localhost" }}]\n'
            f'[status]\nendpoint = "127.0.0.1:{port}"\nserver_cert = "{certificate}"\n'
        )
        return str(config)

    assert ask("--config", configured("status.pem"))[0] == 0
    assert ask("--config", configured("other.pem"))[0] == 1
    url = f"https://localhost:{port}"
    assert ask("--url", url)[0] == 1
    status, _, err = ask("--url", url, "--ca-file", str(tmp_path / "status.pem"))
    assert (status, "Hostname mismatch" in err) == (1, True), err
    status = evolve(gateway.service.gateway.config.status, server_cert=tmp_path / "other.pem")
    changed = evolve(gateway.service.gateway.config, status=status)
    gateway.call(lambda: gateway.service.change(changed))
    assert ask("--url", url, "--ca-file", str(tmp_path / "other.pem"))[0] == 0


def test_nobody_there_is_one_line(ask: Ask, tmp_path: Path) -> None:
    """With where to look."""
    port = free_port()
    for url in (f"http://127.0.0.1:{port}", f"unix:{tmp_path}/nothing"):
        status, out, err = ask("--url", url)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert f"{url} does not answer: " in err
        assert "check that the gateway runs and has [status] endpoint in its configuration" in err


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """Return a function that starts a server with one answer to everything; it gives the URL."""
    servers: list[socket.socket] = []

    def serve(answer: bytes) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def run() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield serve
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def http_answer(body: bytes, status: str = "200 OK") -> bytes:
    """Make an answer."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x00\xffSSH-2.0\r\n", "does not answer"),
        (b"", "does not answer"),
        (http_answer(b"<html>\x1b[2J"), "is not a gateway: another service listens there"),
        (http_answer(b"[]"), "another service listens there"),
        (http_answer(b'{"schema": 99}'), "is a gateway of another version"),
        (http_answer(b'{"schema": %d, "devices": 5}' % SCHEMA), "does not answer as a gateway of this version"),
        (http_answer(b"\x1b[2Jno", "404 Not Found"), r"answers 404: \x1b[2Jno"),
        (http_answer(b"ask again", "429 Too Many"), "answers 429: ask again"),
    ],
)
def test_somebody_else_there_is_one_line(
    answering: Any, ask: Ask, monkeypatch: pytest.MonkeyPatch, answer: bytes, words: str
) -> None:
    """Whatever it says: no traceback, nothing that does not print."""
    monkeypatch.setattr("gateway.cli.status._RETRY_AFTER", 0.0)
    status, out, err = ask("--url", answering(answer))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert words in err
    assert err[:-1].isprintable()


def test_a_gateway_that_is_asked_too_often_is_asked_again(
    start: StartGateway, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It spares the relay, and answers a moment later."""
    monkeypatch.setattr("gateway.cli.status._RETRY_AFTER", 0.0)
    gateway = start(upstream=1)
    site = gateway.service.status_port._open.site
    answer, refused = site._answer, [(429, "text/plain", b"later")] * 2
    monkeypatch.setattr(site, "_answer", lambda *request: refused.pop() if refused else answer(*request))
    status, out, _ = ask("--url", f"http://127.0.0.1:{status_port(gateway)}")
    assert status in {0, 2, 3}
    assert "version" in out
    assert not refused


def test_wrong_options_are_told(ask: Ask) -> None:
    """Status 1, as for every wrong command line."""
    for arguments in (["--devices", "5000"], ["--watch", "0"], ["--url", "http://a", "--config", "b"]):
        status, _, err = ask(*arguments)
        assert status == 1
        assert "usage: " in err


def test_no_answer_is_an_unknown_devices(start: StartGateway) -> None:
    """The words for a device that is not known are made for what is known of the gateway."""
    document = at_once(start(upstream=1).service.sight.document())
    assert all(line.endswith(".") for line in unknown_words(document))


# ---- on a terminal


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._own, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("mqtts-gateway"), "status", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"LC_ALL": "C.UTF-8"},
            preexec_fn=as_from_a_terminal,
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, words: str) -> str:
        """Read until the words are there; return what came."""
        deadline = time.monotonic() + PATIENCE
        while words not in self.shown:
            ready, _, _ = select.select([self._own], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {words!r} in {self.shown!r}"
            try:
                self.shown += os.read(self._own, 65536).decode()
            except OSError:
                raise AssertionError(f"it ended without {words!r}: {self.shown!r}") from None
        shown, self.shown = self.shown, ""
        return shown

    def end(self) -> int:
        """Interrupt it; return its exit status."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(PATIENCE)
        finally:
            os.close(self._own)


def test_watching_keeps_it_current(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], ask: Ask
) -> None:
    """Printed anew on a cleared screen, in colours; also while the gateway is away; until it is interrupted."""
    gateway = start(upstream=start_broker().port)
    terminal = Terminal("--watch", "0.2", "--url", f"http://127.0.0.1:{status_port(gateway)}")
    first = terminal.wait_for("0 connected")
    assert "\x1b[H\x1b[2J" in first
    assert "\x1b[1mNo device has connected yet" in first
    devices.append(connected(gateway, "device-17"))
    assert "device-17" in terminal.wait_for("device-17") + terminal.wait_for("1 connected")
    devices[0].close()
    terminal.wait_for("device-lost")
    gateway.stop()
    terminal.wait_for("does not answer")
    assert terminal.end() == 130


def test_the_devices_with_a_rule_are_listed_with_their_state(
    start: StartGateway,
    start_broker: StartBroker,
    devices: list[Device],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Connected, not connected since when and why, disabled, not seen; patterns for many have no state."""
    rules = [{"match_client_id": name, "max_qos": 1} for name in ("here", "gone", "never", "many-*")]
    gateway = start(upstream=start_broker().port, device=[*rules, {"match_client_id": "off", "enabled": False}])
    devices.append(connected(gateway, "here"))
    connected(gateway, "gone").close()
    gateway.wait_ended()
    silent(gateway, "off")
    (tmp_path / "devices").mkdir()
    for rule in rules:
        (tmp_path / "devices" / f"{str(rule['match_client_id']).strip('-*')}.toml").write_text(
            f'match_client_id = "{rule["match_client_id"]}"\n'
        )
    (tmp_path / "devices/off.toml").write_text("enabled = false\n")
    config = tmp_path / "gateway.toml"
    config.write_text(
        f'[[upstream]]\nhost = "b.example"\n[devices]\ndirectory = "devices"\n'
        f'[status]\nendpoint = "127.0.0.1:{status_port(gateway)}"\n'
    )
    gateway.wait_ended(2)
    assert console(["device", "list", "--config", str(config)]) == 0
    lines = {line.partition("  ")[0]: line for line in capfd.readouterr().out.splitlines()}
    assert "connected for" in lines["here"]
    assert re.search(r"not connected since .*\d\d:\d\d:\d\d [A-Z+-]+.* \(.*\): device-lost$", lines["gone"])
    assert "last try" not in lines["gone"]
    assert "not seen lately" in lines["never"]
    assert re.search("  disabled, last refused .* ago$|  disabled, last refused just now$", lines["off"])
    assert lines["every many-*"].endswith("credentials")
    assert console(["device", "list", "--json", "--config", str(config)]) == 0
    facts = {each["client_id"][0]: each for each in json.loads(capfd.readouterr().out)}
    assert [facts[name]["connected"] for name in ("here", "gone", "never", "many-*")] == [True, False, False, None]
    assert [facts[name]["enabled"] for name in ("here", "off")] == [True, False]


def test_the_time_since_when_a_device_is_not_connected_does_not_move_with_its_tries(
    start: StartGateway, tmp_path: Path, ask: Ask, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the list of rules and in what `status --device` says; the last try is shown apart."""
    gateway = start(upstream=1, device=[{"match_client_id": "pump-2"}])
    silent(gateway, "pump-2")
    gateway.wait_ended()
    (end,) = gateway.service.ledger.ends()
    end.ended, end.absent_since = end.ended - 60, end.absent_since - 3660  # as if it had tried for an hour
    silent(gateway, "pump-2")
    gateway.wait_ended(2)
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices/pump-2.toml").write_text("enabled = true\n")
    config = tmp_path / "gateway.toml"
    config.write_text(
        f'[[upstream]]\nhost = "b.example"\n[devices]\ndirectory = "devices"\n'
        f'[status]\nendpoint = "127.0.0.1:{status_port(gateway)}"\n'
    )
    assert console(["device", "list", "--config", str(config)]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    since = datetime.now().astimezone() - timedelta(seconds=3660)
    assert re.search(r"not connected since .*\(last try (just now|\d+ s ago)\): tcp-refused$", line)
    assert any(f"{since - timedelta(minutes=minutes):%H:%M:}" in line for minutes in (0, 1))
    _, out, _ = ask("--device", "pump-2", gateway=gateway)
    words = " ".join(out.split())
    assert ", 1 h 1 min ago (" in words
    assert "Its last try was " in words
