"""Key files: JSON with one secret each, made by scripts/keygen and readable by their user alone.

`client.key` is all that a client needs: its own key pair and the public key of the gateways.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from kvbaton.errors import KvbatonError
from kvbaton.sockets import Curve

KEYS_VARIABLE = "KVBATON_KEYS"
CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"
CLIENT = "client"
ADMIN = "admin"
MAX_FILE_BYTES = 1 << 20
OTHERS = stat.S_IRWXG | stat.S_IRWXO

T = TypeVar("T")

Z85Key = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}$")]


class KeyFileError(KvbatonError):
    """A key file is missing, open to others, or no key file; the message says what to do."""

    code = "key_file"


class KeyPair(msgspec.Struct, kw_only=True, frozen=True):
    """The content of a service's key file: a CURVE key pair (Z85)."""

    public_key: Z85Key
    secret_key: Z85Key


class ClientKey(KeyPair, kw_only=True, frozen=True):
    """The content of a client's or an operator's key file. `server_key` is the gateways' public
    key."""

    server_key: Z85Key


def key_file_name(role: str) -> str:
    """The file with a role's secret, in a folder of keys."""
    return f"{role}.key"


def mode_of(path: Path, status: os.stat_result) -> int:
    """The permission bits of a file. The group's reading bit does not count where systemd keeps a
    unit's credentials, in a folder that nobody else can enter: since version 254 it stands for an
    access control list with one user in it, the unit's own (systemd issue 29435, acl(5))."""
    mode = stat.S_IMODE(status.st_mode)
    credentials = os.environ.get(CREDENTIALS_VARIABLE)
    if credentials and path.is_relative_to(credentials):
        return mode & ~stat.S_IRGRP
    return mode


def read_with_mode(path: Path, most_bytes: int) -> tuple[int, bytes]:
    """The mode and the first bytes of one open file: it cannot be another one in between. Raises
    OSError."""
    with path.open("rb") as file:
        return mode_of(path, os.fstat(file.fileno())), file.read(most_bytes)


def read_key_file(path: Path, kind: type[T], forbidden: int = OTHERS) -> T:
    """The content of a key file without any `forbidden` bit in its mode. Raises KeyFileError."""
    try:
        mode, raw = read_with_mode(path, MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"key file {path} cannot be read: {error.strerror}") from error
    if mode & forbidden:
        raise KeyFileError(f"key file {path} is open to others (mode {mode:04o}): chmod 600 it")
    if len(raw) > MAX_FILE_BYTES:
        raise KeyFileError(f"key file {path} has more than {MAX_FILE_BYTES} bytes")
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Not "from error": what the decoder says may quote the secret.
        raise KeyFileError(f"{path} is no key file of this kind: make one with keygen") from None


def client_curve(keys: Path | str | None, role: str = CLIENT) -> Curve | None:
    """A client's end of its connections; None for plain ones. Raises KeyFileError.

    `keys` is a key file, or a folder with the role's; "" is no key, None what KVBATON_KEYS names.
    """
    named = os.environ.get(KEYS_VARIABLE, "") if keys is None else str(keys)
    if not named:
        return None
    path = Path(named)
    key = read_key_file(path / key_file_name(role) if path.is_dir() else path, ClientKey)
    return Curve(key.public_key, key.secret_key, key.server_key)
