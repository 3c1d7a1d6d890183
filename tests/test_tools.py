"""The helper that decides between a skip and a failure."""

from __future__ import annotations

import pytest

from tests.tools import require_tool


def test_a_missing_program_is_a_skip_for_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason says what to install."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-broker is not installed: apt install no-such-broker"):
        require_tool("no-such-broker")


def test_a_missing_program_is_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CI does not run, nobody runs."""
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt install"):
        require_tool("no-such-broker")


def test_a_program_that_is_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path comes back, also in CI."""
    monkeypatch.setenv("CI", "true")
    assert require_tool("sh").endswith("/sh")
