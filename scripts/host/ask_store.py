"""Asks a KV store whether it would take us in: reached, keys known, same protocol, same model.

A worker's hello without an endpoint is refused in any case, but only after all else has been looked
at: so a store can be asked and nothing changes there. A gateway's is accepted; it leaves at once.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from common.config import StartError
from common.kv.layout import KvLayout
from common.messages import (
    INTERNAL_VERSION,
    FromStore,
    Hello,
    Leave,
    Member,
    Members,
    Message,
    Welcome,
    decoder,
)
from common.net.access import Access, Keys
from common.net.link import Link
from common.net.zmq_transport import ZmqTransport
from common.service import live_seams
from kvbaton.errors import KvbatonError
from scripts.host.facts import StoreAnswer

TIMEOUT_S = 3.0

# Of no model: what a store that serves none, or is not told which, finds nothing wrong with.
_ANY_LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=16, block_size=16, dtype="uint8")


def ask_store(
    endpoint: str, role: str, keys: Path | None, fingerprint: str, layout: KvLayout | None
) -> StoreAnswer:
    """Say hello as `role`, with its key in the folder `keys`. `fingerprint` and `layout` are those
    of the model here; "" and None if it was not loaded."""
    problem = _connect(endpoint)
    if problem:
        return StoreAnswer(endpoint, role, is_open=False, problem=problem)
    try:
        own = Access(role, str(keys or ""), keys is None, []).load()
    except StartError as error:
        return StoreAnswer(endpoint, role, is_open=True, problem=str(error))
    return asyncio.run(_ask(own, endpoint, role, fingerprint, layout))


def _connect(endpoint: str) -> str:
    """Why no TCP connection can be made; "" if one can."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not port.isdecimal():
        return "this is no endpoint like tcp://10.0.0.1:5570"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S):
            return ""
    except OSError as error:
        return f"cannot connect: {error.strerror or error}"


async def _ask(
    keys: Keys | None, endpoint: str, role: str, fingerprint: str, layout: KvLayout | None
) -> StoreAnswer:
    transport = ZmqTransport(keys)
    try:
        return await _greet(transport, endpoint, role, fingerprint, layout)
    finally:
        transport.close()


async def _greet(
    transport: ZmqTransport,
    endpoint: str,
    role: str,
    fingerprint: str,
    layout: KvLayout | None,
) -> StoreAnswer:
    loop = asyncio.get_running_loop()
    greeted: asyncio.Future[None] = loop.create_future()
    told: asyncio.Future[Members] = loop.create_future()
    seams = live_seams(transport)
    is_worker = role != "gateway"
    member = Member(
        member_id=seams.rng.new_id(),
        role=role,
        name="doctor",
        host_id=seams.host_id,
        pid=seams.pid,
        fingerprint=fingerprint if is_worker else "",
        layout=(layout or _ANY_LAYOUT) if is_worker else None,
    )

    def welcomed(_welcome: Welcome) -> None:
        if not greeted.done():
            greeted.set_result(None)

    def refused(error: KvbatonError) -> None:
        if not greeted.done():
            greeted.set_exception(error)

    def handle(message: Message) -> None:
        if isinstance(message, Members) and not told.done():
            told.set_result(message)

    link = Link(
        transport,
        endpoint,
        decoder(FromStore),
        role="kvstore",
        hello=lambda: Hello(internal_version=INTERNAL_VERSION, member=member),
        welcomed=welcomed,
        handle=handle,
        refused=refused,
    )
    answer = StoreAnswer(endpoint, role, is_open=True)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await greeted
            members = (await told).members
        link.send(Leave())
        served = {each.fingerprint for each in members}
        return StoreAnswer(endpoint, role, is_open=True, fingerprint="".join(sorted(served)[:1]))
    except TimeoutError:
        return StoreAnswer(
            endpoint,
            role,
            is_open=True,
            problem=f"no answer to a hello within {TIMEOUT_S:g} s: it does not know this key",
        )
    except KvbatonError as error:
        if is_worker and _would_be_taken(error, knows_model=layout is not None):
            return answer
        return StoreAnswer(
            endpoint, role, is_open=True, problem=error.message, field=error.field or ""
        )
    finally:
        link.close()


def _would_be_taken(error: KvbatonError, *, knows_model: bool) -> bool:
    """Whether the store found fault only with what we left out."""
    left_out = ("endpoint",) if knows_model else ("endpoint", "fingerprint", "layout")
    return error.field in left_out
