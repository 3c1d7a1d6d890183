"""What a proxy is asked and what its answers mean, without sockets; and which proxy is used."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from gateway.config import from_mapping
from gateway.config.proxies import ProxyServer, from_environment, is_direct
from gateway.dial.tunnel import Tunnel, tunnel_to
from gateway.errors import ConfigError, EndReason, UpstreamFailure

HTTP = ProxyServer("http", "proxy.example", 3128)
HTTP_WITH_PASSWORD = ProxyServer("http", "proxy.example", 3128, "user", "pass:wörd")
HTTPS = ProxyServer("https", "proxy.example", 443)
SOCKS = ProxyServer("socks5", "proxy.example", 1080)
SOCKS_WITH_PASSWORD = ProxyServer("socks5", "proxy.example", 1080, "user", "word")

CUTS = pytest.mark.parametrize("at_a_time", [1, 3, 100_000], ids=["bytewise", "by threes", "whole"])


def fed(tunnel: Tunnel, data: bytes, at_a_time: int) -> bytes:
    """Give a tunnel the proxy's bytes, cut into pieces, until it is open; return what it sends."""
    sent = b""
    while data and not tunnel.is_open:
        sent += tunnel.receive(data[:at_a_time])
        data = data[at_a_time:]
    # What the connection would be given next.
    tunnel.rest += data
    return sent


def failure(proxy: ProxyServer, answer: bytes, at_a_time: int = 100_000) -> UpstreamFailure:
    """Return what an answer of the proxy ends in."""
    tunnel = tunnel_to("broker.example", 8883, proxy)
    tunnel.start()
    with pytest.raises(UpstreamFailure) as caught:
        fed(tunnel, answer, at_a_time)
    assert not tunnel.is_open
    return caught.value


@CUTS
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 Connection established\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nProxy-agent: tinyproxy\r\n\r\n",
        b"HTTP/1.1 204 whatever\r\n\r\n",
        # RFC 9110 §9.3.6: Content-Length and Transfer-Encoding of a 2xx are ignored.
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_any_2xx_opens_the_tunnel_and_what_follows_belongs_to_it(answer: bytes, at_a_time: int) -> None:
    """Bytes behind the header are TLS's."""
    tunnel = tunnel_to("broker.example", 8883, HTTP)
    assert tunnel.start() == b"CONNECT broker.example:8883 HTTP/1.1\r\nHost: broker.example:8883\r\n\r\n"
    assert fed(tunnel, answer + b"\x16\x03\x03", at_a_time) == b""
    assert tunnel.is_open
    assert tunnel.rest == b"\x16\x03\x03"


def test_the_proxy_gets_the_name_and_not_an_address() -> None:
    """An address stays one, in brackets if it is IPv6; a trailing dot is the resolver's."""
    assert b"CONNECT broker.example:443 " in tunnel_to("broker.example.", 443, HTTP).start()
    assert b"CONNECT [2001:db8::1]:443 " in tunnel_to("2001:db8::1", 443, HTTP).start()


def test_credentials_are_sent_as_basic() -> None:
    """RFC 7617, in UTF-8."""
    request = tunnel_to("broker.example", 8883, HTTP_WITH_PASSWORD).start()
    credentials = base64.b64encode("user:pass:wörd".encode())
    assert b"\r\nProxy-Authorization: Basic " + credentials + b"\r\n" in request
    assert b"Proxy-Authorization" not in tunnel_to("broker.example", 8883, HTTP).start()


@CUTS
@pytest.mark.parametrize(
    ("answer", "reason", "named"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", EndReason.PROXY_REFUSED, "403 Forbidden"),
        (b"HTTP/1.1 405 No\r\nContent-Length: 3\r\n\r\nwhy", EndReason.PROXY_REFUSED, "405"),
        (b"HTTP/1.1 301 Moved\r\nLocation: /\r\n\r\n", EndReason.PROXY_REFUSED, "301"),
        (
            b"HTTP/1.1 407 Auth\r\nProxy-Authenticate: NTLM\r\nProxy-Authenticate: Negotiate\r\n\r\n",
            EndReason.PROXY_AUTHENTICATION,
            "NTLM, Negotiate",
        ),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", EndReason.TCP_UNREACHABLE, "502 Bad Gateway"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", EndReason.TCP_UNREACHABLE, "503"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", EndReason.PROXY_UNREACHABLE, "no valid HTTP answer"),
        (b"\x15\x03\x01\x00\x02\x02\x46" + bytes(20), EndReason.PROXY_UNREACHABLE, "no valid HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000, EndReason.PROXY_UNREACHABLE, "no valid HTTP answer"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 100, EndReason.PROXY_UNREACHABLE, "too many"),
        (b"HTTP/1.1 403 \x1b[2J\xff\r\n\r\n", EndReason.PROXY_REFUSED, "403"),
    ],
)
def test_what_http_answers_mean(answer: bytes, reason: EndReason, named: str, at_a_time: int) -> None:
    """The proxy's own refusal is the proxy's; 5xx says that it could not reach the broker."""
    found = failure(HTTP_WITH_PASSWORD, answer, at_a_time)
    assert found.reason is reason
    assert named in found.detail
    assert "proxy.example:3128" in found.detail
    assert found.detail.isprintable()
    assert "wörd" not in str(found)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (300, EndReason.PROXY_REFUSED),
        (408, EndReason.PROXY_REFUSED),
        (499, EndReason.PROXY_REFUSED),
        (500, EndReason.TCP_UNREACHABLE),
        (599, EndReason.TCP_UNREACHABLE),
    ],
)
def test_the_borders_between_statuses(status: int, reason: EndReason) -> None:
    """2xx opens, 5xx is the broker's failure, all else the proxy's."""
    assert failure(HTTP, b"HTTP/1.1 %d Status\r\n\r\n" % status, 1000).reason is reason
    tunnel = tunnel_to("broker.example", 8883, HTTP)
    tunnel.start()
    fed(tunnel, b"HTTP/1.1 299 Status\r\n\r\n", 1000)
    assert tunnel.is_open


def test_an_answer_is_bounded() -> None:
    """Ten interim answers and 16 KiB of a head, and no more."""
    interim, final = b"HTTP/1.1 102 Processing\r\n\r\n", b"HTTP/1.1 200 OK\r\n"
    for answer in (interim * 10 + final + b"\r\n", final + b"X: " + b"a" * 16_000 + b"\r\n\r\n"):
        tunnel = tunnel_to("broker.example", 8883, HTTP)
        tunnel.start()
        fed(tunnel, answer, 1000)
        assert tunnel.is_open
    for answer in (interim * 11 + final + b"\r\n", final + b"X: " + b"a" * 17_000 + b"\r\n\r\n"):
        assert failure(HTTP, answer, 1000).reason is EndReason.PROXY_UNREACHABLE


@CUTS
@pytest.mark.parametrize(
    "bound", [b"\x01\x7f\0\0\1\0\x50", b"\x04" + bytes(16) + b"\0\x50", b"\x03\x05proxy\0\x50"], ids=["4", "6", "name"]
)
def test_socks5_opens_the_tunnel(bound: bytes, at_a_time: int) -> None:
    """RFC 1928, by name; the address that the proxy bound may be of any type."""
    tunnel = tunnel_to("broker.example", 8883, SOCKS)
    assert tunnel.start() == b"\x05\x01\x00"
    sent = fed(tunnel, b"\x05\x00" + b"\x05\x00\x00" + bound + b"\x16\x03", at_a_time)
    assert sent == b"\x05\x01\x00\x03\x0ebroker.example" + (8883).to_bytes(2, "big")
    assert tunnel.is_open
    assert tunnel.rest == b"\x16\x03"


@CUTS
def test_socks5_credentials(at_a_time: int) -> None:
    """RFC 1929, if the proxy asks for them."""
    tunnel = tunnel_to("192.0.2.1", 8883, SOCKS_WITH_PASSWORD)
    assert tunnel.start() == b"\x05\x02\x00\x02"
    sent = fed(tunnel, b"\x05\x02" + b"\x01\x00" + b"\x05\x00\x00\x01\x7f\0\0\1\0\x50", at_a_time)
    assert sent == b"\x01\x04user\x04word" + b"\x05\x01\x00\x01\xc0\x00\x02\x01" + (8883).to_bytes(2, "big")
    assert tunnel.is_open


@pytest.mark.parametrize(
    ("host", "target"),
    [
        ("192.0.2.1", b"\x01\xc0\x00\x02\x01"),
        ("2001:db8::1", b"\x04\x20\x01\x0d\xb8" + bytes(11) + b"\x01"),
        ("fe80::1%eth0", b"\x04\xfe\x80" + bytes(13) + b"\x01"),
        ("b" * 63 + ".example.", b"\x03\x47" + b"b" * 63 + b".example"),
    ],
)
def test_socks5_gets_an_address_or_a_name(host: str, target: bytes) -> None:
    """Of its own type each, without what only the resolver or this machine knows."""
    tunnel = tunnel_to(host, 443, SOCKS)
    tunnel.start()
    assert fed(tunnel, b"\x05\x00", 2) == b"\x05\x01\x00" + target + b"\x01\xbb"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (1, "general failure"),
        (2, "not allowed"),
        (3, "network unreachable"),
        (4, "host unreachable"),
        (5, "connection refused"),
        (6, "TTL expired"),
        (7, "command not supported"),
        (8, "address type not supported"),
        (9, "reply 9"),
    ],
)
def test_a_socks5_reply_has_words(reply: int, words: str) -> None:
    """RFC 1928 §6."""
    assert words in failure(SOCKS, b"\x05\x00\x05" + bytes([reply]), 1).detail


@CUTS
@pytest.mark.parametrize(
    ("proxy", "answer", "reason"),
    [
        (SOCKS, b"\x05\xff", EndReason.PROXY_AUTHENTICATION),
        (SOCKS, b"\x05\x02", EndReason.PROXY_AUTHENTICATION),
        (SOCKS_WITH_PASSWORD, b"\x05\x02\x01\x01", EndReason.PROXY_AUTHENTICATION),
        (SOCKS, b"\x05\x00\x05\x01", EndReason.TCP_UNREACHABLE),
        (SOCKS, b"\x05\x00\x05\x02", EndReason.PROXY_REFUSED),
        (SOCKS, b"\x05\x00\x05\x03", EndReason.TCP_UNREACHABLE),
        (SOCKS, b"\x05\x00\x05\x04", EndReason.TCP_UNREACHABLE),
        (SOCKS, b"\x05\x00\x05\x05", EndReason.TCP_REFUSED),
        (SOCKS, b"\x05\x00\x05\x06", EndReason.TCP_TIMEOUT),
        (SOCKS, b"\x05\x00\x05\x07", EndReason.PROXY_REFUSED),
        (SOCKS, b"\x05\x00\x05\x77", EndReason.PROXY_REFUSED),
        (SOCKS, b"\x04\x00", EndReason.PROXY_UNREACHABLE),
        (SOCKS, b"HTTP/1.1 400 Bad Request\r\n", EndReason.PROXY_UNREACHABLE),
        (SOCKS, b"\x05\x00\x05\x00\x00\x09\x00", EndReason.PROXY_UNREACHABLE),
    ],
)
def test_what_socks5_answers_mean(proxy: ProxyServer, answer: bytes, reason: EndReason, at_a_time: int) -> None:
    """What the proxy decides is the proxy's; what it could not reach is the broker's."""
    assert failure(proxy, answer, at_a_time).reason is reason


SOCKS5, TLS_ALERT, TLS_HANDSHAKE = b"\x05", b"\x15", b"\x16"


@pytest.mark.parametrize(
    ("proxy", "first", "scheme"),
    [
        (HTTP, SOCKS5, "socks5://"),
        (HTTP, TLS_ALERT, "https://"),
        (HTTP, TLS_HANDSHAKE, "https://"),
        (HTTP, b"S", None),
        (HTTP, b"\x00", None),
        (HTTP, b"HTTP:", None),
        (HTTPS, SOCKS5, None),
        (SOCKS, b"H", "http://"),
        (SOCKS, TLS_ALERT, "https://"),
        (SOCKS, b"\x04", None),
        (SOCKS, SOCKS5 + b"\x00H", "http://"),
    ],
)
def test_the_first_byte_of_another_protocol_is_enough(proxy: ProxyServer, first: bytes, scheme: str | None) -> None:
    """Who speaks it may wait for more. The scheme that the proxy does speak is named, and never used by itself."""
    found = failure(proxy, first, 1)
    assert found.reason is EndReason.PROXY_UNREACHABLE
    assert found.detail.startswith(proxy.address)
    assert ("; use " in found.detail) == (scheme is not None)
    if scheme is not None:
        assert f"; use {scheme} in the upstream's proxy" in found.detail


def test_the_methods_that_were_offered_are_named() -> None:
    """Whoever set no user name sees that the proxy wants one."""
    assert "user name" not in failure(SOCKS, b"\x05\xff").detail
    assert "or user name and password" in failure(SOCKS_WITH_PASSWORD, b"\x05\xff").detail


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://proxy.example", "http://proxy.example:3128"),
        ("http://Proxy.Example:8080/", "http://proxy.example:8080"),
        ("https://proxy.example", "https://proxy.example:443"),
        ("socks5://192.0.2.1", "socks5://192.0.2.1:1080"),
        ("http://[2001:db8::1]:8080", "http://[2001:db8::1]:8080"),
    ],
)
def test_urls_of_proxies(url: str, address: str) -> None:
    """Ports have their usual defaults."""
    assert ProxyServer.of(url).address == address


def test_credentials_in_the_environments_url_are_kept_and_not_shown() -> None:
    """They may be percent-encoded."""
    server = ProxyServer.of("http://user:p%40ss@proxy.example:8080")
    assert (server.username, server.password) == ("user", "p@ss")
    assert "p@ss" not in repr(server) + server.address


@pytest.mark.parametrize(
    ("upstream", "named"),
    [
        ({"proxy": "proxy.example:3128"}, "http://"),
        ({"proxy": "ftp://proxy.example"}, "ftp"),
        ({"proxy": "socks4://proxy.example"}, "socks5"),
        ({"proxy": "http://user:hunter2@proxy.example"}, "proxy_password_file"),
        ({"proxy": "http://proxy.example/path"}, "port"),
        ({"proxy": "http://proxy.example:99999"}, "port"),
        ({"proxy": "http://"}, "empty"),
        ({"no_proxy": ["broker.example"]}, "no proxy"),
        ({"proxy_username": "a"}, "proxy"),
        ({"proxy": "http://proxy.example", "proxy_password_file": "f"}, "proxy_username"),
        ({"proxy": "http://proxy.example", "proxy_ca_file": "ca.pem"}, "https"),
        ({"proxy": "http://proxy.example", "no_proxy": ["a b"]}, "no_proxy[0]"),
        ({"proxy": "http://proxy.example", "proxy_username": "a\nb"}, "control"),
    ],
)
def test_what_is_no_proxy_is_refused(upstream: dict[str, Any], named: str) -> None:
    """With the key and the cause, and without a password."""
    with pytest.raises(ConfigError) as caught:
        from_mapping({"upstream": [{"host": "broker.example", **upstream}]})
    (problem,) = caught.value.problems
    assert problem.startswith("upstream[0].")
    assert named in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    ("host", "entries", "direct"),
    [
        ("broker.example.com", ["example.com"], True),
        ("broker.example.com", [".example.com"], True),
        ("broker.example.com", ["*.example.com"], True),
        ("broker.example.com.", ["Example.COM."], True),
        ("example.com", [".example.com"], True),
        ("notexample.com", ["example.com"], False),
        ("broker.example.com", ["broker"], False),
        ("10.1.2.3", ["10.0.0.0/8"], True),
        ("10.1.2.3", ["10.1.2.3"], True),
        ("11.1.2.3", ["10.0.0.0/8"], False),
        ("2001:db8::1", ["2001:db8::/32"], True),
        ("2001:db8::1", ["[2001:db8::1]"], True),
        ("broker.example.com", ["10.0.0.0/8"], False),
        ("broker.example.com", ["*"], True),
        ("broker.example.com", [], False),
    ],
)
def test_what_is_reached_without_the_proxy(host: str, entries: list[str], direct: bool) -> None:
    """Names with all below them, addresses, networks, `*`."""
    assert is_direct(host, entries) is direct


def test_the_environment_is_read_as_curl_reads_it() -> None:
    """Lower case first; a URL without a scheme is HTTP."""
    both = {"https_proxy": "a.example:8080", "HTTPS_PROXY": "http://b.example", "NO_PROXY": "x.example, .y.example"}
    assert from_environment(both) == ("http://a.example:8080", ["x.example", ".y.example"])
    assert from_environment({"HTTP_PROXY": "http://c.example"}) == ("", [])
