"""The CONNECT that a check sends.

In: the fields that the user chose.  Out: `Login`, with the packet; `ValueError` for what CONNECT cannot carry.
"""

from __future__ import annotations

import secrets
import string
from pathlib import Path

from attrs import field, frozen

from gateway.disk import read_file
from gateway.mqtt.packets import MAX_STRING_BYTES, PacketType, encode_remaining_length, encode_string

_ALPHABET = string.ascii_lowercase + string.digits
# 23 with the prefix: the longest Client Identifier that every broker must accept (MQTT 3.1.1 §3.1.3.1).
_RANDOM_CHARACTERS = 3
_KEEP_ALIVE = 60  # seconds; the session is shorter than that
_USERNAME_FLAG, _PASSWORD_FLAG, _CLEAN_SESSION_FLAG = 0x80, 0x40, 0x02


@frozen
class Login:
    """The fields of CONNECT; `chose_identifier` is set if the user chose the Client Identifier.

    With `clean` the broker forgets the session that it has for that name, and what waits in it.
    """

    client_identifier: str
    chose_identifier: bool
    username: str | None
    password: bytes | None = field(repr=False)
    clean: bool = True

    @property
    def packet(self) -> bytes:
        """CONNECT of MQTT 3.1.1 (§3.1).  Raises `ValueError` for a field that is too long."""
        flags = _CLEAN_SESSION_FLAG if self.clean else 0
        payload = encode_string(self.client_identifier)
        if self.username is not None:
            flags |= _USERNAME_FLAG
            payload += encode_string(self.username)
        if self.password is not None:
            flags |= _PASSWORD_FLAG
            payload += len(self.password).to_bytes(2, "big") + self.password
        body = encode_string("MQTT") + bytes((4, flags)) + _KEEP_ALIVE.to_bytes(2, "big") + payload
        return bytes((PacketType.CONNECT << 4,)) + encode_remaining_length(len(body)) + body


def make_login(client_identifier: str | None, username: str | None, password_file: str | None) -> Login:
    """Make the login; without a Client Identifier it gets a random one, which disturbs no device.

    The password is the file's content without the line end.  Raises `ValueError` that names the option.
    """
    if password_file is not None and username is None:
        raise ValueError("--password-file: also give --username; MQTT 3.1.1 has no password without a user name")
    password = None if password_file is None else _read_password(Path(password_file))
    random = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))
    for option, text in (("--client-id", client_identifier), ("--username", username)):
        try:
            encode_string(text or "")
        except UnicodeEncodeError:
            raise ValueError(f"{option}: it is not UTF-8, which MQTT requires") from None
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
    return Login(
        f"mqtts-gateway-check-{random}" if client_identifier is None else client_identifier,
        client_identifier is not None,
        username,
        password,
        clean=client_identifier is None,
    )


def _read_password(path: Path) -> bytes:
    try:
        content = read_file(path, from_pipe=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--password-file: {path} cannot be read: {reason}") from None
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"--password-file: {path} begins with a byte order mark: save it as plain text without one")
    password = content.removesuffix(b"\n").removesuffix(b"\r")
    if len(password) > MAX_STRING_BYTES:
        raise ValueError(f"--password-file: {path} is longer than the {MAX_STRING_BYTES} bytes that MQTT can carry")
    return password
