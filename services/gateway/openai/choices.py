"""All choices of one request: submitted together, read as one sequence, cancelled together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from prometheus_client import Histogram

from common.metrics import LATENCY_BUCKETS_S, REGISTRY
from common.seams import Clock, Rng
from kvbaton.sampling import SamplingParams
from services.gateway.backend import Backend, GenerationRequest
from services.gateway.generation import Generation, TextOutput, TextToken
from services.gateway.quotas import Charge
from services.gateway.text import TextModel

_FIRST_TOKEN_S = Histogram(
    "kvbaton_time_to_first_token_seconds",
    "From a request's arrival to the first token of each choice",
    buckets=LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
_INTER_TOKEN_S = Histogram(
    "kvbaton_inter_token_latency_seconds",
    "Between one token of a choice and the next",
    buckets=LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
_MAX_QUEUED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: what to generate, whatever the shape of the answer."""

    request_id: str
    prompts: Sequence[list[int]]
    n: int
    sampling: SamplingParams
    stop: Sequence[str]
    skip_special_tokens: bool
    cache_salt: str
    cache_tenant: str
    charge: Charge
    rng: Rng  # where seeds come from that the client did not give
    received_at: float


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Choices:
    """The tokens of a job as they come: (index of the choice, token).

    Choice `prompt * n + i` is the i-th of its prompt. Iteration raises what a choice raises;
    `close` cancels whatever still runs and must be called.
    """

    def __init__(self, job: Job, backend: Backend, model: TextModel, clock: Clock) -> None:
        """Submits every choice, or none: raises what Backend.submit raises."""
        self._job = job
        self._backend = backend
        self._model = model
        self._clock = clock
        self._generations: list[Generation] = []
        self._queue: asyncio.Queue[tuple[int, TextToken] | Exception] = asyncio.Queue(
            _MAX_QUEUED_TOKENS
        )
        self._pumps: list[asyncio.Task[None]] = []
        try:
            for prompt in job.prompts:
                self._submit(prompt)
        except BaseException:
            self._cancel()
            job.charge.settle(0)
            raise
        self._num_running = len(self._generations)
        self._last_at = [0.0] * len(self._generations)

    def __len__(self) -> int:
        return len(self._generations)

    def _submit(self, prompt: list[int]) -> None:
        job, sampling = self._job, self._job.sampling
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=job.rng.new_seed())
        for choice in range(job.n):
            request = GenerationRequest(
                request_id=self._request_id(),
                prompt=prompt,
                sampling=sampling,
                choice=choice,
                tenant=job.cache_tenant,
                cache_salt=job.cache_salt,
            )
            stream = self._backend.submit(request)
            detokenizer = self._model.detokenizer(skip_special_tokens=job.skip_special_tokens)
            output = TextOutput(detokenizer, job.stop, min_tokens=sampling.min_tokens)
            self._generations.append(Generation(stream, output))

    def _request_id(self) -> str:
        """The next choice's own: the first goes by the id that the client sees."""
        number = len(self._generations)
        return f"{self._job.request_id}#{number}" if number else self._job.request_id

    def __aiter__(self) -> Choices:
        return self

    async def __anext__(self) -> tuple[int, TextToken]:
        if self._num_running == 0:
            raise StopAsyncIteration
        if len(self._generations) == 1:
            item = 0, await anext(self._generations[0])
        else:
            item = await self._next_of_many()
        index, token = item
        now = self._clock.now()
        if token.index == 0:
            _FIRST_TOKEN_S.observe(now - self._job.received_at)
        else:
            _INTER_TOKEN_S.observe(now - self._last_at[index])
        self._last_at[index] = now
        self._num_running -= token.finish_reason is not None
        return item

    async def _next_of_many(self) -> tuple[int, TextToken]:
        if not self._pumps:
            self._pumps = [
                asyncio.create_task(self._pump(index, generation), name=f"choice-{index}")
                for index, generation in enumerate(self._generations)
            ]
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def _pump(self, index: int, generation: Generation) -> None:
        try:
            async for token in generation:
                await self._queue.put((index, token))
        except Exception as error:  # raised again by whoever reads the queue
            await self._queue.put(error)

    def usage(self) -> Usage:
        """The counts so far."""
        num_prompt = sum(map(len, self._job.prompts))
        num_output = sum(generation.num_output_tokens for generation in self._generations)
        firsts = self._generations[:: self._job.n]
        num_cached = sum(generation.stream.num_cached_tokens for generation in firsts)
        return Usage(num_prompt, num_output, num_prompt + num_output, PromptDetails(num_cached))

    async def close(self) -> None:
        """Cancel what still runs."""
        self._cancel()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        self._job.charge.settle(self.usage().total_tokens)

    def _cancel(self) -> None:
        for generation in self._generations:
            generation.cancel()
