"""Log-probabilities of prompts: computed beside the KV, chunk by chunk, put together once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence as Many
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from common.engine import runner
from common.engine.mock import MOCK_LAYOUT, MockEngine, mock_scores
from common.engine.runner import TorchEngine
from common.engine.sampler import NumericalError
from common.engine.work import Work
from common.messages import Granted, OutputToken
from common.scores import MAX_SCORES, pack_scores, unpack_scores
from common.worker.sequence import Sequence
from kvbaton.errors import InvalidRequestError
from kvbaton.sampling import SamplingParams
from services.gateway.backend import GenerationRequest, PromptToken
from services.gateway.routing.stream import RequestStream
from tests.unit.engine_models import (
    GREEDY,
    build,
    kv,
    make_engine,
    random_tokens,
    reference_logits,
    whole,
)
from tests.unit.sequences import sequence_of

LENGTH = 150
SLOTS = range(20, 30)
SCORED = msgspec.structs.replace(GREEDY, prompt_logprobs=3)


def scored(tokens: list[int], start: int, stop: int, slots: Many[int] = SLOTS) -> Work:
    return Work(
        tokens,
        len(tokens),
        start,
        stop - start,
        slots,
        SCORED,
        sample=stop == len(tokens),
        prompt_logprobs=3,
    )


def scores_of(engine: TorchEngine, tokens: list[int], cuts: list[int], num_others: int) -> bytes:
    """The prompt's scores, from chunks that end at `cuts`, among others that want none."""
    raw = b""
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        work = scored(tokens, start, stop)
        others = [whole(tokens[:9], [slot]) for slot in range(num_others)]
        engine.step_sync([*others, work])
        assert all(not other.scores for other in others)
        raw += work.scores
    return raw


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scores_are_transformers(family: str, tmp_path: Path) -> None:
    model = build(family, tmp_path)
    engine = make_engine(tmp_path)
    tokens = random_tokens(random.Random(2), LENGTH)
    rows = unpack_scores(scores_of(engine, tokens, [1, 17, 64, 149], 1), LENGTH - 1)
    engine.close()
    expected: Tensor = reference_logits(model, tokens).log_softmax(-1)
    for place, ((token, logprob), *top) in enumerate(rows):
        assert token == tokens[place + 1]
        assert logprob == pytest.approx(float(expected[place, token]), abs=1e-4)
        likeliest = expected[place].topk(3)
        assert [each for each, _ in top] == likeliest.indices.tolist()
        found = torch.tensor([each for _, each in top], dtype=torch.float32)
        torch.testing.assert_close(found, likeliest.values, atol=1e-4, rtol=0)


def test_bits_of_scores_depend_on_the_prompt_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path)
    engine = make_engine(tmp_path, batch_invariant=True)
    tokens = random_tokens(random.Random(3), LENGTH)
    alone = scores_of(engine, tokens, [], 0)
    assert len(alone) == (LENGTH - 1) * 4 * 12
    for cuts, num_others in (([1, 2, 80], 3), ([16, 32, 48, 140], 7)):
        assert scores_of(engine, tokens, cuts, num_others) == alone
    monkeypatch.setattr(runner, "_SCORED_AT_ONCE", 5)
    assert scores_of(engine, tokens, [70], 0) == alone
    engine.close()


def test_positions_after_the_prompt_are_not_scored(tmp_path: Path) -> None:
    build("llama", tmp_path)
    engine = make_engine(tmp_path)
    work = Work([1, 2, 3, 4, 5], 3, 0, 5, [0], SCORED, prompt_logprobs=0)
    engine.step_sync([work])
    rows = unpack_scores(work.scores, 2)
    assert [[token for token, _ in row] for row in rows] == [[2], [3]]
    work = Work([1, 2, 3, 4, 5], 3, 2, 3, [0], SCORED, prompt_logprobs=0)
    engine.step_sync([work])
    assert work.scores == b""
    engine.close()


def test_scores_that_are_no_numbers_fail_the_step(tmp_path: Path) -> None:
    build("llama", tmp_path)
    engine = make_engine(tmp_path)
    tokens = random_tokens(random.Random(4), 40)
    engine.step_sync([scored(tokens, 0, 16)])
    kv(engine)[SLOTS[0]] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        engine.step_sync([scored(tokens, 16, 30)])
    engine.close()


def test_the_mock_engine_scores_what_it_reads_in_the_arena() -> None:
    engine = MockEngine(0.0, 0.0)
    arena = bytearray(64 * MOCK_LAYOUT.block_bytes)
    engine.attach(memoryview(arena))
    tokens = list(range(100, 140))
    works = [scored(tokens, 0, 17), scored(tokens, 17, 40)]
    for work in works:
        asyncio.run(engine.step([work]))
    assert works[0].scores + works[1].scores == mock_scores(tokens)
    arena[SLOTS[0] * MOCK_LAYOUT.block_bytes] ^= 1
    asyncio.run(engine.step([works[1]]))
    assert works[1].scores != mock_scores(tokens)[-len(works[1].scores) :]


# ---- on a worker --------------------------------------------------------------------------------


def asking() -> Sequence:
    """A sequence of 7 tokens, in blocks of 2, whose prompt is to be scored."""
    return sequence_of(7, sampling=SamplingParams(prompt_logprobs=0))


def step(sequence: Sequence, num_tokens: int, mark: float = 0.0) -> None:
    """The step's scores say which position they follow."""
    work = sequence.work(num_tokens)
    assert work.prompt_logprobs == (0 if sequence.awaits_scores else None)
    work.scores = b"".join(
        pack_scores([(work.start + index + 1, mark)]) for index in range(work.num_scored)
    )
    sequence.computed(work)


def scored_positions(raw: bytes, num_rows: int = 6) -> list[int]:
    return [row[0][0] for row in unpack_scores(raw, num_rows)]


def test_chunks_put_together_leave_with_the_first_token_only() -> None:
    sequence = asking()
    for num_tokens in (1, 3, 3):
        step(sequence, num_tokens)
    assert scored_positions(sequence.take_scores()) == [1, 2, 3, 4, 5, 6]
    sequence.tokens.append(1)
    step(sequence, 1)
    assert not sequence.awaits_scores
    assert sequence.take_scores() == b""


def test_what_is_computed_again_is_scored_again() -> None:
    sequence = asking()
    step(sequence, 5, -1.0)
    sequence.lose_blocks()
    sequence.granted(Granted(blocks=[1, 2, 3, 4], num_committed=1, num_keys=3))
    step(sequence, 5, -2.0)
    raw = sequence.take_scores()
    assert scored_positions(raw) == [1, 2, 3, 4, 5, 6]
    assert [row[0][1] for row in unpack_scores(raw, 6)] == [-1.0] * 2 + [-2.0] * 4


def test_blocks_of_another_request_leave_a_gap_that_shows() -> None:
    sequence = asking()
    sequence.granted(Granted(blocks=[1, 2, 3, 4], num_committed=1, num_keys=3))
    step(sequence, 5)
    with pytest.raises(ValueError, match="rows"):
        unpack_scores(sequence.take_scores(), 6)


def test_who_claims_a_computed_prompt_scores_nothing() -> None:
    sequence = asking()
    sequence.claimed(9)
    assert sequence.work(1).prompt_logprobs is None


# ---- at the gateway -----------------------------------------------------------------------------

PROMPT = [5, 6, 7]
RAW = pack_scores([(6, -0.5), (9, -0.25)]) + pack_scores([(7, -1.5), (7, -1.5)])


def stream_of(count: int | None = 1, length: int = 3) -> RequestStream:
    sampling = SamplingParams(prompt_logprobs=count)
    prompt = (PROMPT * length)[:length]
    return RequestStream(GenerationRequest("request", prompt, sampling), received_at=3.0)


def test_scores_become_the_streams() -> None:
    stream = stream_of()
    stream.take_scores(RAW)
    assert not stream.awaits_prompt_logprobs
    assert stream.prompt_logprobs == [
        PromptToken(6, -0.5, ((9, -0.25),)),
        PromptToken(7, -1.5, ((7, -1.5),)),
    ]


def test_who_did_not_ask_or_has_one_token_awaits_none() -> None:
    assert not stream_of(None).awaits_prompt_logprobs
    assert not stream_of(1, 1).awaits_prompt_logprobs


@pytest.mark.parametrize("raw", [b"", RAW[:-1], RAW[:24], RAW[:36], RAW[24:] * 2])
def test_scores_that_are_not_the_prompts_are_refused(raw: bytes) -> None:
    stream = stream_of()
    with pytest.raises(ValueError, match=r"rows|another"):
        stream.take_scores(raw)
    assert stream.awaits_prompt_logprobs


def test_more_than_a_message_holds_is_refused_by_name_and_limit() -> None:
    longest = MAX_SCORES // 21 + 1
    assert stream_of(20, longest).awaits_prompt_logprobs
    with pytest.raises(InvalidRequestError, match=str(MAX_SCORES)) as caught:
        stream_of(20, longest + 1)
    assert caught.value.field == "prompt_logprobs"


def test_the_most_that_is_taken_fits_a_message() -> None:
    raw = bytes(MAX_SCORES * 12)
    token = OutputToken(handoff_id="h", index=0, token_id=1, prompt_scores=raw)
    assert msgspec.convert(msgspec.to_builtins(token, builtin_types=(bytes,)), OutputToken) == token
