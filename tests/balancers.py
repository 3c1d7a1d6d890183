"""Load balancers and gateways as processes of their own, and sensors that go on whatever happens to them."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tests import mqtt_packets as mqtt
from tests.harness import PATIENCE, Device, eventually
from tests.tools import require_tool


class Program:
    """A process whose output is kept in a file."""

    def __init__(self, command: list[str], log: Path, *, pass_fds: tuple[int, ...] = ()) -> None:
        self._log = log
        with log.open("ab") as output:
            self.process = self._start(command, output, pass_fds)

    @staticmethod
    def _start(command: list[str], output: IO[bytes], pass_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, pass_fds=pass_fds)

    @property
    def log(self) -> str:
        """All that it has written."""
        return self._log.read_text(errors="replace")

    def wait_for(self, words: str) -> None:
        """Wait until it has written `words`."""
        self.wait_until(lambda: words in self.log, f"{words!r} in {self._log}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` is true, unless it ends before."""

        def come_about() -> bool:
            assert self.process.poll() is None, f"it has ended: {self.log}"
            return condition()

        eventually(come_about, what)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait_ended(self) -> int:
        """Wait for the end; return the exit status."""
        return self.process.wait(PATIENCE)

    def stop(self) -> None:
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)


# Hands the descriptor that is its first argument over as systemd does (sd_listen_fds(3)), to the command behind it.
_HAND_OVER = """\
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "mqtt"}
os.execv(sys.argv[2], sys.argv[2:])
"""


class GatewayProcess(Program):
    """`twistd mqtts-gateway` with a configuration file; `port` is a socket that it is passed, as systemd does it."""

    def __init__(self, directory: Path, name: str, configuration: str, port: socket.socket | None = None) -> None:
        path = directory / f"{name}.toml"
        path.write_text(configuration)
        twistd = Path(sys.executable).with_name("twistd")
        command = [sys.executable, str(twistd), "-n", "--pidfile=", "mqtts-gateway", "--config", str(path)]
        descriptors: tuple[int, ...] = ()
        if port is not None:
            descriptors = (port.fileno(),)
            command = [sys.executable, "-c", _HAND_OVER, str(port.fileno()), *command]
        super().__init__(command, directory / f"{name}.log", pass_fds=descriptors)
        self.wait_for("listening for plain MQTT")

    def sessions(self) -> dict[str, str]:
        """Return the Client Identifiers whose sessions have stood, each with the start of its last line."""
        lines = (line.partition("session ")[2] for line in self.log.splitlines() if " is connected to " in line)
        return {line.split('"')[1]: line for line in lines}


class HAProxy(Program):
    """HAProxy in the foreground; `ask` speaks to its admin socket."""

    def __init__(self, directory: Path, configuration: str, admin: Path) -> None:
        path = directory / "haproxy.cfg"
        path.write_text(configuration)
        self._admin = admin
        super().__init__([require_tool("haproxy"), "-db", "-f", str(path)], directory / "haproxy.log")
        # Not by connecting to it: the gateway behind it would see that, too.
        self.wait_until(self._answers, "HAProxy answers")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return "mqtt,FRONTEND" in self.ask("show stat")
        return False

    def ask(self, command: str) -> str:
        """Give a command, and return the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(self._admin))
            connection.sendall(command.encode() + b"\n")
            answer = b""
            while part := connection.recv(65536):
                answer += part
        return answer.decode()

    def status(self, server: str) -> str:
        """Return what HAProxy thinks of a server: `UP`, `DOWN`, `DRAIN` ..."""
        for line in self.ask("show stat").splitlines():
            fields = line.split(",")
            if len(fields) > 17 and fields[1] == server:
                return fields[17]
        raise AssertionError(f"there is no server {server}")


class Nginx(Program):
    """nginx in the foreground, as it passes one port on to another with a PROXY header (version 1; it has no other)."""

    def __init__(self, directory: Path, port: int, to_port: int) -> None:
        program = require_tool("nginx")
        built = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stderr
        module = "load_module modules/ngx_stream_module.so;" if "--with-stream=dynamic" in built else ""
        path = directory / "nginx.conf"
        path.write_text(f"""\
{module}
daemon off;
# One process: a worker would outlive a master that is killed.
master_process off;
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections 64; }}
stream {{
    server {{
        listen 127.0.0.1:{port};
        proxy_pass 127.0.0.1:{to_port};
        proxy_timeout 28h;
        proxy_protocol on;
    }}
}}
""")
        super().__init__([program, "-e", "stderr", "-c", str(path)], directory / "nginx.log")
        # Written when it listens.
        self.wait_until((directory / "nginx.pid").exists, "nginx listens")


class Sensor(threading.Thread):
    """A device that publishes with QoS 1 without end, and connects again whenever its connection is lost.

    `acknowledged` counts PUBACKs, `connected` and `lost` connections; `faults` are answers that make no sense.
    """

    def __init__(self, name: str, port: int, source: str = "") -> None:
        super().__init__(daemon=True)
        self.identifier = name
        self.source = source
        self._port = port
        self._stopped = threading.Event()
        self.acknowledged = self.connected = self.lost = 0
        self.faults: list[bytes] = []
        self.start()

    def run(self) -> None:
        """Go on until told to stop."""
        while not self._stopped.is_set():
            try:
                with Device(self._port, source=self.source) as device:
                    self._publish(device)
            except OSError:
                self.lost += 1
                time.sleep(0.1)

    def _publish(self, device: Device) -> None:
        device.send(mqtt.connect(self.identifier))
        if not self._answered(device, mqtt.connack()):
            return
        self.connected += 1
        number = 0
        while not self._stopped.is_set():
            number = number % 60_000 + 1
            device.send(mqtt.publish(f"t/{self.identifier}", qos=1, packet_identifier=number))
            if not self._answered(device, mqtt.acknowledgement(0x40, packet_identifier=number)):
                return
            self.acknowledged += 1
            time.sleep(0.02)
        device.send(mqtt.disconnect())

    def _answered(self, device: Device, expected: bytes) -> bool:
        answer = device.read(len(expected))
        if answer == expected:
            return True
        if answer:
            self.faults.append(answer)
        raise ConnectionError

    def wait_for_more(self, count: int = 5) -> None:
        """Wait until `count` more messages are acknowledged."""
        wanted = self.acknowledged + count
        eventually(lambda: self.acknowledged >= wanted, f"{count} more messages of {self.identifier}")

    def stop(self) -> None:
        """Send DISCONNECT and end."""
        self._stopped.set()
        self.join(PATIENCE)
