"""Who may use the HTTP face: one gate before every route, and what the settings say about it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from common.config import StartError
from common.net.access import is_loopback_host
from common.seams import Clock
from kvbaton.keys import OTHERS, mode_of
from services.gateway.access.api_keys import (
    HOW_TO_MAKE_ONE,
    ApiKeys,
    Caller,
    anybody,
    load_entries,
)
from services.gateway.access.quotas import over_quota
from services.gateway.http.openai.errors import kvbaton_error_response, no_key_response
from services.gateway.http.page.files import PATHS as PAGE_PATHS

log = structlog.get_logger()

OPEN_PATHS = PAGE_PATHS | {"/health"}


@dataclass(frozen=True, slots=True)
class HttpAccess:
    """`keys` None: everybody may do everything. `tls` None: plain HTTP."""

    keys: ApiKeys | None = None
    tls: ssl.SSLContext | None = None


def load_access(
    *, host: str, api_keys: str, tls_cert: str, tls_key: str, open_http: bool, clock: Clock
) -> HttpAccess:
    """What the settings of the same names say. Raises StartError: also when everybody who reaches
    this host would be let in, and nobody said that this is meant."""
    if bool(tls_cert) != bool(tls_key):
        raise StartError("--tls-cert and --tls-key go together")
    if not api_keys and not open_http and not is_loopback_host(host):
        raise StartError(
            f"--host {host} can be reached from elsewhere, and without --api-keys everybody there "
            f"is let in: make keys with {HOW_TO_MAKE_ONE}, or say --open-http if that is meant"
        )
    tls = tls_context(Path(tls_cert), Path(tls_key)) if tls_cert else None
    if tls is None and api_keys and not is_loopback_host(host):
        log.warning("api_keys_travel_in_the_clear", host=host, hint="set --tls-cert and --tls-key")
    keys = ApiKeys(load_entries(Path(api_keys)), clock.now()) if api_keys else None
    return HttpAccess(keys, tls)


def tls_context(cert: Path, key: Path) -> ssl.SSLContext:
    """For a server: TLS 1.2 or later. Raises StartError, also if others may read the key."""
    try:
        mode = mode_of(key, key.stat())
        if mode & OTHERS:
            raise StartError(f"--tls-key {key} is open to others (mode {mode:03o}): chmod 600 it")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise StartError(f"--tls-cert {cert} and --tls-key {key}: {error}") from error
    return context


def _no_password() -> str:
    """Without this, OpenSSL would ask the terminal."""
    raise ValueError("the key is encrypted")


class Gate:
    """Every request passes here first, so that a route added later is closed as well.

    Puts the Caller into the request's state.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys | None, clock: Clock) -> None:
        self._app = app
        self._keys = keys
        self._clock = clock
        self._anybody = anybody(clock.now())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller: Caller | None = self._anybody
        if self._keys is not None and scope["path"] not in OPEN_PATHS:
            key = _bearer(scope)
            caller = self._keys.caller(key) if key is not None else None
        if caller is None:
            await no_key_response()(scope, receive, send)
            return
        refusal = caller.quota.take_request(self._clock.now())
        if refusal is not None:
            await kvbaton_error_response(over_quota(refusal))(scope, receive, send)
            return
        scope["state"]["caller"] = caller
        await self._app(scope, receive, send)


def _bearer(scope: Scope) -> bytes | None:
    """The key a request comes with; None also if it comes with several."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(b" ")
    return bytes(key.strip()) if scheme.lower() == b"bearer" else None
