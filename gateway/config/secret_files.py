"""Secrets in files: passwords, passphrases, systemd credentials.

In: a path, or the name of a credential.  Out: the secret's bytes; `SecretUnavailable`, which says what is wrong with
the source and never contains the secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from gateway.config.value_words import quoted
from gateway.disk import read_file
from gateway.errors import GatewayError

LARGEST_SECRET = 65_535
"""Bytes; the longest password that MQTT allows."""

# How text in UTF-8 or UTF-16 begins that an editor of Windows has saved.
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
# systemd.exec(5), LoadCredential=: a file name.
_CREDENTIAL = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.@:-]{1,255}")


class SecretUnavailable(GatewayError):
    """A secret is not available; `str()` says why and contains nothing secret."""


@frozen
class Passphrase:
    """Where the passphrase of a private key is: in a file, in a systemd credential, or nowhere."""

    file: Path | None = None
    credential: str = ""

    @property
    def key(self) -> str:
        """The key of the configuration that names it."""
        return "client_key_password_credential" if self.credential else "client_key_password_file"

    def read(self, environment: Mapping[str, str] = os.environ) -> bytes | None:
        """Return it, `None` if there is none.  Raises `SecretUnavailable`."""
        if self.file is not None:
            return read_secret(self.file)
        return read_secret(credential_path(self.credential, environment)) if self.credential else None


def check_credential_name(text: str) -> None:
    """Refuse what cannot be the name of a systemd credential; "" is none."""
    if text and not _CREDENTIAL.fullmatch(text):
        raise ValueError(f"{quoted(text)} is not a credential name: give the name used in LoadCredential=")


def read_secret(path: Path) -> bytes:
    """Read a password from a file; one line end (LF or CRLF) at the end of the file is removed.

    Raises SecretUnavailable.
    """
    try:
        data = read_file(path)
    except OSError as problem:
        raise SecretUnavailable(f"{path} cannot be read: {problem.strerror}") from None
    return checked_secret(data, str(path))


def credential_path(name: str, environment: Mapping[str, str]) -> Path:
    """Return the path of a systemd credential (systemd.exec(5)).  Raises SecretUnavailable."""
    directory = environment.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise SecretUnavailable(
            f"credential {name} not found: CREDENTIALS_DIRECTORY is not set. Set LoadCredential= in the service's unit"
        )
    return Path(directory) / name


def checked_secret(data: bytes, shown: str) -> bytes:
    """Return a secret without the line end after it; `shown` names its source.  Raises SecretUnavailable."""
    if data.startswith(_BYTE_ORDER_MARKS):
        raise SecretUnavailable(f"{shown} begins with a byte order mark: save it as plain text without one")
    password = data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data
    if not password:
        raise SecretUnavailable(f"{shown}: the password is empty")
    if len(password) > LARGEST_SECRET:
        raise SecretUnavailable(f"{shown}: the password is longer than {LARGEST_SECRET} bytes")
    return password
