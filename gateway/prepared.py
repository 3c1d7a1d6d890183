"""Everything that a configuration needs from the disk, prepared before any of it is used.

In: a `Config`, and what was prepared for the configuration before it.  Out: `Prepared`, or `ConfigError`.

This is the slow part of a reload, and it grows with the number of rules.  It touches nothing that the event loop uses,
so that a thread can do it.  What did not change is neither read nor built again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from gateway.config import Config, DeviceRule, changed_keys
from gateway.config.algorithms import Algorithms
from gateway.config.devices import BrokenRule
from gateway.dial.proxy import ProxyRoute, proxy_routes
from gateway.dial.websocket import WebSocketRoute, websocket_routes
from gateway.ops.expiry import DeviceCertificates
from gateway.ops.watch import FileState, differing, states
from gateway.pieces import Pause, let_go, merging_at_once, no_pause
from gateway.rules.credentials import DeviceKeys, key_files, read_keys
from gateway.rules.names import Names
from gateway.rules.rules import Rule, Rules
from gateway.rules.secrets import Programs
from gateway.tls.channel import make_policies
from gateway.tls.devices import DevicePolicies
from gateway.tls.trust import ClientIdentity, TLSPolicy, policy_files

# The sections that sessions are judged by, and what follows a section's name in a key.
_TO_JUDGE_BY = frozenset({"upstream", "devices", "device", "limits"})
_SECTION = re.compile(r"[.\[ :]")


@frozen(eq=False, kw_only=True)
class Prepared:
    """What was made of one configuration.

    `files` has the states of all certificates, keys and CRLs from just before they were read.  `policy` is the
    first upstream's, `upstream_policies` has those of all.  `refused` gives the problem of each rule that cannot be
    used; its devices are refused.  `changed` names the keys and files that differ from the
    configuration before.  `is_equivalent` means that sessions are verified and judged as before.
    """

    config: Config
    policy_files: Sequence[Path]
    other_files: Sequence[Path]
    files: Mapping[Path, FileState]
    policy: TLSPolicy
    upstream_policies: Mapping[Algorithms, TLSPolicy]
    rules: Rules
    keys: Mapping[DeviceRule, DeviceKeys]
    policies: DevicePolicies[DeviceRule]
    names: Names
    proxies: Sequence[ProxyRoute | None]
    websockets: Sequence[WebSocketRoute | None]
    refused: Mapping[DeviceRule, str]
    certificates: DeviceCertificates
    changed: Sequence[str] = ()
    is_equivalent: bool = False
    # The configuration before: what holds its parts, and the parts, so that a thread can free them bit by bit.
    containers: list[Any] = field(factory=list, repr=False)
    leftovers: list[Any] = field(factory=list, repr=False)


def prepare(
    config: Config,
    uniform: Callable[[], float],
    programs: Programs | None = None,
    before: Prepared | None = None,
    pause: Pause = no_pause,
) -> Prepared:
    """Read and build all that sessions need under `config`.  Raises `ConfigError` if nobody could be served.

    `uniform` returns random numbers from 0 to 1; `programs` runs programs.
    """
    of_policy, of_others = policy_files(config.tls), [*upstream_files(config), *status_files(config)]
    for path in device_files(config):
        of_others.append(path)
        pause()
    files = states([*of_policy, *of_others], pause)
    is_policy_kept = before is not None and _is_policy_kept(config, files, of_policy, before)
    kept = before if is_policy_kept else None
    upstream_policies = make_policies(config) if kept is None else kept.upstream_policies
    policies = DevicePolicies(config.tls, None if kept is None else kept.policies, config.all_algorithms)
    keys: dict[DeviceRule, DeviceKeys] = {}
    refused: dict[DeviceRule, str] = {}
    for device in config.device:
        if isinstance(device, BrokenRule):
            refused[device] = device.problem
        if key_files(device):
            keys[device] = read = _keys(device, files, before)
            if problems := [*read.problems, *_policy_problems(policies, device, read.client)]:
                refused[device] = "; ".join(problems)
            pause()
    policies.done()
    rules = Rules(config, before.rules if before is not None else (), pause)
    prepared = Prepared(
        config=config,
        policy_files=of_policy,
        other_files=of_others,
        files=files,
        policy=upstream_policies[config.all_algorithms[0]],
        upstream_policies=upstream_policies,
        rules=rules,
        keys=keys,
        policies=policies,
        names=Names(config, rules, pause),
        proxies=proxy_routes(config, os.environ, uniform),
        websockets=websocket_routes(config, programs),
        refused=refused,
        certificates=_certificates(keys, before, pause),
    )
    return prepared if before is None else _compared(prepared, before, pause)


def look(prepared: Prepared, pause: Pause = no_pause) -> dict[Path, FileState]:
    """Return the states of the files now; files may have been added to a directory of CAs."""
    return states([*policy_files(prepared.config.tls), *prepared.other_files], pause)


def free(prepared: Prepared, pause: Pause = no_pause) -> None:
    """Free the configuration before a few parts at a time: thousands in one go would hold up the event loop."""
    with merging_at_once():
        # To free a container frees no part, since these are still held.
        while prepared.containers:
            del prepared.containers[-1]
            pause()
        let_go(prepared.leftovers, pause)


def upstream_files(config: Config) -> list[Path]:
    """Return the files that `[[upstream]]` tables name."""
    return [
        path
        for upstream in config.upstream
        for path in (*upstream.proxy_ca_file, upstream.proxy_password_file, upstream.request_file)
        if path is not None
    ]


def status_files(config: Config) -> list[Path]:
    """Return the files that `[status]` names."""
    return [path for path in (config.status.server_cert, config.status.server_key) if path is not None]


def device_files(config: Config) -> Iterator[Path]:
    """Yield the files with keys and certificates that rules name."""
    for device in config.device:
        yield from key_files(device)


def _is_policy_kept(
    config: Config, files: Mapping[Path, FileState], of_policy: Sequence[Path], before: Prepared
) -> bool:
    return (
        config.tls == before.config.tls
        and config.all_algorithms == before.config.all_algorithms
        and of_policy == before.policy_files
        and all(files[path] == before.files.get(path) for path in of_policy)
    )


def _keys(device: DeviceRule, files: Mapping[Path, FileState], before: Prepared | None) -> DeviceKeys:
    if before is not None:
        known = before.keys.get(device)
        if known is not None and all(files[path] == before.files.get(path) for path in key_files(device)):
            return known
    return read_keys(device)


def _certificates(keys: Mapping[DeviceRule, DeviceKeys], before: Prepared | None, pause: Pause) -> DeviceCertificates:
    named = []
    for device, read in keys.items():
        if read.client is not None:
            named.append((device.name, read.client))
        pause()
    if before is not None and before.certificates.are_of(named, pause):
        return before.certificates
    return DeviceCertificates(named, pause)


def _policy_problems(
    policies: DevicePolicies[DeviceRule], device: DeviceRule, client: ClientIdentity | None
) -> Iterator[str]:
    if client is not None:
        try:
            policies.add(device, client)
        except ValueError as error:
            yield str(error)


def _compared(after: Prepared, before: Prepared, pause: Pause) -> Prepared:
    """Add what differs from the configuration before."""
    old, new = before.config, after.config
    keys = changed_keys(old, new, pause)
    changed = list(keys)
    for path in differing(before.files, after.files, pause):
        changed.append(str(path))
        pause()
    is_equivalent = (
        after.policy is before.policy
        and _TO_JUDGE_BY.isdisjoint(_SECTION.split(key, 1)[0] for key in keys)
        and (_listener_names(old) <= _listener_names(new) or not any(device.match_listener for device in new.device))
        and all(after.files[path] == before.files.get(path) for path in upstream_files(new))
        and _are_keys_kept(after, before, pause)
    )
    leftovers: list[Any] = []
    for part in chain(
        old.device,
        before.keys.values(),
        before.policies.all,
        before.other_files,
        before.files.values(),
        before.certificates.parts if before.certificates is not after.certificates else (),
        before.names.parts,
        before.rules.parts,
        chain.from_iterable(map(_parts, before.rules)),
    ):
        leftovers.append(part)
        pause()
    # From the end, so what holds all others comes last.
    containers: list[Any] = [old, before.other_files, before.files, before.keys, before.policies, before.refused]
    containers += [before.certificates, before.names, before.rules, before]
    return evolve(after, changed=changed, is_equivalent=is_equivalent, containers=containers, leftovers=leftovers)


def _are_keys_kept(after: Prepared, before: Prepared, pause: Pause) -> bool:
    for device, keys in after.keys.items():
        if keys is not before.keys.get(device):
            return False
        pause()
    return True


def _listener_names(config: Config) -> set[tuple[str, str]]:
    return {(listener.description, listener.name) for listener in config.listen}


def _parts(rule: Rule) -> tuple[Any, ...]:
    return rule, rule.globs, rule.pattern
