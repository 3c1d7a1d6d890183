"""What the store keeps of a device besides its messages, to serve it offline and to deliver for it after a restart.

In: what the session learns.  Out: JSON for the disk, and the state again.  No credentials: the CONNECT in it has none.
"""

from __future__ import annotations

import json

from attrs import define, field

from gateway.mqtt.message import Message
from gateway.session.subscriptions import Subscriptions


@define(slots=True)
class DeviceState:
    """One device's state.

    `connect` is its last CONNECT without password and Will; `had_password` says that it had one. `address` and
    `listener` are where it came from. `has_session` says that broker and gateway keep a session for it; `clean_pending`
    that the broker has not been told of its Clean Start yet. `connack_missing` says that a CONNECT has left without an
    answer while messages were between PUBREC and PUBCOMP: Session Present in the next CONNACK does not prove that the
    broker still has them. `limits` are the properties of the broker's last CONNACK.
    `will` is published if the device does not come back; None when it has left in order.  `has_left` says that it is
    away, and not that the gateway was stopped while it was there.
    """

    connect: bytes = b""
    had_password: bool = False
    address: str = ""
    listener: str = ""
    has_session: bool = False
    clean_pending: bool = False
    connack_missing: bool = False
    limits: bytes = b""
    subscriptions: Subscriptions = field(factory=Subscriptions)
    will: Message | None = None
    will_delay: float = 0.0
    has_left: bool = False

    def dumped(self) -> str:
        """Return JSON."""
        will = self.will
        return json.dumps(
            {
                "connect": self.connect.hex(),
                "had_password": self.had_password,
                "address": self.address,
                "listener": self.listener,
                "has_session": self.has_session,
                "clean_pending": self.clean_pending,
                "connack_missing": self.connack_missing,
                "limits": self.limits.hex(),
                "subscriptions": self.subscriptions.dumped(),
                "will": None
                if will is None
                else {
                    "topic": will.topic.hex(),
                    "payload": will.payload.hex(),
                    "qos": will.qos,
                    "retain": will.retain,
                    "properties": None if will.properties is None else will.properties.hex(),
                    "expiry": will.expiry,
                },
                "will_delay": self.will_delay,
                "has_left": self.has_left,
            }
        )

    @classmethod
    def load(cls, text: str) -> DeviceState:
        """Take what `dumped` returned; what cannot be read is as if nothing were known."""
        try:
            return cls._load(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls()

    @classmethod
    def _load(cls, values: dict[str, object]) -> DeviceState:
        state = cls(
            connect=bytes.fromhex(str(values["connect"])),
            had_password=bool(values["had_password"]),
            address=str(values["address"]),
            listener=str(values["listener"]),
            has_session=bool(values["has_session"]),
            clean_pending=bool(values["clean_pending"]),
            connack_missing=bool(values.get("connack_missing", False)),
            limits=bytes.fromhex(str(values["limits"])),
            will_delay=float(str(values["will_delay"])),
            has_left=bool(values.get("has_left", False)),
        )
        subscriptions = values["subscriptions"]
        if isinstance(subscriptions, dict):
            state.subscriptions.load(subscriptions["table"], subscriptions["untold"])
        will = values["will"]
        if isinstance(will, dict):
            state.will = Message(
                bytes.fromhex(will["topic"]),
                bytes.fromhex(will["payload"]),
                will["qos"],
                will["retain"],
                None if will["properties"] is None else bytes.fromhex(will["properties"]),
                will["expiry"],
            )
        return state
