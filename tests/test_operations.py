"""docs/operations.md and docs/troubleshooting.md: their commands are run, what they say of the unit is so.

Each block of commands is marked with where it is tried: `<!-- box: NAME -->` here, in a box with a systemd of its own
(tests/box.py), `<!-- elsewhere: FILE -->` by another test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import EndReason
from tests.box import ENVIRONMENT, ROOT, Box, require_box
from tests.mqtt_packets import connect
from tests.test_service import ACCEPTED, BROKER, CONFIG, SETTINGS, UNIT, Plant
from tests.test_systemd import UNIT as UNIT_FILE
from tests.test_systemd import directives

OPERATIONS = ROOT / "docs" / "operations.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
_BLOCK = re.compile(r"(?:<!-- (box|elsewhere): ([^>]+) -->\n)?```sh\n(.*?)```", re.DOTALL)


def blocks(document: Path) -> list[tuple[str, str, str]]:
    """Return the blocks of commands: where they are tried, the name there, the commands."""
    return [(found[1] or "", found[2] or "", found[3]) for found in _BLOCK.finditer(document.read_text())]


@pytest.mark.parametrize("document", [OPERATIONS, TROUBLESHOOTING], ids=lambda path: path.name)
def test_every_block_of_commands_is_tried_somewhere(document: Path) -> None:
    """None stands unmarked, and a file that tries some exists."""
    found = blocks(document)
    assert found
    for where, name, commands in found:
        assert where, f"nobody tries {commands}"
        assert where == "box" or (ROOT / name).is_file()


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    """Return a plant whose gateway has yet to be installed."""
    require_box()
    with Box() as box:
        plant = Plant(box, install=False)
        yield plant
        plant.stop()


class Reader:
    """Somebody who does what a document says, block by block, in a directory of their own."""

    def __init__(self, plant: Plant, document: Path) -> None:
        self.plant = plant
        self._steps = {name: commands for where, name, commands in blocks(document) if where == "box"}
        self.done: list[str] = []

    def do(self, name: str) -> str:
        """Run a block as it stands, but with the names of this plant; return what it printed."""
        commands = self._steps[name].replace("broker.example.com", f"{BROKER}:{self.plant.broker.port}")
        self.done.append(name)
        self.plant.box.do("mkdir", "-p", "/srv/reader")
        return self.plant.box.do("sh", "-euc", f"cd /srv/reader\n{commands}")

    def receive(self, name: str) -> None:
        """Have a certificate issued, and find it in this directory."""
        chain, key = self.plant.issued(name)
        self.plant.box.write("/srv/reader/client.pem", chain)
        self.plant.box.write("/srv/reader/client.key", key, 0o600)


@pytest.mark.slow
def test_the_operations_from_install_to_decommission(plant: Plant) -> None:
    """One life of a gateway, by nothing but the document's commands and the lines of configuration that it shows."""
    box, reader = plant.box, Reader(plant, OPERATIONS)
    assert "nothing changed" in reader.do("install")
    box.write(SETTINGS / "ca.pem", plant.ca.cert_pem.bytes().decode())
    lines = re.findall(r"```toml\n\[tls\]\n(.*?)```", OPERATIONS.read_text(), re.DOTALL)[0]
    box.do("sed", "-i", f"s|^\\[tls\\]$|[tls]\\n{lines.strip()}|".replace("\n", "\\n"), CONFIG)
    reader.receive("first")
    reader.do("key")
    assert box.do("stat", "--format=%a", SETTINGS / "credentials/client.key").strip() == "600"
    for name in ("check", "start", "watch", "reload"):
        said = reader.do(name)
        if name == "check":
            assert "FAIL" not in said
        elif name == "start":
            assert "Active: active (running)" in said
            assert re.search(r'Status: ".+"', said)
    with plant.session():
        assert plant.shown_name() == "first"
    for name in ("restart", "group"):
        reader.receive(name)
        reader.do(name)
        with plant.session():
            assert plant.shown_name() == name
    reader.do("stop")
    assert box.property(UNIT, "ActiveState") == "inactive"
    reader.do("stop at once")

    box.do("sh", "-c", f"printf '\\n[[listen]]\\nendpoint = \"systemd:domain=INET:name=mqtt\"\\n' >>{CONFIG}")
    reader.do("socket")
    plant.session().close()
    reader.do("keep")
    reader.do("upgrade")
    plant.session().close()
    box.do("sh", "-c", f"echo broken >{ENVIRONMENT}/bin/twistd")
    assert box.run("systemctl", "restart", UNIT).returncode != 0
    with plant.device() as device:
        device.send(connect())
        reader.do("back")
        assert device.read(4) == ACCEPTED
    reader.do("backup")
    assert "credentials" in box.do("tar", "--list", "--file", "/root/mqtts-gateway.tar.gz")
    assert box.do("stat", "--format=%a", "/root/mqtts-gateway.tar.gz").strip() == "600"
    reader.do("decommission")
    left = box.do(
        "find", "/etc", "/usr/local", "/var/lib", "/run", "-name", "*mqtts-gateway*", "-not", "-path", "*/cgroup/*"
    )
    assert left == ""
    assert sorted(reader.done) == sorted(name for where, name, _ in blocks(OPERATIONS) if where == "box")


def test_every_directive_is_explained_in_the_document() -> None:
    """What the unit has stands in the table, and nothing that it has not."""
    section = OPERATIONS.read_text().partition("## What the service may do")[2].partition("\nThree things")[0]
    named = set(re.findall(r"`([A-Z][A-Za-z]+)`", section))
    ofunit = {"Description", "Wants", "After", "StartLimitIntervalSec", "WantedBy"}
    assert named == directives(UNIT_FILE).keys() - ofunit


def test_the_words_of_the_troubleshooting_are_those_of_the_gateway() -> None:
    """Whatever looks like the end of a session is one."""
    text = TROUBLESHOOTING.read_text()
    looks = re.compile(
        r"(?:tls|tcp|dns|upstream|device|too-many|client-id)-[a-z-]+|[a-z]+-(?:timeout|lost|error|implausible)"
    )
    words = {span for span in re.findall(r"`([^`\n]+)`", text) if looks.fullmatch(span)}
    assert len(words) > 25
    assert words - {str(reason) for reason in EndReason} - {"device-17"} == set()


def test_the_troubleshooting_has_every_word_of_the_way_to_a_broker() -> None:
    """Proxy, TLS, WebSocket and what they are given: each reason for which a broker is not reached."""
    named = set(re.findall(r"`([^`\n]+)`", TROUBLESHOOTING.read_text()))
    inbound = {"proxy-not-trusted"}
    way = {str(each) for each in EndReason if re.match("(dns|tcp|proxy|tls|websocket)-|credentials-unavail", each)}
    assert len(way - inbound) > 25
    assert way - inbound - named == set()


@pytest.mark.slow
def test_the_questions_of_the_troubleshooting_are_answered(plant: Plant) -> None:
    """The three commands, and the one about a device, with a gateway that runs."""
    box, reader = plant.box, Reader(plant, TROUBLESHOOTING)
    box.do(ENVIRONMENT / "bin/mqtts-gateway", "install")
    box.do("ln", "-sf", ENVIRONMENT / "bin/mqtts-gateway", "/usr/local/bin/")
    box.write(SETTINGS / "ca.pem", plant.ca.cert_pem.bytes().decode())
    plant.issue("asker")
    plant.configure(more='[status]\nendpoint = "127.0.0.1:9883"\n')
    plant.start()
    with plant.device() as device:
        device.send(connect("device-17"))
        assert device.read(4) == ACCEPTED
        assert "The gateway works" in reader.do("ask")
        assert "device-17: connected" in reader.do("device")
    plant.clear()
