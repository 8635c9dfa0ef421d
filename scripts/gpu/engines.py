"""Engines for the check, over arenas of their own, and what they give."""

from __future__ import annotations

import mmap
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.engine.cuda.engine import DeviceEngine
from common.engine.cuda.memory import ArenaFollower
from common.engine.runner import TorchEngine
from common.engine.work import Sampled, Work
from kvbaton.sampling import SamplingParams

BLOCK_SIZE = 64
GREEDY = SamplingParams(temperature=0)


def cpu_engine(model: Path, num_blocks: int, dtype: str) -> TorchEngine:
    """The reference."""
    engine = TorchEngine(model, dtype=dtype, block_size=BLOCK_SIZE)
    engine.attach(_arena(engine, num_blocks))
    return engine


def device_engine(model: Path, num_blocks: int, device: str, **options: Any) -> DeviceEngine:
    """On the GPU; on the CPU in a rehearsal."""
    engine = DeviceEngine(model, device=device, block_size=BLOCK_SIZE, **options)
    arena = _arena(engine, num_blocks)
    engine.attach(arena)
    with follower_of(engine).replacing(arena):
        pass  # its pages are pinned now
    return engine


def _arena(engine: TorchEngine, num_blocks: int) -> memoryview:
    return memoryview(mmap.mmap(-1, num_blocks * engine.info.layout.block_bytes))


def follower_of(engine: DeviceEngine) -> ArenaFollower:
    """What copies between its arena and its pool."""
    assert engine._follower is not None
    return engine._follower


def tables(count: int, width: int) -> list[list[int]]:
    """Block tables over the first count * width blocks, scattered."""
    blocks = list(range(count * width))
    random.Random(2).shuffle(blocks)  # noqa: S311 - the same each time
    return [blocks[at : at + width] for at in range(0, len(blocks), width)]


def whole(tokens: list[int], table: list[int], start: int = 0) -> Work:
    """From `start` on, and the token after."""
    return Work(tokens, len(tokens), start, len(tokens) - start, table, GREEDY)


def logits_of(engine: TorchEngine, prompts: Sequence[list[int]], width: int) -> Tensor:
    """After each of the prompts, all in one step: [prompts, vocab_size] in fp32."""
    seen: list[Tensor] = []
    draw = engine._draw

    def watched(logits: Tensor, works: Sequence[Work]) -> list[Sampled | None]:
        seen.append(logits.cpu().clone())
        return draw(logits, works)

    engine._draw = watched  # type: ignore[method-assign]
    engine.step_sync(
        [whole(*each) for each in zip(prompts, tables(len(prompts), width), strict=True)]
    )
    engine._draw = draw  # type: ignore[method-assign]
    return torch.cat(seen)


def decode(
    engine: DeviceEngine,
    prompts: Sequence[list[int]],
    width: int,
    num_tokens: int,
    *,
    chunk: int = 1 << 30,
    by_arena: bool = False,
) -> list[list[int]]:
    """The tokens that follow each prompt, whose first part is computed `chunk` positions a step.
    With `by_arena` all KV goes to the arena and comes back from there before each step."""
    texts = [list(prompt) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    places = tables(len(texts), width)
    done = [0] * len(texts)
    while any(done[index] < length + num_tokens for index, length in enumerate(lengths)):
        works = []
        for text, start, table in zip(texts, done, places, strict=True):
            end = min(len(text), start + chunk)
            works.append(
                Work(text, len(text), start, end - start, table, GREEDY, sample=end == len(text))
            )
        for index, (work, sampled) in enumerate(zip(works, engine.step_sync(works), strict=True)):
            done[index] += work.num_tokens
            if sampled is not None:
                texts[index].append(sampled.token_id)
        if by_arena:
            unnamed = {slot: b"" for table in places for slot in table}
            follower_of(engine).save_sync(unnamed)
            follower_of(engine).fetch_sync(unnamed)
    return [text[length : length + num_tokens] for text, length in zip(texts, lengths, strict=True)]
