"""What the opening handshake of a broker's WebSocket asks for.

In: the keys of an upstream, a file, a program.  Out: a `Request` for each connection; `UpstreamFailure` if the program
does not give one.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field, frozen

from gateway.config import Config, Upstream
from gateway.config.secret_files import SecretUnavailable, read_secret
from gateway.errors import ConfigError, EndReason, UpstreamFailure
from gateway.net.websocket import Request, parse_request_lines
from gateway.rules.secrets import Programs
from gateway.rules.turns import ANYONE, Visitor

_HTTPS_PORT = 443
_PROGRAM_TIMEOUT = 10.0  # seconds


@frozen(eq=False)
class WebSocketRoute:
    """How one broker's WebSocket is opened.  `lines` are those of `request_file`; they may be secret."""

    authority: str
    path: str
    programs: Programs | None
    lines: str = field(default="", repr=False)
    command: Sequence[str] = field(default=(), repr=False)

    async def request(self, visitor: Visitor = ANYONE) -> Request:
        """Return what to ask for now; a program is run for each connection.

        Raises `UpstreamFailure`, and `Refusal` if it was not the visitor's turn at a program in time.
        """
        lines = self.lines
        try:
            if self.programs is not None and self.command:
                output = await self.programs.run(self.command, {}, _PROGRAM_TIMEOUT, visitor)
                lines = f"{lines}\n{output.decode()}"
            query, headers = parse_request_lines(lines)
        except SecretUnavailable as problem:
            raise UpstreamFailure(EndReason.CREDENTIALS_UNAVAILABLE, f"request_command: {problem}") from None
        except UnicodeDecodeError:
            raise UpstreamFailure(EndReason.CREDENTIALS_UNAVAILABLE, "request_command: not UTF-8") from None
        except ValueError as error:
            raise UpstreamFailure(EndReason.CREDENTIALS_UNAVAILABLE, f"request_command: {error}") from None
        if query:
            return Request(self.authority, f"{self.path}{'&' if '?' in self.path else '?'}{query}", headers)
        return Request(self.authority, self.path, headers)


def websocket_routes(config: Config, programs: Programs | None) -> list[WebSocketRoute | None]:
    """Return how to open each upstream's WebSocket, in order; `None` for MQTT in TLS.  Raises `ConfigError`."""
    problems: list[str] = []
    routes: list[WebSocketRoute | None] = []
    for index, upstream in enumerate(config.upstream):
        route = None
        if upstream.transport == "websocket":
            try:
                route = _route(upstream, programs)
            except SecretUnavailable as problem:
                problems.append(f"upstream[{index}].request_file: {problem}")
            except UnicodeDecodeError:
                problems.append(f"upstream[{index}].request_file: {upstream.request_file} is not UTF-8")
            except ValueError as error:
                problems.append(f"upstream[{index}].request_file: {upstream.request_file}: {error}")
        routes.append(route)
    if problems:
        raise ConfigError(problems)
    return routes


def _route(upstream: Upstream, programs: Programs | None) -> WebSocketRoute:
    lines = read_secret(upstream.request_file).decode("utf-8-sig") if upstream.request_file is not None else ""
    parse_request_lines(lines)
    if upstream.request_command and programs is None:
        raise ValueError("request_command: programs cannot be run here")
    name = upstream.verify_name
    host = f"[{name}]" if ":" in name else name
    authority = host if upstream.port == _HTTPS_PORT else f"{host}:{upstream.port}"
    return WebSocketRoute(authority, upstream.path or "/mqtt", programs, lines, upstream.request_command)
