"""What a scheduler asks of an engine in one step, and what it gets back. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.kv.layout import KvLayout
from kvbaton.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the cluster must know of a model. Workers with equal fingerprints produce equal KV.

    The fingerprint covers weights, configuration, dtype, KV layout and, in batch-invariant mode,
    the kernels.
    """

    fingerprint: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    layout: KvLayout


@dataclass(slots=True)
class Work:
    """One sequence's part in a step: compute positions [start, start + num_tokens).

    `tokens` is prompt plus output so far; it may be longer than what is computed now. `slots[i]` is
    the arena slot of the block that holds positions [i * block_size, (i + 1) * block_size); the
    slots cover at least all positions below start + num_tokens. With `sample` the token that
    follows the last computed position is drawn; its position is start + num_tokens, which then
    equals len(tokens).
    """

    tokens: Sequence[int]
    num_prompt_tokens: int
    start: int
    num_tokens: int
    slots: Sequence[int]
    sampling: SamplingParams
    choice: int = 0
    sample: bool = True


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token drawn, its log-probability, and the likeliest alternatives if they were asked for.

    Log-probabilities are those of the model's raw distribution (before temperature and penalties),
    as vLLM reports them by default; `logprob` is 0.0 where the request asked for none.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Engine(Protocol):
    """What a worker needs of an engine. The live one computes on its own thread."""

    info: ModelInfo

    def attach(self, arena: memoryview) -> None:
        """Use `arena` (a whole number of blocks of info.layout) as the KV memory."""

    async def step(self, works: Sequence[Work]) -> list[Sampled | None]:
        """Run one step; one result for each work, None where nothing was to be sampled."""

    def close(self) -> None:
        """Stop the thread, drop references to the arena."""
