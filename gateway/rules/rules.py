"""Match a device to its rule, and apply the rule to the device's CONNECT.

In: the configured rules; a CONNECT and its source.  Out: a `Rule`; a `Treatment`; `Refusal` for what the rule does not
permit.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from itertools import chain

import attrs
from attrs import field, frozen

from gateway.config import Config, DeviceRule, Network
from gateway.config.passwords import PasswordHash, parse_hash
from gateway.config.patterns import Pattern, compile_pattern
from gateway.config.templates import UnusableValueError, expand
from gateway.errors import EndReason, Refusal
from gateway.mqtt.connect import Connect
from gateway.mqtt.inspector import TopicRules, at_broker, judge_publish
from gateway.mqtt.packets import ProtocolVersion, ReasonCode
from gateway.mqtt.properties import PropertyId
from gateway.mqtt.reader import Packet
from gateway.mqtt.relayed import Publish
from gateway.mqtt.rewrite import KEPT, ConnectChanges, Kept, rewrite_connect
from gateway.mqtt.topics import TopicFilters
from gateway.pieces import Pause, no_pause
from gateway.session.treatment import Treatment

_WILDCARDS = frozenset("*?[")
# Limits the time that a pattern can take on a name chosen by a stranger.
LONGEST_MATCHED = 256
_MAX_KEEP_ALIVE = 65_535
_CODE_3_NOT_AUTHORIZED = 5


@frozen
class Caller:
    """Who sent a CONNECT: its address without a port, "" for a local socket, and the listener's name."""

    address: str
    listener: str


@frozen(eq=False)
class Rule:
    """A rule with its patterns compiled and its password hash parsed."""

    device: DeviceRule
    order: int
    globs: tuple[re.Pattern[str], ...] = field(repr=False)
    pattern: Pattern | None = field(repr=False)
    password: PasswordHash | None = field(repr=False)

    @property
    def is_exact(self) -> bool:
        """Whether `match_client_id` lists whole Client Identifiers, without wildcards."""
        texts = self.device.match_client_id
        return bool(texts) and not any(_WILDCARDS & set(text) for text in texts)

    @classmethod
    def of(cls, device: DeviceRule, order: int) -> Rule:
        """Compile a configured rule; `order` is its position in the configuration."""
        return cls(
            device,
            order,
            tuple(re.compile(fnmatch.translate(text)) for text in device.match_client_id if _WILDCARDS & set(text)),
            compile_pattern(device.match_pattern) if device.match_pattern else None,
            parse_hash(device.lan_password) if device.lan_password else None,
        )

    def groups(self, connect: Connect, caller: Caller) -> Mapping[str, str | None] | None:
        """Return the named groups of the pattern if the rule matches this device, otherwise None.

        Raises Refusal for a Client Identifier that is too long for the rule's patterns.
        """
        device, name = self.device, connect.client_identifier
        if device.match_username and connect.username not in device.match_username:
            return None
        if not self._is_at(caller) or not self._matches_client_id(name):
            return None
        if self.pattern is None:
            return {}
        self._check_length(name)
        return self.pattern.match(name)

    def _is_at(self, caller: Caller) -> bool:
        device = self.device
        if device.match_listener and caller.listener not in device.match_listener:
            return False
        return not device.match_network or is_in(caller.address, device.match_network)

    def covers(self, name: str, caller: Caller, under: str) -> bool:
        """Whether the rule matches a device whose session began under the rule with the name `under`.

        Its user name is not known any more: a rule for user names covers the sessions that began under it.
        """
        if (self.device.match_username and self.device.name != under) or not self._is_at(caller):
            return False
        if len(name) > LONGEST_MATCHED and not (self.is_exact and self.pattern is None):
            return not self.device.match_client_id and self.pattern is None
        return self.matches_name(name)

    def matches_name(self, name: str) -> bool:
        """Whether a Client Identifier, of at most `LONGEST_MATCHED` characters, is one that the rule is for."""
        return self._matches_client_id(name) and (self.pattern is None or self.pattern.match(name) is not None)

    def _matches_client_id(self, name: str) -> bool:
        names = self.device.match_client_id
        return not names or name in names or self._matches_glob(name)

    def _matches_glob(self, name: str) -> bool:
        if self.is_exact:
            return False
        self._check_length(name)
        return any(glob.match(name) for glob in self.globs)

    def _check_length(self, name: str) -> None:
        """Refuse a name that the rule may be meant for, but whose match would take too long to find out."""
        if len(name) > LONGEST_MATCHED:
            detail = f"rule {self.device.name}: patterns match Client Identifiers of up to {LONGEST_MATCHED} characters"
            raise Refusal(EndReason.DEVICE_NAME_UNUSABLE, f"{detail}, this one has {len(name)}", 2, 0x85)


@frozen(eq=False)
class Matched:
    """A rule, and the values of its template placeholders for one device."""

    rule: Rule
    values: Mapping[str, str | None]

    def expand(self, key: str, template: str) -> str:
        """Expand the template in `key`.  Raises Refusal."""
        try:
            return expand(template, self.values)
        except UnusableValueError as error:
            raise Refusal(EndReason.DEVICE_NAME_UNUSABLE, f"{key}: {error}", 2, 0x85) from None


class Rules:
    """All rules, in order.

    Rules for exact Client Identifiers alone, of which there may be thousands, are looked up by name; the others are
    tried in turn.
    """

    def __init__(self, config: Config, known: Iterable[Rule] = (), pause: Pause = no_pause) -> None:
        """Those of the `known` rules that are configured are used again; `pause` is called between two rules."""
        self._all: list[Rule] = []
        self._exact: dict[str, list[Rule]] = {}
        self._others: list[Rule] = []
        self.disables_any = False
        self._unknown_pass = config.devices.unknown == "pass"
        compiled: dict[int, Rule] = {}
        for rule in known:
            compiled[id(rule.device)] = rule
            pause()
        for order, device in enumerate(config.device):
            pause()
            before = compiled.get(id(device))
            if before is None:
                rule = Rule.of(device, order)
            else:
                rule = before if before.order == order else attrs.evolve(before, order=order)
            self._all.append(rule)
            self.disables_any = self.disables_any or not device.enabled
            if rule.is_exact:
                for text in set(device.match_client_id):
                    self._exact.setdefault(text, []).append(rule)
            else:
                self._others.append(rule)
        while compiled:
            compiled.popitem()
            pause()

    def __iter__(self) -> Iterator[Rule]:
        """Iterate over all rules, in order."""
        return iter(self._all)

    @property
    def parts(self) -> Iterable[object]:
        """What holds the rules, to be freed bit by bit."""
        return chain(self._exact.values(), [self._others])

    def match(self, connect: Connect, caller: Caller) -> Matched | None:
        """Return the first rule that matches a device; None for an unknown device that may pass.

        Raises Refusal for an unknown device that may not, for one that is disabled, and for one outside the networks of
        `bound_to`.
        """
        matched = self._first(connect, caller)
        if matched is None:
            if self._unknown_pass:
                return None
            raise Refusal(EndReason.DEVICE_UNKNOWN, "", _CODE_3_NOT_AUTHORIZED, 0x87)
        device = matched.rule.device
        if not device.enabled:
            raise disabled(device)
        if device.bound_to and not is_in(caller.address, device.bound_to):
            bound = ", ".join(str(network) for network in device.bound_to)
            raise Refusal(EndReason.SPOOFED, f"rule {device.name}: bound to {bound}", _CODE_3_NOT_AUTHORIZED, 0x87)
        return matched

    @property
    def tried(self) -> int:
        """How many rules are tried for each device."""
        return len(self._others) + 1

    def disabling(self, name: str, caller: Caller, under: str) -> Refusal | None:
        """Return the refusal for an established session whose device is disabled; see `Rule.covers`."""
        candidates = sorted((*self._exact.get(name, ()), *self._others), key=lambda rule: rule.order)
        rule = next((rule for rule in candidates if rule.covers(name, caller, under)), None)
        return None if rule is None or rule.device.enabled else disabled(rule.device)

    def _first(self, connect: Connect, caller: Caller) -> Matched | None:
        best = self._first_of(self._exact.get(connect.client_identifier, ()), connect, caller)
        # A rule of the others that comes earlier takes precedence.
        others = self._others if best is None else (rule for rule in self._others if rule.order < best.rule.order)
        return self._first_of(others, connect, caller) or best

    def _first_of(self, rules: Iterable[Rule], connect: Connect, caller: Caller) -> Matched | None:
        for rule in rules:
            groups = rule.groups(connect, caller)
            if groups is not None:
                known = {
                    "client_id": connect.client_identifier,
                    "username": connect.username,
                    "address": caller.address or None,
                }
                return Matched(rule, {**groups, **known})
        return None


def disabled(device: DeviceRule) -> Refusal:
    """Make the refusal for a device that is disabled."""
    return Refusal(EndReason.DEVICE_DISABLED, f"rule {device.name}", _CODE_3_NOT_AUTHORIZED, ReasonCode.BANNED)


def wrong_password(rule: Rule) -> Refusal:
    """Make the refusal for a wrong password."""
    return Refusal(EndReason.DEVICE_PASSWORD_WRONG, f"rule {rule.device.name}", 4, 0x86)


def topic_rules(matched: Matched) -> TopicRules:
    """Make the topic rules for the inspectors.  Raises Refusal."""
    device = matched.rule.device

    def filters(key: str, texts: tuple[str, ...] | None) -> TopicFilters | None:
        return None if texts is None else TopicFilters(tuple(matched.expand(key, text) for text in texts))

    return TopicRules(
        publish=filters("publish", device.publish),
        subscribe=filters("subscribe", device.subscribe),
        max_qos=device.max_qos,
        strip_retain=device.retain == "strip",
        refuse_retain=device.retain == "refuse",
        publish_prefix=matched.expand("publish_prefix", device.publish_prefix),
        subscribe_prefix=matched.expand("subscribe_prefix", device.subscribe_prefix),
    )


def treat(
    matched: Matched,
    packet: Packet,
    connect: Connect,
    password: bytes | Kept | None,
    lives: float | None,
    max_connect_size: int,
) -> Treatment:
    """Apply a rule to a CONNECT.

    `password` is for the broker, `KEPT` for the device's own; the session must end after `lives` seconds (None for no
    limit). Raises Refusal.
    """
    device = matched.rule.device
    topics = topic_rules(matched)
    username: str | Kept | None = None if device.credentials == "drop" else KEPT
    if device.username:
        username = matched.expand("username", device.username)
    keep_alive = min(max(connect.keep_alive or _MAX_KEEP_ALIVE, device.keep_alive_min), device.keep_alive_max)
    if not connect.keep_alive and device.keep_alive_max == _MAX_KEEP_ALIVE:
        keep_alive = 0  # the device asks for none, and the rule sets none
    is_upgraded = device.upgrade_3_1 and connect.version is ProtocolVersion.MQTT_3_1
    version = ProtocolVersion.MQTT_3_1_1 if is_upgraded else connect.version
    changes = ConnectChanges(
        client_identifier=matched.expand("client_id", device.client_id) if device.client_id else KEPT,
        username=username,
        password=password,
        keep_alive=keep_alive,
        clean_start=KEPT if device.clean_start is None else device.clean_start,
        version=version,
    )
    changes = _with_will(changes, topics, connect)
    try:
        written = rewrite_connect(packet, connect, changes, max_connect_size)
    except ValueError as error:
        raise Refusal(EndReason.CONNECT_NOT_REWRITABLE, f"rule {device.name}: {error}", 3, 0x88) from None
    # The device does not know the lower Keep Alive, so the gateway must ping for it.
    lowered = keep_alive and (not connect.keep_alive or keep_alive < connect.keep_alive)
    name = changes.client_identifier
    return Treatment(
        connect=written,
        version=version,
        keep_alive=keep_alive,
        assigned=name if isinstance(name, str) and not connect.client_identifier else None,
        lenient=device.conformance == "lenient",
        topics=topics,
        max_packet_size=device.max_packet_size,
        packets_per_second=device.packets_per_second,
        bytes_per_second=device.bytes_per_second,
        ping_interval=keep_alive / 2 if lowered else 0.0,
        lives=lives,
    )


def _with_will(changes: ConnectChanges, topics: TopicRules, connect: Connect) -> ConnectChanges:
    """Judge and rewrite the Will as the PUBLISH that it becomes.  Raises Refusal."""
    if connect.will is None:
        return changes
    answer = None if connect.will.properties is None else connect.will.properties.text(PropertyId.RESPONSE_TOPIC)
    message = Publish(connect.will.topic, connect.will.qos, connect.will.retain, answer)
    refused = judge_publish(topics, message, "a Will")
    if refused is not None:
        raise Refusal(refused.reason, refused.detail, _CODE_3_NOT_AUTHORIZED, refused.reason_code)
    topic, answer = at_broker(topics, message)
    return attrs.evolve(
        changes,
        will_topic=topic,
        will_retain=False if topics.strip_retain else KEPT,
        will_response_topic=KEPT if answer is None else answer,
    )


def is_in(address: str, networks: Iterable[Network]) -> bool:
    """Whether an address, "" for a local socket, is in one of the networks."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)
