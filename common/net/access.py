"""Who this process is to the others and who they are to it: keys, or plain loopback if asked for.

A process has two files: its role's secret, and public.json, which names every key that is known.
A key that is taken out of public.json is refused by processes that start from then on.
"""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.config import StartError
from kvbaton.keys import ADMIN, CLIENT, KeyFileError, KeyPair, Z85Key, key_file_name, read_key_file
from kvbaton.sockets import Curve

SERVICES = ("gateway", "kvstore", "prefill", "decode")
PUBLIC_FILE = "public.json"

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_HOW = (
    "make keys with `scripts/keygen DIR` and start with --keys DIR, or, on loopback alone, "
    "with --insecure"
)


class ClientEntry(msgspec.Struct, kw_only=True, frozen=True):
    """A client's public key, and whose client it is."""

    name: str
    tenant: str
    public_key: Z85Key


class PublicKeys(msgspec.Struct, kw_only=True, frozen=True):
    """The content of public.json: every key that is known, those of services and the operator's by
    role."""

    roles: dict[str, Z85Key]
    clients: list[ClientEntry] = []

    def __post_init__(self) -> None:
        if set(self.roles) != {*SERVICES, ADMIN}:
            raise ValueError("a key for each role is needed")
        if len(self.users()) != len(self.roles) + len(self.clients):
            raise ValueError("a key is given to two users")

    def users(self) -> dict[str, str]:
        """The user of each public key: a role, or client/TENANT/NAME."""
        clients = {each.public_key: f"{CLIENT}/{each.tenant}/{each.name}" for each in self.clients}
        return clients | {key: role for role, key in self.roles.items()}


def role_of(user: str) -> str:
    """The role of a key's user; "" for a peer without a key, where none are used."""
    return user.partition("/")[0]


def tenant_of(user: str) -> str:
    """The tenant of a client's user; "" for all others."""
    return user.split("/")[1] if role_of(user) == CLIENT else ""


def read_public_keys(folder: Path) -> PublicKeys:
    """What is in public.json. Raises KeyFileError: also if others may write it, and so let
    anybody in."""
    return read_key_file(folder / PUBLIC_FILE, PublicKeys, _WRITABLE)


@dataclass(frozen=True, slots=True)
class Keys:
    """A process's own key pair, and everybody's public keys."""

    own: KeyPair
    public: PublicKeys

    @property
    def binding(self) -> Curve:
        """For sockets that bind."""
        return Curve(self.own.public_key, self.own.secret_key)

    def connecting(self, role: str) -> Curve:
        """For sockets that connect to a service of this role."""
        return Curve(self.own.public_key, self.own.secret_key, self.public.roles[role])


@dataclass(frozen=True, slots=True)
class Access:
    """What a service's settings say: `folder` of its keys, or `insecure`; and what it `binds`."""

    role: str
    folder: str
    insecure: bool
    binds: Sequence[str]

    def load(self) -> Keys | None:
        """The keys; None if the process is to run without. Raises StartError, which says what to
        do."""
        outside = [endpoint for endpoint in self.binds if not _is_loopback(endpoint)]
        if self.insecure and outside:
            raise StartError(
                f"{outside[0]} can be reached from elsewhere, where --insecure is not allowed: "
                "make keys with `scripts/keygen DIR` and start with --keys DIR"
            )
        if self.insecure:
            return None
        if not self.folder:
            raise StartError(f"there are no keys: {_HOW}")
        try:
            return self._read(Path(self.folder))
        except KeyFileError as error:
            raise StartError(f"--keys {self.folder}: {error.message}") from error
        except OSError as error:
            raise StartError(f"--keys {self.folder} ({error.strerror}): {_HOW}") from error

    def _read(self, folder: Path) -> Keys:
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & _WRITABLE:
            raise KeyFileError(f"others may write to the folder (mode {mode:04o}): chmod 700 it")
        file_name = key_file_name(self.role)
        own, public = read_key_file(folder / file_name, KeyPair), read_public_keys(folder)
        if public.roles[self.role] != own.public_key:
            raise KeyFileError(f"{file_name} and {PUBLIC_FILE} do not belong together")
        return Keys(own, public)


def _is_loopback(endpoint: str) -> bool:
    scheme, _, address = endpoint.partition("://")
    host = address.rpartition(":")[0].strip("[]")
    return scheme in ("ipc", "inproc") or (scheme == "tcp" and is_loopback_host(host))


def is_loopback_host(host: str) -> bool:
    """Whether only processes of this host can reach what is bound there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # an interface or a name: it may be anything
        return False
