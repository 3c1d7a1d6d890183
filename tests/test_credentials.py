"""What each rule needs of files: keys that are read at the start, passwords at CONNECT."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from twisted.internet.defer import ensureDeferred

from gateway.config import TLS, from_mapping
from gateway.errors import EndReason, Refusal
from gateway.mqtt.rewrite import KEPT
from gateway.rules.credentials import Credentials
from gateway.rules.rules import Caller, Rules
from gateway.rules.secrets import Programs
from gateway.rules.tokens import sas_token
from gateway.rules.turns import ANYONE, Visitor
from gateway.tls.devices import DevicePolicies
from gateway.tls.trust import ClientIdentity
from tests.mqtt_packets import connect
from tests.pki import CLIENT, certify, certify_ca
from tests.test_mqtt_rewrite import read

NOW = 1_700_000_000.75


def outcome(
    rule: dict[str, Any],
    *,
    uniform: float = 0.0,
    environment: dict[str, str] | None = None,
    name: str = "d1",
    programs: Programs | None = None,
) -> Any:
    """What comes of asking for the password."""
    config = from_mapping({"upstream": [{"host": "b"}], "device": [rule]})
    credentials = Credentials(config.device, programs, lambda: uniform, lambda: NOW, environment or {})
    matched = Rules(config).match(read(connect(name))[1], Caller("10.0.0.1", ""))
    assert matched is not None
    outcomes: list[Any] = []
    ensureDeferred(credentials.password(matched)).addBoth(outcomes.append)
    return getattr(outcomes[0], "value", outcomes[0])


def test_the_devices_own_password_is_kept_or_dropped() -> None:
    """What the gateway has checked itself is never passed on."""
    assert outcome({}) == (KEPT, None)
    assert outcome({"credentials": "drop"}) == (None, None)
    hashed = "scrypt$16384$8$1$" + "$".join(base64.b64encode(bytes(16)).decode() for _ in range(2))
    assert outcome({"lan_password": hashed}) == (None, None)


def test_a_credential_of_systemd_is_read_where_it_is(tmp_path: Path) -> None:
    """In the directory that systemd names; without one the remedy is told."""
    (tmp_path / "broker").write_text("secret\n")
    rule = {"password_credential": "broker"}
    assert outcome(rule, environment={"CREDENTIALS_DIRECTORY": str(tmp_path)}) == (b"secret", None)
    refusal = outcome(rule)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is EndReason.CREDENTIALS_UNAVAILABLE
    assert "LoadCredential" in refusal.detail


class _Programs(Programs):
    """Programs that would succeed, if they ran."""

    def __init__(self) -> None:
        """Start nothing."""

    async def run(
        self, words: Sequence[str], environment: Mapping[str, str], timeout: float, visitor: Visitor = ANYONE
    ) -> bytes:
        """Return what the program would know of the device."""
        return repr(dict(environment)).encode()


@pytest.mark.parametrize("name", ["a b", "$(id)", "x" * 129])
def test_a_password_program_never_runs_without_the_name_of_a_named_device(name: str) -> None:
    """It could give the device a password meant for another; a device without a name is no such case."""
    rule = {"password_command": ["/bin/x"]}
    refusal = outcome(rule, name=name, programs=_Programs())
    assert isinstance(refusal, Refusal)
    assert refusal.reason is EndReason.DEVICE_NAME_UNUSABLE
    assert outcome(rule, name="", programs=_Programs()) == (b"{'ADDRESS': '10.0.0.1'}", None)


@pytest.mark.parametrize(
    ("uniform", "lifetime", "lives"), [(0, 1000, 800), (1, 1000, 950), (0.5, 1000, 875), (1, 5, 3)]
)
def test_a_sas_token_is_made_for_the_moment(tmp_path: Path, uniform: float, lifetime: int, lives: float) -> None:
    """With whole seconds, and an end of the session that is spread and in time."""
    (tmp_path / "key").write_text(base64.b64encode(b"key").decode())
    rule = {
        "sas_key_file": str(tmp_path / "key"),
        "sas_resource": "hub/devices/{client_id}",
        "sas_policy": "device",
        "token_lifetime": lifetime,
    }
    token = sas_token("hub/devices/d1", b"key", int(NOW) + lifetime, "device")
    assert outcome(rule, uniform=uniform) == (token, pytest.approx(lives))
    refusal = outcome(rule, name="d1&se=9999999999")
    assert isinstance(refusal, Refusal)
    assert refusal.reason is EndReason.DEVICE_NAME_UNUSABLE


def test_a_json_web_token_is_made_for_the_moment(tmp_path: Path) -> None:
    """Issued now, for as long as it is to hold; tests/test_tokens.py has another program verify such."""
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    rule = {"jwt_key_file": str(tmp_path / "key.pem"), "jwt_audience": "project", "token_lifetime": 1000}
    token, lives = outcome(rule, uniform=0.5)
    claims = token.split(b".")[1]
    claims = json.loads(base64.urlsafe_b64decode(claims + b"=" * (-len(claims) % 4)))
    assert claims == {"aud": "project", "iat": int(NOW), "exp": int(NOW) + 1000}
    assert lives == pytest.approx(875)


def test_a_program_needs_somebody_to_run_it() -> None:
    """In memory there is nobody."""
    refusal = outcome({"password_command": ["/bin/true"]})
    assert isinstance(refusal, Refusal)
    assert refusal.reason is EndReason.CREDENTIALS_UNAVAILABLE


# ---- Contexts


def identity(issuer: Any, *intermediates: Any, subject: str = "d") -> ClientIdentity:
    certified = certify(issuer, subject=subject, names=(), purposes=(CLIENT,))
    return ClientIdentity((certified.certificate, *(each.certificate for each in intermediates)), certified.key)


def test_contexts_are_shared_by_devices_with_the_same_intermediates(tmp_path: Path) -> None:
    """A thousand devices of one CA have one; the gateway's own is not among them."""
    root = certify_ca()
    middle = certify_ca(root, subject="middle")
    tls = TLS(
        ca_file=(root.write(tmp_path / "ca.pem"),),
        client_cert=certify(root, subject="gateway", names=(), purposes=(CLIENT,)).write(tmp_path / "own.pem"),
    )
    identities = [identity(root) if number % 2 else identity(middle, middle) for number in range(20)]
    policies: DevicePolicies[int] = DevicePolicies(tls)
    for number, client in enumerate(identities):
        policies.add(number, client)
    assert len({id(policy.context) for policy in policies.all}) == 2
    for number, client in enumerate(identities):
        policy = policies.get(number)
        assert policy is not None
        assert policy.own is client
        assert policy.client is None


def test_what_did_not_change_is_used_again(tmp_path: Path) -> None:
    """Context and policy; a renewed certificate gets a new policy with the same Context."""
    root = certify_ca()
    tls = TLS(ca_file=(root.write(tmp_path / "ca.pem"),))
    before: DevicePolicies[str] = DevicePolicies(tls)
    kept = identity(root)
    before.add("kept", kept)
    before.add("renewed", identity(root))
    after = DevicePolicies(tls, before)
    after.add("kept", kept)
    after.add("renewed", identity(root))
    after.done()
    assert after.get("kept") is before.get("kept")
    assert after.get("renewed") is not before.get("renewed")
    assert len({id(policy.context) for policy in after.all}) == 1


def test_contexts_are_bounded(tmp_path: Path) -> None:
    """Each takes most of a mebibyte with the platform's roots."""
    root = certify_ca()
    tls = TLS(ca_file=(root.write(tmp_path / "ca.pem"),))
    middles = [certify_ca(root, subject=f"middle {number}") for number in range(65)]
    policies: DevicePolicies[int] = DevicePolicies(tls)
    for number, middle in enumerate(middles[:64]):
        policies.add(number, identity(middle, middle))
    with pytest.raises(ValueError, match="client_cert: more than 64 sets of intermediates"):
        policies.add(64, identity(middles[64], middles[64]))


def test_a_certificate_that_openssl_refuses(tmp_path: Path) -> None:
    """It is found before a device connects."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    root = certify_ca()
    tls = TLS(ca_file=(root.write(tmp_path / "ca.pem"),))
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505  to be refused
    certified = certify(root, subject="d", names=(), purposes=(CLIENT,), key=weak)
    refused = ClientIdentity((certified.certificate,), weak)
    policies: DevicePolicies[str] = DevicePolicies(tls)
    with pytest.raises(ValueError, match="client_cert: refused by OpenSSL"):
        policies.add("a", refused)
    policies.add("b", identity(root))
    assert policies.get("a") is None
