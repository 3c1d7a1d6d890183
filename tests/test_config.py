"""The configuration: what it accepts, what it says about everything else, and that its documents tell the truth."""

from __future__ import annotations

import base64
import functools
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import (
    LARGEST_PACKET,
    TLS,
    Admission,
    Config,
    DeviceRule,
    Limits,
    Listener,
    Status,
    Upstream,
    from_flags,
    from_mapping,
    load_file,
    normalise_name,
    template_text,
)
from gateway.config.listen import is_open_to_all
from gateway.errors import ConfigError, EndReason

DIGEST = bytes(range(32))
NO_PIN = " is not a pin: give the SHA-256 digest of the public key (SubjectPublicKeyInfo) in base64, 44 characters"
PIN = base64.b64encode(DIGEST).decode()
DOCUMENT = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")


def mapping(**sections: Any) -> dict[str, Any]:
    """Make a mapping that is right in all that it is not told."""
    return {"upstream": [{"host": "broker.example.com"}], **sections}


def problems(sections: Any = None, **more: Any) -> list[str]:
    """Give the lines about a mapping that cannot be used."""
    with pytest.raises(ConfigError) as caught:
        from_mapping(mapping(**(sections or {}), **more))
    return caught.value.problems


def attempt(make: Callable[[], Config]) -> Config | list[str]:
    """Give the Config, or the lines that say why there is none."""
    try:
        return make()
    except ConfigError as error:
        return error.problems


def file_problem(path: Path, content: bytes | None = None) -> str:
    """Give the one line about a file that cannot be used."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    (line,) = caught.value.problems
    return line


def keys() -> dict[str, attrs.Attribute[Any]]:
    """Give every dotted key of the schema."""
    found = {}
    for section in attrs.fields(Config):
        class_ = next(iter(get_args(section.type)), section.type)
        found.update({f"{section.name}.{key.name}": key for key in attrs.fields(class_)})
    return found


# What is accepted.


def test_one_host_is_a_whole_configuration() -> None:
    """All keys but the broker's host have defaults, which are those of the classes."""
    assert from_mapping(mapping()) == Config(upstream=(Upstream("broker.example.com"),))


def test_the_largest_packet_is_the_largest_of_the_protocol() -> None:
    """Four bytes of Remaining Length, seven bits each, and the bytes that hold them (MQTT 5.0 §1.5.5)."""
    assert Limits().max_packet_size == LARGEST_PACKET == 1 + 4 + 128**4 - 1


def test_the_configuration_is_frozen() -> None:
    """Nothing that runs can change what it runs by."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        from_mapping(mapping()).limits.max_packet_size = 1  # type: ignore[misc]


def test_one_text_may_stand_for_a_list_of_one() -> None:
    """A list of one need not be written as a list."""
    config = from_mapping(mapping(tls={"alpn": "mqtt", "pin": PIN}, admission={"allow": "10.0.0.1"}))
    assert config.tls.alpn == ("mqtt",)
    assert config.tls.pin == (PIN,)
    assert config.admission.allow == (ip_network("10.0.0.1/32"),)


def test_proxies_are_networks_or_whoever_opens_the_unix_socket() -> None:
    """An address alone is a network of one; a socket of systemd's may be of either kind."""
    listen = [
        {"endpoint": "1883", "proxies": ["10.0.0.5", "fd12::/64"]},
        {"endpoint": "unix:/run/lb.sock", "proxies": "unix"},
        {"endpoint": "systemd:domain=UNIX:name=lb", "proxies": ["unix"]},
        {"endpoint": "1884"},
    ]
    listeners = from_mapping({"upstream": [{"host": "a"}], "listen": listen}).listen
    assert [listener.proxies for listener in listeners] == [
        (ip_network("10.0.0.5/32"), ip_network("fd12::/64")),
        ("unix",),
        ("unix",),
        (),
    ]


def test_whole_numbers_are_numbers_of_seconds() -> None:
    """`tcp = 20` needs no decimal point."""
    tcp = from_mapping(mapping(timeouts={"tcp": 20})).timeouts.tcp
    assert (tcp, type(tcp)) == (20.0, float)


@pytest.mark.parametrize("prefix", ["", "sha256/", "sha256//"])
def test_pins_become_digests(prefix: str) -> None:
    """Pins are understood as curl, OkHttp and openssl write them."""
    assert TLS(pin=(prefix + PIN,)).pin_digests == {DIGEST}


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1), (0.1, 1), (1.0, 1), (2.5, 3), (100.0, 100)])
def test_a_burst_is_what_one_second_allows(rate: float, burst: int) -> None:
    """However slow the rate, one session can be opened."""
    assert Admission(new_sessions_per_second=rate).burst == burst


# Listeners.


@pytest.mark.parametrize(
    ("endpoint", "description"),
    [
        ("1883", "tcp:port=1883:backlog=1024"),
        ("0", "tcp:port=0:backlog=1024"),
        (":1883", "tcp:port=1883:backlog=1024"),
        ("127.0.0.1:1883", "tcp:port=1883:backlog=1024:interface=127.0.0.1"),
        ("[::1]:1883", r"tcp:port=1883:backlog=1024:interface=\:\:1"),
        ("[::]:1883", r"tcp:port=1883:backlog=1024:interface=\:\:"),
        ("[FE80::1%eth0]:1883", r"tcp:port=1883:backlog=1024:interface=fe80\:\:1%eth0"),
        ("tcp:1883", "tcp:1883"),
        ("tcp:1883:interface=10.0.0.1", "tcp:1883:interface=10.0.0.1"),
        (r"tcp6:port=1883:interface=\:\:1", r"tcp6:port=1883:interface=\:\:1"),
        ("unix:/run/x.sock:mode=660:lockfile=0", "unix:/run/x.sock:mode=660:lockfile=0"),
        ("unix:/run/x.sock", "unix:/run/x.sock:mode=660"),
        ("unix:/run/x.sock:666", "unix:/run/x.sock:666"),
        ("systemd:domain=INET:name=mqtt", "systemd:domain=INET:name=mqtt"),
    ],
)
def test_endpoints_become_twisted_descriptions(endpoint: str, description: str) -> None:
    """The short forms are translated, descriptions are left as they are."""
    assert Listener(endpoint).description == description


@pytest.mark.parametrize("endpoint", ["0", "127.0.0.1:0", "[::1]:0", "tcp6:0", "unix:/tmp/x.sock:mode=660"])
def test_twisted_understands_what_is_accepted(endpoint: str) -> None:
    """The descriptions are really Twisted's."""
    from twisted.internet.endpoints import serverFromString
    from twisted.internet.testing import MemoryReactor

    assert serverFromString(MemoryReactor(), Listener(endpoint).description)


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("", "neither"),
        ("abc", "neither"),
        ("-1", "neither"),
        (":", "neither"),
        ("65536", "not a port"),
        ("9" * 5000, "not a port"),
        ("tcp:", "not a port"),
        ("tcp:mqtt", "not a port"),
        ("tcp:1883:10.0.0.1:50:6", 'not "4"'),
        ("tcp:1883:iface=10.0.0.1", 'not "iface"'),
        ("tcp:1883:interface=eth0", '"eth0" is not an IP address'),
        ("tcp:1883:backlog=x", "backlog"),
        ("localhost:1883", "not an IP address"),
        ("tpc:1883", "not an IP address"),
        ("[::g]:1883", "not an IP address"),
        ("unix:run.sock", "absolute"),
        ("unix:/" + "x" * 107, "107 bytes"),
        ("unix:/x:mode=999", "octal"),
        ("unix:/x:lockfile=yes", "lockfile"),
        ("ssl:8883:privateKey=k.pem", "plain MQTT"),
        ("ssl:8883", "plain MQTT"),
        ("tls:tcp:8883", "plain MQTT"),
        ("haproxy:tcp:1883", "listen.proxies"),
        ("stdio:", "not a listener"),
    ],
)
def test_endpoints_that_cannot_work_are_refused(endpoint: str, reason: str) -> None:
    """Each refusal has its own reason."""
    (line,) = problems(listen=[{"endpoint": endpoint}])
    assert line.startswith("listen[0].endpoint: ")
    assert reason in line


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1883", "tcp:1883"),
        ("1883", "0.0.0.0:1883"),
        ("[::1]:1883", r"tcp:port=1883:interface=0\:\:1"),
        ("tcp6:1883", "[::]:1883"),
        ("unix:/x", "unix:address=/x:mode=600"),
        ("unix:/x/a", "unix://x//b/../a"),
        ("systemd:domain=INET:name=mqtt", "systemd:domain=INET:name=mqtt"),
    ],
)
def test_one_endpoint_twice_is_refused(first: str, second: str) -> None:
    """Two spellings of one port would fail only when the second is opened."""
    assert problems(listen=[{"endpoint": first}, {"endpoint": second}])[0].startswith("listen[1]: ")


@pytest.mark.parametrize("status", ["127.0.0.1:9883", "tcp:9883:interface=127.0.0.1"])
def test_the_status_endpoint_is_no_listener(status: str) -> None:
    """Devices and the status page cannot share it."""
    listen = [{"endpoint": "1883"}, {"endpoint": "127.0.0.1:9883"}]
    assert problems(listen=listen, status={"endpoint": status}) == [
        f'status.endpoint: "{status}" is also in [[listen]]: use another port or path'
    ]


@pytest.mark.parametrize("section", ["pacing", "admission"])
def test_a_rate_at_which_no_session_would_ever_begin_is_refused(section: str) -> None:
    """0 has a meaning of its own."""
    for rate in (0, 0.0003, 1_000_000):
        assert getattr(from_mapping(mapping(**{section: {"new_sessions_per_second": rate}})), section)
    for rate in (1e-300, 0.00029, -1, 1_000_001, math.nan):
        (problem,) = problems(**{section: {"new_sessions_per_second": rate}})
        assert problem.endswith("is out of range (0.0003 to 1000000, or 0 for no limit)")


def test_free_ports_and_other_interfaces_are_not_the_same_endpoint() -> None:
    """Port 0 is another port each time."""
    endpoints = ["0", "0", "127.0.0.1:1883", "127.0.0.2:1883", "127.0.0.1:1884"]
    assert len(from_mapping(mapping(listen=[{"endpoint": text} for text in endpoints])).listen) == 5


# Upstreams.


@pytest.mark.parametrize(
    ("host", "connect", "verify"),
    [
        ("Broker.Example.COM", "broker.example.com", "broker.example.com"),
        ("broker.example.com.", "broker.example.com.", "broker.example.com"),
        ("bücher.example", "xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("BÜCHER。example", "xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("faß.example", "xn--fa-hia.example", "xn--fa-hia.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("mqtt_broker", "mqtt_broker", "mqtt_broker"),
        ("192.168.7.2", "192.168.7.2", "192.168.7.2"),
        ("2001:DB8:0::1", "2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1%eth0", "fe80::1"),
    ],
)
def test_hosts_have_one_spelling(host: str, connect: str, verify: str) -> None:
    """The resolver and the verification get A-labels or canonical addresses (RFC 5890, RFC 5952)."""
    upstream = Upstream(host)
    assert (upstream.connect_name, upstream.verify_name) == (connect, verify)


def test_the_name_to_verify_may_be_another_than_the_host() -> None:
    """A broker can be reached by an address that its certificate does not know."""
    assert Upstream("192.168.7.2", server_name="Broker.example.").verify_name == "broker.example"
    assert Upstream("broker.example", server_name="[2001:DB8::1]").verify_name == "2001:db8::1"


def test_addresses_are_shown_with_brackets_where_needed() -> None:
    """A port can be told from an IPv6 address."""
    assert [Upstream(host).address for host in ("a", "1.2.3.4", "[::1]")] == ["a:8883", "1.2.3.4:8883", "[::1]:8883"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "the name is empty"),
        ("mqtts://broker.example.com", "is a URL"),
        ("broker.example.com:8883", "port"),
        ("[::1]:8883", "port"),
        ("*.example.com", "wildcard"),
        ("a..b", "empty label"),
        (".a", "empty label"),
        (".", "empty label"),
        ("-a.example", "inner hyphens"),
        ("a b", "inner hyphens"),
        ("a" * 64, "1 to 63"),
        ("abcdefgh." * 29, "260 characters"),
        ("ü" * 64 + ".example", "IDNA"),
        ("xn--zz--.example", "inner hyphens"),
        ("xn--a.example", "IDNA"),
        ("☃.\u202eexample", "IDNA"),
        ("127.1", "an IPv4 address"),
        ("0x7f.1", "an IPv4 address"),
        ("256.1.1.1", "an IPv4 address"),
        ("1.2.3.4.", "an IPv4 address"),
        ("127\uff0e1", "an IPv4 address"),
        ("1:2", "port"),
        ("::g", "not an IPv6 address"),
        ("[broker]", "not an IPv6 address"),
        ("fe80::1%", "not an IPv6 address"),
        ("fe80::1%eth0", "not an IPv6 address"),
    ],
)
def test_names_that_cannot_be_verified_are_refused(name: str, reason: str) -> None:
    """Each refusal has its own reason, which shows nothing that does not print."""
    with pytest.raises(ValueError, match=reason) as caught:
        normalise_name(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("host", ["192.168.7.2%eth0", "broker%eth0", "fe80::1%", "fe80::1%a b", "%eth0"])
def test_only_ipv6_addresses_have_zones(host: str) -> None:
    """RFC 4007 §11."""
    assert problems(upstream=[{"host": host}])[0].startswith("upstream[0].host: ")


@pytest.mark.parametrize("other", ["A", "a.", "a"])
def test_one_upstream_twice_is_refused(other: str) -> None:
    """Trying it a second time would only take time."""
    assert problems(upstream=[{"host": "a"}, {"host": "b"}, {"host": other}])[0].startswith("upstream[2]: ")


def test_one_host_may_serve_several_names() -> None:
    """A load balancer may choose the broker by SNI."""
    tables = [{"host": "a"}, {"host": "a", "server_name": "b"}, {"host": "a", "port": 8884}]
    assert len(from_mapping({"upstream": tables}).upstream) == 3


# What is said about everything else.


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"upstream": []}, 'upstream: missing: write [[upstream]] with host = "broker.example.com"'),
        ({"listen": []}, "listen: missing: write [[listen]]"),
        (
            {"upstream": {"host": "a"}},
            "upstream: double brackets",
        ),
        ({"upstream": "a"}, 'upstream: expected tables with their name in double brackets, got the text "a"'),
        ({"upstream": ["a"]}, 'upstream[0]: expected a table, got the text "a"'),
        (
            {"upstream": [{"port": 1}]},
            "upstream[0].host: missing: name the broker",
        ),
        (
            {"listen": [{}]},
            "listen[0].endpoint: missing: ",
        ),
        (
            {"failover": {"retry_first": 31}},
            "failover.retry_first: 31.0 is above retry_max",
        ),
        (
            {"pacing": {"queue_seconds": -1}},
            "pacing.queue_seconds: -1.0 is out of range (0 to 3600)",
        ),
        ({"listen": [{"endpoint": 1883}]}, "listen[0].endpoint: expected a text, got the number 1883"),
        (
            {"listen": [{"endpoint": "1", "name": "\x1b[2J"}]},
            r'listen[0].name: "\x1b[2J" is not a label',
        ),
        (
            {"listen": [{"endpoint": "1", "proxies": ["10.0.0.5", "lan"]}]},
            'listen[0].proxies[1]: "lan" is neither a network',
        ),
        (
            {"listen": [{"endpoint": "1", "proxies": "0.0.0.0/0"}]},
            "listen[0].proxies[0]: 0.0.0.0/0 covers every address",
        ),
        (
            {"listen": [{"endpoint": "[::]:1", "proxies": ["fd00::/8", "unix"]}]},
            'listen[0].proxies[1]: "unix" is for UNIX sockets only',
        ),
        (
            {"listen": [{"endpoint": "unix:/run/x.sock", "proxies": "127.0.0.1"}]},
            'listen[0].proxies[0]: connections to a UNIX socket have no address: write proxies = "unix"',
        ),
        (
            {"listen": [{"endpoint": "1", "proxies": True}]},
            "listen[0].proxies: expected a text or a list of texts, got true",
        ),
        ({"upstream": [{"host": "a", "port": 88830}]}, "upstream[0].port: 88830 is not a port (1 to 65535)"),
        ({"upstream": [{"host": "a", "port": 0}]}, "upstream[0].port: 0 is not a port (1 to 65535)"),
        ({"upstream": [{"host": "a", "port": True}]}, "upstream[0].port: expected a whole number, got true"),
        ({"tls": 5}, "tls: expected a table, got the number 5"),
        ({"tls": {"ca_file": 5}}, "tls.ca_file: expected a text or a list of texts, got the number 5"),
        ({"tls": {"ca_file": ["a", False]}}, "tls.ca_file[1]: expected a path, got false"),
        ({"tls": {"ca_dir": ""}}, "tls.ca_dir: the path is empty: name a file, or leave the key out"),
        ({"tls": {"ca_dir": "a\0"}}, r'tls.ca_dir: "a\x00" is not a path'),
        ({"tls": {"crl_file": "a\0"}}, r'tls.crl_file[0]: "a\x00" is not a path'),
        (
            {"tls": {"client_key": "k"}},
            "tls.client_key: client_cert is missing",
        ),
        (
            {"tls": {"alpn": ["mqtt", ""]}},
            'tls.alpn[1]: "" is not an application protocol',
        ),
        (
            {"tls": {"pin": "abc"}},
            'tls.pin[0]: "abc"' + NO_PIN,
        ),
        (
            {"tls": {"pin": "00" * 32}},
            f'tls.pin[0]: "{"00" * 30}…"{NO_PIN}, not in hexadecimal',
        ),
        (
            {"tls": {"verification": "off"}},
            'tls.verification: expected "standard" or "strict", got the text "off"',
        ),
        (
            {"tls": {"min_version": 1.2}},
            'tls.min_version: expected "1.2" or "1.3", got the number 1.2: write it in quotes',
        ),
        ({"tls": {"resumption": "no"}}, 'tls.resumption: expected true or false, got the text "no"'),
        ({"tls": {"resumption": 0}}, "tls.resumption: expected true or false, got the number 0"),
        ({"tls": {"min_version": "1.1"}}, 'tls.min_version: expected "1.2" or "1.3", got the text "1.1"'),
        (
            {"limits": {"max_packet_size": "256M"}},
            'limits.max_packet_size: expected a whole number of bytes, got the text "256M"',
        ),
        (
            {"limits": {"max_packet_size": 1e6}},
            "limits.max_packet_size: expected a whole number of bytes, got the number 1000000.0",
        ),
        (
            {"limits": {"max_packet_size": 268_435_461}},
            "limits.max_packet_size: 268435461 is out of range (256 to 268435460)",
        ),
        (
            tomllib.loads("timeouts.tcp = 10:00:00"),
            "timeouts.tcp: expected a number of seconds, got a date or time",
        ),
        ({"limits": {"max_connect_size": 255}}, "limits.max_connect_size: 255 is out of range (256 to 1048576)"),
        ({"timeouts": {"dns": "5s"}}, 'timeouts.dns: expected a number of seconds, got the text "5s"'),
        ({"timeouts": {"dns": True}}, "timeouts.dns: expected a number of seconds, got true"),
        ({"timeouts": {"dns": 0}}, "timeouts.dns: 0.0 is out of range (0.001 to 3600)"),
        ({"timeouts": {"tcp": float("nan")}}, "timeouts.tcp: nan is out of range (0.001 to 3600)"),
        ({"timeouts": {"tls": float("inf")}}, "timeouts.tls: inf is out of range (0.001 to 3600)"),
        ({"timeouts": {"close": 16**5000}}, "timeouts.close: a number of 20001 bits is out of range"),
        (
            {"limits": {"max_packet_size": 16**5000}},
            "limits.max_packet_size: a number of 20001 bits is out of range (256 to 268435460)",
        ),
        (
            {"admission": {"allow": []}},
            "admission.allow: no network is allowed",
        ),
        (
            {"admission": {"allow": ["192.168.1.5/24"]}},
            'admission.allow[0]: "192.168.1.5/24" has host bits set: did you mean "192.168.1.0/24"?',
        ),
        (
            {"admission": {"allow": ["lan"]}},
            'admission.allow[0]: "lan" is neither a network',
        ),
        ({"admission": {"allow": [5]}}, "admission.allow[0]: expected a network, got the number 5"),
        (
            {"admission": {"max_sessions": None}},
            "admission.max_sessions: expected a whole number of sessions, got nothing",
        ),
        ({"admission": {"max_sessions": -1}}, "admission.max_sessions: -1 is out of range (0 to 10000000)"),
        (
            {"admission": {"new_sessions_per_second": []}},
            "admission.new_sessions_per_second: expected a number of sessions per second, got a list",
        ),
        ({"tls": {"ca_fil": "a"}}, "tls.ca_fil: unknown key: did you mean `ca_file`?"),
        ({"tls": {"ca-file": "a"}}, "tls.ca-file: unknown key: did you mean `ca_file`?"),
        ({"upstream": [{"host": "a", "prot": 1}]}, "upstream[0].prot: unknown key: did you mean `port`?"),
        ({"ca_file": "a"}, "ca_file: unknown key here: did you mean `tls.ca_file`?"),
        ({"upstream": [{"host": "a", "tls": {}}]}, "upstream[0].tls: unknown key here: did you mean `tls`?"),
        (
            {"limits": {"\n": 1}},
            r'limits."\n": unknown key: known keys are max_packet_size, max_connect_size',
        ),
    ],
)
def test_each_mistake_has_one_clear_line(sections: dict[str, Any], line: str) -> None:
    """The line names the dotted key and the fact."""
    (found,) = problems(sections)
    key, _, fact = line.partition(": ")
    assert found.startswith(f"{key}: ")
    assert fact in found


def test_all_mistakes_are_reported_at_once() -> None:
    """Nobody should have to start the gateway ten times to find ten mistakes."""
    found = problems(
        upstream=[{"host": "a:1", "port": "x", "server_name": "*"}, {"host": "b"}, {"host": "b", "nmae": ""}, {}],
        listen=[{"endpoint": "x"}, {"endpoint": "1", "name": 5}],
        tls={"pin": ["a", PIN, "b"], "min_version": "1.0", "ca_fiel": 1},
        limits={"max_packet_size": 1, "max_connect_size": 1},
        timeouts=[],
        admission={"allow": ["x", "10.0.0.0/8", "10.0.0.1/8"]},
        tsl={},
    )
    assert [line.partition(": ")[0] for line in found] == [
        "listen[0].endpoint",
        "listen[1].name",
        "upstream[0].host",
        "upstream[0].port",
        "upstream[0].server_name",
        "upstream[2].nmae",
        "upstream[3].host",
        "tls.pin[0]",
        "tls.pin[2]",
        "tls.min_version",
        "tls.ca_fiel",
        "limits.max_packet_size",
        "limits.max_connect_size",
        "timeouts",
        "admission.allow[0]",
        "admission.allow[2]",
        "tsl",
    ]


def test_what_is_no_table_is_no_configuration() -> None:
    """Whoever calls from_mapping with something else gets the same kind of error."""
    with pytest.raises(ConfigError, match="the configuration: expected a table, got a list"):
        from_mapping([])  # type: ignore[arg-type]


def test_messages_are_one_line_each_and_short() -> None:
    """However long and however odd a value is, its message can be read."""
    (line,) = problems(upstream=[{"host": "\x1b]0;\u202e\n" * 100_000}])
    assert line.isprintable()
    assert len(line) < 400


WORDS = st.sampled_from(
    [field.name for field in attrs.fields(Config)] + [key.partition(".")[2] for key in keys()] + ["a", "1.2", PIN]
)
JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        section.name: (
            st.lists(st.dictionaries(WORDS, JSON_LIKE, max_size=3), max_size=3) if get_args(section.type) else JSON_LIKE
        )
        for section in attrs.fields(Config)
    },
)


@settings(deadline=None)
@given(st.dictionaries(WORDS | st.text(max_size=5), JSON_LIKE, max_size=5) | PLAUSIBLE | JSON_LIKE)
def test_whatever_is_given_only_config_errors_come_out(given_mapping: Any) -> None:
    """No mapping leads to a traceback, and every line can be printed."""
    outcome = attempt(lambda: from_mapping(given_mapping))
    assert isinstance(outcome, Config) or (outcome and all(line.isprintable() for line in outcome))


@settings(deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"[a-z:/\[\]%.=\\0-9]{1,20}", fullmatch=True))
def test_whatever_text_is_given_to_flags_only_config_errors_come_out(text: str) -> None:
    """Endpoints, names and pins are parsed by hand, so they are tried with everything."""
    flags: dict[str, Any]
    for flags in (
        {"listen": [text]},
        {"upstream": [text]},
        {"server_name": [text]},
        {"pin": [text], "alpn": [text], "allow": [text]},
        {"ca_file": [text], "client_cert": text},
    ):
        outcome = attempt(functools.partial(from_flags, **{"upstream": ["a"], **flags}))
        assert isinstance(outcome, Config) or all(line.startswith("--") and line.isprintable() for line in outcome)


# Files.


def test_paths_start_at_the_directory_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration means the same wherever the gateway is started, and after a daemon has gone to /."""
    monkeypatch.chdir(tmp_path)
    Path("etc").mkdir()
    file = Path("etc") / "gateway.toml"
    file.write_text(
        '[tls]\nca_file = ["a", "/b"]\nca_dir = "c"\nclient_cert = "d"\nclient_key = "../e"\ncrl_file = "f"\n'
        '[[upstream]]\nhost = "broker.example.com"\n'
    )
    etc = tmp_path / "etc"
    assert load_file(file).tls == TLS(
        ca_file=(etc / "a", Path("/b")),
        ca_dir=etc / "c",
        client_cert=etc / "d",
        client_key=etc / "../e",
        crl_file=(etc / "f",),
    )


def test_a_credential_stands_for_the_file_that_only_root_may_read(tmp_path: Path) -> None:
    """What systemd has handed over is meant, however the path is written; anything else is the file itself."""
    handed_over, rules = tmp_path / "handed over", tmp_path / "devices.d"
    (handed_over).mkdir()
    for name in ("credentials_client.key", "credentials_deep_er.key", "credentials_ca.pem", "other"):
        (handed_over / name).touch()
    rules.mkdir()
    (rules / "pump.toml").write_text('password_file = "../credentials/deep/er.key"\n')
    file = tmp_path / "gateway.toml"
    file.write_text(
        f'[tls]\nca_file = ["other", "{tmp_path}/credentials/ca.pem", "credentials/missing", "credentials"]\n'
        'client_cert = "client.pem"\nclient_key = "credentials/client.key"\n'
        '[devices]\ndirectory = "devices.d"\n'
        '[[upstream]]\nhost = "broker.example.com"\n'
    )
    config = load_file(file, {"CREDENTIALS_DIRECTORY": str(handed_over)})
    others = (tmp_path / "other", handed_over / "credentials_ca.pem")
    assert config.tls.ca_file == (*others, tmp_path / "credentials/missing", tmp_path / "credentials")
    assert config.tls.client_cert == tmp_path / "client.pem"
    assert config.tls.client_key == handed_over / "credentials_client.key"
    assert config.device[0].password_file == handed_over / "credentials_deep_er.key"
    assert load_file(file, {}).tls.client_key == tmp_path / "credentials/client.key"


def test_a_byte_order_mark_and_carriage_returns_do_no_harm(tmp_path: Path) -> None:
    """Files may come from an editor on Windows."""
    file = tmp_path / "gateway.toml"
    file.write_bytes(b'\xef\xbb\xbf[[upstream]]\r\nhost = "b\xc3\xbccher.example"\r\n')
    assert load_file(file).upstream == (Upstream("bücher.example"),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty: `mqtts-gateway init` writes"),
        (b" \n\n", "is empty"),
        (b"a = 1\nb = \xff\n", "is not UTF-8: see line 2"),
        (b"a = 1\nb = = 2\n", "is not TOML: line 2, column 5: Invalid value"),
        (b"a = 1\nb = [\n\n", "is not TOML: line 2, at the end: "),
        (b"a = 1\n\na = 2\n", "is not TOML: line 3, "),
        (b"a = " + b"9" * 5000, "absurdly long"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"#" * 1_048_577, "larger than 1 MiB"),
    ],
)
def test_files_that_are_no_configuration_have_one_clear_line(tmp_path: Path, content: bytes, reason: str) -> None:
    """The line names the file, and the place in it where there is one."""
    file = tmp_path / "gateway.toml"
    line = file_problem(file, content)
    assert line.startswith(f'"{file}" ')
    assert reason in line
    assert line.isprintable()


def test_files_that_cannot_be_read_have_one_clear_line(tmp_path: Path) -> None:
    """Missing files and directories are told apart."""
    missing = "cannot be read: No such file or directory; `mqtts-gateway init FILE` writes one"
    assert file_problem(tmp_path / "none.toml").endswith(missing)
    assert file_problem(tmp_path).endswith(
        "cannot be read: it is a directory, not a regular file: replace it, or correct the path"
    )
    assert file_problem(Path("a\0b")).startswith(r'"a\x00b" cannot be read: ')


def test_a_file_reports_all_its_mistakes(tmp_path: Path) -> None:
    """What holds for mappings holds for files."""
    file = tmp_path / "gateway.toml"
    file.write_text("[tls]\nca_fil = 1\n[limits]\nmax_packet_size = 1\n")
    with pytest.raises(ConfigError) as caught:
        load_file(file)
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "upstream",
        "tls.ca_fil",
        "limits.max_packet_size",
    ]


# Flags.


def test_flags_and_file_give_the_same_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one way from text to Config."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "gateway.toml"
    file.write_text(f"""
        [[listen]]
        endpoint = "127.0.0.1:1883"
        [[listen]]
        endpoint = "unix:/run/x.sock"
        [[upstream]]
        host = "broker.example.com"
        server_name = "a.example"
        [[upstream]]
        host = "[2001:db8::1]"
        port = 443
        server_name = "b.example"
        [[upstream]]
        host = "::1"
        server_name = "c.example"
        [tls]
        ca_file = ["ca.pem", "/other.pem"]
        client_cert = "cert.pem"
        client_key = "key.pem"
        crl_file = "list.crl"
        alpn = ["mqtt", "x-amzn-mqtt-ca"]
        pin = "{PIN}"
        [admission]
        allow = ["10.0.0.0/8", "fd00::/8"]
    """)
    assert load_file(file) == from_flags(
        listen=["127.0.0.1:1883", "unix:/run/x.sock"],
        upstream=["broker.example.com", "[2001:db8::1]:443", "::1"],
        server_name=["a.example", "b.example", "c.example"],
        ca_file=["ca.pem", "/other.pem"],
        client_cert="cert.pem",
        client_key="key.pem",
        crl_file=["list.crl"],
        alpn=["mqtt", "x-amzn-mqtt-ca"],
        pin=[PIN],
        allow=["10.0.0.0/8", "fd00::/8"],
    )


def test_flags_that_are_not_given_keep_their_defaults() -> None:
    """The simple case needs one flag."""
    assert from_flags(upstream=["broker.example.com"]) == Config(upstream=(Upstream("broker.example.com"),))


def test_one_server_name_holds_for_all_upstreams() -> None:
    """Several addresses of one broker share its name."""
    config = from_flags(upstream=["10.0.0.1", "10.0.0.2:443"], server_name=["broker.example"])
    assert [upstream.verify_name for upstream in config.upstream] == ["broker.example"] * 2


def test_mistakes_in_flags_name_the_flags() -> None:
    """Whoever wrote flags has never heard of dotted keys; all mistakes come at once here, too."""
    with pytest.raises(ConfigError) as caught:
        from_flags(
            listen=["x"],
            upstream=["mqtts://a", "a:99999", "b:x", "b:"],
            server_name=["a", "b"],
            ca_file=["ca.pem", ""],
            client_key="",
            allow=["10.0.0.1/8"],
        )
    assert caught.value.problems == [
        "--server-name: 2 names for 4 upstreams: give one for all, or one for each",
        '--listen: "x" is neither "PORT" nor "HOST:PORT" nor a Twisted endpoint description',
        '--upstream: "mqtts://a" is a URL: give the host only',
        "--upstream: port: 99999 is not a port (1 to 65535)",
        '--upstream: port: expected a whole number, got the text "x"',
        '--upstream: port: expected a whole number, got the text ""',
        "--ca-file: the path is empty: name a file, or leave the key out",
        "--client-key: the path is empty: name a file, or leave the key out",
        '--allow: "10.0.0.1/8" has host bits set: did you mean "10.0.0.0/8"?',
    ]


def test_no_flags_at_all_ask_for_an_upstream() -> None:
    """The one thing that has no default is asked for."""
    with pytest.raises(ConfigError, match=r"--upstream: missing"):
        from_flags()


# The status page.


@pytest.mark.parametrize(
    "endpoint",
    ["127.0.0.1:9883", "[::1]:9883", "tcp:9883:interface=127.0.0.2", "unix:/run/s.sock", "systemd:domain=UNIX:name=s"],
)
def test_the_status_page_may_be_where_only_this_machine_is(endpoint: str) -> None:
    """Loopback and UNIX sockets."""
    assert from_mapping(mapping(status={"endpoint": endpoint})).status.description


@pytest.mark.parametrize(
    "endpoint",
    ["9883", "0.0.0.0:9883", "[::]:9883", "192.168.7.1:9883", "tcp6:9883", "systemd:domain=INET:name=UNIX"],
)
def test_the_status_page_is_for_others_only_if_they_are_meant(endpoint: str) -> None:
    """An endpoint that other machines may reach wants `public`, and the line says so."""
    (line,) = problems(status={"endpoint": endpoint})
    assert line.startswith(f'status.endpoint: "{endpoint}" can be reached from other machines')
    assert "public = true" in line
    assert from_mapping(mapping(status={"endpoint": endpoint, "public": True})).status.description


def test_the_password_of_the_status_page_is_not_for_all_to_read() -> None:
    """It is a hash, and it is sent in plain text, so only to loopback or a UNIX socket; neither line shows it."""
    password = "scrypt$16384$8$1$c2FsdHNhbHRzYWx0c2FsdA==$YfNTzWDs8Q2tp4Y8u6bgEbV6oO3ECkcGyDgEQ0Ki+Ew="
    assert from_mapping(mapping(status={"endpoint": "127.0.0.1:9883", "password": password}))
    (line,) = problems(status={"endpoint": "0.0.0.0:9883", "public": True, "password": password})
    assert line.startswith('status.password: "0.0.0.0:9883" can be reached from other machines')
    (other,) = problems(status={"endpoint": "127.0.0.1:9883", "password": "plain-secret"})
    assert other.startswith("status.password: not a password hash")
    assert password not in line
    settings = {"endpoint": "0.0.0.0:9883", "public": True, "password": password, "server_cert": "a.pem"}
    assert from_mapping(mapping(status=settings), Path("/etc/x")).status.server_cert == Path("/etc/x/a.pem")
    (line,) = problems(status={"endpoint": "127.0.0.1:9883", "server_key": "a.pem"})
    assert line.startswith("status.server_key: there is no server_cert")
    assert "plain-secret" not in other


def test_the_status_page_has_an_endpoint_that_could_be_one() -> None:
    """It is checked as those of devices are; a truth value is none of the words for one."""
    assert problems(status={"endpoint": "here", "public": "yes"}) == [
        'status.endpoint: "here" is neither "PORT" nor "HOST:PORT" nor a Twisted endpoint description',
        'status.public: expected true or false, got the text "yes"',
    ]


# The documents.


def test_the_template_is_a_configuration() -> None:
    """What `init` writes works once the host is the right one; of what is off by default, it has the status page on."""
    config = from_mapping(tomllib.loads(template_text()))
    assert config == Config(upstream=(Upstream("broker.example.com"),), status=Status("127.0.0.1:9883"))


def test_the_template_shows_every_key_with_its_default() -> None:
    """Without the comment signs it holds all keys, and changes nothing but those that have no default."""
    tables = tomllib.loads(re.sub(r"(?m)^#(?=\S)", "", template_text()))
    shown = {
        f"{section}.{key}"
        for section, content in tables.items()
        for table in (content if isinstance(content, list) else [content])
        for key in table
    }
    assert shown == set(keys())
    for key, field in keys().items():
        if field.default is None:
            section, name = key.split(".")
            table = tables[section]
            del (table[0] if isinstance(table, list) else table)[name]
    rules = tables.pop("device")
    del tables["status"]["endpoint"]
    assert from_mapping(tables) == Config(upstream=(Upstream("broker.example.com"),))
    assert from_mapping({**tables, "device": rules}).device == (DeviceRule(name="device[0]"),)


def documented() -> dict[str, tuple[str, str, str, str]]:
    """Give meaning, unit, default and example of every key in the document."""
    found = {}
    for section, content in re.findall(r"(?ms)^## `\[+([a-z_]+)\]+`$(.*?)(?=^## |\Z)", DOCUMENT):
        for row in re.findall(r"(?m)^\| `(.+) \|$", content):
            key, meaning, unit, default, example = [cell.strip() for cell in row.split(" |")]
            found[f"{section}.{key.rstrip('`')}"] = (meaning, unit, default, example.strip("`"))
    return found


def test_every_key_is_documented_and_no_other() -> None:
    """docs/configuration.md and the schema name the same keys, in the same order."""
    assert list(documented()) == list(keys()) == [*dict.fromkeys(keys())]
    assert all(meaning for meaning, *_ in documented().values())


# What some keys need beside them.
COMPANIONS = {
    "client_key": {"client_cert": "gateway.pem"},
    "client_key_password_file": {"client_cert": "gateway.p12"},
    "client_key_password_credential": {"client_cert": "gateway.p12"},
    "renew_command": {"client_cert": "gateway.pem"},
    "rotate_key": {"client_cert": "gateway.pem", "renew_command": "/usr/bin/x"},
    "store": {"bound_to": "127.0.0.1"},
    "sas_key_file": {"sas_resource": "r"},
    "sas_resource": {"sas_key_file": "k"},
    "sas_policy": {"sas_key_file": "k", "sas_resource": "r"},
    "jwt_key_file": {"jwt_audience": "a"},
    "jwt_audience": {"jwt_key_file": "k"},
    "path": {"transport": "websocket"},
    "request_file": {"transport": "websocket"},
    "request_command": {"transport": "websocket"},
    "proxy_username": {"proxy": "http://p"},
    "proxy_password_file": {"proxy": "http://p", "proxy_username": "u"},
    "proxy_ca_file": {"proxy": "https://p"},
    "no_proxy": {"proxy": "http://p"},
    "server_key": {"server_cert": "c"},
}


@pytest.mark.parametrize("key", list(keys()))
def test_documented_units_defaults_and_examples_are_right(key: str, tmp_path: Path) -> None:
    """The unit and the default are those of the schema; the example is accepted and changes something."""
    _, unit, default, example = documented()[key]
    section, _, name = key.partition(".")
    required = {"upstream": {"host": "a"}, "listen": {"endpoint": "1883"}}.get(section, {})

    def configured(text: str, companions: dict[str, str] | None = None) -> Config:
        table = {**required, **(companions or {}), **tomllib.loads(text)}
        base = {
            "upstream": [{"host": "b"}, {"host": "c", "name": "cloud"}],
            "listen": [{"endpoint": "1884", "name": "sensors"}],
            "device": [],
        }
        if section in base:
            table = [*base[section], table]
        elif name == "directory":
            # There has to be one.
            table = {key: str(tmp_path) for key in table}
        return from_mapping({**base, section: table})

    assert unit == keys()[key].metadata.get("unit", "")
    assert example.startswith(f"{name} = ")
    companions = COMPANIONS.get(name, {})
    assert configured(example, companions) != configured("")
    if default == "required":
        assert keys()[key].default is attrs.NOTHING
    elif default == "not set":
        assert keys()[key].default is None
    else:
        assert configured(f"{name} = {default.strip('`')}") == configured("")


def test_the_documented_files_are_accepted() -> None:
    """Every example in TOML can be copied."""
    examples = re.findall(r"(?ms)^```toml\n(.*?)^```", DOCUMENT)
    assert len(examples) == 2
    for example in examples:
        from_mapping(tomllib.loads(example))


def test_the_documented_flags_exist() -> None:
    """Flags are the parameters of from_flags; each names keys that exist."""
    rows = re.findall(r"(?m)^\| `--([a-z-]+)[^|]*\| (.*) \|$", DOCUMENT)
    parameters = set(from_flags.__annotations__) - {"return"}
    assert {flag.replace("-", "_") for flag, _ in rows} == parameters
    assert {key for _, cell in rows for key in re.findall(r"`(.*?)`", cell)} <= set(keys())


def test_remedies_name_keys_that_exist() -> None:
    """What a record tells people to change can be changed."""
    named = {
        key
        for reason in EndReason
        for key in re.findall(r"\b(?:listen|upstream|tls|limits|timeouts|admission|devices)\.[a-z_]+", reason.remedy)
    }
    assert named
    assert named <= set(keys())


def test_the_configuration_does_without_twisted() -> None:
    """It belongs to the floor that does no I/O on a network."""
    script = "import sys, gateway.config; sys.exit(any(name.partition('.')[0] == 'twisted' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("endpoint", "is_open"),
    [
        ("unix:/x", False),
        ("unix:/x:mode=600", False),
        ("unix:/x:mode=664", False),
        ("unix:/x:mode=666", True),
        ("unix:/x:0662", True),
        ("1883", False),
        ("systemd:domain=UNIX:name=s", False),
    ],
)
def test_a_socket_that_every_user_can_connect_to(endpoint: str, is_open: bool) -> None:
    """To connect is to write, unix(7)."""
    assert is_open_to_all(endpoint) is is_open
