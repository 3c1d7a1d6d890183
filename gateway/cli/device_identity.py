"""The part of `check` that acts as one device: its rule, its LAN password, its credentials for the broker.

In: the configuration, a CONNECT, the source address to assume.  Out: a `Step` for each, and the `Guise` in which the
CONNECT goes to the broker, or None if the gateway would refuse the device.

Other sessions with the same Client Identifier are not considered: the check runs beside the gateway, not inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import random
from typing import Any

from attrs import evolve, frozen

from gateway.cli.certificates import expiry, subject
from gateway.cli.login import Login
from gateway.cli.report import Status, Step
from gateway.config import Config, DeviceRule
from gateway.config.algorithms import Algorithms
from gateway.errors import ConfigError, EndReason, Refusal
from gateway.mqtt.connect import Connect, parse_connect
from gateway.mqtt.packets import PacketType
from gateway.mqtt.reader import Packet, PacketReader
from gateway.mqtt.rewrite import ConnectChanges, rewrite_connect
from gateway.ops.remedies import remedy_for
from gateway.rules.credentials import Credentials
from gateway.rules.names import Names, brokers, name_at_broker
from gateway.rules.rules import Caller, Matched, Rules, treat, wrong_password
from gateway.rules.secrets import Programs
from gateway.session.treatment import Treatment
from gateway.text import printable, unprintable_escaped
from gateway.tls.devices import DevicePolicies
from gateway.tls.trust import ClientIdentity, TLSPolicy

STEPS = ["rule", "lan-password", "credentials"]
NOT_ADMITTED = "not reached: the gateway refuses this device"
_LOCALHOST = "127.0.0.1"


@frozen
class Guise:
    """What the broker sees of a device: its CONNECT and its certificate; and the rule, which names the brokers.

    `treatment` is None if no rule matches, `policies` if the device has no certificate of its own.
    """

    connect: Connect
    treatment: Treatment | None = None
    policies: Mapping[Algorithms, TLSPolicy] | None = None
    device: DeviceRule | None = None


def with_clean_session(guise: Guise, config: Config) -> Guise:
    """Return the same with Clean Session in CONNECT."""
    if guise.treatment is None:
        return evolve(guise, connect=evolve(guise.connect, clean_start=True))
    packet, connect = _read(guise.treatment.connect, config)
    clean = rewrite_connect(packet, connect, ConnectChanges(clean_start=True), len(packet.raw))
    return evolve(guise, connect=_read(clean, config)[1], treatment=evolve(guise.treatment, connect=clean))


async def put_on(
    config: Config, login: Login, address: str, listener: str, reactor: Any, add: Callable[[Step], None]
) -> Guise | None:
    """Run the steps for a device whose CONNECT is `login`; an `address` of "" picks one that its rule allows."""
    packet, connect = _read(login.packet, config)
    caller = Caller(address or _address_of(config, connect.client_identifier), listener)
    left = list(STEPS)

    def told(name: str, status: Status, message: str, remedy: str = "") -> None:
        left.remove(name)
        add(Step(name, status, message, remedy))

    def refused(name: str, refusal: Refusal, remedy: str = "") -> None:
        words = f"{refusal.reason}: {unprintable_escaped(refusal.detail or refusal.reason.meaning, 400)}"
        named = remedy_for(refusal.reason, printable(login.client_identifier))
        told(name, Status.FAIL, words, remedy or named)
        for each in left:
            add(Step(each, Status.SKIP, NOT_ADMITTED))

    try:
        rules = Rules(config)
        matched = rules.match(connect, caller)
        at = brokers(config, () if matched is None else matched.rule.device.upstream)
        Names(config, rules).check(name_at_broker(matched, connect.client_identifier), matched, caller, at)
    except Refusal as refusal:
        assumed = f"The check assumed the address {caller.address}. Use --from to set another."
        refused("rule", refusal, assumed if refusal.reason is EndReason.SPOOFED else "")
        return None
    if matched is None:
        told("rule", Status.PASS, "no rule matches; the device passes unchanged")
        told("lan-password", Status.SKIP, "no rule")
        told("credentials", Status.SKIP, f"no rule; the broker gets {_shared(config)}, {_words(None, connect)}")
        return Guise(connect)
    device = matched.rule.device
    told("rule", Status.PASS, f"{printable(device.name)}, from {caller.address}")
    try:
        told("lan-password", *_lan_password(matched, connect))
    except Refusal as refusal:
        refused("lan-password", refusal)
        return None
    try:
        credentials = Credentials((device,), Programs(reactor, reactor), random)
        password, lives = await credentials.password(matched)
        treatment = treat(matched, packet, connect, password, lives, config.limits.max_connect_size)
        client = credentials.client_identity(device)
        policies = None if client is None else _policies(config, client)
    except Refusal as refusal:
        refused("credentials", refusal)
        return None
    except ConfigError as error:
        told("credentials", Status.FAIL, "; ".join(error.problems))
        return None
    except ValueError as error:
        told("credentials", Status.FAIL, f"rule {printable(device.name)}: {error}")
        return None
    _, presented = _read(treatment.connect, config)
    login_words = _words(device, presented, lives)
    if client is not None:
        status, words = expiry(client.chain[0])
        remedy = "Renew it." if status is not Status.PASS else ""
        told("credentials", status, f"client certificate {subject(client.chain[0])}, {words}; {login_words}", remedy)
    elif device.sources or device.username:
        told("credentials", Status.PASS, f"{_shared(config)}; {login_words}")
    else:
        told("credentials", Status.SKIP, f"its rule has none; the broker gets {_shared(config)}, {login_words}")
    return Guise(presented, treatment, policies, device)


def _shared(config: Config) -> str:
    """Name the client certificate that devices without their own share."""
    path = config.tls.client_cert
    return "no client certificate" if path is None else f"the gateway's client certificate {path}"


def _policies(config: Config, client: ClientIdentity) -> Mapping[Algorithms, TLSPolicy]:
    """Return the policies that show a device's certificate.  Raises `ConfigError` and `ValueError`."""
    made: DevicePolicies[int] = DevicePolicies(config.tls, None, config.all_algorithms)
    made.add(0, client)
    policies = ((algorithms, made.get(0, algorithms)) for algorithms in config.all_algorithms)
    return {algorithms: policy for algorithms, policy in policies if policy is not None}


def _lan_password(matched: Matched, connect: Connect) -> tuple[Status, str] | tuple[Status, str, str]:
    wanted = matched.rule.password
    if wanted is None:
        return Status.SKIP, "its rule does not ask for a password"
    if connect.password is None:
        return Status.SKIP, "its rule asks for a password; test one with --username and --password-file"
    if not wanted.verify(connect.password):
        raise wrong_password(matched.rule)
    return Status.PASS, "the password is correct"


def _words(device: DeviceRule | None, presented: Connect, lives: float | None = None) -> str:
    """Describe the credentials in CONNECT, without secrets."""
    name = "no user name" if presented.username is None else f'user name "{printable(presented.username)}"'
    source = device.sources[0].removesuffix("_file") if device is not None and device.sources else "the device's own"
    password = "no password" if presented.password is None else f"a password ({source})"
    until = f"; the session would end after {lives:.0f} s" if lives is not None else ""
    return f"{name}, {password}{until}"


def _address_of(config: Config, client_identifier: str) -> str:
    """Return an address that the first rule naming this device allows."""
    for device in config.device:
        if client_identifier in device.match_client_id:
            for network in (*device.bound_to, *device.match_network):
                return str(next(iter(network.hosts()), network.network_address))
    return _LOCALHOST


def _read(raw: bytes, config: Config) -> tuple[Packet, Connect]:
    reader = PacketReader(
        frozenset({PacketType.CONNECT}), max(len(raw), config.limits.max_connect_size), EndReason.NOT_MQTT
    )
    reader.feed(raw)
    packet = reader.next_packet()
    assert packet is not None  # noqa: S101  made by `Login`, so complete; narrows the type
    return packet, parse_connect(packet)
