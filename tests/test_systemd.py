"""The systemd units: valid, tight, of one mind, and their command really starts a gateway.

What they do under systemd itself is in tests/test_service.py.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from tests.harness import eventually
from tests.tools import require_tool

UNITS = Path(__file__).resolve().parent.parent / "systemd"
UNIT = UNITS / "mqtts-gateway.service"
INSTANCE = UNITS / "mqtts-gateway@.service"
INSTALLED = "/opt/mqtts-gateway/bin/"
CONFIG = "/etc/mqtts-gateway/gateway.toml"
MOST_EXPOSED = 1.2  # of 10, which is a service without any restriction


def verify(*units: Path) -> tuple[int, str]:
    """Run `systemd-analyze verify`; return its exit status and what it says about these units."""
    command = [require_tool("systemd-analyze"), "verify", "--man=no", *map(str, units)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    # Units of the machine that these refer to may have faults of their own.
    return result.returncode, "".join(line for line in result.stderr.splitlines(True) if "mqtts-gateway" in line)


def exposure(unit: Path) -> float:
    """Return what `systemd-analyze security` says of a unit: the less the better."""
    command = [require_tool("systemd-analyze"), "security", "--offline=yes", "--no-pager", str(unit)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", output)[1])


def directives(unit: Path) -> dict[str, list[str]]:
    """Return the directives of a unit, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def rendered(tmp_path: Path) -> list[Path]:
    """Return copies of the units whose programs exist, as systemd demands it; templates as one of their instances."""
    copies = []
    for unit in sorted(UNITS.iterdir()):
        copies.append(tmp_path / unit.name.replace("@.", "@1."))
        copies[-1].write_text(unit.read_text().replace(INSTALLED, f"{Path(sys.executable).parent}/"))
    assert len(copies) == 4
    return copies


def test_systemd_finds_no_fault(rendered: list[Path]) -> None:
    """Not a warning either: an unknown directive is one."""
    assert verify(*rendered) == (0, "")


@pytest.mark.parametrize("index", range(4))
def test_a_fault_would_be_found(rendered: list[Path], index: int) -> None:
    """The check above can fail, for each of the files."""
    text = rendered[index].read_text()
    rendered[index].write_text(
        re.sub(r"^(\[(?:Service|Socket)\])$", r"\1\nProtectTheHome=yes", text, flags=re.MULTILINE)
    )
    assert "ProtectTheHome" in verify(*rendered)[1]


@pytest.mark.parametrize("unit", [UNIT, INSTANCE], ids=lambda path: path.name)
def test_the_exposure_is_small(unit: Path) -> None:
    """As systemd judges it from the directives alone."""
    assert exposure(unit) <= MOST_EXPOSED


def test_an_exposure_that_is_not_small_would_be_seen(tmp_path: Path) -> None:
    """Leaving out the least of what counts is seen as well."""
    loose = tmp_path / UNIT.name
    loose.write_text(
        UNIT.read_text().replace("SystemCallFilter=~@privileged @resources\n", "").replace("PrivateUsers=yes\n", "")
    )
    assert exposure(loose) > MOST_EXPOSED


def test_the_instances_are_the_service_many_times() -> None:
    """They differ in their names, in their directories, and in nothing that protects."""
    one, many = directives(UNIT), directives(INSTANCE)
    own = {"Description", "RuntimeDirectory", "BindPaths", "StateDirectory", "SyslogIdentifier"}
    assert {name for name in one.keys() | many.keys() if one.get(name) != many.get(name)} == own
    assert many["RuntimeDirectory"] == ["mqtts-gateway-%i"]
    assert many["BindPaths"] == ["/run/mqtts-gateway-%i:/run/mqtts-gateway"]


def test_every_directive_has_its_reason_beside_it() -> None:
    """Each paragraph of the service's section begins with a comment, so no directive stands without one above it."""
    section = UNIT.read_text().partition("[Service]\n")[2].partition("\n[Install]")[0]
    unexplained = []
    explained = False
    for line in section.splitlines():
        explained = line.startswith("#") or (explained and bool(line))
        if line and not line.startswith("#") and not explained:
            unexplained.append(line)
    assert unexplained == []


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
