"""The cloud-like broker of the demo and the tests: each of its demands is real, shown without a gateway."""

from __future__ import annotations

import base64
import hashlib
import hmac
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest

from tests.cloud import SERVER_NAME, Cloud
from tests.harness import PATIENCE
from tests.mqtt_packets import connect, publish
from tests.pki import certify_ca

HUB = "plant.azure-devices.example"
KEY = base64.b64encode(b"the device's key").decode()


_clients: list[Client] = []


@pytest.fixture(autouse=True)
def close_clients() -> Iterator[None]:
    """Close what a test has opened."""
    yield
    while _clients:
        _clients.pop().socket.close()


class Client:
    """A TLS client of the standard library's, which says exactly what a test wants said."""

    def __init__(self, cloud: Cloud, certificate: Path | None, *, alpn: str = "", sni: str = SERVER_NAME) -> None:
        context = ssl.create_default_context(cafile=str(cloud.ca_file))
        context.check_hostname = False  # so that a client may name no server at all
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if certificate is not None:
            context.load_cert_chain(certificate)
        if alpn:
            context.set_alpn_protocols([alpn])
        with socket.create_connection(("127.0.0.1", cloud.port), PATIENCE) as raw:
            self.socket = context.wrap_socket(raw, server_hostname=sni or None)
        _clients.append(self)

    def say(self, data: bytes, size: int = 4) -> bytes:
        """Send bytes; return the first that come back, none if the broker ends the connection."""
        self.socket.sendall(data)
        try:
            return self.socket.recv(size)
        except OSError:
            return b""


def cloud_client(cloud: Cloud, **arguments: Any) -> Client:
    certificate = arguments.pop("certificate", None) or cloud.device("d1")
    return Client(cloud, certificate, **arguments)


@pytest.mark.parametrize("version", [4, 5])
def test_a_device_with_its_own_certificate_is_served(tmp_path: Path, version: int) -> None:
    """CONNACK, and a QoS 1 PUBLISH is acknowledged."""
    with Cloud(tmp_path, alpn="mqtt", sni=SERVER_NAME) as cloud:
        client = cloud_client(cloud, alpn="mqtt")
        accepted = b"\x20\x02\x00\x00" if version == 4 else b"\x20\x03\x00\x00"
        assert client.say(connect(client_identifier="d1", version=version)) == accepted
        if version == 5:
            client.socket.recv(1)
        assert client.say(publish("t", version=version, qos=1, packet_identifier=7)) == b"\x40\x02\x00\x07"
        assert cloud.wait("connected")["certificate"] == "d1"
        assert cloud.wait("published", topic="t")["client_identifier"] == "d1"


def test_the_wrong_application_protocol_ends_the_connection(tmp_path: Path) -> None:
    """As on port 443 of the clouds."""
    with Cloud(tmp_path, alpn="x-amzn-mqtt-ca") as cloud:
        assert cloud_client(cloud).say(connect(client_identifier="d1")) == b""
        cloud.wait("ended", why="wrong ALPN")


@pytest.mark.parametrize("sni", ["", "elsewhere.example"])
def test_a_missing_or_wrong_server_name_ends_the_handshake(tmp_path: Path, sni: str) -> None:
    """The name chooses the customer."""
    with Cloud(tmp_path, sni=SERVER_NAME) as cloud, pytest.raises(ssl.SSLError):
        cloud_client(cloud, sni=sni)


def test_an_unknown_certificate_is_refused(tmp_path: Path) -> None:
    """So is none at all."""
    with Cloud(tmp_path) as cloud:
        for certificate in (cloud.device("d1", root=certify_ca(subject="Other CA")), None):
            assert Client(cloud, certificate).say(connect(client_identifier="d1")) == b""
        assert cloud.told("connected") == []


def test_another_devices_identifier_is_refused(tmp_path: Path) -> None:
    """The Client Identifier must be the certificate's common name."""
    with Cloud(tmp_path) as cloud:
        assert cloud_client(cloud).say(connect(client_identifier="d2")) == b"\x20\x02\x00\x05"
        cloud.wait("ended", why="Client Identifier is not the certificate's")


def test_a_byte_between_connect_and_connack_ends_the_connection(tmp_path: Path) -> None:
    """As a cloud that reads nothing more until it has decided."""
    with Cloud(tmp_path) as cloud:
        assert cloud_client(cloud).say(connect(client_identifier="d1") + b"\xc0\x00") == b""
        cloud.wait("ended", why="a byte between CONNECT and CONNACK")


@pytest.mark.parametrize("keep_alive", [0, 29, 1201])
def test_a_keep_alive_out_of_range_is_refused(tmp_path: Path, keep_alive: int) -> None:
    """None at all is out of range, too."""
    with Cloud(tmp_path, keep_alive=(30, 1200)) as cloud:
        assert cloud_client(cloud).say(connect(client_identifier="d1", keep_alive=keep_alive)) == b"\x20\x02\x00\x05"
        cloud.wait("ended", why="Keep Alive out of range")


def test_qos_2_ends_the_connection(tmp_path: Path) -> None:
    """After CONNACK, without a word."""
    with Cloud(tmp_path) as cloud:
        client = cloud_client(cloud)
        assert client.say(connect(client_identifier="d1")) == b"\x20\x02\x00\x00"
        assert client.say(publish("t", qos=2)) == b""
        cloud.wait("ended", why="QoS 2")


def token(expiry: int, resource: str = f"{HUB}/devices/d1", key: str = KEY) -> bytes:
    """Write a SAS token, as Microsoft's documentation of IoT Hub computes it."""
    signed = f"{quote_plus(resource)}\n{expiry}".encode()
    signature = base64.b64encode(hmac.new(base64.b64decode(key), signed, hashlib.sha256).digest())
    return f"SharedAccessSignature sr={quote_plus(resource)}&sig={quote_plus(signature)}&se={expiry}".encode()


@pytest.mark.parametrize(
    ("lives", "changes", "why"),
    [
        (60, {}, ""),
        (-60, {}, "expired SAS token"),
        (60, {"resource": f"{HUB}/devices/d2"}, "SAS token of another device"),
        (60, {"key": base64.b64encode(b"another key").decode()}, "SAS token with a wrong signature"),
    ],
)
def test_a_token_is_judged(tmp_path: Path, lives: int, changes: dict[str, str], why: str) -> None:
    """By its resource, its signature and its time."""
    assert answer_to(tmp_path, token(int(time.time()) + lives, **changes), why) == (5 if why else 0)


def test_a_password_is_no_token(tmp_path: Path) -> None:
    """By its form."""
    assert answer_to(tmp_path, b"a password", "no SAS token") == 5


def answer_to(directory: Path, password: bytes, why: str) -> int:
    """Return the code of the CONNACK that a password gets, once the broker has said why, if it refuses."""
    with Cloud(directory, client_ca="", hub=HUB, keys={"d1": KEY}) as cloud:
        name = f"{HUB}/d1/?api-version=2021-04-12"
        answer = Client(cloud, None).say(connect(client_identifier="d1", username=name, password=password))
        if why:
            cloud.wait("ended", why=why)
        return answer[3]


def test_the_newcomer_throws_out_the_older_of_one_name(tmp_path: Path) -> None:
    """A second connection with the same Client Identifier ends the first."""
    with Cloud(tmp_path) as cloud:
        first, second = cloud_client(cloud), cloud_client(cloud)
        assert first.say(connect(client_identifier="d1")) == b"\x20\x02\x00\x00"
        assert second.say(connect(client_identifier="d1")) == b"\x20\x02\x00\x00"
        assert first.say(b"\xc0\x00") == b""
        assert second.say(b"\xc0\x00") == b"\xd0\x00"
