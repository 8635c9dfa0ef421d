"""What a scheduler asks of an engine in one step, and what it gets back. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from common.kv.layout import KvLayout
from kvbaton.errors import KvbatonError
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
    equals len(tokens). `prompt_logprobs` is how many likeliest tokens are wanted at each of the
    prompt's positions, besides its own token; None for no such thing.

    Two fields are the step's to set. `scores`: the log-probabilities of those tokens of the prompt
    that follow a position computed now (common/scores.py). `error`: why nothing could be drawn for
    this sequence, which cannot go on; others in the step are not concerned.
    """

    tokens: Sequence[int]
    num_prompt_tokens: int
    start: int
    num_tokens: int
    slots: Sequence[int]
    sampling: SamplingParams
    choice: int = 0
    sample: bool = True
    prompt_logprobs: int | None = None
    scores: bytes = b""
    error: KvbatonError | None = None

    @property
    def end(self) -> int:
        """The position after the last that is computed now."""
        return self.start + self.num_tokens

    @property
    def num_scored(self) -> int:
        """How many positions computed now have a token of the prompt after them."""
        return max(0, min(self.end, self.num_prompt_tokens - 1) - self.start)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token drawn, its log-probability, and the likeliest alternatives if they were asked for.

    Log-probabilities are those of the model's raw distribution (before temperature and penalties),
    as vLLM reports them by default; `logprob` is 0.0 where the request asked for none.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Fetched(NamedTuple):
    """Blocks that were copied into a device's memory, and those of them that came from another
    process's memory there."""

    num_blocks: int
    num_from_neighbours: int


class DeviceMemory(Protocol):
    """Memory of a device, in which an engine computes instead of the memory given to attach.

    What others write to that memory does not reach the steps until it is fetched, and what steps
    write does not reach others until it is saved. Slots count blocks of the memory given to attach.
    A final block has a name, its key, which stands for its content; others have an empty one.
    """

    async def fetch(self, named: Mapping[int, bytes]) -> Fetched:
        """Others have written these slots: steps that begin from now on see it."""

    async def save(self, named: Mapping[int, bytes]) -> None:
        """Others see what the steps that have ended wrote to these slots."""

    def forget(self, slots: Sequence[int]) -> None:
        """Nobody will ask for what steps wrote to these and was not saved. To be called before
        others may write them: until then it may be saved at any time, to make room."""

    def replacing(self, place: memoryview) -> AbstractContextManager[None]:
        """Surrounds the mapping of other memory into `place`, a part of the memory given to attach
        that begins at a page. No step may run."""


class Engine(Protocol):
    """What a worker needs of an engine. The live one computes on its own thread.

    `device_memory` is there, from attach on, if the engine does not compute in the memory that it
    is given. `arithmetic_s`: for how long its model has computed so far; 0 where it does so on its
    own, on a device. A step of `full_step_tokens` keeps the arithmetic busy: one of more takes
    longer in proportion, and one of fewer hardly less.
    """

    info: ModelInfo
    full_step_tokens: int
    device_memory: DeviceMemory | None
    arithmetic_s: float

    def attach(self, arena: memoryview) -> None:
        """Use `arena` (a whole number of blocks of info.layout) as the KV memory."""

    async def prepare(self, sampling: SamplingParams) -> None:
        """Make what the request's steps would otherwise wait for: steps go on meanwhile. Raises
        InvalidRequestError for a request that cannot be served."""

    async def step(self, works: Sequence[Work]) -> list[Sampled | None]:
        """Run one step; one result for each work, None where nothing was sampled."""

    def close(self) -> None:
        """Stop the thread, drop references to the arena."""
