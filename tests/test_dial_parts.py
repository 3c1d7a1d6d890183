"""Parts of dialling, each alone: what a WebSocket is asked for with, what a proof of a certificate waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from gateway.config import Upstream
from gateway.config.secret_files import SecretUnavailable
from gateway.dial.proof import Proof
from gateway.dial.websocket import websocket_routes
from gateway.errors import ConfigError, EndReason, UpstreamFailure
from gateway.net.websocket import Request


class Programs:
    """Runs nothing: gives what the test says."""

    def __init__(self, output: bytes | Exception = b"") -> None:
        self.output = output
        self.asked: list[tuple[object, ...]] = []

    async def run(self, *asked: object) -> bytes:
        """See `gateway.rules.secrets.Programs`."""
        self.asked.append(asked)
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


def routes(programs: Programs | None, *upstreams: dict[str, Any]) -> list[Any]:
    """Return the routes of upstreams at broker.test."""
    config: Any = type("Config", (), {"upstream": [Upstream(**{"host": "broker.test", **each}) for each in upstreams]})
    return websocket_routes(config, programs)  # type: ignore[arg-type]


def asked_of(programs: Programs | None = None, **upstream: Any) -> Request:
    """Return what the WebSocket of an upstream is asked for with."""
    (route,) = routes(programs, {"transport": "websocket", **upstream})
    got: list[Request] = []
    Deferred.fromCoroutine(route.request()).addCallback(got.append)
    return got[0]


def failure_of(programs: Programs) -> UpstreamFailure:
    """Return why there is nothing to ask with."""
    (route,) = routes(programs, {"transport": "websocket", "request_command": ("/bin/token",)})
    got: list[Failure] = []
    Deferred.fromCoroutine(route.request()).addErrback(got.append)
    failure = got[0].value
    assert isinstance(failure, UpstreamFailure)
    return failure


@pytest.mark.parametrize(
    ("keys", "authority", "target"),
    [
        ({"port": 443}, "broker.test", "/mqtt"),
        ({"port": 8443, "path": "/a"}, "broker.test:8443", "/a"),
        ({"port": 443, "host": "2001:db8::1"}, "[2001:db8::1]", "/mqtt"),
        ({"port": 444, "host": "10.0.0.1", "server_name": "other.test"}, "other.test:444", "/mqtt"),
    ],
)
def test_a_websocket_is_asked_for_at_its_address(keys: dict[str, Any], authority: str, target: str) -> None:
    """Port 443 is left out (RFC 9110 §7.2)."""
    assert asked_of(**keys) == Request(authority, target, [])


def test_lines_of_the_file_and_of_the_program_are_put_together(tmp_path: Path) -> None:
    """A query is added to that of the path."""
    file = tmp_path / "lines"
    file.write_bytes(b"A: 1\n?x=1\n")
    programs = Programs(b"B: 2\n?y=2")
    assert asked_of(programs, request_file=file) == Request("broker.test:8883", "/mqtt?x=1", [("A", "1")])
    assert programs.asked == []
    asked = asked_of(programs, request_file=file, request_command=("/bin/token",), path="/p?q=0")
    assert asked == Request("broker.test:8883", "/p?q=0&x=1&y=2", [("A", "1"), ("B", "2")])
    assert programs.asked[0][:3] == (("/bin/token",), {}, 10.0)


def test_a_route_shows_no_secret(tmp_path: Path) -> None:
    """What a log or a traceback shows of it has neither the lines nor the program's arguments."""
    file = tmp_path / "lines"
    file.write_text("A: secret")
    keys = {"transport": "websocket", "request_file": file, "request_command": ("/bin/token", "secret")}
    (route,) = routes(Programs(), keys)
    assert "secret" in route.lines
    assert "secret" not in repr(route)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (SecretUnavailable("it failed"), "request_command: it failed"),
        (b"A: \xff", "request_command: not UTF-8"),
        (b"Host: x", "request_command: line 2: the gateway sets this field itself"),
    ],
)
def test_a_program_that_gives_nothing_of_use_is_a_failure(output: bytes | Exception, words: str) -> None:
    """The broker is not asked without its credentials."""
    failure = failure_of(Programs(output))
    assert (failure.reason, failure.detail) == (EndReason.CREDENTIALS_UNAVAILABLE, words)


def test_all_that_is_wrong_with_request_files_is_told(tmp_path: Path) -> None:
    """Each with its upstream; an upstream without WebSocket has no route."""
    (tmp_path / "latin").write_bytes(b"A: \xff")
    (tmp_path / "odd").write_bytes(b"no header")
    (tmp_path / "good").write_bytes(b"A: 1")
    files: list[dict[str, Any]] = [
        {"transport": "websocket", "request_file": tmp_path / name} for name in ("none", "latin", "odd", "good")
    ]
    with pytest.raises(ConfigError) as raised:
        routes(None, {}, *files, {"transport": "websocket", "request_command": ("/bin/token",)})
    told = raised.value.problems
    assert [problem.partition(".")[0] for problem in told] == [f"upstream[{index}]" for index in (1, 2, 3, 5)]
    assert "not UTF-8" in told[1]
    assert routes(None, {})[0] is None


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda proof: proof.upstream_gone(), EndReason.UPSTREAM_LOST),
        (lambda proof: proof.fail("oops"), EndReason.INTERNAL_ERROR),
        (
            lambda proof: proof.upstream_broken(UpstreamFailure(EndReason.TLS_CLIENT_CERTIFICATE_REFUSED, "no")),
            EndReason.TLS_CLIENT_CERTIFICATE_REFUSED,
        ),
    ],
)
def test_a_proof_ends_with_the_first_failure(end: Any, reason: EndReason) -> None:
    """What the broker sends is of no matter; the connection may end in more than one way."""
    proof = Proof()
    nobody: Any = None
    proof.upstream_verified(nobody, nobody)
    proof.upstream_received(b"\x20")
    assert not proof.ended.called
    got: list[Failure] = []
    proof.ended.addErrback(got.append)
    end(proof)
    proof.upstream_gone()
    failure = got[0].value
    assert isinstance(failure, UpstreamFailure)
    assert failure.reason is reason
    proof.gauge.pauseProducing()
