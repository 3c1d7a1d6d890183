"""Client Identifiers at the broker: which rule each belongs to.

In: the rules; the Client Identifier that a device would have at the broker, and how it got it.  Out: nothing, or
`Refusal` for a name that belongs to another rule.

The rules match the names that devices use on the LAN.  With `client_id`, a device has another name at the broker, and a
stranger that used that name on the LAN would not match the rule that protects it, but would have its session and its
queued messages at the broker.  So each name at the broker belongs to the first rule that can give it to a device.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import TypeAlias

from attrs import field, frozen

from gateway.config import Config, DeviceRule, Upstream
from gateway.config.devices import BrokenRule
from gateway.config.templates import FROM_DEVICE, SAFE, expand
from gateway.errors import EndReason, Refusal
from gateway.pieces import Pause, no_pause
from gateway.rules.rules import LONGEST_MATCHED, Caller, Matched, Rule, Rules, is_in

Broker: TypeAlias = tuple[str, int, str]
"""What makes two `[[upstream]]` one broker: host and port, and the name that the certificate must have."""
Brokers: TypeAlias = frozenset[Broker]

# Criteria that this name meets are met by any name.
_NOBODY = "\x7f" * 31
_SAFE_CHARACTERS = frozenset(string.ascii_letters + string.digits + "._:@-")


def brokers(config: Config, names: tuple[str, ...]) -> Brokers:
    """Return the brokers that a rule with these `upstream` names uses; without names, those of every device."""
    return _brokers(each for each in config.upstream if (each.name in names if names else each.default))


def _brokers(upstreams: Iterable[Upstream]) -> Brokers:
    return frozenset((each.connect_name.removesuffix("."), each.port, each.verify_name) for each in upstreams)


def name_at_broker(matched: Matched | None, client_identifier: str) -> str:
    """Return the Client Identifier that a device has at the broker.  Raises Refusal."""
    template = "" if matched is None else matched.rule.device.client_id
    return matched.expand("client_id", template) if matched is not None and template else client_identifier


@frozen(eq=False)
class _Template:
    """A template for Client Identifiers; an empty one stands for the device's own.

    `literals` are the texts before, between and after the placeholders.
    """

    text: str
    literals: tuple[str, ...]
    placeholders: tuple[str, ...]

    @classmethod
    @lru_cache(maxsize=1024)
    def of(cls, text: str) -> _Template:
        """Read a template that has been checked."""
        literals, names = [""], []
        # A doubled brace ends a piece without a placeholder.
        for literal, name, _, _ in string.Formatter().parse(text or "{client_id}"):
            literals[-1] += literal
            if name is not None:
                names.append(name)
                literals.append("")
        return cls(text, tuple(literals), tuple(names))

    @property
    def only(self) -> str | None:
        """The placeholder, if there is exactly one."""
        return self.placeholders[0] if len(self.placeholders) == 1 else None

    @property
    def is_direct(self) -> bool:
        """Whether it is filled with what the rules themselves judge: two rules with it cannot be played off."""
        return bool(self.placeholders) and set(self.placeholders) <= set(FROM_DEVICE)

    def value(self, name: str) -> str | None:
        """Return None if the template cannot give this name; otherwise the value of `only`, or "" if that is None."""
        first, *middle, last = self.literals if self.placeholders else (*self.literals, "")
        if not self.placeholders:
            return "" if name == first else None
        end = len(name) - len(last)
        if end <= len(first) or not name.startswith(first) or not name.endswith(last):
            return None
        if not middle:
            value = name[len(first) : end]
            return value if not self.text or SAFE.fullmatch(value) else None
        # In one pass, since the name is a stranger's.  A name that only nearly fits may be taken for one that does.
        position = len(first)
        for literal in middle:
            position = name.find(literal, position + 1)
            if position < 0:
                return None
            position += len(literal)
        allowed = _SAFE_CHARACTERS.union(*self.literals)
        return "" if position < end and allowed.issuperset(name) else None


@frozen(eq=False)
class _Claim:
    """The names that a rule can give."""

    rule: Rule
    template: _Template
    brokers: Brokers = field(repr=False)

    @property
    def device(self) -> DeviceRule:
        return self.rule.device

    @property
    def is_specific(self) -> bool:
        """Whether these are not all names there are: a rule for all of them protects none."""
        if any(self.template.literals) or self.template.only == "address":
            return True
        if self.template.only == "username" and self.device.match_username:
            return True
        return self.template.only == "client_id" and not self.rule.matches_name(_NOBODY)

    @property
    def is_sure(self) -> bool:
        """Whether its devices are named one by one, or bound to an address or a password of their own."""
        return self.rule.is_exact or bool(self.device.bound_to or self.device.lan_password)

    @property
    def listed(self) -> list[str] | None:
        """All its names if they are few and known, otherwise None."""
        if not self.template.placeholders:
            return [expand(self.device.client_id, {})]
        if self.rule.is_exact and set(self.template.placeholders) == {"client_id"}:
            texts = self.device.match_client_id
            return [self._filled(text) for text in texts if not self.device.client_id or SAFE.fullmatch(text)]
        return None

    def _filled(self, client_identifier: str) -> str:
        template = self.device.client_id
        return expand(template, {"client_id": client_identifier}) if template else client_identifier

    def can_give(self, name: str) -> bool:
        """Whether the rule can give this name to a device; yes where it would take too long to find out."""
        value = self.template.value(name)
        if value is None:
            return False
        if self.template.only == "client_id":
            return len(value) > LONGEST_MATCHED or self.rule.matches_name(value)
        if self.template.only == "username" and self.device.match_username:
            return value in self.device.match_username
        return True


class Names:
    """The Client Identifiers at the broker, and the rules that they belong to."""

    def __init__(self, config: Config, rules: Rules, pause: Pause = no_pause) -> None:
        """`pause` is called between two rules."""
        everyone, everywhere = brokers(config, ()), _brokers(config.upstream)
        self._claims: dict[Rule, _Claim] = {}
        self._listed: dict[str, list[_Claim]] = {}
        self._others: list[_Claim] = []
        # Of these it is not known which names they give.
        self._unread: list[tuple[str, BrokenRule]] = []
        for rule in rules:
            pause()
            named = rule.device.upstream
            at = brokers(config, named) if named else everyone
            if isinstance(rule.device, BrokenRule):
                at = everywhere  # It is not known which of them it named.
                if rule.device.before is not None:
                    self._add(Rule.of(rule.device.before, rule.order), at)
                if rule.device.names_begin is not None:
                    self._unread.append((rule.device.names_begin, rule.device))
            self._add(rule, at)

    def _add(self, rule: Rule, at: Brokers) -> None:
        claim = _Claim(rule, _Template.of(rule.device.client_id), at)
        if not claim.is_specific:
            return
        self._claims[rule] = claim
        listed = claim.listed
        if listed is None:
            self._others.append(claim)
        else:
            for name in listed:
                self._listed.setdefault(name, []).append(claim)

    @property
    def parts(self) -> Iterable[object]:
        """All that it is made of, to be freed bit by bit."""
        return chain(self._claims.values(), self._listed.values())

    def check(self, name: str, matched: Matched | None, caller: Caller, at: Brokers) -> None:
        """Raise Refusal if `name`, which a device has at the brokers `at`, belongs to another rule than its own.

        Where that cannot be known, the names that a rule can give are its own, and all others are refused.
        """
        if not name:
            return
        rule = None if matched is None else matched.rule
        template = "" if rule is None else rule.device.client_id
        own = None if rule is None else self._claims.get(rule)
        for claim in self._claims_to(name):
            if claim.rule is rule or claim.brokers.isdisjoint(at):
                continue
            if claim.template.text == template and claim.template.is_direct:
                # The rules have judged what the name is made of.  But one that neither names its devices one by one nor
                # binds them must not be a way around one that does, from another listener or without its user name.
                belongs = (own is None or not own.is_sure) and not _meets(claim.device, rule, caller)
            else:
                belongs = own is None or claim.rule.order < own.rule.order
            if belongs:
                detail = f"its Client Identifier at the broker belongs to rule {claim.device.name}"
                raise Refusal(EndReason.CLIENT_ID_RESERVED, detail, 2, 0x85)
        if own is None:
            for begins, broken in self._unread:
                if name.startswith(begins):
                    detail = f"its Client Identifier at the broker may belong to rule {broken.name}: {broken.problem}"
                    raise Refusal(EndReason.DEVICE_RULE_BROKEN, detail, 3, 0x88)

    def _claims_to(self, name: str) -> Iterator[_Claim]:
        yield from self._listed.get(name, ())
        for claim in self._others:
            if claim.can_give(name):
                yield claim


def _meets(device: DeviceRule, rule: Rule | None, caller: Caller) -> bool:
    """Whether a device that another rule matched, or none, meets what this one demands of the name's holder."""
    if isinstance(device, BrokenRule):
        return False  # What it demands is not known.
    if device.bound_to and not is_in(caller.address, device.bound_to):
        return False
    return not device.lan_password or (rule is not None and rule.device.lan_password == device.lan_password)
