"""Per-device credentials for the broker: keys and certificates read at startup, passwords obtained at CONNECT.

In: the configured rules, files, programs, the time.  Out: a password and its lifetime; a client identity for TLS;
`ConfigError` with every problem in the files, `Refusal` when a password is not available.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from attrs import field, frozen

from gateway.config import TLS, DeviceRule
from gateway.config.secret_files import SecretUnavailable, credential_path, read_secret
from gateway.config.templates import FROM_DEVICE, UnusableValueError, expand
from gateway.errors import ConfigError, EndReason, Refusal
from gateway.mqtt.rewrite import KEPT, Kept
from gateway.rules.rules import Matched
from gateway.rules.secrets import Programs
from gateway.rules.tokens import SigningKey, check_signing_key, json_web_token, sas_key, sas_token
from gateway.rules.turns import ANYONE, Visitor
from gateway.tls.trust import ClientIdentity, read_client_identity, read_private_key

# A session ends at a random point in this part of its token's lifetime, so that sessions that began together do not
# end together.
_EARLIEST, _LATEST = 0.80, 0.95
# A sweep ends the session, which can be a little late.
_MARGIN = 2.0

_T = TypeVar("_T")


@frozen(slots=True, eq=False)
class DeviceKeys:
    """The keys read for one rule, and the problems in their files."""

    sas: bytes | None = field(default=None, repr=False)
    jwt: SigningKey | None = field(default=None, repr=False)
    client: ClientIdentity | None = field(default=None, repr=False)
    problems: tuple[str, ...] = ()


class Credentials:
    """The passwords and keys of rules.

    Without `keys` it reads the rules' files, and raises `ConfigError` with every problem in them.
    """

    def __init__(
        self,
        devices: tuple[DeviceRule, ...],
        programs: Programs | None,
        uniform: Callable[[], float],
        now: Callable[[], float] = time.time,
        environment: Mapping[str, str] = os.environ,
        keys: Mapping[DeviceRule, DeviceKeys] | None = None,
    ) -> None:
        """`uniform` returns random numbers from 0 to 1, `now` the time of day in seconds since 1970."""
        self._programs = programs
        self._uniform = uniform
        self._now = now
        self._environment = environment
        self._keys = keys if keys is not None else {each: read_keys(each) for each in devices if key_files(each)}
        if keys is None:
            problems = [
                f"rule {device.name}: {problem}" for device, read in self._keys.items() for problem in read.problems
            ]
            if problems:
                raise ConfigError(problems)

    def client_identity(self, device: DeviceRule) -> ClientIdentity | None:
        """Return the client certificate and key of a rule, or None if it has none."""
        keys = self._keys.get(device)
        return None if keys is None else keys.client

    async def password(self, matched: Matched, visitor: Visitor = ANYONE) -> tuple[bytes | Kept | None, float | None]:
        """Return the password for the broker, and the seconds after which the session must end (None for no limit).

        The password is `KEPT` for the device's own, None for none. Raises Refusal.
        """
        device = matched.rule.device
        try:
            if device.password_file is not None:
                return read_secret(device.password_file), None
            if device.password_credential:
                return read_secret(credential_path(device.password_credential, self._environment)), None
            if device.password_command:
                return await self._run(matched, visitor), None
        except SecretUnavailable as problem:
            detail = f"rule {device.name}: {problem}"
            raise Refusal(EndReason.CREDENTIALS_UNAVAILABLE, detail, 3, 0x88) from None
        if device.sas_key_file is not None or device.jwt_key_file is not None:
            return self._token(matched)
        # A password that the gateway checks is not meant for the broker.
        return (None if device.lan_password or device.credentials == "drop" else KEPT), None

    async def _run(self, matched: Matched, visitor: Visitor) -> bytes:
        device = matched.rule.device
        if self._programs is None:
            raise SecretUnavailable("programs cannot be run here")
        environment = {}
        for name in FROM_DEVICE:
            try:
                environment[name.upper()] = expand(f"{{{name}}}", matched.values)
            except UnusableValueError as error:
                # Without the name of a device that has one, the program could give it a password meant for others.
                if name == "client_id" and matched.values[name]:
                    detail = f"rule {device.name}: password_command: {error}"
                    raise Refusal(EndReason.DEVICE_NAME_UNUSABLE, detail, 2, 0x85) from None
        if "CREDENTIALS_DIRECTORY" in self._environment:
            environment["CREDENTIALS_DIRECTORY"] = self._environment["CREDENTIALS_DIRECTORY"]
        return await self._programs.run(device.password_command, environment, device.password_timeout, visitor)

    def _token(self, matched: Matched) -> tuple[bytes, float]:
        device, keys = matched.rule.device, self._keys[matched.rule.device]
        issued = int(self._now())
        expires = issued + int(device.token_lifetime)
        share = _EARLIEST + (_LATEST - _EARLIEST) * self._uniform()
        lives = min(device.token_lifetime * share, device.token_lifetime - _MARGIN)
        if keys.sas is not None:
            resource = matched.expand("sas_resource", device.sas_resource)
            return sas_token(resource, keys.sas, expires, device.sas_policy), lives
        if keys.jwt is None:
            raise AssertionError("a rule with tokens must have a key")
        return json_web_token(keys.jwt, device.jwt_audience, issued, expires), lives


def key_files(device: DeviceRule) -> list[Path]:
    """Return the files that `read_keys` reads for a rule."""
    paths = (device.sas_key_file, device.jwt_key_file, device.client_cert, device.client_key)
    return [path for path in (*paths, device.client_key_password_file) if path is not None]


def read_keys(device: DeviceRule) -> DeviceKeys:
    """Read the keys and certificates of a rule."""
    problems: list[str] = []
    sas: bytes | None = None
    jwt: SigningKey | None = None
    client: ClientIdentity | None = None
    if device.sas_key_file is not None:
        sas = _attempt("sas_key_file", device.sas_key_file, lambda path: sas_key(read_secret(path)), problems)
    if device.jwt_key_file is not None:
        jwt = _attempt(
            "jwt_key_file", device.jwt_key_file, lambda path: check_signing_key(read_private_key(path)), problems
        )
    if device.client_cert is not None:
        settings = TLS(
            client_cert=device.client_cert,
            client_key=device.client_key,
            client_key_password_file=device.client_key_password_file,
            client_key_password_credential=device.client_key_password_credential,
        )
        client, found = read_client_identity(settings)
        problems += [problem.removeprefix("tls.") for problem in found]
    return DeviceKeys(sas, jwt, client, tuple(problems))


def _attempt(key: str, path: Path, read: Callable[[Path], _T], problems: list[str]) -> _T | None:
    try:
        return read(path)
    except SecretUnavailable as problem:
        problems.append(f"{key}: {problem}")
    except ValueError as problem:
        problems.append(f"{key}: {path} {problem}")
    return None
