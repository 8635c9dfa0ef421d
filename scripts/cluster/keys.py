"""Makes a cluster's keys: a folder with one file for each secret, and one that all processes have.

The folder appears whole or not at all, also when several processes make it at once.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

import msgspec
import zmq

from common.locks import locked
from common.net.access import PUBLIC_FILE, SERVICES, ClientEntry, PublicKeys, read_public_keys
from kvbaton.keys import ADMIN, CLIENT, ClientKey, KeyPair, key_file_name
from scripts.cluster.ports import ClusterError

DEFAULT_CLIENT = "default"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def client_file(folder: Path, name: str = DEFAULT_CLIENT) -> Path:
    """Where a client's key is."""
    return folder / key_file_name(CLIENT if name == DEFAULT_CLIENT else f"{CLIENT}-{name}")


def make_keys(folder: Path) -> bool:
    """Make a cluster's keys for this user alone, unless the folder is there: then False. Raises
    OSError."""
    if folder.exists():
        return False
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}")
    unfinished.mkdir(mode=0o700)
    try:
        _fill(unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        return False  # another process was first
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _fill(folder: Path) -> None:
    pairs = {role: _new_pair() for role in (*SERVICES, ADMIN)}
    public = PublicKeys(roles={role: pair.public_key for role, pair in pairs.items()})
    for role in SERVICES:
        _write(folder / key_file_name(role), pairs[role])
    _write(folder / key_file_name(ADMIN), _of_client(pairs[ADMIN], public))
    _write(folder / PUBLIC_FILE, _with_client(folder, public, DEFAULT_CLIENT, ""), mode=0o644)


def add_client(folder: Path, name: str, tenant: str) -> Path:
    """Add a client's key to a cluster's. Returns its file. Raises ClusterError, KeyFileError or
    OSError."""
    for field, text in (("--client", name), ("--tenant", tenant)):
        if not _NAME.fullmatch(text) and not (field == "--tenant" and not text):
            allowed = "letters, digits, dots, dashes or underscores"
            raise ClusterError(f"{field} must be 1 to 64 {allowed}, got {text!r}")
    if not (folder / PUBLIC_FILE).exists():
        raise ClusterError(f"there are no keys in {folder}: make them first, without --client")
    with locked(folder):
        public = read_public_keys(folder)
        if any(client.name == name for client in public.clients):
            raise ClusterError(f"client {name!r} has a key already, in {client_file(folder, name)}")
        extended = _with_client(folder, public, name, tenant)
        unfinished = folder / f"{PUBLIC_FILE}.{secrets.token_hex(8)}"
        _write(unfinished, extended, mode=0o644)
        unfinished.replace(folder / PUBLIC_FILE)
    return client_file(folder, name)


def _with_client(folder: Path, public: PublicKeys, name: str, tenant: str) -> PublicKeys:
    pair = _new_pair()
    _write(client_file(folder, name), _of_client(pair, public))
    entry = ClientEntry(name=name, tenant=tenant, public_key=pair.public_key)
    return msgspec.structs.replace(public, clients=[*public.clients, entry])


def _of_client(pair: KeyPair, public: PublicKeys) -> ClientKey:
    """The pair, with what its owner needs to know of the gateways."""
    server_key = public.roles["gateway"]
    return ClientKey(public_key=pair.public_key, secret_key=pair.secret_key, server_key=server_key)


def _new_pair() -> KeyPair:
    public_key, secret_key = zmq.curve_keypair()
    return KeyPair(public_key=public_key.decode(), secret_key=secret_key.decode())


def _write(path: Path, content: msgspec.Struct, mode: int = 0o600) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
