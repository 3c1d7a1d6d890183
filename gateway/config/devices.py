"""Rules for devices: which devices a rule matches, and what it does to their sessions.

In: values.  Out: `DeviceRule` and `Devices`, sections of the configuration; ValueError for invalid values.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import attrs

from gateway.config import profiles
from gateway.config.anchor import Anchor
from gateway.config.passwords import check_hash
from gateway.config.patterns import compile_pattern
from gateway.config.secret_files import Passphrase, check_credential_name
from gateway.config.templates import FROM_DEVICE, check_template
from gateway.config.validators import (
    MisfitError,
    Network,
    between,
    check_command,
    check_label,
    check_optional_path,
    checked,
)
from gateway.config.value_words import quoted
from gateway.mqtt.topics import check_filter, split_shared
from gateway.pieces import Pause, no_pause

_MAX_KEEP_ALIVE = 65_535
_SMALLEST_PACKET, _LARGEST_PACKET = 256, 1 + 4 + 268_435_455
_TEMPLATES = ("client_id", "username", "sas_resource", "publish_prefix", "subscribe_prefix")
_SOURCES = ("password_file", "password_credential", "password_command", "sas_key_file", "jwt_key_file")


def _check_pattern(text: str) -> None:
    if text:
        compile_pattern(text)


def _check_filters(filters: tuple[str, ...] | None) -> None:
    problems = []
    for index, text in enumerate(filters or ()):
        try:
            # Placeholders contain no characters that matter here.
            check_filter(text)
        except ValueError as error:
            problems.append(MisfitError(f"[{index}]", f"{quoted(text)} is not a Topic Filter: {error}"))
            continue
        if split_shared(text)[0]:
            words = f"{quoted(text)} would permit nothing: of a shared subscription, write only what follows the group"
            problems.append(MisfitError(f"[{index}]", words))
    if problems:
        raise ExceptionGroup("invalid elements", problems)


def _check_prefix(text: str) -> None:
    if "+" in text or "#" in text or "\0" in text:
        raise ValueError(f"{quoted(text)} is not a prefix: it would put a wildcard before every topic")
    if text.startswith("$share/"):
        raise ValueError(f"{quoted(text)} is not a prefix: only the device itself can ask for a shared subscription")
    if text and not text.endswith("/"):
        # "#" would become "plant7#", and device "a" with topic "b/x" would share a topic with device "ab" and "/x".
        raise ValueError(f'{quoted(text)} must end in "/": a prefix is made of whole topic levels')


def _check_max_packet_size(size: int | None) -> None:
    if size is not None and not _SMALLEST_PACKET <= size <= _LARGEST_PACKET:
        raise ValueError(f"{size} is out of range ({_SMALLEST_PACKET} to {_LARGEST_PACKET})")


def _seconds(default: float, low: float, high: float) -> Any:
    return attrs.field(default=default, validator=between(low, high), metadata={"unit": "seconds"})


@attrs.frozen
class Devices:
    """Settings for all devices."""

    profile: profiles.Name = ""
    directory: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    unknown: Literal["pass", "refuse"] = "pass"
    same_client_id: Literal["refuse", "take-over", "pass"] = "refuse"
    connects_per_minute: float = attrs.field(
        default=60.0, validator=between(0, 1_000_000), metadata={"unit": "CONNECTs per minute"}
    )


@attrs.frozen
class DeviceRule:
    """Which devices a rule matches (`match_…`; a missing key matches every device), and what it does to their sessions.

    `client_id`, `username`, `sas_resource`, both prefixes and the Topic Filters are templates.
    """

    name: str = attrs.field(default="", validator=checked(check_label))
    enabled: bool = True
    match_client_id: tuple[str, ...] = ()
    match_pattern: str = attrs.field(default="", validator=checked(_check_pattern))
    match_network: tuple[Network, ...] = ()
    match_username: tuple[str, ...] = ()
    match_listener: tuple[str, ...] = ()
    bound_to: tuple[Network, ...] = ()
    lan_password: str = attrs.field(default="", validator=checked(check_hash), repr=False)
    upstream: tuple[str, ...] = ()
    client_id: str = ""
    username: str = ""
    credentials: Literal["pass", "drop"] = "pass"
    password_file: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    password_credential: str = attrs.field(default="", validator=checked(check_credential_name))
    password_command: tuple[str, ...] = attrs.field(default=(), validator=checked(check_command), repr=False)
    password_timeout: float = _seconds(5.0, 0.001, 60)
    sas_key_file: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    sas_resource: str = ""
    sas_policy: str = ""
    jwt_key_file: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    jwt_audience: str = ""
    token_lifetime: float = _seconds(3600.0, 5, 31_536_000)
    client_cert: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    client_key: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    client_key_password_file: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    client_key_password_credential: str = attrs.field(default="", validator=checked(check_credential_name))
    renew_command: tuple[str, ...] = attrs.field(default=(), validator=checked(check_command), repr=False)
    rotate_key: bool = False
    keep_alive_min: int = attrs.field(default=0, validator=between(0, _MAX_KEEP_ALIVE), metadata={"unit": "seconds"})
    keep_alive_max: int = attrs.field(
        default=_MAX_KEEP_ALIVE, validator=between(1, _MAX_KEEP_ALIVE), metadata={"unit": "seconds"}
    )
    clean_start: bool | None = None
    upgrade_3_1: bool = False
    conformance: Literal["standard", "lenient"] = "standard"
    max_qos: int = attrs.field(default=2, validator=between(0, 2))
    retain: Literal["pass", "strip", "refuse"] = "pass"
    publish: tuple[str, ...] | None = attrs.field(default=None, validator=checked(_check_filters))
    subscribe: tuple[str, ...] | None = attrs.field(default=None, validator=checked(_check_filters))
    publish_prefix: str = attrs.field(default="", validator=checked(_check_prefix))
    subscribe_prefix: str = attrs.field(default="", validator=checked(_check_prefix))
    max_packet_size: int | None = attrs.field(
        default=None, validator=checked(_check_max_packet_size), metadata={"unit": "bytes"}
    )
    packets_per_second: float = attrs.field(
        default=0.0, validator=between(0, 1_000_000), metadata={"unit": "packets per second"}
    )
    bytes_per_second: float = attrs.field(
        default=0.0, validator=between(0, 1e12), metadata={"unit": "bytes per second"}
    )

    store: bool = False
    store_qos0: Literal["pass", "confirm"] = "pass"

    def __attrs_post_init__(self) -> None:
        """Refuse values that contradict each other."""
        problems = [*self._template_problems(), *self._credential_problems()]
        if self.store and not (self.bound_to or self.lan_password):
            problems.append(
                (
                    ".store",
                    "without a broker, the gateway must identify the device itself: set bound_to or lan_password",
                )
            )
        problems += identity_problems(self)
        if self.keep_alive_min > self.keep_alive_max:
            problems.append((".keep_alive_min", f"{self.keep_alive_min} is above keep_alive_max"))
        if problems:
            raise ExceptionGroup("contradicting values", [MisfitError(*problem) for problem in problems])

    @property
    def passphrase(self) -> Passphrase:
        """Where the passphrase of the private key is."""
        return Passphrase(self.client_key_password_file, self.client_key_password_credential)

    @property
    def match(self) -> tuple[Any, ...]:
        """The values of its `match_…` keys."""
        return tuple(getattr(self, key) for key in _MATCHES)

    @property
    def is_for_everybody(self) -> bool:
        """Whether it matches every device."""
        return not any(self.match)

    @property
    def sources(self) -> list[str]:
        """The keys that say where the password comes from; at most one is valid."""
        return [key for key in _SOURCES if getattr(self, key)]

    @property
    def groups(self) -> list[str]:
        """The named groups of the pattern, which are placeholders in templates."""
        return list(compile_pattern(self.match_pattern).groups) if self.match_pattern else []

    def _template_problems(self) -> Iterable[tuple[str, str]]:
        known = [*FROM_DEVICE, *self.groups]
        for name in set(self.groups) & set(FROM_DEVICE):
            yield ".match_pattern", f"its group {name} has the name of a built-in placeholder"
        templates = [(f".{key}", getattr(self, key)) for key in _TEMPLATES]
        for key in ("publish", "subscribe"):
            templates += [(f".{key}[{index}]", text) for index, text in enumerate(getattr(self, key) or ())]
        for where, text in templates:
            try:
                check_template(text, known)
            except ValueError as error:
                yield where, str(error)

    def _credential_problems(self) -> Iterable[tuple[str, str]]:
        sources = self.sources
        for key in sources[1:]:
            yield f".{key}", f"{sources[0]} is set as well: a password has one source"
        if self.sas_key_file is not None and not self.sas_resource:
            yield ".sas_resource", "missing: name the resource the token is for, such as HUB/devices/{client_id}"
        if self.jwt_key_file is not None and not self.jwt_audience:
            yield ".jwt_audience", "missing: name the token's audience, such as the project"
        for key, source in (
            ("sas_resource", "sas_key_file"),
            ("sas_policy", "sas_key_file"),
            ("jwt_audience", "jwt_key_file"),
        ):
            if getattr(self, key) and not getattr(self, source):
                yield f".{key}", f"set {source} as well: it signs the token"


@attrs.frozen
class BrokenRule(DeviceRule):
    """Stands for a rule that cannot be used: the devices that it matches are refused, for `problem`.

    If the names that it gives at the broker cannot be read, `before` gives those of its last usable version.  Without
    one, `names_begin` is the text that they begin with, as far as that can be read, or "".
    """

    problem: str = attrs.field(default="", kw_only=True)
    before: DeviceRule | None = attrs.field(default=None, kw_only=True)
    names_begin: str | None = attrs.field(default=None, kw_only=True)

    @classmethod
    def of(cls, device: DeviceRule, problem: str) -> Self:
        """Make one that matches the same devices, or more, and gives them the same names at the broker."""
        # A listener that does not exist would match nobody, and its devices would go by other rules.
        matches = {key: getattr(device, key) for key in _MATCHES if key != "match_listener"}
        return cls(name=device.name, problem=problem, client_id=device.client_id, **matches)


_MATCHES = [field.name for field in attrs.fields(DeviceRule) if field.name.startswith("match_")]


def identity_problems(table: Any) -> Iterator[tuple[str, str]]:
    """Yield the keys of `[tls]` or a rule about a client certificate that would have no effect, with the problem."""
    if table.client_cert is None:
        for key in ("client_key", "client_key_password_file", "client_key_password_credential"):
            if getattr(table, key):
                yield f".{key}", "client_cert is missing: name the certificate that belongs to this key"
        if table.renew_command:
            yield ".renew_command", "client_cert is missing: name the certificate to renew"
    if table.rotate_key and not table.renew_command:
        yield ".rotate_key", "renew_command is missing: name the program that has the new key certified"
    if table.rotate_key and table.client_key not in (None, table.client_cert):
        # Two files cannot be replaced at the same moment.
        yield ".rotate_key", "client_key is set: put key and certificate into one file, and name it in client_cert"
    if table.rotate_key and (table.client_key_password_file is not None or table.client_key_password_credential):
        yield ".rotate_key", "a new key is written without a passphrase: remove the passphrase, or rotate_key"
    if table.client_key_password_file is not None and table.client_key_password_credential:
        yield ".client_key_password_credential", "client_key_password_file is set as well: a passphrase has one source"


def anchored(device: DeviceRule, anchor: Anchor) -> DeviceRule:
    """Make the paths of a rule absolute."""
    keys = ("password_file", "sas_key_file", "jwt_key_file", "client_cert", "client_key", "client_key_password_file")
    paths: dict[str, Any] = {key: anchor(value) for key in keys if (value := getattr(device, key))}
    return attrs.evolve(device, **paths)


def cross_problems(
    labelled: Iterable[tuple[str, DeviceRule]],
    upstreams: Iterable[str],
    listeners: Iterable[str],
    pause: Pause = no_pause,
) -> list[str]:
    """Return conflicts between rules, each under its label, and unknown names that rules refer to.

    `pause` is called between two rules.
    """
    problems = []
    known = {"upstream": set(upstreams) - {""}, "match_listener": set(listeners) - {""}}
    seen: dict[object, str] = {}
    for label, device in labelled:
        pause()
        if isinstance(device, BrokenRule):
            continue
        for key, names in known.items():
            problems += [
                f"{label}.{key}[{index}]: no {key.removeprefix('match_')} has the name {quoted(name)}"
                for index, name in enumerate(getattr(device, key))
                if name not in names
            ]
        match = device.match
        if match in seen:
            problems.append(f"{label}: {seen[match]} matches the same devices, so this rule would never be used")
        seen.setdefault(match, label)
    while seen:
        seen.popitem()
        pause()
    return problems
