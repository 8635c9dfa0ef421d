"""Every decoder and both servers against messages that were changed, thousands in each run."""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from functools import partial
from random import Random

import msgspec
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.errors import ProtocolError
from tests.security.hostile import hostile, message, packed
from tests.security.samples import UNIONS, kinds, sample
from tests.security.targets import DECODERS, FaceTarget, ServerTarget, decode

NUM_DECODED, NUM_SENT = 2_000, 4_000  # at each decoder, at each server
CANARY_EVERY = 50


@pytest.fixture(autouse=True)
def quiet() -> object:
    """A refusal is logged as a warning: thousands of them."""
    with structlog.testing.capture_logs():
        yield


@pytest.mark.parametrize("union", UNIONS)
def test_samples_are_messages_of_every_kind(union: str) -> None:
    for kind in kinds(UNIONS[union]):
        decoded = DECODERS[union].decode(packed(sample(kind, Random(1))))
        assert type(decoded) is kind.cls


@pytest.mark.parametrize("union", UNIONS)
def test_a_decoder_gives_a_message_or_refuses(union: str) -> None:
    rng = Random(union)
    outcomes = [decode(union, hostile(rng, union)) for _ in range(NUM_DECODED)]
    # Both ways are taken: inputs are near enough to messages to get deep, and most are none.
    assert NUM_DECODED // 10 < sum(outcomes) < NUM_DECODED // 2


@settings(max_examples=150)
@given(st.sampled_from(sorted(UNIONS)), st.randoms(use_true_random=False), st.binary(max_size=30))
def test_what_hypothesis_finds_is_a_message_or_refused(
    union: str, rng: Random, more: bytes
) -> None:
    raw = hostile(rng, union)
    where = rng.randrange(len(raw) + 1)
    decode(union, raw[:where] + more + raw[where:])


@pytest.mark.parametrize("union", UNIONS)
def test_decoding_costs_memory_in_proportion_to_the_bytes(union: str) -> None:
    rng = Random(union)
    inputs = [hostile(rng, union) for _ in range(300)]
    tracemalloc.start()
    try:
        for raw in inputs:
            # The least of three: what other threads of this process allocate is traced too.
            cost_bytes = min(decoding_cost_bytes(union, raw) for _ in range(3))
            assert cost_bytes < 16 * 1024 + 100 * len(raw), raw.hex()
    finally:
        tracemalloc.stop()


def decoding_cost_bytes(union: str, raw: bytes) -> int:
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    with contextlib.suppress(ProtocolError):
        DECODERS[union].decode(raw)
    _, peak = tracemalloc.get_traced_memory()
    return peak - before


async def test_a_server_answers_honest_peers_whatever_others_send() -> None:
    target, rng = ServerTarget(), Random(2)
    for number in range(NUM_SENT):
        target.attack(rng)
        if number % CANARY_EVERY == 0:
            target.canary()
    target.canary()
    assert target.num_handled > NUM_SENT // 5


async def test_a_gateway_serves_honest_clients_whatever_others_send() -> None:
    target, rng = FaceTarget(), Random(3)
    async with asyncio.timeout(60):
        for number in range(NUM_SENT):
            await target.attack(rng)
            if number % CANARY_EVERY == 0:
                await target.canary()
        await target.canary()
    await target.close()
    assert target.num_served > NUM_SENT // 100


def test_the_search_sees_a_decoder_that_lets_other_errors_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A check that cannot fail is none: the same inputs find a decoder without its net."""

    class Careless:
        def decode(self, raw: bytes) -> object:
            fields = msgspec.msgpack.decode(raw)
            return fields["type"]

    monkeypatch.setitem(DECODERS, "client", Careless())
    inputs = [hostile(Random(seed), "client") for seed in range(NUM_DECODED)]
    with pytest.raises((msgspec.DecodeError, KeyError, TypeError, UnicodeDecodeError)):
        list(map(partial(decode, "client"), inputs))


def test_a_seed_gives_the_same_inputs() -> None:
    def inputs() -> list[bytes]:
        rng = Random(5)
        return [hostile(rng, "to_store") for _ in range(50)]

    assert inputs() == inputs()
    assert packed(message(Random(6), "client")) == packed(message(Random(6), "client"))
