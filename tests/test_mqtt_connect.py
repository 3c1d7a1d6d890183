from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import EndReason, PacketError
from gateway.mqtt.connect import Connect, UnsupportedVersion, Will, parse_connect
from gateway.mqtt.packets import PacketType
from gateway.mqtt.properties import Properties, PropertyId
from gateway.mqtt.reader import PacketReader
from tests.mqtt_packets import binary, connect, number, packet, string, text, user_property, variable_byte_integer

VERSIONS = [3, 4, 5]


def parse(data: bytes) -> Connect:
    """Read one CONNECT, and nothing after it, the way the gateway does."""
    reader = PacketReader(frozenset({PacketType.CONNECT}), 1_000_000, EndReason.NOT_MQTT)
    reader.feed(data)
    found = reader.next_packet()
    assert found is not None
    assert reader.buffered == 0
    return parse_connect(found)


def mqtt_text(max_size: int = 30) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=max_size)


CONNECT_PROPERTY_LISTS = st.lists(
    st.sampled_from(
        [
            number(0x11, 2**32 - 1, size=4),
            number(0x21, 1, size=2),
            number(0x27, 128, size=4),
            number(0x22, 0, size=2),
            number(0x19, 1, size=1),
            number(0x17, 0, size=1),
            text(0x15, "SCRAM") + b"\x16" + binary(b"first"),
        ]
    ),
    unique=True,
)
WILL_PROPERTY_LISTS = st.lists(
    st.sampled_from(
        [
            number(0x18, 30, size=4),
            number(0x01, 1, size=1),
            number(0x02, 60, size=4),
            text(0x03, "text/plain"),
            text(0x08, "answers"),
            b"\x09" + binary(b"\0\xff"),
        ]
    ),
    unique=True,
)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), version=st.sampled_from(VERSIONS))
def test_what_was_built_is_what_is_read(data, version):
    """Every field of a generated CONNECT comes out as it went in."""
    username = data.draw(st.none() | mqtt_text())
    may_have_password = username is not None or version == 5
    has_will = data.draw(st.booleans())
    fields = {
        "client_identifier": data.draw(mqtt_text()),
        "clean_start": data.draw(st.booleans()),
        "keep_alive": data.draw(st.integers(0, 65_535)),
        "username": username,
        "password": data.draw(st.none() | st.binary(max_size=200)) if may_have_password else None,
    }
    pairs = data.draw(st.lists(st.tuples(mqtt_text(), mqtt_text()), max_size=3)) if version == 5 else []
    users = b"".join(user_property(*pair) for pair in pairs)
    wire = dict(fields, version=version)
    if version == 5:
        wire["properties"] = b"".join(data.draw(CONNECT_PROPERTY_LISTS)) + users
    will = {}
    if has_will:
        will = {
            "topic": data.draw(mqtt_text()),
            "payload": data.draw(st.binary(max_size=50)),
            "qos": data.draw(st.integers(0, 2)),
            "retain": data.draw(st.booleans()),
        }
        wire |= {f"will_{name}": value for name, value in will.items()}
        if version == 5:
            wire["will_properties"] = users + b"".join(data.draw(WILL_PROPERTY_LISTS))
    parsed = parse(connect(**wire))
    assert {name: getattr(parsed, name) for name in fields} == fields
    assert (parsed.version, parsed.bridge) == (version, False)
    assert (parsed.will is not None) == has_will
    if parsed.will is not None:
        assert {name: getattr(parsed.will, name) for name in will} == will
    for properties in [parsed.properties, *([parsed.will.properties] if parsed.will else [])]:
        assert (properties is None) == (version != 5)


def test_the_properties_of_mqtt_5_are_read():
    """Each value is found by its identifier; those that steer the gateway have names."""
    properties = number(0x11, 10, size=4) + number(0x27, 128, size=4) + text(0x15, "SCRAM") + b"\x16" + binary(b"\0")
    parsed = parse(connect(version=5, properties=properties + user_property("a", "b")))
    assert parsed.properties == Properties(
        {
            PropertyId.SESSION_EXPIRY_INTERVAL: 10,
            PropertyId.MAXIMUM_PACKET_SIZE: 128,
            PropertyId.AUTHENTICATION_METHOD: "SCRAM",
            PropertyId.AUTHENTICATION_DATA: b"\0",
        }
    )
    assert parsed.authentication_method == "SCRAM"
    assert parsed.maximum_packet_size == 128


@pytest.mark.parametrize("version", VERSIONS)
def test_what_only_the_broker_needs_is_dropped_and_the_rest_is_kept(version):
    """A session may last for months, and its credentials must not stay in memory with it."""
    properties = number(0x27, 128, size=4) + text(0x15, "SCRAM") + b"\x16" + binary(b"secret") if version == 5 else b""
    whole = parse(
        connect("d", version=version, keep_alive=7, will_topic="t", username="u", password=b"p", properties=properties)
    )
    rest = whole.without_content()
    assert (rest.client_identifier, rest.will, rest.username, rest.password) == ("", None, None, None)
    assert (rest.version, rest.clean_start, rest.keep_alive) == (whole.version, True, 7)
    assert rest.maximum_packet_size == whole.maximum_packet_size
    assert rest.authentication_method == whole.authentication_method
    assert (rest.properties is None) is (version != 5)
    if rest.properties is not None:
        assert PropertyId.AUTHENTICATION_DATA not in rest.properties.values


def test_a_connect_has_a_thousand_properties_at_most():
    """Those of the Will included; anyone can send one, and each takes time to read."""
    half, more, whole, many = (user_property("", "") * count for count in (500, 501, 1000, 1001))
    for few in ({"properties": whole}, {"properties": half, "will_topic": "t", "will_properties": half}):
        parse(connect(version=5, **few))
    for properties in (
        {"properties": many},
        {"will_topic": "t", "will_properties": many},
        {"properties": half, "will_topic": "t", "will_properties": more},
    ):
        with pytest.raises(PacketError, match="more than 1000 properties") as caught:
            parse(connect(version=5, **properties))
        assert (caught.value.reason, caught.value.reason_code) == (EndReason.PACKET_TOO_LARGE, 0x95)


@pytest.mark.parametrize("first", [0x11, 0x12, 0x14, 0x18, 0x1D])
def test_the_flags_of_connect_mean_nothing_in_3_1(first):
    """MQTT 3.1 §3.1: they are not used; 3.1.1 and 5.0 want them to be 0."""

    def read(version):
        reader = PacketReader(frozenset({PacketType.CONNECT}), 1000, EndReason.NOT_MQTT, any_flags=True)
        reader.feed(bytes([first]) + connect(version=version)[1:])
        return parse_connect(reader.next_packet())

    assert read(3).client_identifier
    for version in (4, 5):
        with pytest.raises(PacketError) as caught:
            read(version)
        assert caught.value.reason is EndReason.MALFORMED_PACKET


@pytest.mark.parametrize("version", VERSIONS)
def test_what_mqtt_5_adds_is_none_when_it_is_absent(version):
    """A device that asks for nothing gets no limit and no enhanced authentication."""
    parsed = parse(connect(version=version))
    assert (parsed.authentication_method, parsed.maximum_packet_size) == (None, None)


@pytest.mark.parametrize("size", [0, 24, 65_535])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_client_identifier_may_have_any_length(version, size):
    """The broker judges it, none included: real brokers take more than the specifications ask them to."""
    assert parse(connect("x" * size, version=version, clean_start=False)).client_identifier == "x" * size


LEVELS = [
    # protocol name, level; the version and the bridge bit, or the CONNACK of the refusal
    (b"MQIsdp", 3, (3, False)),
    (b"MQIsdp", 0x83, (3, True)),
    (b"MQTT", 4, (4, False)),
    (b"MQTT", 0x84, (4, True)),
    (b"MQTT", 5, (5, False)),
    (b"MQIsdp", 2, "20020001"),
    (b"MQIsdp", 4, "20020001"),
    (b"MQIsdp", 5, "2003008400"),
    (b"MQTT", 0, "20020001"),
    (b"MQTT", 3, "20020001"),
    (b"MQTT", 6, "2003008400"),
    (b"MQTT", 0x85, "2003008400"),
    (b"MQTT", 0x83, "2003008400"),
    (b"MQTT", 255, "2003008400"),
]


@pytest.mark.parametrize(("name", "level", "expected"), LEVELS)
def test_the_level_decides_the_version_or_the_refusal(name, level, expected):
    """A level that is not spoken is refused in the form that its device most likely reads."""
    data = connect(version=5 if level == 5 else 4, name=name, level=level)
    if isinstance(expected, tuple):
        parsed = parse(data)
        assert (parsed.version, parsed.bridge) == expected
        return
    with pytest.raises(UnsupportedVersion) as caught:
        parse(data)
    fault = caught.value
    assert fault.answer.hex() == expected
    assert (fault.reason, fault.reason_code) == (EndReason.UNSUPPORTED_PROTOCOL_VERSION, 0x84)
    assert fault.detail == f"protocol name {name.decode()} with level {level}"


def test_a_level_that_is_not_spoken_is_refused_whatever_follows_it():
    """Nobody knows how the rest of a later version's CONNECT is written."""
    with pytest.raises(UnsupportedVersion):
        parse(packet(0x10, binary(b"MQTT") + b"\x06"))


# What is wrong; the versions it is wrong in; the reason code; the detail.
MALFORMED = [
    ("no protocol name", {"name": b""}, [4, 5], 0x81, "protocol name of CONNECT is b''"),
    ("another protocol name", {"name": b"AMQP"}, [4], 0x81, "protocol name of CONNECT is b'AMQP'"),
    ("protocol name in lower case", {"name": b"mqtt"}, [4], 0x81, "b'mqtt', neither MQTT nor MQIsdp"),
    ("endless protocol name", {"name": b"A" * 9_000}, [4], 0x81, "is b'AAAAAAAAAAAAAAAA', neither"),
    ("reserved flag", {"flags": 0x03}, [4, 5], 0x81, "reserved flag set"),
    ("Will QoS 3", {"will_topic": "t", "will_qos": 3}, VERSIONS, 0x81, "Will QoS 3"),
    ("Will QoS without Will", {"flags": 0x0A}, [4, 5], 0x81, "Will QoS but no Will"),
    ("Will Retain without Will", {"flags": 0x22}, [4, 5], 0x81, "Will Retain but no Will"),
    ("password without user name", {"password": b"p"}, [3, 4], 0x81, "password but no user name"),
    (
        "Client Identifier not UTF-8",
        {"client_identifier": b"\xff"},
        VERSIONS,
        0x81,
        "Client Identifier of CONNECT is not UTF-8",
    ),
    ("Client Identifier with a surrogate", {"client_identifier": b"\xed\xa0\x80"}, VERSIONS, 0x81, "not UTF-8"),
    ("Client Identifier overlong", {"client_identifier": b"\xc0\x80"}, VERSIONS, 0x81, "not UTF-8"),
    ("Client Identifier with U+0000", {"client_identifier": "a\0b"}, VERSIONS, 0x81, "U+0000"),
    ("Will Topic not UTF-8", {"will_topic": b"\xff"}, VERSIONS, 0x81, "Will Topic of CONNECT is not UTF-8"),
    ("user name not UTF-8", {"username": b"\xff"}, VERSIONS, 0x81, "user name of CONNECT is not UTF-8"),
    ("user name flag without user name", {"flags": 0x82}, [4, 5], 0x81, "packet ends within the user name"),
    (
        "password flag without password",
        {"username": "u", "flags": 0xC2},
        [4, 5],
        0x81,
        "packet ends within the password",
    ),
    ("Will flag without Will", {"flags": 0x06}, VERSIONS, 0x81, "packet ends within the"),
    ("user name without its flag", {"username": "u", "flags": 0x02}, VERSIONS, 0x81, "3 bytes after its last field"),
    ("bytes after the end", {"extra": b"\0"}, VERSIONS, 0x81, "1 bytes after its last field"),
    ("cut user name", {"flags": 0x82, "extra": b"\0\2u"}, VERSIONS, 0x81, "packet ends within the user name"),
    ("padded Remaining Length", {"length_size": 2}, [5], 0x81, "Remaining Length in more bytes than it needs"),
]


@pytest.mark.parametrize(
    ("wrong", "version", "code", "detail"),
    [
        pytest.param(wrong, version, code, detail, id=f"{name}-{version}")
        for name, wrong, versions, code, detail in MALFORMED
        for version in versions
    ],
)
def test_a_malformed_connect_is_refused(wrong, version, code, detail):
    """Each rule broken alone, in each version that has it."""
    with pytest.raises(PacketError) as caught:
        parse(connect(**{"version": version} | wrong))
    assert caught.value.reason is EndReason.MALFORMED_PACKET
    assert caught.value.reason_code == code
    assert detail in caught.value.detail


# What is wrong; the properties; the reason code; the detail.
WRONG_PROPERTIES = [
    ("unknown identifier", b"\x7e\0", 0x81, "0x7E is not allowed in CONNECT"),
    ("identifier of two bytes", b"\x80\x01\0", 0x81, "0x80 is not allowed in CONNECT"),
    ("property of CONNACK", number(0x13, 1, size=2), 0x81, "0x13 is not allowed in CONNECT"),
    ("property of the Will", number(0x18, 1, size=4), 0x81, "0x18 is not allowed in CONNECT"),
    ("twice", number(0x11, 1, size=4) * 2, 0x82, "Session Expiry Interval more than once"),
    ("Receive Maximum 0", number(0x21, 0, size=2), 0x82, "Receive Maximum of CONNECT is 0"),
    ("Maximum Packet Size 0", number(0x27, 0, size=4), 0x82, "Maximum Packet Size of CONNECT is 0"),
    ("flag of 2", number(0x17, 2, size=1), 0x82, "Request Problem Information of CONNECT is 2"),
    ("data without method", b"\x16" + binary(b"x"), 0x82, "Authentication Data without a method"),
    ("cut number", b"\x11\0\0\0", 0x81, "packet ends within the Session Expiry Interval"),
    ("cut string", b"\x15\0\5abc", 0x81, "packet ends within the Authentication Method"),
    ("cut User Property", b"\x26" + string("key"), 0x81, "packet ends within the User Property"),
    ("User Property not UTF-8", b"\x26\0\1\xff\0\0", 0x81, "User Property of CONNECT is not UTF-8"),
    ("string with U+0000", text(0x15, "\0"), 0x81, "U+0000"),
]


@pytest.mark.parametrize(
    ("properties", "code", "detail"), [pytest.param(*case[1:], id=case[0]) for case in WRONG_PROPERTIES]
)
def test_wrong_properties_are_refused(properties, code, detail):
    """What cannot be read is malformed; what contradicts itself is a protocol error."""
    with pytest.raises(PacketError) as caught:
        parse(connect(version=5, properties=properties))
    reason = EndReason.MALFORMED_PACKET if code == 0x81 else EndReason.PROTOCOL_ERROR
    assert (caught.value.reason, caught.value.reason_code) == (reason, code)
    assert detail in caught.value.detail


@pytest.mark.parametrize("properties", [number(0x11, 1, size=4), number(0x01, 2, size=1), number(0x18, 1, size=4) * 2])
def test_wrong_will_properties_are_refused(properties):
    """The Will has properties of its own, and rules for them."""
    with pytest.raises(PacketError, match="the Will of CONNECT"):
        parse(connect(version=5, will_topic="t", will_properties=properties))


@pytest.mark.parametrize(
    ("property_length", "detail"),
    [
        (b"", "packet ends within the Property Length"),
        (b"\x80", "packet ends within the Property Length"),
        (b"\x80\x00", "takes 2 bytes"),
        (b"\xff\xff\xff\xff\x01", "more than four bytes"),
        (b"\x05\x11", "packet ends within the properties"),
    ],
)
def test_a_wrong_property_length_is_malformed(property_length, detail):
    """The Property Length obeys the same rules as the Remaining Length."""
    start = binary(b"MQTT") + b"\x05\x02\x00\x3c"
    with pytest.raises(PacketError, match=detail) as caught:
        parse(packet(0x10, start + property_length))
    assert caught.value.reason_code == 0x81


@pytest.mark.parametrize("version", VERSIONS)
def test_no_body_that_ends_too_soon_is_read(version):
    """Every strict prefix of a body, under a Remaining Length that is true to it, is refused."""
    whole = connect(
        version=version,
        will_topic="t",
        username="u",
        password=b"p",
        properties=number(0x21, 9, size=2) + user_property(),
        will_properties=text(0x03, "x"),
    )
    body = whole[2:]
    assert whole == b"\x10" + variable_byte_integer(len(body)) + body
    # In 3.1 a user name and a password that were announced may be left out: the body may end before either.
    allowed = {len(body) - 6, len(body) - 3} if version == 3 else set()
    for end in set(range(len(body))) - allowed:
        with pytest.raises(PacketError, match="packet ends within"):
            parse(packet(0x10, body[:end]))


def test_mqtt_3_1_lets_the_remaining_length_decide_over_the_credential_flags():
    """User name and password may be announced and missing (MQTT 3.1 §3.1)."""
    nothing = parse(connect(version=3, flags=0xC2))
    assert (nothing.username, nothing.password) == (None, None)
    only_name = parse(connect(version=3, username="u", flags=0xC2))
    assert (only_name.username, only_name.password) == ("u", None)


def test_mqtt_3_1_does_not_look_at_unused_flags():
    """The reserved bit, and the Will bits without a Will, mean nothing there."""
    parsed = parse(connect(version=3, flags=0b0011_1011))
    assert parsed.will is None
    assert parsed.clean_start


@pytest.mark.parametrize("version", [3, 4])
def test_a_padded_remaining_length_passes_before_mqtt_5(version):
    """Old firmware pads it, and only 5.0 forbids that."""
    assert parse(connect(version=version, length_size=4)).client_identifier == "sensor-1"


def test_mqtt_5_allows_a_password_without_a_user_name():
    """A token may be all that a device has."""
    parsed = parse(connect(version=5, password=b"token"))
    assert (parsed.username, parsed.password) == (None, b"token")


def test_a_byte_order_mark_is_part_of_the_text():
    """It is neither stripped nor refused (MQTT 5.0 §1.5.4)."""
    assert parse(connect("\ufeffa")).client_identifier == "\ufeffa"


def test_repr_shows_no_secret():
    """A Connect that lands in a log does not give the credentials away."""
    parsed = parse(
        connect(
            version=5,
            username="secret-user",
            password=b"secret-password",
            will_topic="gone",
            will_payload=b"secret-payload",
            properties=text(0x15, "M") + b"\x16" + binary(b"secret-data") + user_property("secret-key", "secret-value"),
        )
    )
    assert isinstance(parsed.will, Will)
    assert "secret" not in repr(parsed)
    assert "sensor-1" in repr(parsed)
    assert "{Authentication Method, Authentication Data}" in repr(parsed)


@pytest.mark.parametrize("field", [{"password": b"hunter2" * 9, "username": "hunter2"}, {"username": b"hunter2\xff"}])
def test_a_refusal_shows_no_secret(field):
    """The details of a fault name the field and never quote it."""
    with pytest.raises(PacketError) as caught:
        parse(connect(**field, extra=b"hunter2"))
    assert "hunter2" not in str(caught.value)


@settings(deadline=None, max_examples=500)
@given(st.sampled_from([b"", b"\0\6MQIsdp\3", b"\0\4MQTT\4", b"\0\4MQTT\5"]), st.binary(max_size=60))
def test_noise_raises_nothing_but_packet_errors(start, noise):
    """Whatever stands in a CONNECT, it is read or refused."""
    try:
        parsed = parse(packet(0x10, start + noise))
    except PacketError:
        return
    assert isinstance(parsed, Connect)


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(VERSIONS), st.integers(0, 200), st.integers(0, 255))
def test_one_changed_byte_raises_nothing_but_packet_errors(version, position, byte):
    """A CONNECT with one byte changed reaches the deeper branches."""
    body = bytearray(
        connect(version=version, will_topic="t", username="u", password=b"p", properties=text(0x15, "M"))[2:]
    )
    body[position % len(body)] = byte
    try:
        code = 0
        parse(packet(0x10, bytes(body)))
    except PacketError as fault:
        code = fault.reason_code
    assert code in {0, 0x81, 0x82, 0x84}
