"""The gateway as a process of its own under `twistd`, and the service manager that it reports to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

from tests.harness import PATIENCE, eventually

# Runs twistd as its script does, after whatever a test puts in front.
TWISTD = "import sys; from twisted.scripts.twistd import run; sys.argv[0] = 'twistd'; run()"


class ServiceManager:
    """The end of NOTIFY_SOCKET: what systemd would be told, message by message."""

    def __init__(self, directory: Path, *, abstract: bool = False) -> None:
        self.path = directory / "notify"
        self.address = f"@{self.path}" if abstract else str(self.path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{self.path}" if abstract else str(self.path))
        self.messages: list[dict[str, str]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while message := self._socket.recv(65536):
            self.messages.append(dict(line.split("=", 1) for line in message.decode().splitlines()))

    def states(self) -> list[str]:
        """Return the states that were told, in order: READY, RELOADING, STOPPING."""
        names = ("READY", "RELOADING", "STOPPING")
        return [name for message in list(self.messages) for name in names if message.get(name) == "1"]

    def wait_for(self, *states: str) -> dict[str, str]:
        """Wait until these are the states that were told; return the message of the last."""
        eventually(lambda: len(self.states()) >= len(states), lambda: f"{states}, so far {self.messages}")
        assert self.states() == list(states)
        return next(message for message in reversed(self.messages) if states[-1] in message)

    @property
    def status(self) -> str:
        """The last STATUS."""
        return next((message["STATUS"] for message in reversed(self.messages) if "STATUS" in message), "")

    def close(self) -> None:
        """Listen no longer: the socket and its file are gone, as when systemd has no use for them."""
        # An empty datagram ends the thread.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(b"", self._socket.getsockname())
        self._thread.join(PATIENCE)
        self._socket.close()
        self.path.unlink(missing_ok=True)


class GatewayProcess:
    """`twistd mqtts-gateway` with these options; `prelude` is Python that runs before it in its process."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        manager: ServiceManager | None = None,
        watchdog: float = 0.0,
        prelude: str = "",
    ) -> None:
        self.log = directory / "gateway.log"
        environment = dict(os.environ)
        if manager is not None:
            environment["NOTIFY_SOCKET"] = manager.address
        if watchdog:
            environment["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"{prelude}\n{TWISTD}", "-n", "--pidfile=", "mqtts-gateway", *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=directory,
            )
        eventually(lambda: self.ports or self.process.poll() is not None, "the gateway listens")
        assert self.process.poll() is None, self.text

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)

    @property
    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace")

    @property
    def ports(self) -> list[int]:
        """The ports that it has ever listened on, in order."""
        return [int(port) for port in re.findall(r"listening for plain MQTT on \S+:(\d+)\n", self.text)]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait until it ends; return its exit status."""
        return self.process.wait(PATIENCE)
