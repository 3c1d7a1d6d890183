"""`mqtts-gateway run`: the gateway in the foreground, without knowing twistd."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.cli.main import console
from tests import mqtt_packets as packets
from tests.balancers import Program
from tests.harness import Broker, Device
from tests.ports import free_port


def test_it_serves_devices_until_it_is_told_to_stop(
    start_broker: Callable[..., Broker], ca_file: Path, tmp_path: Path
) -> None:
    """With flags alone, the status page included; SIGTERM ends it in order, and no PID file is left."""
    broker = start_broker()
    port, status = free_port(), free_port()
    command = [sys.executable, "-m", "gateway.cli.main", "run", "--upstream", f"localhost:{broker.port}"]
    command += ["--ca-file", str(ca_file), "--listen", f"127.0.0.1:{port}", "--status", str(status)]
    program = Program(command, tmp_path / "log")
    try:
        program.wait_for("listening for plain MQTT")
        with Device(port) as device:
            device.send(packets.connect())
            assert device.read(4) == packets.connack()
        with urllib.request.urlopen(f"http://127.0.0.1:{status}/healthz", timeout=20) as answer:
            assert answer.status == 200
        program.terminate()
        program.wait_ended()
    finally:
        program.stop()
    assert "stopping" in program.log
    assert not Path("twistd.pid").exists()


HUNG_UP = """
import os, signal, sys
from gateway.config import flags
read, sent = flags.config_from, []
def config_from(*arguments):
    if not sent:
        sent.append(os.kill(os.getpid(), signal.SIGHUP))
    return read(*arguments)
flags.config_from = config_from
"""
STARTS = {
    "run": "sys.argv[1:1] = ['run']; from gateway.cli.main import console; sys.exit(console())",
    "twistd": "sys.argv[1:1] = ['-n', '--pidfile=', 'mqtts-gateway']; from twisted.scripts.twistd import run; run()",
}


@pytest.mark.parametrize("start", STARTS)
def test_sighup_while_it_starts_is_a_reload_and_no_end(tmp_path: Path, start: str) -> None:
    """A certificate may be renewed at any time."""
    command = [sys.executable, "-c", HUNG_UP + STARTS[start], "--upstream", "localhost:1"]
    program = Program([*command, "--listen", f"127.0.0.1:{free_port()}"], tmp_path / "log")
    try:
        program.wait_for("listening for plain MQTT")
        program.wait_for("reloaded")
    finally:
        program.stop()


# As soon as the command imports the first module that takes long.
HUNG_UP_AT_ONCE = """
import os, signal, sys
class Finder:
    def find_spec(name, *_):
        if name == "gateway.config":
            os.kill(os.getpid(), signal.SIGHUP)
sys.meta_path.insert(0, Finder)
"""


def test_sighup_is_noted_before_the_command_is_loaded(tmp_path: Path) -> None:
    """On a small machine that takes a second."""
    command = [sys.executable, "-c", HUNG_UP_AT_ONCE + STARTS["run"], "--upstream", "localhost:1"]
    program = Program([*command, "--listen", f"127.0.0.1:{free_port()}"], tmp_path / "log")
    try:
        program.wait_for("reloaded")
    finally:
        program.stop()


UNREADABLE = """
import errno, os, sys
real = os.open
def open_(path, *arguments, **keywords):
    if str(path).endswith(NAME):
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE), str(path))
    return real(path, *arguments, **keywords)
os.open = open_
"""


@pytest.mark.parametrize("name", ["pump.toml", "key"])
def test_it_does_not_start_without_rules_that_it_could_not_read(tmp_path: Path, name: str) -> None:
    """For want of a descriptor, they would be taken for broken until the next reload."""
    (tmp_path / "key").write_text("a2V5")
    (tmp_path / "pump.toml").write_text('sas_key_file = "key"\nsas_resource = "r"\n')
    config = tmp_path / "gateway.conf"
    config.write_text(
        f'[[listen]]\nendpoint = "127.0.0.1:{free_port()}"\n[[upstream]]\nhost = "localhost"\n'
        f'[devices]\ndirectory = "{tmp_path}"\n'
    )
    code = UNREADABLE.replace("NAME", repr(name)) + STARTS["twistd"]
    program = Program([sys.executable, "-c", code, "--config", str(config)], tmp_path / "log")
    try:
        assert program.wait_ended() == 1
    finally:
        program.stop()
    assert f"{tmp_path / name} cannot be read: Too many open files in system" in program.log
    assert "Traceback" not in program.log


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--upstream"),
        (["--upstream", "a", "--config", "b"], "--config"),
        (["--upstream", "a:x"], "port"),
        (["--upstream", "a", "--status", "0.0.0.0:1"], "public"),
    ],
)
def test_what_cannot_run_is_said_at_once(flags: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    """All problems, status 1, and no traceback."""
    assert console(["run", *flags]) == 1
    error = capfd.readouterr().err
    assert words in error
    assert "Traceback" not in error
