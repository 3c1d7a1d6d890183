"""The container image: built as CONTRIBUTING.md says, and run by podman with the restrictions of docs/containers.md."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trustme

from tests import mqtt_packets as mqtt
from tests.balancers import Program
from tests.box import ROOT, require_box
from tests.harness import Broker, Device, eventually
from tests.ports import free_port
from tests.tools import require_tool

pytestmark = pytest.mark.slow

USER = 65532
# podman would raise limits and make cgroups, which not every machine lets root do.
LIMITS = ("--cgroups", "disabled", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
# crun reads at this place whether a machine has cgroup v2.
UNIFIED = 'mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"'


class Podman:
    """podman with storage of its own, in a mount namespace of its own."""

    def __init__(self, directory: Path) -> None:
        self._options = ("--root", directory / "storage", "--runroot", directory / "run", "--storage-driver", "vfs")

    def command(self, *words: str | Path) -> list[str]:
        """Return a command line."""
        podman = ["podman", *self._options, "--cgroup-manager", "cgroupfs", "--runtime", "crun", *words]
        return [str(word) for word in ("unshare", "--mount", "--cgroup", "sh", "-euc", UNIFIED, "sh", *podman)]

    def run(self, *words: str | Path) -> str:
        """Run it; return its output."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the image, built from this tree."""
    require_box()
    for program in ("crun", "dpkg-deb", "mmdebstrap", "podman", "readelf"):
        require_tool(program)
    command = [sys.executable, ROOT / "image.py", tmp_path_factory.mktemp("image")]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


@pytest.fixture(scope="module")
def podman(image: Path) -> Iterator[Podman]:
    """Give podman with the image."""
    # podman wants a path that is short.
    with TemporaryDirectory(dir="/tmp") as directory:
        podman = Podman(Path(directory))
        assert "mqtts-gateway" in podman.run("load", "--input", image)
        yield podman


@pytest.fixture(scope="module")
def name(podman: Podman) -> str:
    """Return the image's name."""
    return podman.run("images", "--format", "{{.Repository}}:{{.Tag}}")


def test_it_has_the_gateway_and_no_other_program(podman: Podman, name: str) -> None:
    """No shell, no package manager, nothing setuid; it names its packages for scanners, and a user that is not root."""
    (about,) = json.loads(podman.run("image", "inspect", name))
    root = Path(podman.run("image", "mount", name))
    try:
        files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    finally:
        podman.run("image", "unmount", name)
    programs = {path for path in files if re.match(r"(usr/)?s?bin/", path)}
    assert programs == {"usr/bin/mqtts-gateway", "usr/bin/python3", "usr/bin/python3.11"}
    assert [path for path, file in files.items() if file.stat().st_mode & 0o6022] == []
    assert {"var/lib/dpkg/status.d/libc6", "var/lib/dpkg/status.d/mqtts-gateway", "etc/os-release"} <= files.keys()
    assert (root / "var/lib/mqtts-gateway").stat().st_uid == USER
    assert about["Config"]["User"] == f"{USER}:{USER}"
    # docs/containers.md states the size.
    stated = re.search(r"takes (\d+) MB \((\d+) MB compressed\)", (ROOT / "docs/containers.md").read_text())
    assert stated is not None
    assert about["Size"] == pytest.approx(int(stated[1]) * 1_000_000, rel=0.15)


@pytest.fixture
def started(
    podman: Podman, name: str, start_broker: Callable[..., Broker], ca: trustme.CA, tmp_path: Path
) -> Iterator[tuple[Program, str, int, Broker]]:
    """Give a container that serves devices, its name, their port and the broker."""
    broker, port, status = start_broker(), free_port(), f"127.0.0.1:{free_port()}"
    directory = tmp_path / "config"
    directory.mkdir()
    ca.cert_pem.write_to_path(str(directory / "ca.pem"))
    certificate = ca.issue_cert("gateway.example")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(directory / "gateway.pem"))
    (directory / "gateway.toml").write_text(
        f'[[listen]]\nendpoint = "127.0.0.1:{port}"\n[[upstream]]\nhost = "localhost"\nport = {broker.port}\n'
        '[tls]\nca_file = "ca.pem"\nclient_cert = "gateway.pem"\n[status]\n'
        f'endpoint = "{status}"\n[drain]\nseconds = 1\n'
        '[store]\ndirectory = "/var/lib/mqtts-gateway/store"\n'
        # RE2 is loaded, which needs the C++ library.
        '[[device]]\nmatch_pattern = "nobody-[0-9]+"\n'
    )
    for path in (directory, *directory.iterdir()):
        os.chown(path, USER, USER)
    container = f"test-{port}"
    options = ("--network", "host", "--read-only", "--read-only-tmpfs=false", "--cap-drop", "all")
    options += ("--security-opt", "no-new-privileges", "--volume", f"{directory}:/etc/mqtts-gateway:ro", *LIMITS)
    options += ("--env", f"MQTTS_GATEWAY_STATUS={status}")
    program = Program(podman.command("run", "--name", container, *options, name), tmp_path / "log")
    program.wait_for("listening for plain MQTT")
    yield program, container, port, broker
    if program.process.poll() is None:
        os.kill(process_of(podman, container), signal.SIGKILL)
        program.wait_ended()
    podman.run("rm", container)


def process_of(podman: Podman, container: str) -> int:
    """Return the number of the gateway's process."""
    return int(podman.run("inspect", "--format", "{{.State.Pid}}", container))


def status_of(process: int) -> dict[str, str]:
    """Return what proc(5) says of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_a_message_passes_without_any_rights(podman: Podman, started: tuple[Program, str, int, Broker]) -> None:
    """From a device to a TLS broker; it is healthy, holds no capability, cannot write, and SIGTERM drains it."""
    program, container, port, broker = started
    message = mqtt.publish("sensors/1", b"21.5")
    with Device(port) as device:
        device.send(mqtt.connect())
        assert device.read(4) == mqtt.connack()
        device.send(message)
        eventually(lambda: bytes(broker.connection().received).endswith(message), "the message is at the broker")
        process = process_of(podman, container)
        facts: dict[str, Any] = status_of(process)
        assert facts["Uid"].split() == [str(USER)] * 4
        assert {facts[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
        mounts = [line.split() for line in Path(f"/proc/{process}/mountinfo").read_text().splitlines()]
        assert ["ro" in fields[5].split(",") for fields in mounts if fields[4] == "/"] == [True]
        podman.run("healthcheck", "run", container)
        os.kill(process, signal.SIGTERM)
        assert device.read_to_end() == b""
    assert program.wait_ended() == 0
    assert "stopping: closing 1 session over 1 s" in program.log
