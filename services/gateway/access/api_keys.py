"""API keys of the HTTP face: a TOML file with a hash of each key, and whose key it is.

    [[key]]
    name = "alice"
    tenant = "acme"
    sha256 = "..."               # of the key, which is nowhere
    requests_per_minute = 600    # optional, as all below
    tokens_per_minute = 100000
    tokens_per_day = 5000000
    ttft_target_ms = 500         # meant times to the first token, and for each later one
    tpot_target_ms = 50
    share_cache_with = "other"   # a tenant of this file, whose cached prompts this key shares
    operator = true              # may read /metrics, which tells about all tenants

`scripts/apikey` makes entries. Gateways read the file when they start.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from common.config import StartError
from kvbaton.keys import OTHERS, read_with_mode
from services.gateway.access.quotas import Limits, Quota
from services.gateway.backend import NO_TARGETS, Targets

HOW_TO_MAKE_ONE = "scripts/apikey FILE --name NAME --tenant TENANT"
_MAX_FILE_BYTES = 1 << 20
_MAX_KEYS = 1024  # each is compared with each request's
_PREFIX = "kvb-"  # what scanners for leaked keys look for

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=10**9)]
Amount = Annotated[int, msgspec.Meta(ge=1, le=10**15)]


class Entry(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One key, as the file has it."""

    name: Name
    tenant: Name
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    requests_per_minute: Amount | None = None
    tokens_per_minute: Amount | None = None
    tokens_per_day: Amount | None = None
    ttft_target_ms: Milliseconds | None = None
    tpot_target_ms: Milliseconds | None = None
    share_cache_with: Name | None = None
    operator: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: list[Entry]


class Caller:
    """Whose request it is. `cache_tenant`: whose cached prompts it shares. `targets` are those of
    its requests that name none."""

    def __init__(
        self,
        tenant: str,
        cache_tenant: str,
        quota: Quota,
        *,
        is_operator: bool,
        name: str = "",
        targets: Targets = NO_TARGETS,
    ) -> None:
        self.targets = targets
        self.name = name
        self.tenant = tenant
        self.cache_tenant = cache_tenant
        self.quota = quota
        self.is_operator = is_operator


def anybody(now: float) -> Caller:
    """Who calls a gateway without keys."""
    return Caller("", "", Quota(Limits(), now), is_operator=True)


class ApiKeys:
    """Finds out who calls."""

    def __init__(self, entries: list[Entry], now: float) -> None:
        self._callers = [(each.sha256.encode(), _caller(each, now)) for each in entries]

    def caller(self, key: bytes) -> Caller | None:
        """Whose key it is. Takes the same time whichever it is, and if it is none."""
        given = hashlib.sha256(key).hexdigest().encode()
        found = None
        for digest, caller in self._callers:
            if hmac.compare_digest(given, digest):
                found = caller
        return found


def load_entries(path: Path) -> list[Entry]:
    """What is in a file that nobody else may read. Raises StartError, which says what to do."""
    flag = f"--api-keys {path}"
    try:
        mode, raw = read_with_mode(path, _MAX_FILE_BYTES + 1)
    except OSError as error:
        raise StartError(
            f"{flag} cannot be read ({error.strerror}): make it with {HOW_TO_MAKE_ONE}"
        ) from error
    if mode & OTHERS:
        raise StartError(f"{flag} is open to others (mode {mode:03o}): chmod 600 it")
    if len(raw) > _MAX_FILE_BYTES:
        raise StartError(f"{flag} has more than {_MAX_FILE_BYTES} bytes")
    try:
        entries = msgspec.convert(tomllib.loads(raw.decode()), _File).key
    except (ValueError, msgspec.ValidationError) as error:
        raise StartError(f"{flag}: {error}") from error
    problem = _problem(entries)
    if problem:
        raise StartError(f"{flag}: {problem}")
    return entries


def add_key(path: Path, entry: Entry) -> str:
    """Add a key to a file, which is made if need be; `entry.sha256` is filled in. Returns the key,
    which nobody can tell again. Raises StartError or OSError."""
    key = _PREFIX + secrets.token_urlsafe(32)
    entry = msgspec.structs.replace(entry, sha256=hashlib.sha256(key.encode()).hexdigest())
    entries = [*(load_entries(path) if path.exists() else []), entry]
    problem = _problem(entries)
    if problem:
        raise StartError(f"{path}: {problem}")
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write((path.read_bytes() if path.exists() else b"") + _as_toml(entry))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return key


def _as_toml(entry: Entry) -> bytes:
    """Names need no escapes, and JSON writes numbers, booleans and such texts as TOML does."""
    values = msgspec.structs.asdict(entry).items()
    lines = [
        f"{name} = {msgspec.json.encode(value).decode()}\n"
        for name, value in values
        if value is not None and value is not False
    ]
    return f"[[key]]\n{''.join(lines)}\n".encode()


def _problem(entries: list[Entry]) -> str:
    """What is wrong with the keys taken together, if anything is."""
    if not 1 <= len(entries) <= _MAX_KEYS:
        return f"it must hold 1 to {_MAX_KEYS} keys, not {len(entries)}"
    tenants = {entry.tenant for entry in entries}
    names: set[str] = set()
    digests: set[str] = set()
    for entry in entries:
        if entry.name in names or entry.sha256 in digests:
            return f"key {entry.name!r} is there twice"
        if entry.share_cache_with is not None and entry.share_cache_with not in tenants:
            return (
                f"key {entry.name!r}: share_cache_with names {entry.share_cache_with!r}, which is "
                "no tenant of this file"
            )
        names.add(entry.name)
        digests.add(entry.sha256)
    return ""


def _caller(entry: Entry, now: float) -> Caller:
    limits = Limits(
        requests_per_minute=entry.requests_per_minute,
        tokens_per_minute=entry.tokens_per_minute,
        tokens_per_day=entry.tokens_per_day,
    )
    return Caller(
        entry.tenant,
        entry.share_cache_with or entry.tenant,
        Quota(limits, now),
        is_operator=entry.operator,
        name=entry.name,
        targets=Targets(entry.ttft_target_ms or 0.0, entry.tpot_target_ms or 0.0),
    )
