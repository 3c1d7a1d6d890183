"""A hundred devices at once, for tests that take them through outages."""

from __future__ import annotations

from collections import Counter

from gateway.errors import EndReason
from tests import mqtt_packets as packets
from tests.harness import Device, RunningGateway, eventually

DEVICES = 100
PUBACK = b"\x40\x02\x00\x01"


class Fleet:
    """A hundred devices, each of which wants a session and an answer to what it publishes."""

    def __init__(self, gateway: RunningGateway) -> None:
        self._gateway = gateway
        self.devices: dict[str, Device] = {}

    def connect(self) -> None:
        """Connect all; each tries until it is accepted, as devices do."""
        eventually(self._all_connected, lambda: f"{DEVICES} sessions; the last end: {self._gateway.ended[-1:]}")

    def _all_connected(self) -> bool:
        names = [f"device-{number}" for number in range(DEVICES)]
        trying = {name: Device(self._gateway.port) for name in names if name not in self.devices}
        for name, device in trying.items():
            device.send(packets.connect(client_identifier=name))
        for name, device in trying.items():
            if device.read(4) == packets.connack():
                self.devices[name] = device
            else:
                device.close()
        return len(self.devices) == DEVICES

    def publish(self) -> None:
        """Publish a message from each, which the broker acknowledges."""
        for device in self.devices.values():
            device.send(packets.publish(qos=1))
        for name, device in self.devices.items():
            assert device.read(4) == PUBACK, (name, self._reasons())

    def disconnect(self) -> None:
        """End all sessions with DISCONNECT."""
        for device in self.devices.values():
            device.send(packets.disconnect())
        self.lose(EndReason.DEVICE_DISCONNECT)

    def lose(self, reason: EndReason) -> None:
        """Wait until all sessions have ended, each for this reason, and their devices are told."""
        for device in self.devices.values():
            assert device.read_to_end() == b""
            device.close()
        eventually(lambda: self._reasons().total() >= DEVICES, lambda: f"the ends of all, so far {self._reasons()}")
        assert self._reasons() == {reason: DEVICES}
        self.devices.clear()
        self._gateway.ended.clear()

    def _reasons(self) -> Counter[EndReason | None]:
        """Count the ends of sessions whose broker was verified."""
        return Counter(record.reason for record in self._gateway.ended if record.peer is not None)


def refused(gateway: RunningGateway) -> EndReason | None:
    """Have one device refused, and return why."""
    already = len(gateway.ended)
    with Device(gateway.port) as device:
        device.send(packets.connect())
        assert device.read_to_end() == packets.connack(code=3)
    return gateway.wait_ended(already + 1).reason
