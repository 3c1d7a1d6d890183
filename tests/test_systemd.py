"""The systemd unit: valid, and its command really starts a gateway."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from tests.harness import eventually
from tests.tools import require_tool

UNIT = Path(__file__).resolve().parent.parent / "systemd" / "mqtts-gateway.service"
INSTALLED = "/opt/mqtts-gateway/bin/"
CONFIG = "/etc/mqtts-gateway/gateway.toml"


def verify(unit: Path) -> tuple[int, str]:
    """Run `systemd-analyze verify`; return its exit status and what it says about this unit."""
    command = [require_tool("systemd-analyze"), "verify", "--man=no", str(unit)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    # Units of the machine that this one refers to may have faults of their own.
    return result.returncode, "".join(line for line in result.stderr.splitlines(True) if unit.name in line)


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    """Return a copy of the unit whose program exists, as systemd demands it."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(INSTALLED, f"{Path(sys.executable).parent}/"))
    return unit


def test_systemd_finds_no_fault(rendered: Path) -> None:
    """Not a warning either: an unknown directive is one."""
    assert verify(rendered) == (0, "")


def test_a_fault_would_be_found(rendered: Path) -> None:
    """The check above can fail."""
    rendered.write_text(rendered.read_text().replace("ProtectHome=", "ProtectTheHome="))
    assert "ProtectTheHome" in verify(rendered)[1]


def test_its_command_starts_a_gateway(tmp_path: Path) -> None:
    """Every word of ExecStart is taken, the gateway listens, and SIGTERM ends it in order."""
    (line,) = (line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart="))
    program, *options = shlex.split(line.removeprefix("ExecStart="))
    assert program.startswith(INSTALLED)
    assert options[-1] == CONFIG
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    config = tmp_path / "gateway.toml"
    config.write_text(
        '[[listen]]\nendpoint = "127.0.0.1:0"\n[[upstream]]\nhost = "localhost"\n[tls]\nca_file = "ca.pem"\n'
    )
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).with_name(Path(program).name), *options[:-1], str(config)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
        )
    try:
        eventually(
            lambda: "listening for plain MQTT on 127.0.0.1:" in log.read_text() or process.poll() is not None,
            "the gateway listens",
        )
        assert process.poll() is None, log.read_text()
        process.terminate()
        # systemd takes an end by SIGTERM for a clean one.
        assert process.wait(20) in {0, -signal.SIGTERM}
    finally:
        process.kill()
        process.wait()
