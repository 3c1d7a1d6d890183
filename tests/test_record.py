"""The fields of session records: what is known of a session that has only begun."""

from __future__ import annotations

from attrs import fields

from gateway.session.record import Dial, Peer, SessionRecord, Traffic


def test_of_a_session_that_has_begun_nothing_else_is_known() -> None:
    """It is not established, not offline, and nothing has passed."""
    record = SessionRecord(7, "10.0.0.1", 5.0)
    given = {"number": 7, "device_address": "10.0.0.1", "started": 5.0}
    values = {each.name: getattr(record, each.name) for each in fields(SessionRecord)}
    assert {name: value for name, value in values.items() if value not in ("", None) and value is not False} == {
        **given,
        **dict.fromkeys(("bytes_up", "bytes_down", "packets_up", "packets_down", "withheld"), 0),
    }
    assert not record.established
    assert Traffic() == (0, 0, 0, 0)


def test_a_session_is_established_once_connack_came() -> None:
    """Also if that took no time."""
    record = SessionRecord(7, "10.0.0.1", 5.0)
    record.connack_seconds = 0.0
    assert record.established is True


def test_a_record_has_no_other_fields() -> None:
    """A misspelt one would be lost silently; a thousand sessions have one each."""
    for record in (SessionRecord(7, "10.0.0.1", 5.0), Dial("broker.test:8883")):
        assert not hasattr(record, "__dict__")


def test_a_peer_is_not_resumed_unless_that_is_said() -> None:
    """Equal facts are one key, for what caches their texts."""
    facts = ("CN=broker", "CN=ca", "DNS:broker", None, "TLSv1.3", "x", "mqtt")
    peer, same = (Peer(*facts) for _ in range(2))  # type: ignore[arg-type]
    assert peer.resumed is False
    assert {peer: 1}[same] == 1
