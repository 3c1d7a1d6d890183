"""docs/private-ca.md: its commands are run and its files used, with a real openssl, mosquitto and gateway."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.box import ROOT
from tests.harness import eventually
from tests.mosquitto import Mosquitto
from tests.ports import free_port
from tests.tools import require_tool

DOCUMENT = ROOT / "docs" / "private-ca.md"
_BLOCK = re.compile(r"<!-- (step|file): ([^>]+) -->\n```\w*\n(.*?)```", re.DOTALL)


class Reader:
    """Somebody who follows the document in a directory of their own; `localhost` is the broker's name there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self.device_port = free_port(), free_port()
        self._blocks = {(kind, name): text for kind, name, text in _BLOCK.findall(DOCUMENT.read_text())}
        self.config = directory / "gateway.toml"

    def _text(self, kind: str, name: str) -> str:
        text = self._blocks[kind, name].replace("broker.plant.example", "localhost").replace("8883", str(self.port))
        text = text.replace("0.0.0.0:1883", f"127.0.0.1:{self.device_port}")
        return re.sub(r"/etc/(mosquitto(/certs)?|mqtts-gateway)", str(self.directory), text)

    def do(self, name: str, **environment: str) -> str:
        """Run a step's commands; return what they printed."""
        done = subprocess.run(
            ["sh", "-euc", self._text("step", name)],
            cwd=self.directory,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def save(self, name: str) -> str:
        """Save a file as the document has it, and return its text."""
        text = self._text("file", name)
        (self.directory / name).write_text(text)
        return text


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """Return a reader who has done everything up to the gateway's configuration."""
    reader = Reader(tmp_path)
    reader.do("ca")
    reader.save("broker.ext")
    assert "broker.pem: OK" in reader.do("broker")
    return reader


@pytest.fixture
def mosquitto(reader: Reader) -> Iterator[Mosquitto]:
    """Run mosquitto with the document's configuration."""
    reader.save("acl")
    mosquitto = Mosquitto(reader.directory, reader.save("tls.conf"), reader.port)
    yield mosquitto
    mosquitto.stop()


@pytest.mark.slow
def test_the_page_leads_to_devices_with_certificates_of_their_own(reader: Reader, mosquitto: Mosquitto) -> None:
    """Each device's message reaches mosquitto under its own name; one without a rule reaches nothing."""
    reader.save("gateway.toml")
    programs = Path(sys.executable).parent
    # `mqtts-gateway` is the installed command, with this directory's configuration in place of the default one.
    command = reader.directory / "bin" / "mqtts-gateway"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nwhat=$1; shift\n[ "$what" != device ] || {{ what="device $1"; shift; }}\n'
                       f'exec {programs}/mqtts-gateway $what --config {reader.config} "$@"\n')  # fmt: skip
    command.chmod(0o755)
    checked = reader.do("devices", PATH=f"{command.parent}:{os.environ['PATH']}")
    assert "FAIL" not in checked
    gateway = subprocess.Popen(
        [programs / "mqtts-gateway", "run", "--config", reader.config], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        publish = [require_tool("mosquitto_pub"), "-p", str(reader.device_port), "-q", "1", "-m", "21.5"]

        def published(device: str) -> bool:
            done = subprocess.run([*publish, "-i", device, "-t", f"plant/{device}/t"], capture_output=True, check=False)
            return done.returncode == 0

        for device in ("pump-1", "pump-2", "pump-3"):
            eventually(lambda device=device: published(device), f"{device} has published")
        assert not published("stranger")
    finally:
        gateway.terminate()
        gateway.communicate()
    log = mosquitto.log.read_text()
    for device in ("pump-1", "pump-2", "pump-3"):
        assert re.search(rf"New client connected from \S+ as {device} \(.*u'{device}'\)", log)
        assert f"Received PUBLISH from {device}" in log
    assert "stranger" not in log
