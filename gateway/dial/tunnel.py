"""A tunnel through a proxy: what the proxy is asked, and what its answers mean.

In: bytes from the proxy.  Out: bytes to the proxy, then the bytes that already belong to the tunnel; `UpstreamFailure`
if the proxy refuses or fails.  No I/O.

HTTP CONNECT is RFC 9110 §9.3.6, SOCKS5 is RFC 1928 with the user name and password of RFC 1929.  The proxy gets the
broker's name and resolves it.  What was sent through the tunnel is TLS from its first byte.
"""

from __future__ import annotations

import base64
import ipaddress
from typing import Protocol

import h11

from gateway.config.proxies import ProxyServer
from gateway.errors import EndReason, UpstreamFailure
from gateway.net import http
from gateway.text import printable

# What a proxy speaks, by the first byte of its answer: HTTP, SOCKS5, or a TLS alert or handshake (RFC 8446 §5.1).
_SPOKEN = {ord("H"): "http", 5: "socks5", 0x15: "https", 0x16: "https"}
_PROTOCOLS = {"http": "HTTP without TLS", "https": "TLS", "socks5": "SOCKS5"}
# Bytes of an HTTP answer's head.  Proxies add a few hundred.
_LARGEST_HEAD = 16_384
_MOST_INTERIM_ANSWERS = 10
_SHOWN = 200

_VERSION, _CONNECT, _RESERVED = 5, 1, 0
_NO_AUTHENTICATION, _PASSWORD = 0, 2
_PASSWORD_VERSION = 1
_IPV4, _NAME, _IPV6 = 1, 3, 4
_ADDRESS_SIZES = {_IPV4: 4, _IPV6: 16}
# RFC 1928 §6.  The first two are the proxy's own decision; the others say that it could not reach the broker.
_SOCKS_REPLIES = {
    1: (EndReason.TCP_UNREACHABLE, "general failure"),
    2: (EndReason.PROXY_REFUSED, "not allowed by its rules"),
    3: (EndReason.TCP_UNREACHABLE, "network unreachable"),
    4: (EndReason.TCP_UNREACHABLE, "host unreachable"),
    5: (EndReason.TCP_REFUSED, "connection refused"),
    6: (EndReason.TCP_TIMEOUT, "TTL expired"),
    7: (EndReason.PROXY_REFUSED, "command not supported"),
    8: (EndReason.PROXY_REFUSED, "address type not supported"),
}


class Tunnel(Protocol):
    """The exchange with one proxy that opens one tunnel."""

    is_open: bool
    rest: bytes
    """What came behind the proxy's last answer, once the tunnel is open."""

    def start(self) -> bytes:
        """Return the first bytes for the proxy."""

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the proxy and return those to send.  Raises `UpstreamFailure`."""


def tunnel_to(host: str, port: int, proxy: ProxyServer) -> Tunnel:
    """Return the exchange that opens a tunnel to `host`, a normalised name or an address, through `proxy`."""
    name = host.removesuffix(".")
    return SocksTunnel(name, port, proxy) if proxy.scheme == "socks5" else HttpTunnel(name, port, proxy)


def other_protocol(first: int, proxy: ProxyServer) -> str:
    """Return what to do about a proxy whose answer is not of its scheme, and begins with this byte; "" if unknown."""
    scheme = _SPOKEN.get(first, proxy.scheme)
    if scheme == proxy.scheme:
        return ""
    return f": it speaks {_PROTOCOLS[scheme]}; use {scheme}:// in the upstream's proxy"


class HttpTunnel:
    """HTTP CONNECT.  See `Tunnel`."""

    def __init__(self, host: str, port: int, proxy: ProxyServer) -> None:
        self.is_open = False
        self.rest = b""
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LARGEST_HEAD)
        self._authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._proxy = proxy
        self._interim_answers = 0
        self._first = b""

    def start(self) -> bytes:
        """See `Tunnel`."""
        headers = [("Host", self._authority)]
        if self._proxy.username:
            credentials = f"{self._proxy.username}:{self._proxy.password}".encode()
            headers.append(("Proxy-Authorization", f"Basic {base64.b64encode(credentials).decode()}"))
        request = h11.Request(method="CONNECT", target=self._authority, headers=headers)
        return (self._connection.send(request) or b"") + (self._connection.send(h11.EndOfMessage()) or b"")

    def receive(self, data: bytes) -> bytes:
        """See `Tunnel`.  An answer of 2xx opens the tunnel, whatever length it claims (RFC 9110 §9.3.6)."""
        self._first += data[: http.LONGEST - len(self._first)]
        if not http.may_be_http(self._first):
            # Behind TLS with the proxy, the byte says nothing about its scheme.
            hint = other_protocol(self._first[0], self._proxy) if self._proxy.scheme == "http" else ""
            detail = f"{self._proxy.address} sent no valid HTTP answer to CONNECT {self._authority}{hint}"
            raise UpstreamFailure(EndReason.PROXY_UNREACHABLE, detail)
        try:
            self._connection.receive_data(data)
            while not self.is_open:
                event = self._connection.next_event()
                if isinstance(event, h11.Response):
                    self._judge(event)
                elif isinstance(event, h11.InformationalResponse):
                    self._interim_answers += 1
                    if self._interim_answers > _MOST_INTERIM_ANSWERS:
                        raise self._failure(EndReason.PROXY_UNREACHABLE, "sends too many interim answers")
                else:
                    break
        except h11.RemoteProtocolError as error:
            words = printable(str(error), _SHOWN)
            raise self._failure(EndReason.PROXY_UNREACHABLE, f"sent no valid HTTP answer ({words})") from None
        return b""

    def _judge(self, answer: h11.Response) -> None:
        if 200 <= answer.status_code < 300:
            self.is_open = True
            self.rest, _ = self._connection.trailing_data
            return
        said = printable(f"{answer.status_code} {answer.reason.decode('latin-1')}".strip(), _SHOWN)
        if answer.status_code == 407:
            values = [value for name, value in answer.headers if name == b"proxy-authenticate" and value.strip()]
            schemes = sorted({value.split()[0].decode("latin-1") for value in values})
            offered = f"; it accepts {printable(', '.join(schemes), _SHOWN)}" if schemes else ""
            raise self._failure(EndReason.PROXY_AUTHENTICATION, f"answered {said}{offered}")
        # 5xx: the proxy works, and could not reach the broker.
        reason = EndReason.TCP_UNREACHABLE if answer.status_code >= 500 else EndReason.PROXY_REFUSED
        raise self._failure(reason, f"answered {said}")

    def _failure(self, reason: EndReason, words: str) -> UpstreamFailure:
        return UpstreamFailure(reason, f"{self._proxy.address} {words} to CONNECT {self._authority}")


class SocksTunnel:
    """SOCKS5.  See `Tunnel`."""

    def __init__(self, host: str, port: int, proxy: ProxyServer) -> None:
        self.is_open = False
        self.rest = b""
        self._host = host
        self._port = port
        self._proxy = proxy
        self._received = b""
        self._next = self._read_method

    def start(self) -> bytes:
        """See `Tunnel`."""
        methods = (_NO_AUTHENTICATION, _PASSWORD) if self._proxy.username else (_NO_AUTHENTICATION,)
        return bytes((_VERSION, len(methods), *methods))

    def receive(self, data: bytes) -> bytes:
        """See `Tunnel`."""
        self._received += data
        answer = b""
        while not self.is_open:
            step = self._next
            told = step()
            if told is None:
                break
            answer += told
        if self.is_open:
            self.rest, self._received = self._received, b""
        return answer

    def _take(self, size: int) -> bytes | None:
        if len(self._received) < size:
            return None
        taken, self._received = self._received[:size], self._received[size:]
        return taken

    def _read_method(self) -> bytes | None:
        self._check_version()
        answer = self._take(2)
        if answer is None:
            return None
        if answer[1] == _NO_AUTHENTICATION:
            return self._request()
        if answer[1] == _PASSWORD and self._proxy.username:
            username, password = self._proxy.username.encode(), self._proxy.password.encode()
            self._next = self._read_status
            return bytes((_PASSWORD_VERSION, len(username))) + username + bytes((len(password),)) + password
        offered = "no authentication, or user name and password" if self._proxy.username else "no authentication"
        raise self._failure(EndReason.PROXY_AUTHENTICATION, f"accepts no method that was offered: {offered}")

    def _read_status(self) -> bytes | None:
        answer = self._take(2)
        if answer is None:
            return None
        if answer[1] != 0:
            raise self._failure(EndReason.PROXY_AUTHENTICATION, "refused the user name or the password")
        return self._request()

    def _request(self) -> bytes:
        self._next = self._read_reply
        try:
            address = ipaddress.ip_address(self._host.partition("%")[0])
        except ValueError:
            name = self._host.encode("ascii")
            target = bytes((_NAME, len(name))) + name
        else:
            target = bytes((_IPV4 if address.version == 4 else _IPV6,)) + address.packed
        return bytes((_VERSION, _CONNECT, _RESERVED)) + target + self._port.to_bytes(2, "big")

    def _read_reply(self) -> bytes | None:
        head = self._received[:5]
        self._check_version()
        if len(head) < 2:
            return None
        if head[1] != 0:
            reason, words = _SOCKS_REPLIES.get(head[1], (EndReason.PROXY_REFUSED, f"reply {head[1]}"))
            raise self._failure(reason, f"answered: {words}")
        if len(head) < 5:
            return None
        kind = head[3]
        size = 1 + head[4] if kind == _NAME else _ADDRESS_SIZES.get(kind)
        if size is None:
            raise self._failure(EndReason.PROXY_UNREACHABLE, f"gave an address of an unknown type ({kind})")
        if self._take(4 + size + 2) is None:
            return None
        self.is_open = True
        return b""

    def _check_version(self) -> None:
        """Refuse an answer by its first byte: a server that speaks something else may wait for more."""
        if self._received and self._received[0] != _VERSION:
            hint = other_protocol(self._received[0], self._proxy)
            raise self._failure(EndReason.PROXY_UNREACHABLE, f"does not speak SOCKS5{hint}")

    def _failure(self, reason: EndReason, words: str) -> UpstreamFailure:
        return UpstreamFailure(reason, f"{self._proxy.address} {words}")
