"""Renews the certificates whose tables have a `renew_command`: when each is due, a few at a time, again after failures.

In: the configuration in use, the time of day.  Out: replaced files, which the gateway then loads as it does every
changed file; log lines; what fails, for status and metrics.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from attrs import define, frozen
from cryptography import x509
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from gateway.config import TLS, Config, Upstream
from gateway.config.algorithms import Algorithms
from gateway.config.devices import BrokenRule
from gateway.config.secret_files import SecretUnavailable
from gateway.dial.dialler import Dialler
from gateway.errors import SessionEnd, let_frames_go
from gateway.prepared import Prepared
from gateway.rules.secrets import Programs
from gateway.text import printable, unprintable_escaped
from gateway.tls.devices import DevicePolicies
from gateway.tls.renewal import (
    Held,
    Renewable,
    RenewalFailed,
    check_clock,
    checked_chain,
    due_at,
    key_for,
    obstacle,
    read_held,
    replace,
    request_for,
)
from gateway.tls.trust import ClientIdentity, PrivateKey, TLSPolicy

OWN = "tls"
"""The name of the gateway's own certificate."""

_TIMEOUT = 60.0  # seconds for the program
_LARGEST_CHAIN = 65_535  # bytes
_AT_A_TIME = 2
_PER_SWEEP = 100
_ROUND = 10.0  # seconds between two looks at all certificates
# A part of the lifetime, so that certificates issued together are not renewed together.
_JITTER = 1 / 24
# Seconds between attempts: doubled each time, and shorter when little time is left.
_FIRST_RETRY, _LAST_RETRY, _SHARE_OF_REST = 60.0, 6 * 3600.0, 0.1
# Where a timer renews, the gateway cannot write; only then, and only after this part of the lifetime, it says so.
_OVERDUE = 3 / 4
_MAX_PROBLEM = 1000  # characters

_log = Logger(namespace="gateway")


@frozen(kw_only=True)
class Renewer:
    """Renews one certificate.

    `in_thread` runs slow work; `now` gives the time of day; `current` gives the configuration in use and its dialler.
    """

    programs: Programs
    in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
    now: Callable[[], datetime]
    current: Callable[[], tuple[Config, Dialler]]

    async def renew(self, table: Renewable) -> x509.Certificate:
        """Return the new certificate, which has replaced the file of the old one.  Raises `RenewalFailed`."""
        try:
            return await self._renew(table)
        except SecretUnavailable as problem:
            raise RenewalFailed(f"renew_command: {problem}") from None
        except SessionEnd as end:
            raise RenewalFailed(f"no broker accepted the new certificate: {end.detail or end.reason}") from None

    async def _renew(self, table: Renewable) -> x509.Certificate:
        held: Held = await self.in_thread(lambda: read_held(table))
        check_clock(held.leaf, self.now())
        if problem := obstacle(held.file):
            raise RenewalFailed(f"{problem}; run `mqtts-gateway device renew --due` from a timer")
        key: PrivateKey = await self.in_thread(lambda: key_for(held.identity, rotate=table.rotate_key))
        environment = {
            name: os.environ[name] for name in ("CREDENTIALS_DIRECTORY", "STATE_DIRECTORY") if name in os.environ
        }
        output = await self.programs.output(
            table.renew_command,
            environment,
            _TIMEOUT,
            given=request_for(held.leaf, key),
            limit=_LARGEST_CHAIN,
        )
        chain = checked_chain(output, key, held.leaf, self.now())
        await self._prove(ClientIdentity(tuple(chain), key), getattr(table, "upstream", ()))
        await self.in_thread(lambda: replace(held, chain, key if table.rotate_key else None))
        return chain[0]

    async def _prove(self, identity: ClientIdentity, upstreams: tuple[str, ...]) -> None:
        """Show the certificate to a broker, under the configuration that is in use by then."""
        config, dialler = self.current()
        # Nothing here keeps the configuration, which may have thousands of rules.
        algorithms = {upstream: config.algorithms(upstream) for upstream in config.upstream}
        make = partial(_policies, config.tls, config.all_algorithms, identity)
        del config
        policies: DevicePolicies[str] = await self.in_thread(make)

        def policy(upstream: Upstream) -> TLSPolicy:
            found = policies.get(OWN, algorithms[upstream])
            assert found is not None  # noqa: S101  it has just been added
            return found

        await dialler.prove(upstreams, policy)


def _policies(tls: TLS, algorithms: Sequence[Algorithms], identity: ClientIdentity) -> DevicePolicies[str]:
    policies: DevicePolicies[str] = DevicePolicies(tls, None, algorithms)
    try:
        policies.add(OWN, identity)
    except ValueError as error:
        raise RenewalFailed(f"the new certificate cannot be used: {error}") from None
    return policies


def renewables(prepared: Prepared) -> Iterator[tuple[str, Renewable, x509.Certificate]]:
    """Yield the name, the table and the certificate in use of everything that has a `renew_command`."""
    tls, client = prepared.config.tls, prepared.policy.client
    if tls.renew_command and client is not None:
        yield OWN, tls, client.chain[0]
    for device, keys in prepared.keys.items():
        if device.renew_command and keys.client is not None and not isinstance(device, BrokenRule):
            yield device.name, device, keys.client.chain[0]


@define
class _State:
    """What is known of one certificate; times in seconds, `due` and `overdue` since the epoch."""

    leaf: x509.Certificate
    due: float
    overdue: float
    attempts: int = 0
    retry_at: float = float("-inf")
    is_done: bool = False
    is_running: bool = False


class Renewals:
    """Starts renewals.  `failing` has the problem of each certificate whose last attempt failed."""

    def __init__(
        self,
        renewer: Renewer,
        prepared: Callable[[], Prepared],
        seconds: Callable[[], float],
        uniform: Callable[[], float],
    ) -> None:
        """`prepared` gives what is in use; `seconds` measures time, `uniform` returns random numbers from 0 to 1."""
        self._renewer = renewer
        self._prepared = prepared
        self._seconds = seconds
        self._uniform = uniform
        self._states: dict[str, _State] = {}
        self._seen: set[str] = set()
        self._left: Iterator[tuple[str, Renewable, x509.Certificate]] = iter(())
        self._next_round = float("-inf")
        self._running: set[Deferred[None]] = set()
        self.failing: dict[str, str] = {}
        self.done = 0
        self.failed = 0

    def sweep(self) -> None:
        """Start what is due; called about once a second."""
        if self._next_round <= self._seconds():
            self._left = renewables(self._prepared())
            self._seen = set()
            self._next_round = self._seconds() + _ROUND
        for _ in range(_PER_SWEEP):
            if len(self._running) >= _AT_A_TIME:
                return
            each = next(self._left, None)
            if each is None:
                self._forget()
                return
            self._look(*each)

    def let_go(self) -> None:
        """Keep nothing of a configuration that is no longer in use; begin anew with the one that is."""
        self._left = iter(())
        self._next_round = float("-inf")

    def stop(self) -> None:
        """Cancel what is running, and kill its programs."""
        for task in list(self._running):
            task.cancel()

    def _forget(self) -> None:
        """Forget certificates that are no longer in the configuration."""
        if len(self._states) > len(self._seen):
            for name in self._states.keys() - self._seen:
                del self._states[name]
                self.failing.pop(name, None)

    def _look(self, name: str, table: Renewable, leaf: x509.Certificate) -> None:
        self._seen.add(name)
        state = self._states.get(name)
        if state is None or (state.leaf is not leaf and state.leaf != leaf):
            state = self._states[name] = self._state_of(leaf)
            self.failing.pop(name, None)
        if state.is_done or state.is_running or self._seconds() < state.retry_at:
            return
        now = self._renewer.now()
        if now.timestamp() < state.due:
            return
        try:
            check_clock(leaf, now)
        except RenewalFailed:
            return  # The clock has its own step in `check`; the renewal waits until it is set.
        if table.client_cert is not None and now.timestamp() < state.overdue and obstacle(table.client_cert):
            state.retry_at = self._seconds() + _FIRST_RETRY
            return
        state.is_running = True
        task = Deferred.fromCoroutine(self._attempt(name, table, state))
        self._running.add(task)
        task.addBoth(lambda _: self._running.discard(task))

    def _state_of(self, leaf: x509.Certificate) -> _State:
        jitter = _JITTER * self._uniform()
        due = due_at(leaf).timestamp()
        lifetime = (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds()
        return _State(leaf, due + lifetime * jitter, due_at(leaf, _OVERDUE).timestamp())

    async def _attempt(self, name: str, table: Renewable, state: _State) -> None:
        try:
            renewed = await self._renewer.renew(table)
        except CancelledError as cancelled:
            let_frames_go(cancelled)
            return
        except RenewalFailed as problem:
            let_frames_go(problem)
            self._tell_failed(name, state, str(problem))
        except Exception:  # noqa: BLE001  others must go on
            _log.failure("internal error while renewing the certificate of {name}", name=printable(name))
            self._tell_failed(name, state, "internal error, see the log")
        else:
            state.is_done = True
            self.done += 1
            self.failing.pop(name, None)
            _log.info(
                "{whose} has been renewed and is valid until {end:%Y-%m-%d %H:%M} UTC; new sessions use it",
                event="certificate-renewed",
                whose=whose(name),
                end=renewed.not_valid_after_utc,
            )
        finally:
            state.is_running = False

    def _tell_failed(self, name: str, state: _State, problem: str) -> None:
        self.failed += 1
        state.attempts += 1
        end = state.leaf.not_valid_after_utc
        rest = (end - self._renewer.now()).total_seconds()
        longest = min(_LAST_RETRY, max(_FIRST_RETRY, rest * _SHARE_OF_REST))
        delay = min(longest, _FIRST_RETRY * 2 ** min(state.attempts - 1, 20)) * (0.75 + 0.5 * self._uniform())
        state.retry_at = self._seconds() + delay
        words = unprintable_escaped(problem, _MAX_PROBLEM)
        until = f"{'expires' if rest > 0 else 'expired'} on {end:%Y-%m-%d %H:%M} UTC"
        self.failing[name] = f"{words} ({until})"
        _log.error(
            "{whose} could not be renewed and {until}: {problem}; next attempt in {minutes} min",
            event="renewal-failed",
            whose=whose(name),
            until=until,
            problem=words,
            minutes=max(1, round(delay / 60)),
        )


def whose(name: str) -> str:
    """Return whose certificate it is, in words."""
    return "the gateway's own certificate" if name == OWN else f"the certificate of rule {printable(name)}"
