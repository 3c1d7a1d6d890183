"""`ciphers`, `groups`, `signature_algorithms`: what may be named, what is offered, what `check` says of a broker."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.threads import blockingCallFromThread
from twisted.logger import globalLogPublisher

from gateway.cli import check
from gateway.cli.login import make_login
from gateway.cli.report import Report, Status, Step
from gateway.config import TLS, from_mapping, weak_ciphers
from gateway.config.algorithms import Algorithms
from gateway.errors import ConfigError
from gateway.ops.status_words import Level, Verdict, verdict
from gateway.pieces import at_once
from gateway.tls import direct
from gateway.tls.channel import make_policies, make_policy
from gateway.tls.devices import DevicePolicies
from gateway.tls.survey import Answer, Hello, Reader, Survey
from gateway.tls.trust import ClientIdentity
from tests import mqtt_packets as mqtt
from tests.harness import Broker, Device, RunningGateway, accept_session
from tests.pki import CLIENT, Certified, certify, certify_ca, rsa_key


@pytest.fixture(scope="module")
def root() -> Certified:
    """Return the CA that is trusted."""
    return certify_ca()


@pytest.fixture(scope="module")
def ca_file(root: Certified, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file with the CA."""
    path = tmp_path_factory.mktemp("algorithms") / "ca.pem"
    path.write_bytes(root.pem)
    return path


def server(root: Certified, ciphers: str, *, group: str = "", newest: Any = ssl.TLSVersion.TLSv1_2) -> ssl.SSLContext:
    """Return the context of a broker with an RSA key that has only these."""
    context = certify(root, key=rsa_key()).server().context()
    context.maximum_version = newest
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    if group:
        context.set_ecdh_curve(group)
    return context


@pytest.fixture
def probed(reactor: Any, start_broker: Callable[..., Broker], ca_file: Path) -> Callable[..., tuple[Report, Broker]]:
    """Return a function that checks against a broker with a TLS context, under keys of its `[[upstream]]`."""

    def run(context: ssl.SSLContext, *, tls: str = "", **keys: Any) -> tuple[Report, Broker]:
        broker = start_broker(tls=context, serve=accept_session)
        lines = [
            "[[listen]]",
            'endpoint = "127.0.0.1:0"',
            "[[upstream]]",
            'host = "localhost"',
            f"port = {broker.port}",
        ]
        lines += [f"{key} = {list(names)!r}" for key, names in keys.items()]
        lines += ["[timeouts]", "tls = 2", "[tls]", f"ca_file = {str(ca_file)!r}", tls]
        path = ca_file.with_name("mqtts-gateway.toml")
        path.write_text("\n".join(lines))
        given = {flag.name: [] for flag in check.FLAGS} | {"config": [str(path)]}
        report = Report(lambda _: None)
        coroutine = check.examine(reactor, given, make_login(None, None, None), report)
        blockingCallFromThread(reactor, Deferred.fromCoroutine, coroutine)
        return report, broker

    return run


def step(report: Report, name: str) -> Step:
    """Return the only step of a name."""
    (found,) = (each for each in report.steps if each.name == name)
    return found


# ---- what may be named


@pytest.mark.parametrize(
    "name",
    [
        *("ECDHE-RSA-NULL-SHA", "NULL-SHA256", "AECDH-NULL-SHA", "TLS_SHA256_SHA256", "TLS_SHA384_SHA384"),
        *("ADH-AES256-GCM-SHA384", "AECDH-AES128-SHA", "EXP-RC4-MD5", "EXP1024-DES-CBC-SHA"),
        *("PSK-AES128-CBC-SHA", "ECDHE-PSK-CHACHA20-POLY1305", "SRP-RSA-AES-128-CBC-SHA", "RC4-SHA", "RC4-MD5"),
        *("DES-CBC3-SHA", "ECDHE-RSA-DES-CBC3-SHA", "IDEA-CBC-SHA", "TLS_AES_128_CCM_8_SHA256", "AES128-CCM8"),
        *("ALL", "aNULL", "eNULL", "DEFAULT", "HIGH", "@SECLEVEL=0", "AES128-SHA:NULL-SHA", "-AES", "!aNULL", "", " "),
        *("AES128-SHA\n", "aes128-sha", "kRSA", "ECDHE", "COMPLEMENTOFALL", "TLS_RSA_WITH_AES_128_CBC_SHA"),
    ],
)
def test_what_is_not_a_permitted_cipher_is_refused(name: str) -> None:
    """Nothing anonymous, unencrypted, exported or broken can be named, and no expression that could mean it."""
    for table in ({"tls": {"ciphers": [name]}}, {"upstream": [{"host": "localhost", "ciphers": [name]}]}):
        with pytest.raises(ConfigError, match=r"(tls|upstream\[0\])\.ciphers\[0\]"):
            from_mapping({"upstream": [{"host": "localhost"}], **table})


@pytest.mark.parametrize("key", ["groups", "signature_algorithms"])
@pytest.mark.parametrize(
    "name",
    ["secp192r1", "sect163k1", "ffdhe1024", "rsa_pkcs1_sha1", "ecdsa_sha1", "RSA+MD5", "ALL", "?X25519", "*P-256"],
)
def test_what_is_not_a_permitted_group_or_signature_is_refused(key: str, name: str) -> None:
    """Only known names."""
    with pytest.raises(ConfigError, match=rf"tls\.{key}\[0\]"):
        from_mapping({"upstream": [{"host": "localhost"}], "tls": {key: [name]}})


def test_every_cipher_of_openssl_that_is_anonymous_or_does_not_encrypt_is_refused() -> None:
    """OpenSSL's own classes, not names: nothing of them passes the check."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_cipher_list(b"aNULL:eNULL:PSK:SRP:EXPORT:LOW:3DES:RC4:MD5:@SECLEVEL=0")
    context.set_tls13_ciphersuites(b"TLS_SHA256_SHA256:TLS_SHA384_SHA384")
    names = SSL.Connection(context, None).get_cipher_list()
    assert any("NULL" in name for name in names)
    for name in names:
        with pytest.raises(ConfigError):
            from_mapping({"upstream": [{"host": "localhost"}], "tls": {"ciphers": [name]}})


def test_what_is_weaker_than_the_defaults_is_named_with_its_weakness() -> None:
    """RSA key exchange and CBC; the defaults are not weak."""
    names = ["AES128-SHA", "ECDHE-RSA-AES128-SHA256", "AES256-GCM-SHA384", "ECDHE-RSA-AES128-GCM-SHA256"]
    config = from_mapping({"upstream": [{"host": "localhost", "ciphers": names}]})
    assert weak_ciphers(config) == [
        (
            "upstream localhost:8883: ciphers",
            "AES128-SHA (no forward secrecy and CBC without authenticated encryption)",
        ),
        ("upstream localhost:8883: ciphers", "ECDHE-RSA-AES128-SHA256 (CBC without authenticated encryption)"),
        ("upstream localhost:8883: ciphers", "AES256-GCM-SHA384 (no forward secrecy)"),
    ]
    defaults = make_policy(TLS()).offer.ciphers
    assert weak_ciphers(from_mapping({"upstream": [{"host": "a"}], "tls": {"ciphers": [*defaults[:9]]}})) == []


# ---- what is offered


def test_exactly_what_is_named_is_offered() -> None:
    """The ClientHello has these, in this order; TLS 1.3 keeps its own ciphers."""
    tls = TLS(
        ciphers=("AES128-SHA", "ECDHE-RSA-AES256-GCM-SHA384"),
        groups=("secp384r1", "X25519"),
        signature_algorithms=("rsa_pss_rsae_sha384", "rsa_pkcs1_sha256"),
    )
    offer, default = make_policy(tls).offer, make_policy(TLS()).offer
    assert [name for name in offer.ciphers if not name.startswith("TLS_")] == list(tls.ciphers)
    assert [name for name in offer.ciphers if name.startswith("TLS_")] == list(default.ciphers[:3])
    assert offer.groups == ("P-384", "X25519")
    assert offer.signature_algorithms == tls.signature_algorithms
    only = make_policy(TLS(ciphers=("TLS_CHACHA20_POLY1305_SHA256",), min_version="1.3")).offer
    assert only.ciphers == ("TLS_CHACHA20_POLY1305_SHA256",)
    assert only.versions == ("TLS 1.3",)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"ciphers": ("AES128-SHA",), "min_version": "1.3"}, "tls.ciphers: AES128-SHA"),
        ({"groups": ("brainpoolP256r1",)}, "tls.groups"),
    ],
)
def test_what_openssl_leaves_out_silently_is_refused(settings: dict[str, Any], key: str) -> None:
    """A list of which something would have no effect is a mistake."""
    with pytest.raises(ConfigError, match=key):
        make_policy(TLS(**settings))


def test_without_pyopensslsprivate_names_groups_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that cannot set them must not offer others; ciphers are set by public methods."""
    monkeypatch.setattr(direct, "_LISTS", {"groups": "SSL_of_another_time", "signature_algorithms": "and_this"})
    make_policy(TLS(ciphers=("AES128-SHA",)))
    for key, name in (("groups", "X25519"), ("signature_algorithms", "ed25519")):
        with pytest.raises(ConfigError, match=rf"tls\.{key}: the installed pyOpenSSL cannot set it"):
            make_policy(TLS(**{key: (name,)}))


def test_an_upstream_has_its_own_or_those_of_tls() -> None:
    """Each list by itself; upstreams that are offered the same share a policy."""
    config = from_mapping(
        {
            "upstream": [{"host": "a"}, {"host": "b", "ciphers": "AES128-SHA"}, {"host": "c"}],
            "tls": {"groups": "X25519"},
        }
    )
    policies = make_policies(config)
    assert list(policies) == [Algorithms(groups=("X25519",)), Algorithms(ciphers=("AES128-SHA",), groups=("X25519",))]
    first, second = policies.values()
    assert "AES128-SHA" not in first.offer.ciphers
    assert "AES128-SHA" in second.offer.ciphers
    assert second.offer.groups == ("X25519",)
    broken = from_mapping({"upstream": [{"host": "a"}, {"host": "b", "groups": "brainpoolP256r1"}]})
    with pytest.raises(ConfigError, match=r"upstream\[1\]\.groups: OpenSSL"):
        make_policies(broken)


# ---- with a broker


def test_a_broker_with_rsa_key_exchange_is_served_where_its_upstream_says_so(
    probed: Callable[..., tuple[Report, Broker]], root: Certified
) -> None:
    """By name, with a warning; and not otherwise, with what either side has."""
    report, broker = probed(server(root, "AES256-SHA:AES128-SHA"))
    found = step(report, "certificate")
    assert found.status is Status.FAIL
    assert "tls-handshake-failed" in found.message
    assert "the broker has: TLS 1.2; ciphers AES256-SHA, AES128-SHA" in found.message
    assert 'set ciphers = ["AES256-SHA", "AES128-SHA"] in its [[upstream]]' in found.remedy
    assert not broker.received

    report, broker = probed(server(root, "AES256-SHA:AES128-SHA"), ciphers=["AES256-SHA"])
    assert step(report, "connack").status is Status.PASS
    assert "TLSv1.2, AES256-SHA" in step(report, "tls").message
    assert "; ciphers TLS_AES_256_GCM_SHA384" in step(report, "client-hello").message
    warnings = [each.message for each in report.steps if each.status is Status.WARN and each.name == "file"]
    assert any("AES256-SHA (no forward secrecy" in message for message in warnings)
    assert report.exit_status(strict=True) == 2
    assert any("-cipher AES256-SHA" in command for command in report.commands)


def test_a_broker_with_another_group_or_version_is_told_apart(
    probed: Callable[..., tuple[Report, Broker]], root: Certified
) -> None:
    """Groups in TLS 1.2 and 1.3, and versions."""
    report, _ = probed(server(root, "ECDHE-RSA-AES128-GCM-SHA256", group="secp521r1"), groups=["X25519"])
    found = step(report, "certificate")
    assert "groups P-521" in found.message
    assert 'set groups = ["P-521"]' in found.remedy
    newest = server(root, "DEFAULT", group="secp384r1", newest=ssl.TLSVersion.TLSv1_3)
    newest.minimum_version = ssl.TLSVersion.TLSv1_3
    report, _ = probed(newest, groups=["X25519"])
    found = step(report, "certificate")
    assert "the broker has: TLS 1.3; ciphers TLS_" in found.message
    assert 'set groups = ["P-384"]' in found.remedy
    report, _ = probed(server(root, "DEFAULT"), tls='min_version = "1.3"')
    found = step(report, "certificate")
    assert "the broker has: TLS 1.2" in found.message
    assert 'Set min_version = "1.2"' in found.remedy


def test_the_ciphers_of_tls_are_those_of_devices_certificates_too(root: Certified, ca_file: Path) -> None:
    """A device's own certificate goes to each upstream with what that one is offered."""
    config = from_mapping(
        {
            "upstream": [{"host": "a"}, {"host": "b", "ciphers": "AES128-SHA"}],
            "tls": {"ca_file": str(ca_file)},
        }
    )
    certified = certify(root)
    client = ClientIdentity((certified.certificate,), certified.key)
    policies: DevicePolicies[str] = DevicePolicies(config.tls, None, config.all_algorithms)
    policies.add("sensor", client)
    first, second = (policies.get("sensor", config.algorithms(upstream)) for upstream in config.upstream)
    assert first is not None
    assert second is not None
    assert first.own is second.own is client
    assert ("AES128-SHA" in first.offer.ciphers, "AES128-SHA" in second.offer.ciphers) == (False, True)


# ---- the survey against anything


def test_a_survey_ends_whatever_it_is_told() -> None:
    """A broker that accepts everything, or answers with garbage, is asked a bounded number of times."""
    survey, asked = Survey(), 0
    while survey.hello is not None:
        asked += 1
        hello = survey.hello
        version = 0x0304 if hello.is_1_3 else 0x0303
        survey.answered(Answer(version, hello.ciphers[0], hello.groups[0], hello.signature_algorithms[0]))
    assert asked <= 40
    assert survey.offer is not None
    survey = Survey()
    while survey.hello is not None:
        survey.answered(None)
    assert survey.offer is None


@pytest.mark.parametrize("size", [0, 1, 4, 5, 9, 40, 70])
def test_an_answer_that_is_cut_or_garbled_is_a_refusal(size: int) -> None:
    """No exception leaves the reader."""
    for filler in (b"\x00", b"\x16", b"\xff", b"\x02"):
        body = filler * size
        message = b"\x02" + len(body).to_bytes(3) + body
        is_complete, answer = Reader().feed(b"\x16\x03\x03" + len(message).to_bytes(2) + message)
        assert is_complete
        assert answer is None or size >= 38  # version, random, session id, cipher suite, compression method
    assert Reader().feed(b"HTTP/1.1 400 Bad Request\r\n") == (True, None)
    assert Reader().feed(b"\x15\x03\x03\x00\x02\x02\x28") == (True, None)


def test_sessions_use_what_their_upstream_is_offered(
    start_gateway: Callable[..., RunningGateway],
    start_broker: Callable[..., Broker],
    root: Certified,
    ca_file: Path,
    tmp_path: Path,
) -> None:
    """With and without a device's own certificate, across a reload that changes them; the log warns."""
    weak = start_broker(tls=server(root, "AES256-SHA"))
    good = start_broker(tls=server(root, "DEFAULT", newest=ssl.TLSVersion.TLSv1_3))
    own = certify(root, subject="sensor-1", names=(), purposes=(CLIENT,))
    key = own.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "own.pem").write_bytes(own.pem + key)
    tables: list[dict[str, Any]] = [
        {"host": "localhost", "port": good.port, "name": "good"},
        {"host": "localhost", "port": weak.port, "name": "weak", "ciphers": "AES256-SHA"},
    ]
    devices = [
        {"match_client_id": "sensor-1", "client_cert": str(tmp_path / "own.pem"), "upstream": ["weak", "good"]},
        {"match_client_id": "sensor-2", "upstream": "good"},
        {"match_client_id": "sensor-3", "upstream": "weak"},
    ]
    warned: list[str] = []

    def observe(event: Any) -> None:
        if event.get("event") == "weak-cipher":
            warned.append(event["cipher"])

    globalLogPublisher.addObserver(observe)
    try:
        gateway = start_gateway(upstream=tables, ca_file=ca_file, device=devices)
        assert served(gateway, "sensor-1") == "AES256-SHA"
        assert served(gateway, "sensor-2").startswith("TLS_")
        assert served(gateway, "sensor-3") == "AES256-SHA"
        assert [words.partition(" ")[0] for words in warned] == ["AES256-SHA"]
        assert any("weaker than the defaults: AES256-SHA (no forward" in line for line in shown(gateway).reasons)
        assert shown(gateway).level is Level.WELL
        # Without the list, the same broker is refused, and the next one serves.
        gateway.change(upstream=[{key: value for key, value in table.items() if key != "ciphers"} for table in tables])
        assert served(gateway, "sensor-1").startswith("TLS_")
        assert len(warned) == 1
        assert not any("weaker" in line for line in shown(gateway).reasons)
        gateway.change(upstream=tables)
        assert served(gateway, "sensor-1") == "AES256-SHA"
    finally:
        globalLogPublisher.removeObserver(observe)


def shown(gateway: RunningGateway) -> Verdict:
    """Return the headline of the status page and of `status`, with the lines below it."""
    return verdict(gateway.call(lambda: at_once(gateway.service.sight.document())))


def served(gateway: RunningGateway, client_id: str) -> str:
    """Open a session, end it, and return its cipher."""
    count = len(gateway.ended)
    with Device(gateway.port) as device:
        device.send(mqtt.connect(client_id))
        assert device.read(4) == mqtt.connack()
        device.send(mqtt.disconnect())
        device.read_to_end()
    record = gateway.wait_ended(count + 1)
    assert record.peer is not None
    return record.peer.cipher


def handshake(kind: int, body: bytes) -> bytes:
    """Return a handshake message in a TLS record."""
    message = bytes((kind,)) + len(body).to_bytes(3) + body
    return b"\x16\x03\x03" + len(message).to_bytes(2) + message


def test_what_a_broker_chose_in_tls_1_2_is_read() -> None:
    """The group and the signature algorithm are in its ServerKeyExchange, which differs between ECDHE and DHE."""
    hello = b"\3\3" + bytes(32) + b"\0%b\0"
    ecdhe = b"\3\1\2" + b"\5point" + b"\x08\x04"
    dhe = b"\1\2" + bytes(0x102) + b"\0\1\2" + b"\1\0" + bytes(0x100) + b"\4\1"
    for cipher, body, group, algorithm in ((0xC02F, ecdhe, 0x102, 0x0804), (0x9E, dhe, 0, 0x0401)):
        answer = handshake(2, hello % cipher.to_bytes(2)) + handshake(12, body)
        assert Reader().feed(answer) == (True, Answer(0x303, cipher, group, algorithm))


def test_a_broker_without_a_name_is_asked_without_one() -> None:
    """There is no server_name for an address (RFC 6066 §3)."""
    hello = Hello(is_1_3=False, ciphers=(0xC02F,), groups=(29,), signature_algorithms=(0x0804,))
    named, nameless = hello.record("broker.example", ()), hello.record(None, ())
    assert b"broker.example" in named
    assert len(named) - len(nameless) == len("broker.example") + 9


def test_each_signature_algorithm_of_tls_1_2_is_found() -> None:
    """A broker with two always chooses the first, until it is not offered."""
    survey = Survey()
    while (hello := survey.hello) is not None:
        chosen = [code for code in (0x0403, 0x0804) if code in hello.signature_algorithms]
        answers = not hello.is_1_3 and chosen and 0xC02F in hello.ciphers and 29 in hello.groups
        survey.answered(Answer(0x303, 0xC02F, 29, chosen[0]) if answers else None)
    assert survey.offer is not None
    assert len(survey.offer.signature_algorithms) == 2
