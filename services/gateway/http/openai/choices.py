"""All choices of one request: read as one sequence, ranked, counted, cancelled together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from common.seams import Clock, Rng
from kvbaton.explanation import Explanation
from services.gateway.access.quotas import Charge
from services.gateway.backend import Backend, GenerationRequest, PromptToken, Timeline
from services.gateway.observe.explain import explain
from services.gateway.text.generation import Generation, TextOutput, TextToken, prompt_logprobs
from services.gateway.text.merged import Merged
from services.gateway.text.model import TextModel


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: what to generate, whatever the shape of the answer.

    `like` is every choice's request but for its prompt, seed and number. Each prompt gets `n`
    choices, the best of `best_of`. `drops_output`: only the prompt is wanted, and what the model
    says of it; the token that comes with that does not count. `is_explained`: the answer tells how
    it came about.
    """

    like: GenerationRequest
    prompts: Sequence[list[int]]
    n: int
    best_of: int
    stop: Sequence[str]
    include_stop: bool
    skip_special_tokens: bool
    drops_output: bool
    charge: Charge
    rng: Rng  # where seeds come from that the client did not give
    is_explained: bool = False


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Token counts; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails = CompletionDetails()


class Choices:
    """The tokens of a job as they come: (index of the choice, token).

    Choice `prompt * best_of + i` is the i-th of its prompt. The first of a prompt is submitted at
    once, the others with its first token: then the prompt is computed, and they find it cached.
    Iteration raises what a choice raises; `close` cancels whatever still runs and must be called.
    """

    def __init__(self, job: Job, backend: Backend, model: TextModel, clock: Clock) -> None:
        """Submits each prompt's first choice, or none: raises what Backend.submit raises."""
        self.job = job
        self._backend = backend
        self._model = model
        self._clock = clock
        self._seeds = [self._seed() for _ in job.prompts]
        self._generations: dict[int, Generation] = {}
        self._merged = Merged(len(self))
        try:
            for index in range(0, len(self), job.best_of):
                self._submit(index)
        except BaseException:
            self._cancel()
            job.charge.settle(0)
            raise
        if len(self) > 1:
            for index, generation in self._generations.items():
                self._merged.add(index, generation)

    def __len__(self) -> int:
        return len(self.job.prompts) * self.job.best_of

    def _seed(self) -> int:
        seed = self.job.like.sampling.seed
        return self.job.rng.new_seed() if seed is None else seed

    def _submit(self, index: int) -> Generation:
        job = self.job
        prompt, choice = divmod(index, job.best_of)
        sampling = msgspec.structs.replace(job.like.sampling, seed=self._seeds[prompt])
        if choice:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        request = replace(
            job.like,
            # The first goes by the id that the client sees.
            request_id=f"{job.like.request_id}#{index}" if index else job.like.request_id,
            prompt=job.prompts[prompt],
            sampling=sampling,
            choice=choice,
            n=job.n,
            # The others come when the first has its first token.
            received_at=0.0 if choice else job.like.received_at,
        )
        stream = self._backend.submit(request)
        output = TextOutput(
            self._model.detokenizer(skip_special_tokens=job.skip_special_tokens),
            job.stop,
            min_tokens=sampling.min_tokens,
            include_stop=job.include_stop,
        )
        generation = Generation(stream, output)
        self._generations[index] = generation
        return generation

    def __aiter__(self) -> Choices:
        return self

    async def __anext__(self) -> tuple[int, TextToken]:
        if len(self) == 1:
            return 0, await anext(self._generations[0])
        index, token = await anext(self._merged)
        if token.index == 0 and index % self.job.best_of == 0:
            for other in range(index + 1, index + self.job.best_of):
                self._merged.add(other, self._submit(other))
        return index, token

    def explanations(self) -> list[Explanation]:
        """Of each choice, once it has its last token."""
        now, streams = self._clock.now(), sorted(self._generations.items())
        return [explain(each.stream, now, time.time()) for _, each in streams]

    def prompt_logprobs(self, prompt: int) -> list[PromptToken]:
        """Those of one prompt, once its first choice has a token. They must have been asked for."""
        stream = self._generations[prompt * self.job.best_of].stream
        return prompt_logprobs(stream, self.job.prompts[prompt])

    @property
    def timeline(self) -> Timeline:
        """That of the first choice."""
        return self._generations[0].stream.timeline

    def usage(self) -> Usage:
        """The counts so far."""
        job = self.job
        num_prompt = sum(map(len, job.prompts))
        num_output = sum(each.num_output_tokens for each in self._generations.values())
        num_output *= not job.drops_output
        firsts = range(0, len(self), job.best_of)
        num_cached = sum(self._generations[each].stream.num_cached_tokens for each in firsts)
        return Usage(num_prompt, num_output, num_prompt + num_output, PromptDetails(num_cached))

    async def close(self) -> None:
        """Cancel what still runs."""
        self._cancel()
        await self._merged.close()
        self.job.charge.settle(self.usage().total_tokens)

    def _cancel(self) -> None:
        for generation in self._generations.values():
            generation.cancel()


def best(job: Job, outputs: list[list[TextToken]]) -> list[list[TextToken]]:
    """The `n` of each prompt that are most likely by token, the likeliest first."""
    if job.best_of == job.n:
        return outputs
    found = []
    for first in range(0, len(outputs), job.best_of):
        found += sorted(outputs[first : first + job.best_of], key=_unlikelihood)[: job.n]
    return found


def _unlikelihood(output: list[TextToken]) -> float:
    return -sum(token.logprob for token in output) / len(output)
