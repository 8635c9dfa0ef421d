"""The engine as workers use it: its thread, its arena, its errors."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from common.engine.runner import TorchEngine
from common.engine.sampler import NumericalError
from common.engine.work import Engine, Work
from kvbaton.sampling import SamplingParams
from tests.unit.engine_models import GREEDY, build, kv, make_engine, part, whole


@pytest.fixture
def engine(tmp_path: Path) -> TorchEngine:
    build("llama", tmp_path)
    return make_engine(tmp_path, max_model_len=100)


def test_the_engine_says_what_it_serves(engine: TorchEngine) -> None:
    as_protocol: Engine = engine
    info = as_protocol.info
    assert (info.max_model_len, info.vocab_size) == (100, 257)
    assert info.layout.block_bytes == 2 * 2 * 2 * 16 * 16 * 4


async def test_steps_run_one_by_one_on_the_engines_thread(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    honest = engine.step_sync

    def watched(works: list[Work]) -> list[object]:
        threads.add(threading.current_thread().name)
        return list(honest(works))

    monkeypatch.setattr(engine, "step_sync", watched)
    both = await asyncio.gather(
        engine.step([whole([1, 2, 3], [5])]), engine.step([whole([1, 2, 3], [6])])
    )
    assert both[0] == both[1] == honest([whole([1, 2, 3], [7])])
    assert len(threads) == 1
    assert threads.pop().startswith("engine")
    engine.close()


async def test_errors_come_back_to_the_caller(engine: TorchEngine) -> None:
    await engine.step([part(range(1, 20), [1, 2], 0, 16)])
    kv(engine)[1] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        await engine.step([whole(range(1, 20), [1, 2], 16)])
    assert await engine.step([whole([1, 2, 3], [5])])  # and the engine goes on
    engine.close()


def test_nothing_to_do_is_no_work(engine: TorchEngine) -> None:
    assert engine.step_sync([]) == []
    assert engine.arithmetic_s == 0
    assert engine.step_sync([part([1, 2], [0], 0, 2)]) == [None]
    assert engine.arithmetic_s > 0
    engine.close()


@pytest.mark.parametrize(
    "work",
    [
        Work([1, 2, 3], 3, 0, 0, [0], GREEDY),
        Work([1, 2, 3], 3, 0, 4, [0], GREEDY),
        Work([1, 2, 3], 3, 0, 2, [0], GREEDY),  # samples before the last token
        Work([1] * 20, 20, 0, 20, [0], GREEDY),  # a block too few
        Work([1] * 101, 101, 0, 101, list(range(7)), GREEDY),  # beyond max_model_len
        Work([1, 2, 3], 3, 0, 3, [64], GREEDY),  # beyond the arena
        Work([1, 2, 3], 3, 0, 3, [-1], GREEDY),
    ],
)
def test_a_scheduler_that_errs_is_stopped(engine: TorchEngine, work: Work) -> None:
    with pytest.raises(AssertionError):
        engine.step_sync([work])
    engine.close()


def test_an_arena_of_the_wrong_size_is_refused(engine: TorchEngine) -> None:
    size = engine.info.layout.block_bytes
    for arena in (memoryview(b""), memoryview(bytearray(size + 1)), memoryview(bytes(size))):
        with pytest.raises(ValueError, match="the arena must be"):
            engine.attach(arena)
    engine.close()


def test_the_kv_is_written_where_the_arena_says(engine: TorchEngine) -> None:
    layout = engine.info.layout
    arena = bytearray(4 * layout.block_bytes)
    engine.attach(memoryview(arena))
    engine.step_sync([part([1, 2, 3], [2], 0, 3)])
    blocks = [arena[i * layout.block_bytes : (i + 1) * layout.block_bytes] for i in range(4)]
    assert [any(block) for block in blocks] == [False, False, True, False]
    row = layout.head_dim * 4
    assert any(blocks[2][: 3 * row])
    assert not any(blocks[2][3 * row : 16 * row])
    engine.close()
    arena.clear()  # which fails while anyone still holds the memory


def test_sampling_is_the_same_however_the_sequence_was_computed(engine: TorchEngine) -> None:
    params = SamplingParams(temperature=0.8, seed=9, frequency_penalty=0.4, logprobs=2)
    tokens = [3, 1, 4, 1, 5, 9]
    (together,) = engine.step_sync([Work(tokens, 4, 0, 6, [0], params)])
    engine.step_sync([Work(tokens, 4, 0, 5, [1], params, sample=False)])
    (apart,) = engine.step_sync([Work(tokens, 4, 5, 1, [1], params)])
    assert together is not None
    assert apart is not None
    assert together.token_id == apart.token_id
    assert together.logprob == pytest.approx(apart.logprob, abs=1e-4)
    engine.close()
