"""docs/private-ca.md: its commands are run and its files used, with a real openssl, mosquitto and gateway."""

from __future__ import annotations

import os
import re
import shutil
import stat
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
    """Somebody who follows the document; `localhost` is the broker's name, and `/etc` is a directory of the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "work"
        self.etc = directory / "etc"
        for path in (self.directory, self.etc / "mosquitto" / "certs", self.etc / "mosquitto" / "conf.d"):
            path.mkdir(parents=True)
        self.config = self.etc / "mqtts-gateway" / "gateway.toml"
        self.port, self.device_port = free_port(), free_port()
        self._names = {
            "broker.plant.example": "localhost",
            "-h gateway.plant.example": f"-h localhost -p {self.device_port}",
            "8883": str(self.port),
            "0.0.0.0:1883": f"127.0.0.1:{self.device_port}",
            "127.0.0.1:9883": f"127.0.0.1:{free_port()}",
            "-o mosquitto ": "",
            "/etc/": f"{self.etc}/",
        }
        self._blocks = {(kind, name): text for kind, name, text in _BLOCK.findall(DOCUMENT.read_text())}

    def text(self, kind: str, name: str) -> str:
        """Return a block with the names of this test."""
        text = self._blocks[kind, name]
        for theirs, ours in self._names.items():
            text = text.replace(theirs, ours)
        return text

    def do(self, name: str, **environment: str) -> str:
        """Run a step's commands, all under the `umask` of the first; return what they printed."""
        done = subprocess.run(
            ["sh", "-euc", f"umask 077\n{self.text('step', name)}"],
            cwd=self.directory,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """Return a reader who has all the files, up to the gateway's configuration."""
    reader = Reader(tmp_path)
    reader.do("ca")
    for name in ("broker.ext", "device.ext", "tls.conf", "acl"):
        (reader.directory / name).write_text(reader.text("file", name))
    assert "broker.pem: OK" in reader.do("broker")
    for name in ("mosquitto", "gateway", "monitor"):
        reader.do(name)
    reader.config.write_text(reader.text("file", "gateway.toml"))
    return reader


@pytest.fixture
def mosquitto(reader: Reader) -> Iterator[Mosquitto]:
    """Run mosquitto with the document's configuration."""
    configuration = (reader.etc / "mosquitto" / "conf.d" / "tls.conf").read_text()
    mosquitto = Mosquitto(reader.directory, configuration, reader.port)
    yield mosquitto
    mosquitto.stop()


def _everyone_can_read(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IROTH)


@pytest.mark.slow
def test_the_page_leads_to_devices_with_certificates_of_their_own(reader: Reader, mosquitto: Mosquitto) -> None:
    """Each device's message reaches mosquitto under its own name and the monitor; one without a rule reaches nothing.

    Programs with users of their own can read what they need, and not the keys.
    """
    programs = Path(sys.executable).parent
    # `mqtts-gateway` is the installed command, with this directory's configuration in place of the default one.
    command = reader.directory / "bin" / "mqtts-gateway"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nwhat=$1; shift\n[ "$what" != device ] || {{ what="device $1"; shift; }}\n'
                       f'exec {programs}/mqtts-gateway $what --config {reader.config} "$@"\n')  # fmt: skip
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    checked = reader.do("devices", PATH=path)
    reader.do("request", PATH=path)
    shutil.copy(reader.etc / "mqtts-gateway" / "devices" / "pump-4.csr.pem", reader.directory)
    signed = reader.do("sign")
    assert "CN = pump-4" in signed
    assert "pump-4.pem: OK" in signed
    assert "FAIL" not in checked + reader.do("issued", PATH=path)
    public = {path for path in reader.etc.rglob("*.pem") if _everyone_can_read(path)}
    certificates = ("mosquitto/certs/ca.pem", "mosquitto/certs/broker.pem", "mqtts-gateway/ca.pem")
    assert {reader.etc / name for name in certificates} <= public
    assert not any(b"PRIVATE" in path.read_bytes() for path in public)
    assert _everyone_can_read(reader.etc / "mqtts-gateway" / "devices")
    gateway = subprocess.Popen(
        [programs / "mqtts-gateway", "run", "--config", reader.config], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    watched = reader.directory / "watched"
    with watched.open("wb") as output:
        watch = subprocess.Popen(
            ["sh", "-euc", f"exec {reader.text('step', 'watch')}"], cwd=reader.directory, stdout=output
        )
    try:
        eventually(lambda: "Sending SUBACK to" in mosquitto.log.read_text(), "the monitor has subscribed")
        publish = [require_tool("mosquitto_pub"), "-p", str(reader.device_port), "-q", "1", "-m", "21.5"]

        def published(device: str) -> bool:
            done = subprocess.run([*publish, "-i", device, "-t", f"plant/{device}/t"], capture_output=True, check=False)
            return done.returncode == 0

        for device in ("pump-1", "pump-2", "pump-3", "pump-4"):
            eventually(lambda device=device: published(device), f"{device} has published")
        assert not published("stranger")
        reader.do("publish")
        received = [*(f"plant/pump-{number}/t 21.5" for number in (1, 2, 3, 4)), "plant/pump-1/temperature 21.5"]
        eventually(lambda: watched.read_text().splitlines() == received, "the monitor has received all")
        for words in (["status"], ["device", "list"]):
            shown = subprocess.run([command, *words], capture_output=True, text=True, check=True)
            assert "pump-1" in shown.stdout
    finally:
        for process in (gateway, watch):
            process.terminate()
            process.communicate()
    log = mosquitto.log.read_text()
    for device in ("pump-1", "pump-2", "pump-3", "pump-4"):
        assert re.search(rf"New client connected from \S+ as {device} \(.*u'{device}'\)", log)
        assert f"Received PUBLISH from {device}" in log
    assert "stranger" not in log
