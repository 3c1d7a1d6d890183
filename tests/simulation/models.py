"""Devices and brokers: models that keep to MQTT or break it as the seed wants, and say afterwards what they did.

In: a seed's random numbers.  Out: what each sent and got, and how it ended, for the oracles of `world`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from OpenSSL import SSL
from twisted.internet.address import IPv4Address
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from gateway.config import Limits
from tests import mqtt_packets as mqtt
from tests.proxy_headers import v1, v2
from tests.simulation.identities import FAULTS, HOSTS
from tests.simulation.network import Link, Name, Route, make_address
from tests.simulation.packets import Cutter, packets_of
from tests.simulation.rules import KEEP_ALIVE, is_presented, name_in, same_length

if TYPE_CHECKING:
    from tests.simulation.world import World

# Virtual seconds before a run is judged after which nobody says anything more, so that nothing is on its way then.
QUIET = 5.0
PASSWORD, PAYLOAD = "hunter-", "payload-"

CONNECT, CONNACK, PUBLISH, DISCONNECT, AUTH = 1, 2, 3, 14, 15
_METHOD = mqtt.text(0x15, "SCRAM-SHA-256")


class Model(Protocol):
    """What devices and brokers have in common: a script, pauses, an end."""

    def __init__(self, world: World, name: str, random: Random) -> None:
        self.world = world
        self.name = name
        self.random = random
        self.link: Link
        self.sent = bytearray()
        self.received = bytearray()
        self.left: str | None = None
        self.lost: Failure | None = None
        self.paused = False
        self._cutter = Cutter()
        self._closing = False
        # What is to be said when the packet that is half sent is whole; None if none is.
        self._waiting: list[tuple[bytes, bool]] | None = None

    @property
    def here(self) -> bool:
        """Whether the connection stands and the model has not ended it."""
        return self.connected == 1 and self.lost is None and not self._closing

    def say(self, data: bytes, *, legal: bool = True) -> None:
        """Send bytes; `legal` says whether they may be passed on.  They wait if a packet is half sent."""
        if self._waiting is not None:
            self._waiting.append((data, legal))
        elif self.here:
            self._say(data, legal)

    def say_half(self, data: bytes) -> None:
        """Send the first bytes of a packet; nothing follows but what `say_rest` sends."""
        self.say(data)
        self._waiting = self._waiting or []

    def say_rest(self, data: bytes) -> None:
        """Send what is left of a packet, and what was to be said meanwhile."""
        waiting, self._waiting = self._waiting or [], None
        self.say(data)
        for more, legal in waiting:
            self.say(more, legal=legal)

    def _say(self, data: bytes, legal: bool) -> None:
        raise NotImplementedError

    def later(self, delay: float, function: Callable[..., None], *arguments: Any) -> None:
        """Do something later, if the connection still stands then."""
        self.world.clock.schedule(delay, lambda: function(*arguments) if self.here else None)

    def pause(self, seconds: float) -> None:
        """Read nothing for a while."""
        self.paused = True
        self.world.note(self.name, f"reads nothing for {seconds:.1f} s")
        self.transport.pauseProducing()
        self.world.clock.schedule(seconds, lambda: self.transport.resumeProducing() if self.lost is None else None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost = reason
        self.world.note(self.name, f"lost its connection: {reason.value}")


class Device(Model):
    """A device: sends CONNECT in its way, plays its script once it is accepted, and ends in its way."""

    def __init__(self, world: World, number: int, random: Random) -> None:
        super().__init__(world, f"device-{number}", random)
        same = world.config.admission.max_sessions_per_address and random.random() < 0.3
        host = "192.168.1.1" if same else f"192.168.{1 + number // 250}.{number % 250 + 1}"
        self.address = IPv4Address("TCP", host, 50_000 + number)
        self.connects_from = IPv4Address("TCP", "192.168.9.1", 40_000 + number) if world.balanced else self.address
        self.start = random.choice((0.0, random.uniform(0, 5)))
        if world.away_until and random.random() < 0.5:
            self.start = world.found_by + random.uniform(0, 2)
        self.version = random.choice((3, 4, 4, 5, 5))
        self.keep_alive = random.choice((0, 8, 20, 60))
        self.authenticates = self.version == 5 and random.random() < 0.2
        self.rule = world.rule_of(number)
        self.connect_packet = b""
        self.password = f"{PASSWORD}{self.name}".encode()
        valid = random.random() < 0.85
        self.opening = "connect" if valid else random.choice(("half", "nothing", *_BAD_OPENINGS))
        self.ending = random.choice(_DEVICE_ENDINGS)
        self.pipelines = valid and not self.authenticates and random.random() < 0.3
        # Bytes of `sent` from here on must never reach a broker: a packet that breaks the rules, or what follows
        # DISCONNECT.
        self.legal_end: int | None = None
        self.violated = False
        self.disconnected = False
        self.asked = False
        self.asked_at = 0.0
        self.accepted = False
        self.turned_away = False
        self.authenticated = 0
        self._heard_at: list[float] = []

    @property
    def careless(self) -> bool:
        """Whether it may still have been sending when the gateway had closed, and so met a reset."""
        return self.link.was_reset

    @property
    def is_pinged_for(self) -> bool:
        """Whether its Keep Alive is longer than its rule's, so that the gateway has to keep that one."""
        return self.rule == "pings" and (not self.keep_alive or self.keep_alive > KEEP_ALIVE)

    def connect(self) -> None:
        self.world.note(self.name, f"connects: MQTT {self.version}, {self.opening}, {self.ending}")
        self.link = self.world.network.connect_device(self, self.connects_from, self.world.factory)
        if self.world.balanced:
            header = self.world.fork(f"{self.name} header").choice((v1, v2))
            self.transport.write(header(self.address.host, self.address.port))
        self.later(self.random.choice((0.0, 0.01, 2.0)), self._open)

    def last_heard(self, until: float) -> float:
        """Return when it last said something before `until`."""
        return max((at for at in self._heard_at if at <= until), default=0.0)

    def _say(self, data: bytes, legal: bool) -> None:
        if not legal:
            self.violated = True
            self._end_of_legal()
        self._heard_at.append(self.world.now)
        self.world.note(self.name, f"sends {len(data)} bytes {data[:4].hex()}{'' if legal else ', which is wrong'}")
        self.sent += data
        self.transport.write(data)

    def _end_of_legal(self) -> None:
        if self.legal_end is None:
            self.legal_end = len(self.sent)

    def _open(self) -> None:
        number = self.name
        connect = mqtt.connect(
            self.name,
            version=self.version,
            keep_alive=self.keep_alive,
            username="user",
            password=self.password,
            will_topic=f"{number}/will" if self.random.random() < 0.5 else None,
            properties=(_METHOD if self.authenticates else b"") + announced(self.world.config.limits),
            length_size=1,
        )
        self.connect_packet = connect
        if self.opening == "connect":
            self.asked = True
            at = self.random.randint(1, len(connect)) if self.random.random() < 0.3 else len(connect)
            self.say(connect[:at])
            self.asked_at = self.world.now + 1.0
            self.later(0.0 if at == len(connect) else 1.0, self._finish_open, connect[at:])
        elif self.opening == "half":
            self._end_of_legal()
            self.say(connect[: self.random.randint(1, len(connect) - 1)])
        elif self.opening != "nothing":
            self.say(_BAD_OPENINGS[self.opening](self), legal=False)
        else:
            self._end_of_legal()

    def _finish_open(self, rest: bytes) -> None:
        if rest:
            self.say(rest)
        if self.pipelines:
            flood = self.world.flooded and self.random.random() < 0.5
            for _ in range(20 if flood else self.random.randint(1, 4)):
                self._publish(60_000 if flood else 0)
            if self.random.random() < 0.3:
                self._disconnect()
                if self.random.random() < 0.4:
                    self._leave(self.random.choice(("half", "fin")))
        elif self.random.random() < 0.08:
            self.later(self.random.uniform(0, 8), self._leave, self.random.choice(("half", "fin", "reset")))

    def dataReceived(self, data: bytes) -> None:
        self.world.note(self.name, f"gets {len(data)} bytes")
        text = bytes(data)
        self.world.expect(PASSWORD.encode() not in text, "secrets", f"{self.name} was told a password: {text!r}")
        self.received += data
        for first, body in self._cutter.feed(data):
            kind = first >> 4
            if kind == CONNACK and body[1:2] == b"\0":
                self.world.expect(not self.accepted, "truth", f"{self.name} got two CONNACKs")
                self.accepted = True
                self._play()
            elif kind == AUTH:
                if not self.accepted:
                    self.authenticated = len(self.received) - len(self._cutter.rest)
                self.later(0.01, self.say, mqtt.auth())
            elif kind == PUBLISH and first & 0b0110:
                topic = int.from_bytes(body[:2], "big")
                self.later(0.0, self.say, mqtt.packet(0x40, body[2 + topic : 4 + topic]))

    def is_refusal(self, told: bytes, *, whole: bool) -> bool:
        """Say whether `told` is the gateway's CONNACK that refuses, in this device's version."""
        code_3, code_5 = (5, 0x87) if self.rule == "spoofed" else (3, 0x88)
        if self.version < 5:
            refusal = bytes((0x20, 2, 0, code_3))
            return told == refusal if whole else refusal.startswith(told)
        return self._is_packet_5(told, b"\x20", (code_5,), whole)

    def is_farewell(self, told: bytes, *, accepted: bool) -> bool:
        """Say whether `told` may be the gateway's own last words, cut off or not."""
        if accepted:
            codes: tuple[int, ...] = (0x80, 0x8B, 0x8D)
            if self.rule == "token":
                codes += (0xA0,)
            return self.version == 5 and self._is_packet_5(told, b"\xe0", codes, whole=False)
        if self.opening.startswith("level"):
            answer = b"\x20\x03\x00\x84\x00" if self.opening == "level-6" else b"\x20\x02\x00\x01"
            return answer.startswith(told)
        return self.asked and self.is_refusal(told, whole=False)

    def _is_packet_5(self, told: bytes, first: bytes, codes: tuple[int, ...], whole: bool) -> bool:
        if self.violated:
            codes += (0x81, 0x82, 0x87, 0x95)
        if told[:1] != first:
            return False
        found = packets_of(told)
        if len(told) < 2 or not found:
            return not whole
        (end, _, body), *others = found
        if others or end != len(told):
            return False
        if first == b"\x20":
            if body[:1] != b"\0":
                return False
            body = body[1:]
        # Code, Property Length, and a Reason String if there is one.
        properties = body[2:]
        reason_string = not properties or (
            properties[0] == 0x1F and int.from_bytes(properties[1:3], "big") == len(properties) - 3
        )
        return bool(body) and body[0] in codes and body[1:2] == bytes([len(properties)]) and reason_string

    def _publish(self, size: int = 0) -> None:
        qos = self.random.choice((0, 1))
        payload = f"{PAYLOAD}{self.name}".encode() + bytes(size)
        data = mqtt.publish(f"{self.name}/t", payload, version=self.version, qos=qos)
        self.say(data, legal=len(data) <= self.world.config.limits.max_packet_size)

    def _play(self) -> None:
        """Play the script, which begins with CONNACK."""
        random, at = self.random, 0.0
        for _ in range(random.randint(0, 6)):
            at += random.uniform(0, 1.5)
            act = random.random()
            if act < 0.45:
                self.later(at, self._publish)
            elif act < 0.6:
                self.later(at, self._publish, random.choice((300, 5000, 60_000)))
            elif act < 0.7:
                self.later(at, self.say, mqtt.subscribe(version=self.version))
            elif act < 0.8:
                self.later(at, self.say, mqtt.pingreq())
            elif act < 0.87:
                self.later(at, self.pause, random.uniform(0.1, 20))
            elif act < 0.93:
                data = mqtt.publish(f"{self.name}/t", b"x" * 200, version=self.version)
                cut = random.randint(1, len(data) - 1)
                self.later(at, self._publish_slowly, data[:cut], data[cut:])
                at += 0.7
            elif not self.world.calm:
                self.later(at, self._break_rules)
        chance = self.world.fork(f"{self.name} topics")
        if self.rule == "inspect" and chance.random() < 0.4:
            self.later(chance.uniform(0, 6), self._publish_elsewhere)
        if self.world.flooded and random.random() < 0.7:
            for _ in range(30):
                self.later(at, self._publish, random.choice((30_000, 60_000)))
        at += random.uniform(0, 2)
        if self.ending == "stay":
            self._keep_alive()
        elif self.ending == "disconnect":
            self.later(at, self._disconnect)
            self.later(at + random.choice((0.0, 0.0, 0.5, 9.0)), self._leave, random.choice(("half", "fin", "wait")))
        elif self.ending == "middle":
            self.later(at, self.say_half, mqtt.publish(f"{self.name}/t", bytes(100), version=self.version)[:-50])
            self.later(at + random.choice((0.0, 0.5)), self._leave, random.choice(("fin", "reset")))
        elif self.ending == "part-of-disconnect":
            self.later(at, self.say_half, mqtt.disconnect(code=0x04 if self.version == 5 else None)[:-1])
            self.later(at + random.choice((0.0, 0.5)), self._leave, random.choice(("half", "fin", "reset")))
        elif self.ending != "silence":
            self.later(at, self._leave, self.ending)

    def _publish_slowly(self, head: bytes, rest: bytes) -> None:
        if self._waiting is None:
            self.say_half(head)
            # Long enough for the gateway to have to keep the Keep Alive at the broker meanwhile, where it is to.
            self.later(13.0 if self.is_pinged_for else 0.6, self.say_rest, rest)

    def _publish_elsewhere(self) -> None:
        """Publish what the device's rule does not permit."""
        self.say(mqtt.publish("elsewhere/t", PAYLOAD.encode(), version=self.version), legal=False)

    def _break_rules(self) -> None:
        wrong = (
            mqtt.connect(self.name, version=self.version),
            mqtt.packet(0xC0, b"x"),
            mqtt.packet(0x00),
            mqtt.packet(0x36, bytes(10)),
            mqtt.packet(0x20, bytes(2)),
            b"\x30\xff\xff\xff\xff\x7f",
            mqtt.packet(0x62, b"\0"),
        )
        self.say(self.random.choice(wrong), legal=False)

    def _disconnect(self) -> None:
        data = mqtt.disconnect(code=self.random.choice((None, 0, 4)) if self.version == 5 else None)
        self.say(data)
        self.disconnected = True
        # Nothing may follow; a careless device sends something all the same.
        self._end_of_legal()
        if self.random.random() < 0.2:
            self.say(mqtt.pingreq(), legal=False)

    def _keep_alive(self) -> None:
        if self.keep_alive and self.world.now < self.world.settled - QUIET:
            self.say(mqtt.pingreq())
            self.later(self.keep_alive * 0.7, self._keep_alive)

    def _leave(self, how: str) -> None:
        if how == "wait":
            return
        self.world.note(self.name, f"leaves: {how}")
        self.left = how
        self._closing = True
        if how == "half":
            self.transport.loseWriteConnection()
        elif how == "fin":
            self.transport.loseConnection()
        else:
            self.transport.reset()

    def leave(self) -> None:
        """Go, if still here."""
        if self.connected and self.lost is None:
            self.left = "over"
            self.transport.resumeProducing()
            if self.random.random() < 0.5:
                self.transport.loseConnection()
            else:
                self.transport.reset()


_DEVICE_ENDINGS = (
    "stay",
    "stay",
    "disconnect",
    "disconnect",
    "silence",
    "half",
    "fin",
    "reset",
    "middle",
    "part-of-disconnect",
)


def announced(limits: Limits) -> bytes:
    """Return the Maximum Packet Size (5.0) that peers announce: the gateway's, so that it changes neither packet."""
    size = limits.max_packet_size
    return b"" if size > 268_435_455 else mqtt.number(0x27, size, size=4)


_BAD_OPENINGS: dict[str, Callable[[Device], bytes]] = {
    "http": lambda _: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": lambda _: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506),
    "noise": lambda device: b"\x80" + device.random.randbytes(300),
    "publish": lambda device: mqtt.publish(version=device.version),
    "level-6": lambda device: mqtt.connect(device.name, level=6, password=b"hunter-2", username="user"),
    "level-2": lambda device: mqtt.connect(device.name, level=2, password=b"hunter-2", username="user"),
    "flags": lambda device: mqtt.connect(device.name, version=4, flags=0x43) + bytes(20),
    "oversize": lambda _: b"\x10\xff\x7f" + bytes(900),
    "five-bytes": lambda _: b"\x10\xff\xff\xff\xff\x01",
    "trailing": lambda device: mqtt.connect(device.name, version=device.version, extra=b"hunter-2"),
}


class Broker:
    """A configured upstream: its name, its addresses, and what answers there."""

    def __init__(self, world: World, index: int, random: Random) -> None:
        self.world = world
        self.host = HOSTS[index]
        self.random = random
        chance = random.random()
        self.kind = "right" if chance < 0.6 else random.choice((*FAULTS, *_STRANGERS, *_STRANGERS))
        self.version = random.choice(("1.2", "1.3", "1.3"))
        self.calls = 0
        literal = self.host[0].isdigit()
        hosts = [self.host]
        if not literal:
            both = (f"10.8.{index}.1", f"fd00::{index}:1", f"10.8.{index}.2", f"fd00::{index}:2")
            hosts = random.sample(both, random.randint(1, 4))
        sound = random.random() < 0.7
        for host in hosts:
            kind = "accept" if sound else random.choice(("accept", "refuse", "unreachable", "blackhole"))
            delay = random.choice((0.0, 0.01, 0.25, 0.5, 3.0))
            world.network.routes[host] = Route(kind, delay, self.accept)
        dns = 0.0 if literal else random.choice((0.0, 0.02, 1.0))
        if not literal and random.random() < 0.1:
            dns = random.choice((4.9, 5.5, None))
        empty = not literal and random.random() < 0.03
        addresses = () if empty else tuple(make_address(host) for host in hosts)
        world.network.names[self.host] = Name(dns, addresses)
        answers = any(world.network.routes[host].kind == "accept" for host in hosts)
        self.reachable = answers and not empty and dns is not None and dns < 5
        self._hosts = hosts
        self.good = self.reachable and self.kind == "right"

    def be_away(self, until: float) -> None:
        """Answer no connection until then, in one way or another, and then be as chosen."""
        routes = self.world.network.routes
        for host in self._hosts:
            before = routes[host]
            routes[host] = Route(self.random.choice(("refuse", "unreachable", "blackhole")), before.delay)
            self.world.clock.schedule(until, routes.__setitem__, host, before)

    def accept(self, link: Link) -> Protocol:
        """Answer a connection."""
        self.calls += 1
        name = f"broker-{self.host.split('.', maxsplit=1)[0]}.{self.calls}"
        connection = BrokerConnection(self.world, self, link, name, self.world.fork(name))
        self.world.connections.append(connection)
        return connection


class BrokerConnection(Model):
    """One connection at a broker: TLS (or what is there in its place), and MQTT if it comes to that."""

    def __init__(self, world: World, broker: Broker, link: Link, name: str, random: Random) -> None:
        super().__init__(world, name, random)
        self.link = link
        self.broker = broker
        # What its broker was when this connection began: certificates are replaced while connections go on.
        self.kind = broker.kind
        self.device: Device | None = None
        self.answer = "accept" if world.calm or random.random() < 0.6 else random.choice(_ANSWERS)
        self.ending = "stay" if random.random() < 0.6 else random.choice(_BROKER_ENDINGS)
        self.lingers = random.random() < 0.1
        self.answered = False
        self.accepted = False
        self.own_pings = 0
        # Whether the broker has set a Keep Alive, which then is the device's to keep.
        self.device_pings = False
        self._raw = bytearray()
        self._passed = Cutter()
        self.got_close_notify = False
        self.seen = bytearray()
        link.seen = self.seen  # type: ignore[attr-defined]  # what went over this wire
        self._stalled = False
        self._tls: SSL.Connection | None = None
        if broker.kind in FAULTS or broker.kind in {"right", "stall", "late"}:
            fault = broker.kind if broker.kind in FAULTS else "right"
            self._tls = SSL.Connection(world.identities.contexts[fault, broker.version], None)
            self._tls.set_accept_state()
        self._shaken = False

    def connectionMade(self) -> None:
        self.world.note(self.name, f"is called: {self.broker.kind}, {self.answer}, {self.ending}")
        kind = self.broker.kind
        if kind == "banner":
            self.transport.write(b"220 mail.test ESMTP\r\n")
        elif kind == "close":
            self._leave("fin")
        elif kind == "reset":
            self.later(0.01, self._leave, "reset")

    def dataReceived(self, data: bytes) -> None:
        if len(self.seen) < 65536:
            self.seen += data
        if self._tls is None:
            self._strange()
            return
        self._tls.bio_write(data)
        if not self._shaken and not self._shake(self._tls):
            return
        try:
            while True:
                plaintext = self._tls.recv(65536)
                self._take(plaintext)
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self.got_close_notify = True
            self.world.note(self.name, "gets close_notify")
            if not self.lingers and self.here:
                self._leave("notify", own=False)
        except SSL.Error as problem:
            self.world.note(self.name, f"TLS: {problem}")
            self.transport.abortConnection()
            return
        self._flush()

    def _shake(self, tls: SSL.Connection) -> bool:
        try:
            tls.do_handshake()
        except SSL.WantReadError:
            self._flush()
            return False
        except SSL.Error as problem:
            # OpenSSL's words for the same alert are the same in every run.
            self.world.note(self.name, f"TLS handshake: {problem}")
            self._flush()
            self.transport.loseConnection()
            return False
        self._shaken = True
        self.world.note(self.name, "has shaken hands")
        if self.broker.kind == "late":
            self._leave(self.random.choice(("notify", "fin", "reset")))
        return True

    def _strange(self) -> None:
        kind = self.broker.kind
        replies = {
            "plaintext": mqtt.connack(),
            "http": b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
            "alert": b"\x15\x03\x03\x00\x02\x02\x28",
            "garbage": self.random.randbytes(200),
        }
        if kind in replies and not self.sent:
            self.sent += replies[kind]
            self.transport.write(replies[kind])
            if self.random.random() < 0.5:
                self._leave("fin")

    def _take(self, plaintext: bytes) -> None:
        """Take application bytes: they must be a device's own, and this broker must be the right one."""
        world = self.world
        world.note(self.name, f"gets {len(plaintext)} bytes")
        if world.ruled:
            plaintext = self._undo_rule(plaintext)
        world.expect(self.kind in {"right", "late"}, "verified", f"bytes for a broker that is {self.kind}")
        start, end = len(self.received), len(self.received) + len(plaintext)
        self.received += plaintext
        device = self.device
        if not plaintext:
            return
        if device is None:
            owners = [each for each in world.devices if each.sent.startswith(self.received)]
            world.expect(owners, "end-to-end", f"{self.name} got bytes of nobody's: {bytes(self.received[:60])!r}")
            if len(owners) == 1:
                self.device = device = owners[0]
                world.expect(
                    device.opening == "connect", "verified", f"{device.name} sent no CONNECT, but {self.name} got"
                )
        else:
            same = device.sent[start:end] == plaintext
            in_its_name = not same and world.is_leave(device, start, plaintext)
            known = same or in_its_name
            world.expect(known, "end-to-end", f"{self.name} got what {device.name} never sent: {plaintext[:60]!r}")
            # The gateway's own DISCONNECT is none of the device's bytes, so it may come where a forbidden packet of the
            # device's, still on its way, would have come.
            end = start if in_its_name else end
        if device is not None:
            legal = device.legal_end is None or end <= device.legal_end
            world.expect(legal, "end-to-end", f"{self.name} got what {device.name} must not send")
        for first, body in self._cutter.feed(plaintext):
            if device is not None and not self.accepted and first >> 4 != CONNECT:
                early = device.authenticates and first >> 4 in {AUTH, DISCONNECT}
                world.expect(early, "hold", f"{self.name} got 0x{first:02X} before it answered CONNECT")
            if first >> 4 == CONNECT:
                self.later(self.random.choice((0.0, 0.0, 0.05, 1.0)), self._answer_connect)
            elif first >> 4 == AUTH and not self.accepted:
                self.later(0.01, self._answer_auth)
            elif first >> 4 == PUBLISH and first & 0b0110:
                topic = int.from_bytes(body[:2], "big")
                self.later(0.01, self.say, mqtt.packet(0x40, body[2 + topic : 4 + topic]))
            elif first == 0xC0:
                self.later(0.01, self.say, mqtt.pingresp())

    def _undo_rule(self, plaintext: bytes) -> bytes:
        """Return what a device sent for what the gateway made of it by its rule."""
        self._raw += plaintext
        raw = self._raw
        passed = b""
        if self.device is None:
            if not packets_of(raw):
                return b""
            end, _, body = packets_of(raw)[0]
            name = name_in(body)
            device = next((each for each in self.world.devices if each.name == name), None)
            if device is None:
                passed, self._raw = bytes(raw), bytearray()
                return passed
            right = is_presented(device.rule, device.connect_packet, device.password, bytes(raw[:end]))
            self.world.expect(right, "end-to-end", f"{device.name}'s rule was not applied: {bytes(raw[:end])!r}")
            self.world.expect(device.rule != "spoofed", "identity", f"{device.name} is not where it is bound to")
            self.device = device
            passed = device.connect_packet
            del raw[:end]
        at = len(self.received) + len(passed)
        if len(passed):
            self._passed.feed(passed)
        while raw:
            ahead = self.device.sent[at : at + len(raw)]
            same = same_length(raw, ahead)
            self._passed.feed(bytes(raw[:same]))
            passed += bytes(raw[:same])
            at += same
            del raw[:same]
            own = bool(self.device.rule) and not self._passed.rest and b"\xc0\x00".startswith(raw[:2])
            if not own:
                passed += bytes(raw)
                raw.clear()
            elif len(raw) < 2:
                break
            else:
                # A PINGREQ that the device has not sent, at a place where one may be.
                del raw[:2]
                self.own_pings += 1
                self.later(0.01, self.say, mqtt.pingresp())
        return passed

    def _say(self, plaintext: bytes, legal: bool) -> None:
        assert self._tls is not None
        self.world.note(self.name, f"sends {len(plaintext)} bytes {plaintext[:4].hex()}")
        self.sent += plaintext
        for start in range(0, len(plaintext), 16384):
            self._tls.send(plaintext[start : start + 16384])
        self._flush()

    def _flush(self) -> None:
        assert self._tls is not None
        try:
            while True:
                data = self._tls.bio_read(65536)
                if self._stalled:
                    continue
                if self.broker.kind == "stall":
                    # Half a flight, and then nothing more, ever.
                    data, self._stalled = data[: self.random.randint(0, len(data) - 1)], True
                self.transport.write(data)
        except SSL.WantReadError:
            pass

    def _answer_connect(self) -> None:
        device = self.device
        if device is None:
            return
        version, answer = device.version, self.answer
        if device.authenticates and answer == "accept" and self.random.random() < 0.9:
            self.say(mqtt.auth())
        elif answer == "accept":
            self._accept(version)
        elif answer == "refuse":
            self.answered = True
            self.say(mqtt.connack(version=version, code=0x87 if version == 5 else 5))
            if self.random.random() < 0.5:
                self._leave("notify")
        elif answer == "part":
            self.say_half(mqtt.connack(version=version)[: self.random.randint(1, 3)])
            if self.random.random() < 0.5:
                self._leave("fin")
        elif answer == "other":
            self.say(mqtt.pingresp())
        elif answer == "flags":
            self.say(mqtt.packet(0x20, b"\x02\x00" + (b"\0" if version == 5 else b"")))
            # MQTT 3.1 gives that byte no meaning, so there this is an acceptance.
            self.answered = self.accepted = version == 3
        elif answer == "disconnect":
            self.say(mqtt.disconnect(code=0x89))
        elif answer == "noise":
            self.say(b"\x00" + self.random.randbytes(50))
        elif answer != "silence":
            self._leave(answer)

    def _answer_auth(self) -> None:
        if self.device is not None and not self.accepted:
            if self.random.random() < 0.3:
                self.say(mqtt.auth())
            else:
                self._accept(self.device.version)

    def _accept(self, version: int) -> None:
        self.answered = self.accepted = True
        properties = b""
        if version == 5 and self.device is not None and self.random.random() < 0.2:
            self.device.keep_alive = 10
            self.device_pings = True
            properties = mqtt.number(0x13, 10, size=2)
        properties += announced(self.world.config.limits)
        answer = mqtt.connack(version=version, properties=properties)
        if self.random.random() < 0.3:
            # Retained messages of a session that was present come right behind CONNACK.
            answer += self._message(version)
        self.say(answer)
        self._play(version)

    def _message(self, version: int, size: int = 20) -> bytes:
        return mqtt.publish("down", PAYLOAD.encode() + bytes(size), version=version, qos=self.random.choice((0, 1)))

    def _play(self, version: int) -> None:
        random, at = self.random, 0.0
        for _ in range(random.randint(0, 5)):
            at += random.uniform(0, 1.5)
            act = random.random()
            if act < 0.7:
                size = min(random.choice((20, 20, 5000, 60_000)), self.world.config.limits.max_packet_size // 2)
                self.later(at, self.say, self._message(version, size))
            elif act < 0.8:
                self.later(at, self.pause, random.uniform(0.1, 20))
        if self.world.flooded and random.random() < 0.7:
            size = min(60_000, self.world.config.limits.max_packet_size // 2)
            for _ in range(30):
                self.later(at, self.say, self._message(version, size))
        at += random.uniform(0, 3)
        if self.ending == "disconnect" and version == 5:
            self.later(at, self.say, mqtt.disconnect(code=0x8E))
            self.later(at, self._leave, "notify")
        elif self.ending == "middle":
            self.later(at, self.say_half, self._message(version, 200)[:-100])
            self.later(at + random.choice((0.0, 0.5)), self._leave, random.choice(("notify", "fin", "reset")))
        elif self.ending == "wrong":
            wrong = (b"\x00\x00", b"\x10\x00", b"\x30\xff\xff\xff\xff\x7f", b"\x36\x04\x00\x01tx", b"\x82\x02\x00\x01")
            self.later(at, self.say, random.choice(wrong))
            self.later(at, self._spoil)
        elif self.ending in {"notify", "fin", "reset"}:
            self.later(at, self._leave, self.ending)

    def _spoil(self) -> None:
        self.left = "wrong"

    def _leave(self, how: str, *, own: bool = True) -> None:
        self.world.note(self.name, f"leaves: {how}")
        self._closing = True
        if own:
            self.left = how
        if how == "notify" and self._tls is not None:
            self._tls.shutdown()
            self._flush()
        if how == "reset":
            self.transport.reset()
        else:
            self.transport.loseConnection()

    def leave(self) -> None:
        """Go on reading, so that the gateway's end is seen."""
        if self.connected and self.lost is None:
            self.transport.resumeProducing()


_STRANGERS = ("plaintext", "http", "banner", "alert", "garbage", "hang", "stall", "close", "reset", "late")
_ANSWERS = ("refuse", "silence", "part", "other", "flags", "disconnect", "noise", "notify", "fin", "reset")
_BROKER_ENDINGS = ("notify", "fin", "reset", "middle", "disconnect", "wrong")
