"""The demo's cloud-like broker for tests: started in a process of its own, as `gateway.cli.demo_cloud` describes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

from tests.harness import PATIENCE, eventually
from tests.pki import CLIENT, Certified, certify, certify_ca

SERVER_NAME = "localhost"


class Cloud:
    """A strict broker on loopback.  `events` is what it has told so far; `root` issues all certificates.

    `rules` are those of `gateway.cli.demo_cloud.Rules`; certificates of devices are demanded unless `client_ca=""`.
    """

    def __init__(self, directory: Path, *, root: Certified | None = None, **rules: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.root = root or certify_ca()
        self._directory = directory
        self.ca_file = directory / "ca.pem"
        self.ca_file.write_bytes(self.root.pem)
        broker = certify(self.root, names=(f"DNS:{SERVER_NAME}", "IP:127.0.0.1"))
        chain, key = directory / "broker.pem", directory / "broker-key.pem"
        chain.write_bytes(broker.pem)
        key.write_bytes(broker.key_pem)
        given = {"cert": str(chain), "key": str(key), "client_ca": str(self.ca_file)} | rules
        self.events: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli.demo_cloud", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        assert first.startswith("ready "), first
        self.port = int(first.split()[1])
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.events.append(json.loads(line))

    def told(self, event: str, **facts: Any) -> list[dict[str, Any]]:
        """Return the events of a kind that have these facts."""
        return [each for each in self.events if each["event"] == event and facts.items() <= each.items()]

    def wait(self, event: str, **facts: Any) -> dict[str, Any]:
        """Wait for an event; return it."""
        eventually(
            lambda: self.told(event, **facts), lambda: f"{event} {facts} at the broker, which told {self.events}"
        )
        return self.told(event, **facts)[0]

    def device(self, name: str, *, root: Certified | None = None) -> Path:
        """Issue a device's certificate for the common name `name`; return the file with it and its key."""
        certified = certify(root or self.root, subject=name, names=(), purposes=(CLIENT,))
        # The file's name says nothing of the device's, which may not be fit for one.
        path = certified.write(self._directory / f"device-{certified.certificate.serial_number}.pem")
        path.chmod(0o600)
        return path

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
