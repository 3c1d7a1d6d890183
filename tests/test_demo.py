"""`mqtts-gateway demo`, run as a user runs it: in a process of its own."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from xml.etree import ElementTree

import pytest
import trustme
from twisted.internet.threads import blockingCallFromThread

from gateway.cli import demo
from gateway.cli.demo_show import Impostor
from tests.harness import Device, eventually
from tests.mqtt_packets import connect
from tests.tools import as_from_a_terminal

ROOT = Path(__file__).resolve().parent.parent
# The console script's own words; the script itself stands wherever pip has put it.
_COMMAND = (sys.executable, "-c", "import sys; from gateway.cli.main import console; sys.exit(console())", "demo")
# An unbuffered Python would hide what happens to output that waits in a buffer.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


class RunningDemo:
    """The demo's process; `output` is all that it has written so far."""

    def __init__(self, directory: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self._output = directory / "output"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*_COMMAND, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_ENVIRONMENT | {"TMPDIR": str(self.temporary)} | (environment or {}),
                preexec_fn=as_from_a_terminal,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, pattern: str) -> str:
        """Wait until the output matches; return the first group."""

        def found() -> re.Match[str] | None:
            match = re.search(pattern, self.output)
            assert match or self.process.poll() is None, f"the demo has ended: {self.output}"
            return match

        match: re.Match[str] = eventually(found, f"{pattern} in the demo's output")
        return match[1]

    def wait(self) -> int:
        return self.process.wait(60)

    def left_behind(self) -> list[str]:
        """Return the names of what is in the demo's temporary directory."""
        return [path.name for path in self.temporary.rglob("*")]

    def private_keys(self) -> list[str]:
        """Return the names of files that hold a private key."""
        files = [path for path in self.temporary.rglob("*") if path.is_file()]
        return [path.name for path in files if b"PRIVATE KEY" in path.read_bytes()]


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Callable[..., RunningDemo]]:
    """Return a function that starts the demo; it is killed after the test if it still runs."""
    demos: list[RunningDemo] = []

    def start(*options: str, **arguments: Any) -> RunningDemo:
        demos.append(RunningDemo(tmp_path, *options, **arguments))
        return demos[-1]

    yield start
    for running in demos:
        running.process.kill()
        running.process.wait()


def gone(pid: int) -> bool:
    """Tell whether a process is no more, or only waits to be reaped by someone else."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_message_arrives_and_the_impostor_learns_nothing(start_demo: Callable[..., RunningDemo]) -> None:
    """`--once` shows every fact of the way, ends with 0 and leaves nothing behind."""
    running = start_demo("--once")
    assert running.wait() == 0, running.output
    shown = running.output
    for fact in (
        r"broker  amqtt \S+ listens on 127\.0\.0\.1:\d+, TLS only",
        r"verified as DNS:localhost, issuer \S*OU=CA,O=mqtts-gateway demo, TLSv1\.3 TLS_",
        r"sensor  got CONNACK 0 \(Success\)",
        r"subscriber  received 21\.5 on demo/temperature",
        r"session 1 ended: tls-name-mismatch \(the certificate is for DNS:elsewhere\.example",
        r"sensor  got CONNACK 3 \(Server unavailable\)",
        r"impostor  received 0 bytes of MQTT",
    ):
        assert re.search(fact, shown), f"{fact} is not in:\n{shown}"
    assert shown.index("received 21.5") < shown.index("CONNACK 3")
    assert "Traceback" not in shown
    assert running.left_behind() == []
    assert gone(int(running.wait_for(r"\(process (\d+)\)")))


def test_the_recording_in_the_readme_shows_what_the_demo_prints(start_demo: Callable[..., RunningDemo]) -> None:
    """But for ports, numbers and the directory; `python docs/record_demo.py` records it again."""
    running = start_demo("--once")
    assert running.wait() == 0, running.output
    texts = ElementTree.parse(ROOT / "docs" / "demo.svg").iterfind("{*}text")  # noqa: S314  our own
    command, *recorded = [" ".join(span.text or "" for span in text) for text in texts]
    assert command == "$ mqtts-gateway demo --once"
    assert "docs/demo.svg" in (ROOT / "README.md").read_text()

    def facts(lines: list[str]) -> list[str]:
        """Without what differs in each run; gateway and clients speak at the same time."""
        alike = (re.sub(r"\S*mqtts-gateway-demo-\w+", "DIR", line.strip()) for line in lines)
        return sorted(re.sub(r"\d+(\.\d+)*", "N", line) for line in alike)

    assert facts(recorded) == facts(running.output.splitlines())


def test_each_sensor_has_an_identity_of_its_own_and_the_spoofer_has_none(
    start_demo: Callable[..., RunningDemo],
) -> None:
    """`--profile aws-like` shows two sensors under their own certificates, and ends with 0 and nothing left."""
    running = start_demo("--profile", "aws-like", "--once")
    assert running.wait() == 0, running.output
    shown = running.output
    for fact in (
        r"broker  listens on 127\.0\.0\.1:\d+ .* it requires ALPN x-amzn-mqtt-ca, the name localhost",
        r"boiler-1  got CONNACK 0 \(Success\)",
        r"broker  boiler-1 authenticated with the certificate CN=boiler-1, and published on plant/boiler-1/temperature",
        r"broker  boiler-2 authenticated with the certificate CN=boiler-2, and published on plant/boiler-2/temperature",
        r"session 3 ended: spoofed \(rule boiler-1: bound to 127\.0\.0\.1/32\)",
        r"spoofer  connected from 127\.0\.0\.66 as boiler-1, and got CONNACK 5 \(Not authorized\)",
    ):
        assert re.search(fact, shown), f"{fact} is not in:\n{shown}"
    assert "Traceback" not in shown
    assert running.left_behind() == []
    assert gone(int(running.wait_for(r"\(process (\d+)\)")))


@pytest.mark.slow
def test_a_sensor_sees_nothing_of_an_outage(start_demo: Callable[..., RunningDemo]) -> None:
    """`--profile outage` stores what is published while the link is cut, and delivers it in order."""
    running = start_demo("--profile", "outage", "--once")
    assert running.wait() == 0, running.output
    shown = running.output
    cut, opened = shown.index("cut: the gateway"), shown.index("link  open again")
    published = [
        match.start() for match in re.finditer(r"sensor  published 21\.[3-7], QoS 1: the gateway stored", shown)
    ]
    received = [(match[1], match.start()) for match in re.finditer(r"subscriber  received (21\.\d)\n", shown)]
    assert [reading for reading, _ in received] == [f"21.{number}" for number in range(1, 9)]
    assert len(published) == 5
    assert all(cut < place < opened for place in published)
    assert next(reading for reading, place in received if place > opened) == "21.3"
    assert "Traceback" not in shown
    assert running.left_behind() == []
    assert gone(int(running.wait_for(r"\(process (\d+)\)")))


def test_the_impostor_counts_what_it_is_told(reactor: Any, ca: trustme.CA) -> None:
    """Its zero means something: a client that verifies nothing is counted to the byte."""
    impostor = Impostor(ca.issue_cert("elsewhere.example"))
    port = blockingCallFromThread(reactor, reactor.listenSSL, 0, impostor, impostor, interface="127.0.0.1")
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port.getHost().port))) as client:
        client.sendall(b"secret")
        eventually(lambda: impostor.received == 6, "six bytes are counted")
    blockingCallFromThread(reactor, port.stopListening)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_serves_until_it_is_told_to_stop(start_demo: Callable[..., RunningDemo], number: signal.Signals) -> None:
    """One's own client is served meanwhile; afterwards the broker's process and the directory are gone."""
    running = start_demo()
    port = int(running.wait_for(r"point your own client at 127\.0\.0\.1:(\d+)"))
    broker = int(running.wait_for(r"\(process (\d+)\)"))
    with Device(port) as device:
        device.send(connect(client_identifier="mine"))
        assert device.read(4) == b"\x20\x02\x00\x00"
        running.wait_for(r'("mine") from 127\.0\.0\.1')
        with Device(port) as newer:
            # With Receive Maximum, as mosquitto_pub sends it.
            newer.send(connect("", version=5, properties=b"\x21\x00\x14"))
            answer = newer.read_to_end()
        # Unsupported Protocol Version, at once: the demo's broker has MQTT 3.1.1 only.
        assert (answer[:1], answer[2:4]) == (b"\x20", b"\x00\x84")
        assert "upstream-silent" not in running.output
        status_page = running.wait_for(r"gateway  status page: (http://\S+/)")
        with urlopen(status_page, timeout=20) as page:  # noqa: S310  it is http
            assert b">mine</b>" in page.read()
        assert running.private_keys() == []
        running.process.send_signal(number)
        running.process.send_signal(number)
        assert running.wait() == 0, running.output
    assert "Traceback" not in running.output
    assert running.left_behind() == []
    assert gone(broker)


@pytest.mark.slow
def test_even_when_killed_no_key_and_no_process_is_left(start_demo: Callable[..., RunningDemo]) -> None:
    """The broker ends with the demo, and the keys were off the disk before."""
    running = start_demo()
    running.wait_for(r"point your own client at (\S+)")
    broker = int(running.wait_for(r"\(process (\d+)\)"))
    running.process.kill()
    eventually(lambda: gone(broker), "the broker's process has ended")
    assert running.left_behind() != []
    assert running.private_keys() == []


def test_a_broker_that_dies_ends_the_demo(start_demo: Callable[..., RunningDemo]) -> None:
    """The demo says so and cleans up, rather than stand there without a broker."""
    running = start_demo()
    running.wait_for(r"point your own client at (\S+)")
    os.kill(int(running.wait_for(r"\(process (\d+)\)")), signal.SIGKILL)
    assert running.wait() == 1
    assert "mqtts-gateway demo: the broker has ended (signal 9)" in running.output
    assert running.left_behind() == []


def test_a_broker_that_cannot_start_is_explained(start_demo: Callable[..., RunningDemo], tmp_path: Path) -> None:
    """The broker's own last lines are shown."""
    package = tmp_path / "broken" / "amqtt"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "broker.py").write_text("raise RuntimeError('the spool is full')\n")
    running = start_demo("--once", environment={"PYTHONPATH": str(package.parent)})
    assert running.wait() == 1
    assert "mqtts-gateway demo: the broker did not start (exit status 1)" in running.output
    assert "RuntimeError: the spool is full" in running.output
    assert running.left_behind() == []


def test_a_port_that_is_taken_is_named(start_demo: Callable[..., RunningDemo]) -> None:
    """The configuration's own words, and no broker left running."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = start_demo("--once", "--listen", str(port))
        assert running.wait() == 1
    assert f"cannot listen on 127.0.0.1:{port}" in running.output
    assert "Traceback" not in running.output
    assert running.left_behind() == []
    assert gone(int(running.wait_for(r"\(process (\d+)\)")))


def test_output_that_nobody_takes_ends_the_demo(tmp_path: Path) -> None:
    """It neither runs on unseen nor counts as shown."""
    with Path("/dev/full").open("wb") as full:
        running = subprocess.run(
            _COMMAND,
            stdout=full,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT | {"TMPDIR": str(tmp_path)},
        )
    assert (running.returncode, running.stderr.decode()) == (
        1,
        "mqtts-gateway demo: cannot write to standard output: No space left on device\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "package"), [("amqtt", "amqtt"), ("paho.mqtt.client", "paho-mqtt"), ("trustme", "trustme")]
)
def test_a_missing_extra_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, package: str
) -> None:
    """The line says what to type, and names the packages of the extra."""
    monkeypatch.setitem(sys.modules, module, None)
    assert demo.run(argparse.Namespace(listen=0, once=True, profile="plain")) == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = " ".join(each.partition(">")[0] for each in project["optional-dependencies"]["demo"])
    expected = f"mqtts-gateway demo: {package} is missing: pip install {packages}, or '.[demo]' in a clone\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("text", ["65536", "-1", "mqtt", "٣"])
def test_what_is_no_port_is_refused(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """The message names the option and the value."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--listen={text}"])
    assert "argument --listen: " in capsys.readouterr().err
