"""Members that say what they must not: each is refused in words, and a request goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from common.messages import (
    AbortHandoff,
    Claim,
    Commit,
    Fill,
    GetBlocks,
    GiveBack,
    Lease,
    Message,
    OpenHandoff,
    Prefill,
    PutBlocks,
    Quit,
    Release,
    Reserve,
    Seal,
    Stopped,
    Suspend,
)
from kvbaton.sampling import SamplingParams
from services.decode.worker import DecodeRole
from services.kvstore.handoff import Handoff
from services.prefill.worker import PrefillRole
from tests.sim.cluster import DATA, STORES, Shape, SimCluster, output_of, simulate
from tests.sim.stranger import STRANGER_ID, Stranger
from tests.sim.world import World

_BLOCK = bytes(MOCK_LAYOUT.block_bytes)
_FAR = 1 << 40
_PROMPT, _NUM_TOKENS = [5] * 40, 300

Check = Callable[[SimCluster, Handoff], Awaitable[None]]


def while_serving(check: Check, shape: Shape | None = None) -> None:
    """Run `check` while a request is served, which must get its own tokens all the same."""

    async def main() -> None:
        async with SimCluster(World(1), shape or Shape()) as cluster:
            stream = cluster.submit(_PROMPT, _NUM_TOKENS)
            await asyncio.sleep(0.1)
            (ledger,) = cluster.ledgers()
            (handoff,) = ledger.handoffs.values()
            await check(cluster, handoff)
            assert not stream.is_over
            ledger.check()
            assert await output_of(stream) == mock_output(_PROMPT, _NUM_TOKENS)
            assert stream.timeline.num_attempts == 1
            await cluster.settle()

    simulate(main())


def endpoint_of(cluster: SimCluster, role: type[PrefillRole | DecodeRole]) -> str:
    (worker,) = cluster.of_role(role)
    return cluster.world.network.router_of(worker.seams.pid).endpoint


_NO_LAYOUTS = [
    msgspec.structs.replace(MOCK_LAYOUT, block_size=0),
    msgspec.structs.replace(MOCK_LAYOUT, num_layers=-1),
    msgspec.structs.replace(MOCK_LAYOUT, dtype="x"),
]


@pytest.mark.parametrize(
    "changes",
    [
        {"role": "emperor"},
        {"member_id": ""},
        {"endpoint": ""},
        {"max_num_seqs": 0},
        {"max_num_seqs": -1},
        {"layout": None},
        *({"layout": layout} for layout in _NO_LAYOUTS),
        {"layout": msgspec.structs.replace(MOCK_LAYOUT, num_layers=2)},
        {"fingerprint": "another"},
    ],
)
def test_a_hello_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    async def check(cluster: SimCluster, _handoff: Handoff) -> None:
        stranger = Stranger(cluster, STORES[0])
        assert await stranger.hello(**{"role": "decode", **changes}) == "protocol_error"
        assert await stranger.ask(Lease(num_blocks=1)) == "hello_required"

    while_serving(check)


def test_a_worker_that_keeps_kv_in_another_type_is_told_so() -> None:
    async def check(cluster: SimCluster, _handoff: Handoff) -> None:
        layout = msgspec.structs.replace(MOCK_LAYOUT, dtype="int8")
        stranger = Stranger(cluster, STORES[0])
        assert await stranger.hello("decode", layout=layout) == "protocol_error"
        for words in ("dtype='uint8'", "dtype='int8'", "the same dtype, quantization and kv_cache"):
            assert words in stranger.refusal

    while_serving(check)


def test_a_layout_that_makes_no_sense_is_refused_also_where_no_worker_is() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            for worker in list(cluster.workers):
                await cluster.kill(worker)
            for layout in _NO_LAYOUTS:
                answer = await Stranger(cluster, STORES[0]).hello("decode", layout=layout)
                assert answer == "protocol_error"
            await cluster.add_worker("prefill")
            await cluster.add_worker("decode")
            await asyncio.sleep(1)
            assert await output_of(cluster.submit([5] * 20, 5)) == mock_output([5] * 20, 5)
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("role", ["gateway", "prefill", "decode"])
def test_a_member_is_spoken_for_by_one_connection_only(role: str) -> None:
    async def check(cluster: SimCluster, handoff: Handoff) -> None:
        for member_id in (handoff.gateway_id, handoff.prefill_id, handoff.decode_id):
            stranger = Stranger(cluster, STORES[0])
            assert await stranger.hello(role, member_id=member_id) == "protocol_error"

    while_serving(check)


@pytest.mark.parametrize("role", ["gateway", "prefill", "decode"])
def test_nobody_says_of_another_that_it_has_stopped(role: str) -> None:
    async def check(cluster: SimCluster, handoff: Handoff) -> None:
        stranger = Stranger(cluster, STORES[0])
        assert await stranger.hello(role) == "Welcome"
        for member_id in (
            "",
            STRANGER_ID,
            handoff.gateway_id,
            handoff.prefill_id,
            handoff.decode_id,
        ):
            assert await stranger.ask(Stopped(member_id=member_id)) == "protocol_error"
        assert await stranger.ask(Stopped(member_id="f" * 32)) == "Ok"  # it never was

    while_serving(check)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_takes_no_step_on_a_handoff_of_others(role: str) -> None:
    async def check(cluster: SimCluster, handoff: Handoff) -> None:
        stranger = Stranger(cluster, STORES[0])
        assert await stranger.hello(role) == "Welcome"
        step: dict[str, Any] = {"handoff_id": handoff.handoff_id, "epoch": handoff.epoch}
        blocks = handoff.blocks
        stale: list[Message] = [
            Fill(**step),
            Commit(**step, first_index=0, blocks=blocks[:1]),
            Commit(**step, first_index=handoff.num_committed, blocks=blocks[-1:], keys=[b"k" * 32]),
            Commit(**step, first_index=0, blocks=[100_000]),
            Seal(**step, first_token=5),
            Seal(**step, first_token=5, finished=True),
            Claim(**step),
            Release(**step),
            Suspend(**step, num_tokens=1000),
        ]
        for message in stale:
            assert await stranger.ask(message) == "stale", message
        malformed: list[Message] = [
            Commit(**step, first_index=-1, blocks=[0]),
            Commit(**step, first_index=0, blocks=[-1]),
            Seal(**step, first_token=-1),
            Suspend(**step, num_tokens=-1),
            Lease(num_blocks=-1),
            GiveBack(blocks=[-1]),
        ]
        for message in malformed:
            assert await stranger.ask(message) == "protocol_error", message
        assert await stranger.ask(AbortHandoff(handoff_id=handoff.handoff_id)) == "forbidden"
        assert await stranger.ask(Quit(**step)) == ""
        assert await stranger.ask(GiveBack(blocks=[*blocks, *blocks, 100_000])) == ""

    while_serving(check)


def test_a_gateway_takes_no_workers_steps_and_ends_no_handoff_of_others() -> None:
    async def check(cluster: SimCluster, handoff: Handoff) -> None:
        stranger = Stranger(cluster, STORES[0])
        assert await stranger.hello("gateway") == "Welcome"
        step: dict[str, Any] = {"handoff_id": handoff.handoff_id, "epoch": handoff.epoch}
        for message in (Fill(**step), Release(**step), Quit(**step), Lease(num_blocks=1)):
            assert await stranger.ask(message) == "forbidden", message
        assert await stranger.ask(AbortHandoff(handoff_id=handoff.handoff_id)) == ""
        request = OpenHandoff(
            request_id="r",
            prefill_id=handoff.prefill_id,
            decode_id=handoff.decode_id,
            tenant=b"t",
            root_key=b"",
            keys=[],
            num_tokens=20,
        )
        for changes, code in (
            ({"prefill_id": "f" * 32}, "unavailable"),
            ({"decode_id": "f" * 32}, "unavailable"),
            ({"keys": [b"k" * 32] * 2}, "unprocessable"),
            ({"num_tokens": 0}, "unprocessable"),
            ({"num_tokens": -1}, "protocol_error"),
            ({"num_tokens": 1_000_000}, "invalid_request"),
            ({"tenant": b"t" * 65}, "protocol_error"),
        ):
            assert await stranger.ask(msgspec.structs.replace(request, **changes)) == code, changes

    while_serving(check)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_block_bytes_come_and_go_only_with_the_right_to_them(role: str) -> None:
    async def check(cluster: SimCluster, handoff: Handoff) -> None:
        control, data = Stranger(cluster, STORES[0]), Stranger(cluster, DATA[0])
        step: dict[str, Any] = {"handoff_id": handoff.handoff_id, "epoch": handoff.epoch}
        block = handoff.blocks[0]
        assert await data.ask(GetBlocks(**step, indexes=[0])) == "hello_required"
        assert await data.hello(role) == "stale"  # no member yet
        assert await control.hello(role) == "Welcome"
        assert await data.hello(role) == "Welcome"
        for index in (0, len(handoff.blocks) - 1, 100_000):
            assert await data.ask(GetBlocks(**step, indexes=[index])) == "stale"
        put: dict[str, Any] = {**step, "first_index": 0, "digests": [b"d" * 16]}
        for each in (block, handoff.blocks[-1], 100_000):
            assert await data.ask(PutBlocks(**put, blocks=[each]), _BLOCK) == "stale"
        for message, *bulk in (
            (PutBlocks(**put, blocks=[block]),),
            (PutBlocks(**put, blocks=[block]), _BLOCK, _BLOCK),
            (PutBlocks(**put, blocks=[block]), _BLOCK[:-1]),
            (PutBlocks(**put, blocks=[-1]), _BLOCK),
            (PutBlocks(**{**put, "first_index": -1}, blocks=[block]), _BLOCK),
            (PutBlocks(**{**put, "digests": []}, blocks=[block]), _BLOCK),
            (PutBlocks(**{**put, "digests": [b"d" * 65]}, blocks=[block]), _BLOCK),
            (GetBlocks(**step, indexes=[-1]),),
            (GetBlocks(**step, indexes=[0] * 100_000),),
        ):
            assert await data.ask(message, *bulk) == "protocol_error", message
        planes: dict[str, Any] = {**put, "encoding": "planes"}
        assert await data.ask(PutBlocks(**planes, blocks=[block]), _BLOCK) == "stale"
        several: dict[str, Any] = {**planes, "digests": []}
        coded: list[tuple[Message, list[bytes]]] = [
            (PutBlocks(**planes, blocks=[block]), [_BLOCK[:-1]]),
            (PutBlocks(**planes, blocks=[block]), [b""]),
            (PutBlocks(**planes, blocks=[block]), [_BLOCK * 2]),
            (PutBlocks(**{**planes, "encoding": "int8"}, blocks=[block]), [_BLOCK[:-1]]),
            (PutBlocks(**several, blocks=[block] * 2000), [_BLOCK] * 2000),  # to decode at once
            (PutBlocks(**{**put, "encoding": "other"}, blocks=[block]), [_BLOCK]),
            (GetBlocks(**step, indexes=[0] * 2000, encoding="planes"), []),
        ]
        for asked, given in coded:
            assert await data.ask(asked, *given) == "protocol_error", asked
        get = GetBlocks(**step, indexes=[0], encoding="planes")
        assert await data.ask(get) == "stale"
        with patch("services.kvstore.data.MAX_CODED", 0):
            assert await data.ask(get) == "overloaded"
        assert await data.ask(Lease(num_blocks=1)) == "forbidden"
        assert await control.ask(GetBlocks(**step, indexes=[0])) == "forbidden"

    while_serving(check)


@pytest.mark.parametrize("role", [PrefillRole, DecodeRole])
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tokens": []}, "protocol_error"),
        ({"tokens": [-5]}, "protocol_error"),
        ({"tokens": [_FAR]}, "protocol_error"),
        ({"num_prompt_tokens": -1}, "protocol_error"),
        ({"choice": -1}, "protocol_error"),
        ({"store": -1}, "unprocessable"),
        ({"store": 1}, "unprocessable"),
    ],
)
def test_a_worker_refuses_a_request_that_makes_no_sense(
    role: type[PrefillRole | DecodeRole], changes: dict[str, Any], code: str
) -> None:
    async def check(cluster: SimCluster, _handoff: Handoff) -> None:
        stranger = Stranger(cluster, endpoint_of(cluster, role))
        prefill, reserve = (
            kind(
                handoff_id=STRANGER_ID,
                epoch=1,
                worker_id=cluster.of_role(role)[0].stores[0].member_id,
                store=0,
                root_key=b"root",
                tokens=[5] * 20,
                num_prompt_tokens=20,
                sampling=SamplingParams(),
                choice=0,
            )
            for kind in (Prefill, Reserve)
        )
        assert await stranger.ask(reserve) == "hello_required"
        assert await stranger.hello("gateway") == "Welcome"
        allowed = [prefill, reserve] if role is PrefillRole else [reserve]
        if prefill not in allowed:
            assert await stranger.ask(prefill) == "forbidden"
        for message in allowed:
            assert await stranger.ask(msgspec.structs.replace(message, **changes)) == code

    while_serving(check)
