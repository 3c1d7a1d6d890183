"""How long a reload holds up the event loop, with many rules for devices.

In: numbers of rules.  Out: for each, the time that a reload takes, and the longest turn of the reactor during it, and
during the periodic look at the files.

    python -m benchmarks.reload [--rules 1000,10000] [--key ec|rsa]

A turn is measured by a call that the reactor makes again as soon as it may: the longest time between two of them is the
longest that any message would have waited.  Every rule has a certificate and a key of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from twisted.internet import reactor as default_reactor
from twisted.internet.defer import Deferred, ensureDeferred

from gateway.config import load_file
from gateway.config.directory import RuleFiles
from gateway.pieces import Pauses
from gateway.service import GatewayService

reactor: Any = default_reactor
_DISTINCT_KEYS = 20  # to make ten thousand RSA keys would take an hour


def write(directory: Path, rules: int, kind: str) -> Path:
    """Write a configuration with so many rules, each with files of its own; return its path."""
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "device")])
    pairs = []
    for serial in range(1, _DISTINCT_KEYS + 1):
        key: Any = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65537, 2048)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), serial, now, now + timedelta(days=365))
        ).sign(key, SHA256())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pairs.append((certificate.public_bytes(Encoding.PEM), pem))
    (directory / "ca.pem").write_bytes(pairs[0][0])
    devices = directory / "devices"
    devices.mkdir()
    for number in range(rules):
        certificate_pem, key_pem = pairs[number % len(pairs)]
        (devices / f"d{number}.pem").write_bytes(certificate_pem)
        (devices / f"d{number}.key").write_bytes(key_pem)
        (devices / f"d{number}.toml").write_text(
            f'match_client_id = "d{number}"\nclient_cert = "d{number}.pem"\nclient_key = "d{number}.key"\n'
        )
    config = directory / "gateway.toml"
    config.write_text(
        '[[listen]]\nendpoint = "127.0.0.1:0"\n[[upstream]]\nhost = "localhost"\n'
        '[tls]\nca_file = "ca.pem"\n[devices]\ndirectory = "devices"\nunknown = "refuse"\n'
    )
    return config


class Turns:
    """Measures the longest time between two turns of the reactor."""

    def __init__(self) -> None:
        self.all: list[float] = []
        self._last = time.perf_counter()
        self._call = reactor.callLater(0, self._turn)

    def _turn(self) -> None:
        now = time.perf_counter()
        self.all.append(now - self._last)
        self._last = now
        self._call = reactor.callLater(0.0005, self._turn)

    def stop(self) -> None:
        """Stop measuring."""
        self._call.cancel()

    def words(self) -> str:
        """Return the longest turn, and what one in a thousand exceeds, in milliseconds."""
        longest = sorted(self.all)
        rare = longest[int(len(longest) * 0.999)]
        return f"longest turn {longest[-1] * 1e3:6.1f} ms, p99.9 {rare * 1e3:5.1f} ms"


def sleep(seconds: float) -> Deferred[None]:
    """Fire after so many seconds."""
    done: Deferred[None] = Deferred()
    reactor.callLater(seconds, done.callback, None)
    return done


async def measure(what: str, do: Callable[[], Any]) -> None:
    """Print how long something takes and how long it holds up the reactor."""
    turns = Turns()
    began = time.perf_counter()
    await do()
    took = time.perf_counter() - began
    await sleep(0.3)
    turns.stop()
    print(f"  {what:<36} {took:7.2f} s  {turns.words()}", flush=True)


async def run(rules: int, kind: str) -> None:
    """Measure with so many rules."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = write(directory, rules, kind)
        await sleep(2.1)  # so that the files' times say that they rest
        known = RuleFiles()
        began = time.perf_counter()
        service = GatewayService(
            load_file(config, known=known), reactor, reread=partial(load_file, config, known=known)
        )
        print(f"{rules} rules, {kind}: started in {time.perf_counter() - began:.2f} s")
        known.pause = Pauses()
        service.startService()
        await measure("nothing", lambda: sleep(2))
        await measure("the look at the files (5 s)", lambda: sleep(5))
        await measure("reload, nothing has changed", service.reload)
        for suffix in ("toml", "pem"):
            os.utime(directory / "devices" / f"d0.{suffix}")
        await measure("reload, one rule has changed", service.reload)
        for path in (directory / "devices").iterdir():
            os.utime(path)
        await measure("reload, everything has changed", service.reload)
        await measure("what that left behind (3 s)", lambda: sleep(3))
        await service.stopService()


async def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default="1000,10000", help="numbers of rules, by commas")
    parser.add_argument("--key", default="ec", choices=("ec", "rsa"))
    arguments = parser.parse_args()
    for rules in arguments.rules.split(","):
        await run(int(rules), arguments.key)


if __name__ == "__main__":
    running = ensureDeferred(main())
    running.addErrback(lambda failure: failure.printTraceback(sys.stderr))
    running.addBoth(lambda _: reactor.stop())
    reactor.run()
