"""What can be configured: the one typed, frozen `Config` that files and flags both become.

In: values.  Out: `Config` and its sections.  Each class raises ValueError for invalid values (an ExceptionGroup of them
if several elements of a list are invalid).

The fields' names are the keys of the file. `docs/configuration.md` describes each; a test keeps the two in step.
"""

import base64
import ipaddress
import math
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import attrs

from gateway.config.algorithms import Algorithms, check_cipher, check_group, check_signature_algorithm, weak
from gateway.config.devices import DeviceRule, Devices, identity_problems
from gateway.config.listen import describe_endpoint, endpoint_identity, endpoint_kind, is_local
from gateway.config.names import connect_name, normalise_name
from gateway.config.passwords import check_hash
from gateway.config.proxies import ENVIRONMENT, check_credential, check_no_proxy, check_proxy_url
from gateway.config.secret_files import Passphrase, check_credential_name
from gateway.config.validators import (
    MisfitError,
    Network,
    Validator,
    between,
    check_command,
    check_label,
    check_optional_path,
    check_path,
    checked,
    checked_each,
)
from gateway.config.value_words import number, quoted

Proxy: TypeAlias = Network | Literal["unix"]

LARGEST_PACKET = 1 + 4 + 268_435_455
"""Bytes of the largest control packet: type, four bytes of Remaining Length (MQTT 5.0 §2.1.4), and the body."""


# New sessions per second; the slowest is about one in the longest time that a device can wait for its turn.
_SLOWEST, _FASTEST = 0.0003, 1_000_000


def _distinct(identity: Callable[[Any], Hashable], shown: Callable[[Any], str], missing: str) -> Validator:
    """Make a validator for a list that must not be empty nor contain duplicates."""

    def validate(_instance: Any, _attribute: "attrs.Attribute[Any]", values: tuple[Any, ...]) -> None:
        if not values:
            raise ValueError(missing)
        seen: set[Hashable] = set()
        problems = []
        for index, value in enumerate(values):
            if identity(value) in seen:
                problems.append(MisfitError(f"[{index}]", f"{quoted(shown(value))} is listed twice"))
            seen.add(identity(value))
        if problems:
            raise ExceptionGroup("listed twice", problems)

    return validate


def _check_rate(rate: float) -> None:
    if rate and not _SLOWEST <= rate <= _FASTEST:  # written so that NaN is refused, too
        span = f"{number(_SLOWEST)} to {_FASTEST}, or 0 for no limit"
        raise ValueError(f"{number(rate)} is out of range ({span})")


def _check_server_name(text: str) -> None:
    if text:
        normalise_name(text)


def _check_alpn(text: str) -> None:
    """Check a protocol name (RFC 7301 §3.1: 1 to 255 bytes; all registered names are ASCII)."""
    if not (1 <= len(text) <= 255 and text.isascii() and text.isprintable()):
        raise ValueError(f"{quoted(text)} is not an application protocol: use 1 to 255 ASCII characters, such as mqtt")


def _pin_digest(text: str) -> bytes:
    """Return the 32 bytes of a pin: base64, after an optional `sha256/` (OkHttp, Android) or `sha256//` (curl)."""
    # A slash is a base64 digit, too: only the length tells whether a second one belongs to the prefix or the digest.
    match = re.fullmatch(r"(?:sha256//?)?([A-Za-z0-9+/]{43}=)", text)
    if match is None:
        hexadecimal = re.fullmatch(r"(?:[0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2}", text)
        raise ValueError(
            f"{quoted(text)} is not a pin: give the SHA-256 digest of the public key (SubjectPublicKeyInfo) in base64, "
            f"44 characters" + (", not in hexadecimal" if hexadecimal else "")
        )
    return base64.b64decode(match[1])


def _without_brackets(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _check_proxy(proxy: Proxy) -> None:
    if proxy != "unix" and not proxy.prefixlen:
        raise ValueError(f"{proxy} covers every address, so anyone could claim any address: name the load balancers")


@attrs.frozen
class Listener:
    """A port where devices connect with plain MQTT, or load balancers with a PROXY header first."""

    endpoint: str = attrs.field(validator=checked(describe_endpoint))
    name: str = attrs.field(default="", validator=checked(check_label))
    proxies: tuple[Proxy, ...] = attrs.field(default=(), validator=checked_each(_check_proxy))

    def __attrs_post_init__(self) -> None:
        """Refuse proxies that could never connect."""
        kind = endpoint_kind(self.endpoint)
        for index, proxy in enumerate(self.proxies):
            if kind == "unix" and proxy != "unix":
                raise MisfitError(
                    f".proxies[{index}]", 'connections to a UNIX socket have no address: write proxies = "unix"'
                )
            if kind in {"tcp", "tcp6"} and proxy == "unix":
                raise MisfitError(f".proxies[{index}]", '"unix" is for UNIX sockets only: list networks here')

    @property
    def description(self) -> str:
        """The endpoint as a description that `twisted.internet.endpoints.serverFromString` takes."""
        return describe_endpoint(self.endpoint)


def _check_request_target(text: str) -> None:
    """Check the path of a WebSocket, with its query if it has one (RFC 9112 §3.2.1)."""
    if text and not (text.startswith("/") and text.isascii() and text.isprintable() and not set(" #") & set(text)):
        raise ValueError(f"{quoted(text)} is not a path: begin with /, and percent-encode other characters")


@attrs.frozen
class Upstream:
    """A broker's TLS port."""

    host: str = attrs.field(converter=_without_brackets, validator=checked(connect_name))
    port: int = attrs.field(default=8883, validator=between(1, 65535, "not a port"))
    server_name: str = attrs.field(default="", validator=checked(_check_server_name))
    name: str = attrs.field(default="", validator=checked(check_label))
    default: bool = True
    transport: Literal["tls", "websocket"] = "tls"
    path: str = attrs.field(default="", validator=checked(_check_request_target))
    request_file: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    request_command: tuple[str, ...] = attrs.field(default=(), validator=checked(check_command), repr=False)
    proxy: str = attrs.field(default="", validator=checked(check_proxy_url))
    proxy_username: str = attrs.field(default="", validator=checked(check_credential))
    proxy_password_file: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    proxy_ca_file: tuple[Path, ...] = attrs.field(default=(), validator=checked_each(check_path))
    no_proxy: tuple[str, ...] = attrs.field(default=(), validator=checked_each(check_no_proxy))
    ciphers: tuple[str, ...] = attrs.field(default=(), validator=checked_each(check_cipher))
    groups: tuple[str, ...] = attrs.field(default=(), validator=checked_each(check_group))
    signature_algorithms: tuple[str, ...] = attrs.field(default=(), validator=checked_each(check_signature_algorithm))

    def __attrs_post_init__(self) -> None:
        """Refuse keys that would have no effect."""
        for key in ("path", "request_file", "request_command"):
            if getattr(self, key) and self.transport != "websocket":
                raise MisfitError(f".{key}", 'it is for transport = "websocket"')
        if not self.proxy and self.no_proxy:
            raise MisfitError(".no_proxy", "there is no proxy that it could be an exception to")
        is_url = bool(self.proxy) and self.proxy != ENVIRONMENT
        for key in ("proxy_username", "proxy_password_file"):
            if getattr(self, key) and not is_url:
                raise MisfitError(f".{key}", "there is no proxy = URL that it could be for")
        if self.proxy_password_file is not None and not self.proxy_username:
            raise MisfitError(".proxy_password_file", "there is no proxy_username that it could belong to")
        if self.proxy_ca_file and not (self.proxy == ENVIRONMENT or self.proxy.startswith("https:")):
            raise MisfitError(".proxy_ca_file", "only an https:// proxy has a certificate to verify")

    @property
    def connect_name(self) -> str:
        """The name to resolve, as A-labels (a trailing dot is kept), or the address to connect to (a zone is kept)."""
        return connect_name(self.host)

    @property
    def verify_name(self) -> str:
        """The name that the broker's certificate must be for: lower-case A-labels, or a canonical IP address."""
        return normalise_name(self.server_name or self.host.partition("%")[0])

    @property
    def address(self) -> str:
        """`HOST:PORT` for people, with brackets around IPv6."""
        name = self.connect_name
        return f"[{name}]:{self.port}" if ":" in name else f"{name}:{self.port}"


@attrs.frozen
class TLS:
    """How brokers are verified, and the gateway's own certificate; for every upstream."""

    ca_file: tuple[Path, ...] = attrs.field(default=(), validator=checked_each(check_path))
    ca_dir: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    client_cert: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    client_key: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    client_key_password_file: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    client_key_password_credential: str = attrs.field(default="", validator=checked(check_credential_name))
    renew_command: tuple[str, ...] = attrs.field(default=(), validator=checked(check_command), repr=False)
    rotate_key: bool = False
    crl_file: tuple[Path, ...] = attrs.field(default=(), validator=checked_each(check_path))
    alpn: tuple[str, ...] = attrs.field(default=(), validator=checked_each(_check_alpn))
    pin: tuple[str, ...] = attrs.field(default=(), validator=checked_each(_pin_digest))
    verification: Literal["standard", "strict"] = "standard"
    min_version: Literal["1.2", "1.3"] = "1.2"
    ciphers: tuple[str, ...] = attrs.field(default=(), validator=checked_each(check_cipher))
    groups: tuple[str, ...] = attrs.field(default=(), validator=checked_each(check_group))
    signature_algorithms: tuple[str, ...] = attrs.field(default=(), validator=checked_each(check_signature_algorithm))
    ocsp: Literal["off", "stapled", "must-staple"] = "off"
    resumption: bool = True

    def __attrs_post_init__(self) -> None:
        """Refuse a key without its certificate."""
        for where, problem in identity_problems(self):
            raise MisfitError(where, problem)

    @property
    def passphrase(self) -> Passphrase:
        """Where the passphrase of the private key is."""
        return Passphrase(self.client_key_password_file, self.client_key_password_credential)

    @property
    def algorithms(self) -> Algorithms:
        """What is offered to upstreams that do not say otherwise."""
        return Algorithms(self.ciphers, self.groups, self.signature_algorithms)

    def offering(self, algorithms: Algorithms) -> Self:
        """Return these settings with other algorithms."""
        return attrs.evolve(
            self,
            ciphers=algorithms.ciphers,
            groups=algorithms.groups,
            signature_algorithms=algorithms.signature_algorithms,
        )

    @property
    def pin_digests(self) -> frozenset[bytes]:
        """SHA-256 digests of the SubjectPublicKeyInfo (RFC 7469 §2.4) of which the chain must hold one; empty: any."""
        return frozenset(_pin_digest(pin) for pin in self.pin)


@attrs.frozen
class Limits:
    """Size limits for control packets, from devices and from brokers."""

    max_packet_size: int = attrs.field(
        default=LARGEST_PACKET, validator=between(256, LARGEST_PACKET), metadata={"unit": "bytes"}
    )
    # Held in memory for each session that the broker has not accepted yet: hence the low maximum.
    max_connect_size: int = attrs.field(default=65_536, validator=between(256, 1_048_576), metadata={"unit": "bytes"})
    # Whether topics, Packet Identifiers, properties and subscriptions are checked, too, or only fixed headers.
    check_bodies: bool = True


def _seconds(default: float) -> Any:
    return attrs.field(default=default, validator=between(0.001, 3600), metadata={"unit": "seconds"})


@attrs.frozen
class Timeouts:
    """Timeouts of each step (seconds)."""

    connect_packet: float = _seconds(10.0)
    dns: float = _seconds(5.0)
    tcp: float = _seconds(10.0)
    tls: float = _seconds(10.0)
    connack: float = _seconds(10.0)
    close: float = _seconds(5.0)
    tcp_user: float = _seconds(60.0)


_HOME_NETWORKS: tuple[Network, ...] = tuple(
    map(
        ipaddress.ip_network,
        (
            "127.0.0.0/8",  # loopback
            "::1/128",
            "10.0.0.0/8",  # private (RFC 1918)
            "172.16.0.0/12",
            "192.168.0.0/16",
            "169.254.0.0/16",  # link-local (RFC 3927, RFC 4291)
            "fe80::/10",
            "fc00::/7",  # unique local (RFC 4193)
        ),
    )
)


def _check_any_network(networks: tuple[Network, ...]) -> None:
    if not networks:
        raise ValueError("no network is allowed, so no device could ever connect: list one, or leave the key out")


@attrs.frozen
class Admission:
    """Who may open sessions, and how many."""

    allow: tuple[Network, ...] = attrs.field(default=_HOME_NETWORKS, validator=checked(_check_any_network))
    max_sessions: int = attrs.field(default=0, validator=between(0, 10_000_000), metadata={"unit": "sessions"})
    max_sessions_per_address: int = attrs.field(
        default=0, validator=between(0, 10_000_000), metadata={"unit": "sessions"}
    )
    new_sessions_per_second: float = attrs.field(
        default=0.0, validator=checked(_check_rate), metadata={"unit": "sessions per second"}
    )

    @property
    def burst(self) -> int:
        """How many sessions an address may open at once: those of one second, but at least one."""
        return max(1, math.ceil(self.new_sessions_per_second))


@attrs.frozen
class Failover:
    """How long a failed broker is not dialled before the next attempt."""

    retry_first: float = _seconds(1.0)
    retry_max: float = _seconds(30.0)

    def __attrs_post_init__(self) -> None:
        """Refuse a first delay above the maximum."""
        if self.retry_first > self.retry_max:
            first, most = number(self.retry_first), number(self.retry_max)
            raise MisfitError(".retry_first", f"{first} is above retry_max, which is {most}")


@attrs.frozen
class Pacing:
    """The rate of new sessions to the broker, for all devices together."""

    new_sessions_per_second: float = attrs.field(
        default=100.0, validator=checked(_check_rate), metadata={"unit": "sessions per second"}
    )
    queue_seconds: float = attrs.field(default=10.0, validator=between(0, 3600), metadata={"unit": "seconds"})


@attrs.frozen
class Drain:
    """How sessions end when the gateway stops."""

    seconds: float = attrs.field(default=10.0, validator=between(0, 3600), metadata={"unit": "seconds"})
    wills: Literal["publish", "discard"] = "publish"


def _check_optional_endpoint(text: str) -> None:
    if text:
        describe_endpoint(text)


@attrs.frozen
class Status:
    """Where the status page, metrics and health checks are served."""

    endpoint: str = attrs.field(default="", validator=checked(_check_optional_endpoint))
    public: bool = False
    password: str = attrs.field(default="", validator=checked(check_hash), repr=False)
    server_cert: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    server_key: Path | None = attrs.field(default=None, validator=checked(check_optional_path))

    def __attrs_post_init__(self) -> None:
        """Refuse an endpoint that other machines can reach, unless `public` is set, and a password in plain text."""
        if self.server_key is not None and self.server_cert is None:
            raise MisfitError(".server_key", "there is no server_cert that it could belong to")
        if not self.endpoint or is_local(self.endpoint):
            return
        if self.password and self.server_cert is None:
            raise MisfitError(
                ".password",
                f"{quoted(self.endpoint)} can be reached from other machines, and would get the password in plain "
                'text: set server_cert and server_key, or use loopback ("127.0.0.1:9883") or a UNIX socket',
            )
        if not self.public:
            raise MisfitError(
                ".endpoint",
                f"{quoted(self.endpoint)} can be reached from other machines, and anyone who reaches it can read the "
                'names and addresses of all devices: use loopback ("127.0.0.1:9883"), a UNIX socket, or public = true',
            )

    @property
    def description(self) -> str:
        """The endpoint as a description that `serverFromString` takes; "" if there is none."""
        return describe_endpoint(self.endpoint) if self.endpoint else ""


@attrs.frozen
class Relay:
    """What relays the messages of established sessions."""

    engine: Literal["auto", "python"] = "auto"


@attrs.frozen
class StoreConfig:
    """Where the messages of devices with `store = true` are kept while no broker is available, and how many."""

    directory: Path | None = attrs.field(default=None, validator=checked(check_optional_path))
    max_size: int = attrs.field(
        default=1_073_741_824, validator=between(1_048_576, 1 << 44), metadata={"unit": "bytes"}
    )
    max_size_per_device: int = attrs.field(
        default=268_435_456, validator=between(65_536, 1 << 44), metadata={"unit": "bytes"}
    )
    max_age: float = attrs.field(default=0.0, validator=between(0, 315_360_000), metadata={"unit": "seconds"})
    full: Literal["drop-oldest", "refuse"] = "drop-oldest"
    after: float = attrs.field(default=5.0, validator=between(2, 60), metadata={"unit": "seconds"})
    drain_messages_per_second: float = attrs.field(default=2500.0, validator=between(0, 1_000_000))


@attrs.frozen
class Log:
    """The log's format, and which sessions are recorded."""

    format: Literal["auto", "text", "journal", "json"] = "auto"
    sessions: Literal["all", "limited", "failures"] = "all"


def _upstream_identity(upstream: Upstream) -> Hashable:
    # The same address may be listed with different names, because a load balancer may choose the broker by SNI, and
    # with different proxies.
    return upstream.connect_name.removesuffix("."), upstream.port, upstream.verify_name, upstream.proxy


@attrs.frozen(kw_only=True)
class Config:
    """The whole configuration."""

    listen: tuple[Listener, ...] = attrs.field(
        default=(Listener("1883"),),
        validator=_distinct(
            lambda listener: endpoint_identity(listener.endpoint),
            lambda listener: listener.endpoint,
            'missing: write [[listen]] with endpoint = "1883", or leave the key out',
        ),
    )
    upstream: tuple[Upstream, ...] = attrs.field(
        validator=_distinct(
            _upstream_identity,
            lambda upstream: upstream.address,
            'missing: write [[upstream]] with host = "broker.example.com"',
        ),
    )
    tls: TLS = TLS()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    failover: Failover = Failover()
    pacing: Pacing = Pacing()
    admission: Admission = Admission()
    drain: Drain = Drain()
    devices: Devices = Devices()  # noqa: RUF009  frozen, as the others
    device: tuple[DeviceRule, ...] = ()
    store: StoreConfig = StoreConfig()
    status: Status = Status()
    relay: Relay = Relay()
    log: Log = Log()

    def __attrs_post_init__(self) -> None:
        """Refuse a status endpoint that is also a listener."""
        endpoint = self.status.endpoint
        if endpoint and endpoint_identity(endpoint) in {endpoint_identity(each.endpoint) for each in self.listen}:
            words = f"{quoted(endpoint)} is also in [[listen]]: use another port or path"
            raise MisfitError("status.endpoint", words)

    def algorithms(self, upstream: Upstream) -> Algorithms:
        """Return what is offered to an upstream: its own lists, or those of `[tls]`."""
        return Algorithms(
            upstream.ciphers or self.tls.ciphers,
            upstream.groups or self.tls.groups,
            upstream.signature_algorithms or self.tls.signature_algorithms,
        )

    @property
    def all_algorithms(self) -> tuple[Algorithms, ...]:
        """What is offered to the upstreams, each once, in their order."""
        return tuple(dict.fromkeys(self.algorithms(upstream) for upstream in self.upstream))


def weak_ciphers(config: Config) -> list[tuple[str, str]]:
    """Return the ciphers that are weaker than the defaults: the key, and the cipher with its weakness."""
    lists = [("tls", config.tls.ciphers)]
    lists += [(f"upstream {upstream.address}", upstream.ciphers) for upstream in config.upstream]
    return [(f"{where}: ciphers", words) for where, ciphers in lists for words in weak(ciphers)]
