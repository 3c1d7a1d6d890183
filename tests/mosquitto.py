"""mosquitto, in a process of its own, as tests configure it."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from tests.harness import eventually
from tests.tools import require_tool


class Mosquitto:
    """A mosquitto with a TLS listener for whom gateways verify, and a plain one for what stands behind it."""

    def __init__(self, directory: Path, configuration: str, *ports: int) -> None:
        self.ports = ports
        self.log = directory / "mosquitto.log"
        path = directory / "mosquitto.conf"
        # As root it would give up its rights, and with them those to read the files of this test.
        path.write_text(f"user root\nlog_dest file {self.log}\nlog_type all\nset_tcp_nodelay true\n{configuration}")
        with (directory / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [require_tool("mosquitto"), "-c", str(path)], stdout=output, stderr=subprocess.STDOUT
            )
        eventually(self._listens, f"mosquitto listens: {path.read_text()}")

    def _listens(self) -> bool:
        assert self.process.poll() is None, f"mosquitto has ended: {self.log.read_text() if self.log.exists() else ''}"
        try:
            for port in self.ports:
                socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def stop(self) -> None:
        """End it, and wait for its end."""
        self.process.terminate()
        self.process.wait(20)


def open_mosquitto(
    directory: Path, plain: int, port: int, certificate: tuple[Path, Path] | None = None, *, websocket: bool = False
) -> Mosquitto:
    """Start a mosquitto that admits everyone.

    At `port` it uses TLS if it has a certificate and its key, and WebSocket if told so.  2.0.11 does not start with
    WebSocket listeners alone, so there is a plain listener, too.
    """
    lines = ["allow_anonymous true", f"listener {plain} 127.0.0.1", f"listener {port} 127.0.0.1"]
    if certificate is not None:
        chain, key = certificate
        lines += [f"certfile {chain}", f"keyfile {key}"]
    if websocket:
        lines.append("protocol websockets")
    return Mosquitto(directory, "\n".join(lines) + "\n", plain, port)
