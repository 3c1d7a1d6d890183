"""`mqtts-gateway store`: with a gateway that runs, and without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.main import console
from gateway.store.backlog import Backlog
from gateway.store.database import Database, StoreError
from tests import mqtt_packets as mqtt
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, eventually
from tests.pki import SERVER, certify, certify_ca
from tests.stored_world import packets_of

_NOT_AUTHORIZED = 0x87


class Plant:
    """A gateway with a store, and a broker that refuses each message while `refuses` is set."""

    def __init__(self, reactor: Any, directory: Path) -> None:
        root = certify_ca()
        (directory / "root.pem").write_bytes(root.pem)
        self.directory = directory / "store"
        self.refuses = True
        self.got: list[bytes] = []
        self.broker = Broker(
            tls=certify(root, names=("DNS:localhost",), purposes=(SERVER,)).server(), serve=self._serve
        )
        self._reactor = reactor
        self._sections: dict[str, Any] = {
            "store": {"directory": str(self.directory), "after": 2},
            "device": [{"match_client_id": "*", "bound_to": ["127.0.0.0/8"], "store": True}],
            "failover": {"retry_first": 0.1, "retry_max": 0.3},
        }
        self._ca_file = directory / "root.pem"
        self.gateway: RunningGateway | None = None

    def start(self, port: int) -> RunningGateway:
        """Start a gateway in front of this port."""
        self.gateway = RunningGateway(self._reactor, port, ca_file=self._ca_file, **self._sections)
        return self.gateway

    def stop_gateway(self) -> None:
        """Stop the gateway."""
        if self.gateway is not None:
            self.gateway.stop()
            self.gateway = None

    def _serve(self, connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(b"\x20\x03\x00\x00\x00")
        while True:
            raw = connection.read_packet()
            if raw[0] >> 4 == 3:
                size = int.from_bytes(raw[2:4], "big")
                self.got.append(raw)
                code = bytes((_NOT_AUTHORIZED,)) if self.refuses else b""
                connection.send(mqtt.packet(0x40, raw[4 + size : 6 + size] + code))
            elif raw[0] == 0xC0:
                connection.send(b"\xd0\0")

    def publish(self, *payloads: bytes) -> None:
        """Publish as a device that then disconnects; each message is acknowledged."""
        assert self.gateway is not None
        with Device(self.gateway.port) as device:
            device.send(mqtt.connect("d\x7f1", version=5))
            first = device.read(2)
            device.read(first[1])
            for number, payload in enumerate(payloads, 1):
                device.send(mqtt.publish(payload=payload, qos=1, packet_identifier=number, version=5))
            assert len(packets_of(device.read(4 * len(payloads)))) == len(payloads)
            device.send(mqtt.packet(0xE0))


@pytest.fixture
def plant(reactor: Any, tmp_path: Path) -> Iterator[Plant]:
    """A plant whose gateway is not started."""
    made = Plant(reactor, tmp_path)
    yield made
    made.stop_gateway()
    made.broker.stop()


def ask(capsys: pytest.CaptureFixture[str], plant: Plant, *words: str) -> tuple[int, str]:
    """Run the command; return its exit status and output."""
    status = console(["store", *words, "--directory", str(plant.directory)])
    taken = capsys.readouterr()
    return status, taken.out + taken.err


NAME = "d\x7f1"


def test_what_waits_is_shown_exported_and_dropped(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    """While the gateway runs; names of devices are made printable."""
    gateway = plant.start(1)
    plant.publish(b"one", b"two")
    status, listed = ask(capsys, plant, "list")
    assert status == 0
    assert "\x7f" not in listed
    assert listed.splitlines()[1].split()[0] == "2"
    _, shown = ask(capsys, plant, "show", NAME)
    assert len(shown.splitlines()) == 2
    _, exported = ask(capsys, plant, "export", NAME)
    assert [bytes.fromhex(json.loads(line)["payload_hex"]) for line in exported.splitlines()] == [b"one", b"two"]
    status, dropped = ask(capsys, plant, "drop", NAME)
    assert status == 0
    assert "2 messages" in dropped
    stored = gateway.service.gateway.stored
    assert stored is not None
    eventually(lambda: not stored.sessions and not stored.store.messages, "nothing is left")
    assert ask(capsys, plant, "drop", NAME)[0] == 1


def test_a_change_of_an_unknown_device_fails(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    """With a gateway, and without."""
    plant.start(1)
    assert ask(capsys, plant, "retry", "nobody")[0] == 1
    plant.stop_gateway()
    assert ask(capsys, plant, "retry", "nobody")[0] == 1


def test_what_was_set_aside_is_delivered_again_on_request(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    """The broker refused it, and takes it now."""
    gateway = plant.start(1)
    plant.publish(b"one", b"two")
    plant.stop_gateway()
    gateway = plant.start(plant.broker.port)
    stored = gateway.service.gateway.stored
    assert stored is not None
    eventually(lambda: sum(stored.store.aside.values()) == 2, "both are set aside")
    # What is counted is written with the next commit.
    eventually(lambda: ask(capsys, plant, "show", NAME)[1].count("0x87") == 2, "the file says so")
    plant.refuses = False
    plant.got.clear()
    status, answer = ask(capsys, plant, "retry", NAME)
    assert status == 0
    assert "2 messages" in answer
    eventually(lambda: [raw[-3:] for raw in plant.got] == [b"one", b"two"], "both are delivered")


def test_a_disk_that_fails_is_not_taken_for_nothing_to_change(
    plant: Plant, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command fails, and says what is still there."""

    def fail(*_: object) -> None:
        raise StoreError("disk I/O error")

    plant.start(1)
    plant.publish(b"one")
    monkeypatch.setattr(Database, "retry_aside", fail)
    monkeypatch.setattr(Database, "drop_aside", fail)
    failed = "the store cannot be changed: disk I/O error"
    status, words = ask(capsys, plant, "retry", NAME)
    assert (status, words.strip().endswith(failed)) == (1, True), words
    status, words = ask(capsys, plant, "drop", NAME)
    assert (status, words.strip().endswith(f"{failed}; 1 messages are deleted, those set aside are not")) == (1, True)


def test_damaged_files_are_listed(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    """Until a person removes them."""
    plant.start(1)
    assert "damaged" not in ask(capsys, plant, "list")[1]
    for suffix in ("", "-wal"):
        (plant.directory / f"store.db.damaged-20260101T000000{suffix}").touch()
    assert ask(capsys, plant, "list")[1].count("store.db.damaged-") == 1


def test_without_a_gateway_the_file_is_changed(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    """Its lock keeps a gateway out meanwhile."""
    plant.start(1)
    plant.publish(b"one")
    plant.stop_gateway()
    assert "1 message of" in ask(capsys, plant, "drop", NAME)[1]
    assert len(ask(capsys, plant, "list")[1].splitlines()) == 1


def test_a_row_sent_before_it_was_stored_is_taken_whatever_a_person_put_back() -> None:
    """Otherwise a row that was put back would never be sent."""
    backlog = Backlog(1, "d", loading=False)
    for number in (7, 8, 9):
        backlog.append(number, 10, 0)
    backlog.adopt(9)
    assert backlog.take(5) == [7, 8]
    assert backlog.finish(9) == 10
    assert backlog.finish(7) == 10
    assert len(backlog) == 1
