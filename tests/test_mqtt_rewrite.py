from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import EndReason
from gateway.mqtt.connect import Connect, parse_connect
from gateway.mqtt.packets import PacketType, ProtocolVersion
from gateway.mqtt.properties import PropertyId
from gateway.mqtt.reader import Packet, PacketReader
from gateway.mqtt.rewrite import KEPT, ConnectChanges, rewrite_connect, will_properties
from tests.mqtt_packets import connect, string, text, user_property, with_length
from tests.test_mqtt_connect import CONNECT_PROPERTY_LISTS, WILL_PROPERTY_LISTS, mqtt_text

LIMIT = 1_000_000


def read(data: bytes) -> tuple[Packet, Connect]:
    reader = PacketReader(frozenset({PacketType.CONNECT}), LIMIT, EndReason.NOT_MQTT)
    reader.feed(data)
    packet = reader.next_packet()
    assert packet is not None
    assert reader.buffered == 0
    return packet, parse_connect(packet)


def rewrite(data: bytes, max_size: int = LIMIT, **changes: object) -> bytes:
    return rewrite_connect(*read(data), ConnectChanges(**changes), max_size)


@st.composite
def connects(draw: st.DrawFn) -> tuple[bytes, dict[str, object]]:
    """A CONNECT of any version, and what it was made of."""
    version = draw(st.sampled_from([3, 4, 5]))
    username = draw(st.none() | mqtt_text())
    may_have_password = username is not None or version == 5
    fields: dict[str, object] = {
        "version": version,
        "client_identifier": draw(mqtt_text()),
        "clean_start": draw(st.booleans()),
        "keep_alive": draw(st.integers(0, 65_535)),
        "username": username,
        "password": draw(st.none() | st.binary(max_size=200)) if may_have_password else None,
        "length_size": draw(st.sampled_from([1, 4])) if version < 5 else 1,
    }
    if version == 5:
        users = b"".join(user_property(*pair) for pair in draw(st.lists(st.tuples(mqtt_text(), mqtt_text()))))
        fields["properties"] = b"".join(draw(CONNECT_PROPERTY_LISTS)) + users
    if draw(st.booleans()):
        fields |= {
            "will_topic": draw(mqtt_text()),
            "will_payload": draw(st.binary(max_size=50)),
            "will_qos": draw(st.integers(0, 2)),
            "will_retain": draw(st.booleans()),
        }
        if version == 5:
            fields["will_properties"] = user_property() + b"".join(draw(WILL_PROPERTY_LISTS))
    return connect(**fields), fields  # type: ignore[arg-type]


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "client_identifier": mqtt_text(300),
        "username": mqtt_text(300),
        "password": st.none() | st.binary(max_size=300),
        "keep_alive": st.integers(0, 65_535),
        "clean_start": st.booleans(),
        "will_topic": mqtt_text(300),
        "will_retain": st.booleans(),
    },
)


@settings(max_examples=250)
@given(made=connects(), changes=CHANGES, upgrade=st.booleans())
def test_a_rewritten_connect_is_what_the_device_would_have_sent_with_those_fields(made, changes, upgrade):
    """Built anew from the changed fields by the tests' own encoder, it has the same bytes, Will and properties too."""
    data, fields = made
    parsed = read(data)[1]
    version = fields["version"]
    if upgrade and version == 3:
        changes["version"] = ProtocolVersion.MQTT_3_1_1
        version = 4
    if fields.get("will_topic") is None:
        effective = {key: value for key, value in changes.items() if not key.startswith("will_")}
    else:
        effective = changes
    wanted = fields | effective | {"version": version}
    if wanted["password"] is not None and wanted["username"] is None and version < 5:
        with pytest.raises(ValueError, match="no password without a user name"):
            rewrite(data, **changes)
        return
    if all(value == fields.get(key) for key, value in effective.items()):
        assert rewrite(data, **changes) == data
        return
    rewritten = rewrite(data, **changes)
    assert rewritten == connect(**dict(wanted, length_size=1))
    told = read(rewritten)[1]
    named = {key for key in effective if not key.startswith("will_")}
    for field in attrs.fields(Connect):
        if field.name not in named | {"will"}:
            assert getattr(told, field.name) == getattr(parsed, field.name), field.name
    for name in named:
        assert getattr(told, name) == effective[name]


@given(made=connects())
def test_a_connect_in_which_nothing_changes_keeps_its_bytes(made):
    """Also where the changes name what is there already, and where the Remaining Length is padded."""
    data, _ = made
    parsed = read(data)[1]
    assert rewrite(data) == data
    names = ("client_identifier", "username", "password", "keep_alive", "clean_start", "version")
    assert rewrite(data, **{name: getattr(parsed, name) for name in names}) == data


@pytest.mark.parametrize("flags", [0b1100_0011, 0b1111_1010, 0b0010_0011, 0b1000_0000])
def test_what_3_1_leaves_without_meaning_is_right_in_3_1_1(flags):
    """Flags that stand for nothing in 3.1 would be malformed in 3.1.1: the upgraded CONNECT has none of them."""
    data = connect(version=3, flags=flags)
    upgraded = rewrite(data, version=ProtocolVersion.MQTT_3_1_1)
    assert upgraded == connect(version=4, clean_start=bool(flags & 2))


def test_flags_of_credentials_that_are_absent_are_not_left_to_lie():
    """A 3.1 CONNECT may flag a password that it does not carry; with a user name added, that flag would be false."""
    told = rewrite(connect(version=3, flags=0b1100_0010), username="plant")
    assert told == connect(version=3, username="plant")


def test_the_bridge_bit_survives_the_upgrade():
    """Mosquitto's bit says something of the client, not of the version."""
    data = connect(version=3, level=0x83)
    assert rewrite(data, version=ProtocolVersion.MQTT_3_1_1) == connect(version=4, level=0x84)


@pytest.mark.parametrize(("old", "new"), [(3, 5), (4, 3), (4, 5), (5, 4)])
def test_no_other_change_of_version_is_made(old, new):
    """Everything after CONNECT would have to be translated, too."""
    with pytest.raises(ValueError, match="cannot become"):
        rewrite(connect(version=old), version=ProtocolVersion(new))


@pytest.mark.parametrize("value", ["answers/here", "", "x" * 300])
def test_the_response_topic_of_a_will_alone_is_replaced(value):
    """What stands before and after it in the properties is copied."""
    before, after = user_property("a", "b"), user_property("c", "d") + text(0x03, "text/plain")
    will = {"version": 5, "will_topic": "gone"}
    data = connect(**will, will_properties=before + text(0x08, "answers") + after)
    assert rewrite(data, will_response_topic=value) == connect(
        **will, will_properties=before + text(0x08, value) + after
    )


def test_a_response_topic_is_not_given_to_a_will_without_one():
    """The gateway invents no properties."""
    data = connect(version=5, will_topic="gone", will_properties=user_property())
    assert rewrite(data, will_response_topic="x") == data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client_identifier": "x" * 65_536}, "65536 bytes"),
        ({"username": "ü" * 40_000}, "80000 bytes"),
        ({"username": "x", "password": bytes(65_536)}, "65536 bytes"),
        ({"will_topic": "x" * 65_536}, "65536 bytes"),
        ({"client_identifier": "x" * 300}, "above the limit of 256"),
    ],
)
def test_what_no_connect_can_carry_is_refused(changes, words):
    """A field of more than 65,535 bytes, and a packet above the limit."""
    with pytest.raises(ValueError, match=words):
        rewrite(connect(will_topic="gone"), max_size=256, **changes)


def test_changes_show_no_credentials():
    """They may come to stand in a traceback."""
    assert "hunter2" not in repr(ConnectChanges(username="hunter2", password=b"hunter2"))
    assert ConnectChanges().username is KEPT


def test_the_properties_of_a_connect_are_not_looked_into():
    """An Authentication Method whose text looks like a property is copied like everything else."""
    properties = text(0x15, "\x08\x01\x01x") + user_property()
    data = connect(version=5, properties=properties)
    rewritten = rewrite(data, client_identifier="other", will_response_topic="y")
    assert rewritten == connect("other", version=5, properties=properties)
    assert with_length(properties) in rewritten
    assert string("other") in rewritten
    assert read(rewritten)[1].properties.text(PropertyId.AUTHENTICATION_METHOD) == "\x08\x01\x01x"


def test_a_connect_may_be_as_large_as_the_limit() -> None:
    """And not a byte larger."""
    whole = rewrite(connect("a"), client_identifier="longer")
    assert rewrite(connect("a"), len(whole), client_identifier="longer") == whole
    with pytest.raises(ValueError, match="limit"):
        rewrite(connect("a"), len(whole) - 1, client_identifier="longer")


def test_the_properties_that_a_rule_gives_are_those_of_the_connect() -> None:
    """Before 5.0 there are none to replace."""
    data = connect(version=5, properties=user_property())
    given = with_length(user_property("c", "d"))
    assert rewrite(data, properties=given) == connect(version=5, properties=user_property("c", "d"))
    assert rewrite(data, keep_alive=7) == connect(version=5, properties=user_property(), keep_alive=7)
    assert rewrite(connect(version=4), properties=given) == connect(version=4)


def test_the_properties_of_a_will_are_returned_with_their_length() -> None:
    """Nothing without a Will, or before 5.0."""
    assert will_properties(*read(connect(version=5, will_topic="t", will_properties=user_property()))) == with_length(
        user_property()
    )
    assert will_properties(*read(connect(version=5, will_topic="t"))) == b"\0"
    assert will_properties(*read(connect(version=5))) == b""
    assert will_properties(*read(connect(version=4, will_topic="t"))) == b""
