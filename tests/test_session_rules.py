"""What a session does by its rule: pace, pings, an end before a token expires, and what is counted on the way."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.errors import EndReason, Refusal
from gateway.mqtt.inspector import TopicRules
from gateway.mqtt.packets import ProtocolVersion
from gateway.session.record import Dial
from gateway.session.session import State
from gateway.session.treatment import Treatment
from tests import mqtt_packets as mqtt
from tests.facts import PEER
from tests.test_session import Bench, RememberingSide, breaks, fails

_VERSIONS = {3: ProtocolVersion.MQTT_3_1, 4: ProtocolVersion.MQTT_3_1_1, 5: ProtocolVersion.MQTT_5_0}


def ruled(*, version: int = 4, connack: bytes | None = None, keep_alive: int = 60, **rule: Any) -> Bench:
    """A session whose broker has accepted it, under a rule."""
    bench = Bench().connect(version=version, keep_alive=keep_alive)
    sent = mqtt.connect("at-the-broker", version=version)
    rule.setdefault("version", _VERSIONS[version])
    bench.session.treat(Treatment(connect=sent, **rule))
    bench.session.upstream_verified(bench.upstream, PEER)
    assert bench.upstream.bytes == sent
    bench.session.upstream_received(connack or mqtt.connack(version=version))
    assert bench.state is State.RELAYING
    bench.device.written.clear()
    bench.upstream.written.clear()
    return bench


# ---- pace


def test_a_device_that_is_too_fast_is_not_read_until_time_has_made_up_for_it() -> None:
    """All that was read has passed: nothing is lost."""
    bench = ruled(packets_per_second=1.0)
    assert not bench.device.held
    bench.session.device_received(mqtt.publish() * 2)
    assert not bench.device.held
    bench.session.device_received(mqtt.publish() * 3)
    assert bench.device.held
    assert bench.upstream.bytes == mqtt.publish() * 5
    bench.pass_seconds(2)
    assert bench.device.held
    bench.pass_seconds(1)
    assert not bench.device.held


def test_a_device_without_a_pace_is_read_on() -> None:
    bench = ruled()
    bench.session.device_received(mqtt.publish() * 1000)
    assert not bench.device.held


def test_what_came_behind_connect_counts_for_the_pace() -> None:
    """A device that was too fast before it was accepted is not read on then."""
    bench = Bench().connect()
    bench.session.treat(Treatment(mqtt.connect(), ProtocolVersion.MQTT_3_1_1, packets_per_second=1.0))
    bench.session.device_received(mqtt.publish() * 5)
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(mqtt.connack())
    assert bench.device.held


# ---- a token


@pytest.mark.parametrize("version", [4, 5])
def test_a_session_ends_when_its_token_is_about_to_expire(version: int) -> None:
    """Not before; the broker gets a DISCONNECT, so that it publishes no Will, and a 5.0 device is told why."""
    bench = ruled(version=version, lives=30.0)
    bench.pass_seconds(29)
    assert bench.state is State.RELAYING
    bench.pass_seconds(1)
    assert bench.reason is EndReason.TOKEN_EXPIRING
    assert bench.upstream.bytes == mqtt.disconnect()
    assert bench.device.bytes[:1] == (b"\xe0" if version == 5 else b"")
    assert bench.device.bytes[2:3] == (b"\xa0" if version == 5 else b"")


def test_a_token_lives_from_when_it_was_made() -> None:
    """What the dial and the broker took is not given back."""
    bench = Bench().connect()
    bench.session.treat(Treatment(mqtt.connect(), ProtocolVersion.MQTT_3_1_1, lives=30.0))
    bench.clock.advance(9)
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(mqtt.connack())
    bench.pass_seconds(20)
    assert bench.state is State.RELAYING
    bench.pass_seconds(1)
    assert bench.reason is EndReason.TOKEN_EXPIRING


def test_no_disconnect_is_written_into_a_packet_that_is_half_passed_on() -> None:
    bench = ruled(lives=5.0)
    half = mqtt.publish()[:-1]
    bench.session.device_received(half)
    bench.pass_seconds(5)
    assert bench.reason is EndReason.TOKEN_EXPIRING
    assert bench.upstream.bytes == half


# ---- the Keep Alive at the broker


def test_the_gateway_pings_as_often_as_its_rule_says() -> None:
    """For the first time an interval after CONNACK."""
    bench = ruled(keep_alive=0, ping_interval=10.0)
    bench.pass_seconds(9)
    assert bench.upstream.bytes == b""
    bench.pass_seconds(1)
    assert bench.upstream.bytes == mqtt.pingreq()
    bench.session.upstream_received(mqtt.pingresp())
    assert bench.device.bytes == b""
    bench.pass_seconds(9)
    assert bench.upstream.bytes == mqtt.pingreq()
    bench.pass_seconds(1)
    assert bench.upstream.bytes == mqtt.pingreq() * 2


def test_the_gateways_pingreq_waits_for_the_end_of_a_packet() -> None:
    """In the middle of a PUBLISH it would be a part of its payload."""
    bench = ruled(keep_alive=0, ping_interval=10.0)
    packet = mqtt.publish(payload=bytes(20))
    bench.session.device_received(packet[:-5])
    bench.pass_seconds(30)
    assert bench.upstream.bytes == packet[:-5]
    bench.session.device_received(packet[-5:])
    bench.pass_seconds(1)
    assert bench.upstream.bytes == packet + mqtt.pingreq()


def test_the_device_gets_the_answers_to_its_own_pingreqs() -> None:
    bench = ruled(keep_alive=0, ping_interval=10.0)
    bench.pass_seconds(10)
    bench.session.device_received(mqtt.pingreq())
    bench.session.upstream_received(mqtt.pingresp() * 2)
    assert bench.device.bytes == mqtt.pingresp()


def test_a_keep_alive_that_the_broker_sets_is_the_devices_to_keep() -> None:
    """[MQTT-3.2.2-21]: the device is told, so the gateway has nothing to send in its place."""
    connack = mqtt.connack(version=5, properties=mqtt.number(0x13, 40, size=2))
    bench = ruled(version=5, connack=connack, keep_alive=0, ping_interval=10.0)
    bench.pass_seconds(50)
    assert bench.upstream.bytes == b""
    bench.pass_seconds(11)
    assert bench.reason is EndReason.KEEPALIVE_TIMEOUT


# ---- what is counted


def test_what_the_gateway_sends_itself_counts_as_sent() -> None:
    """The broker got these bytes, too."""
    bench = ruled(keep_alive=0, ping_interval=10.0)
    before = bench.session.traffic
    bench.pass_seconds(20)
    assert bench.session.traffic.bytes_up == before.bytes_up + 2 * len(mqtt.pingreq())


def test_authentication_counts_as_traffic() -> None:
    bench = Bench().verified(version=5, properties=mqtt.text(0x15, "SCRAM-SHA-256"))
    before = bench.session.traffic
    bench.session.device_received(mqtt.auth())
    after = bench.session.traffic
    assert after.bytes_up == before.bytes_up + len(mqtt.auth())
    assert after.packets_up == before.packets_up + 1


def test_the_broker_reads_the_version_that_it_was_sent() -> None:
    """A CONNACK for a device of 3.1 that became one of 3.1.1 is read as 3.1.1, where flags have a meaning."""
    refused = Bench().connect(version=3)
    refused.session.treat(Treatment(mqtt.connect(version=4), ProtocolVersion.MQTT_3_1_1))
    refused.session.upstream_verified(refused.upstream, PEER)
    refused.session.upstream_received(mqtt.packet(0x20, b"\x02\x00"))
    assert refused.reason is EndReason.UPSTREAM_PROTOCOL_ERROR
    accepted = Bench().connect(version=3)
    accepted.session.upstream_verified(accepted.upstream, PEER)
    accepted.session.upstream_received(mqtt.packet(0x20, b"\x02\x00"))
    assert accepted.state is State.RELAYING


def test_the_record_says_why_a_broker_refused() -> None:
    """In the broker's own words, if it gave any."""
    for words in ("", "no such tenant"):
        bench = Bench().verified(version=5)
        reason = mqtt.text(0x1F, words) if words else b""
        bench.session.upstream_received(mqtt.connack(version=5, code=0x87, properties=reason))
        assert bench.reason is EndReason.UPSTREAM_REFUSED
        detail = bench.journal.ended[0].detail
        assert detail.endswith(f": {words}") if words else not detail.endswith(": ")
        assert "None" not in detail


def test_the_record_has_the_dial_that_led_to_the_broker() -> None:
    bench = Bench().connect()
    bench.session.dials(Dial("one.example:8883"))
    second = Dial("two.example:8883", address="192.0.2.9:8883", tcp_seconds=0.25)
    bench.session.dials(second)
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(mqtt.connack())
    (record,) = bench.journal.started
    assert (record.upstream, record.upstream_address) == ("two.example:8883", "192.0.2.9:8883")
    assert record.tcp_seconds == 0.25


# ---- the ends


@pytest.mark.parametrize("how", ["fails", "refused", "verified"])
def test_an_attempt_that_has_answered_is_not_given_up(how: str) -> None:
    """It is over; whoever cancels it then, cancels what it has begun since."""
    bench = Bench().connect()
    if how == "fails":
        fails(bench)
    elif how == "refused":
        bench.session.refuse(Refusal(EndReason.DEVICE_UNKNOWN, "", 5, 0x87))
    else:
        bench.session.upstream_verified(bench.upstream, PEER)
        breaks(bench)
    assert bench.state is State.ENDED
    assert not bench.attempts[0].cancelled


def test_disconnect_is_the_last_that_a_broker_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it may wait for the close, and leave with it; what came before may not."""
    last: list[bytes] = []
    monkeypatch.setattr(RememberingSide, "write_last", lambda _, data: last.append(data))
    bench = Bench().relaying()
    bench.session.device_received(mqtt.publish())
    assert bench.upstream.bytes == mqtt.publish()
    bench.session.device_received(mqtt.disconnect())
    assert last == [mqtt.disconnect()]
    assert bench.upstream.closed


def test_the_will_of_a_session_whose_broker_is_gone_needs_no_disconnect() -> None:
    """A stop that comes between the end of the connection and that of the session writes to nobody."""
    bench = Bench().relaying()
    bench.session.upstream_gone()
    bench.session.stop(EndReason.GATEWAY_STOPPING, discard_will=True)
    assert bench.reason is EndReason.GATEWAY_STOPPING
    assert not bench.upstream.written


# ---- what a treatment makes


@pytest.mark.parametrize(("at_broker", "expected"), [(4, b"\xc0\0"), (3, b"\xc1\0")])
def test_only_packets_of_an_upgraded_device_lose_bits_that_3_1_does_not_use(at_broker: int, expected: bytes) -> None:
    """3.1.1 forbids them; with a broker of 3.1 they stay, even if packets are read for another reason."""
    topics = TopicRules(publish_prefix="site/")
    treatment = Treatment(b"", _VERSIONS[at_broker], topics)
    assert treatment.from_device(_VERSIONS[3], 1000).feed(b"\xc1\0") == expected


@pytest.mark.parametrize(
    ("check_bodies", "lenient", "passes"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_bodies_are_checked_unless_the_rule_is_lenient(*, check_bodies: bool, lenient: bool, passes: bool) -> None:
    """A lenient rule lets pass what a check would not."""
    treatment = Treatment(b"", _VERSIONS[4], lenient=lenient)
    wrong = mqtt.publish(qos=1, packet_identifier=0)
    for checker in (
        treatment.from_device(_VERSIONS[4], 1000, check_bodies=check_bodies),
        treatment.from_broker(_VERSIONS[4], 1000, check_bodies=check_bodies),
    ):
        assert checker.feed(wrong) == (wrong if passes else b"")
        assert (checker.error is None) is passes


@pytest.mark.parametrize(
    ("topics", "most"),
    [
        (TopicRules(), 0),
        (TopicRules(max_qos=1), 0),
        (TopicRules(publish_prefix="ü/"), 3),
        (TopicRules(publish_prefix="a/", subscribe_prefix="bc/"), 5),
    ],
)
def test_only_prefixes_make_packets_longer(topics: TopicRules, most: int) -> None:
    """By their bytes, and by what the longer lengths take."""
    longer = Treatment(b"", _VERSIONS[5], topics).lengthens
    assert longer == 0 if not most else most < longer <= most + 8


def test_without_limits_there_is_no_pace() -> None:
    """With one of the two there is."""
    treatments = [Treatment(b"", _VERSIONS[4], **{key: 1.0}) for key in ("packets_per_second", "bytes_per_second")]
    assert all(treatment.pace(lambda: 0.0) is not None for treatment in treatments)
    assert Treatment(b"", _VERSIONS[4]).pace(lambda: 0.0) is None


def test_a_broker_that_keeps_no_time_is_not_pinged_for_a_paced_device() -> None:
    """Without a Keep Alive it waits for as long as it takes."""
    bench = ruled(packets_per_second=0.01, keep_alive=0)
    bench.session.device_received(mqtt.publish() * 5)
    bench.upstream.written.clear()
    bench.pass_seconds(100)
    assert bench.device.held
    assert not bench.upstream.written
