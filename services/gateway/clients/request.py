"""One `generate` of a msgpack client: its answers one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence

from kvbaton.protocol import (
    Accepted,
    Done,
    FinishedChoice,
    Generate,
    Timings,
    Token,
    Tokens,
)
from kvbaton.questions import Prompt, PromptToken
from services.gateway import backend
from services.gateway.clients.choices import Choice, Choices
from services.gateway.clients.plan import Means, Plan, make_plan
from services.gateway.http.openai.logprobs import finite
from services.gateway.observe.explain import explain
from services.gateway.text.generation import TextToken
from services.gateway.text.model import TextModel

_MAX_TOKENS_IN_MESSAGE = 512
_MAX_TOKENS_ON_LOOP = 128  # about a millisecond of text: above it the loop is not kept waiting


async def answer(
    message: Generate, means: Means, tenant: str
) -> AsyncGenerator[Accepted | Prompt | Tokens | Done, None]:
    """`accepted` and the prompt if they are wanted, the tokens as they come, `done`. Raises what
    the request ends by.

    Closing the iterator frees what the request holds.
    """
    plan = await make_plan(message, means, tenant)
    choices = Choices(plan, means)
    has_logprobs = message.sampling.logprobs is not None
    is_told = not plan.shows_prompt
    try:
        await choices.begin()
        if message.resumable and choices.stream is not None:
            seed = plan.like.sampling.seed
            assert seed is not None
            yield Accepted(id=message.id, request_id=plan.like.request_id, seed=seed)
        async for number, token in choices:
            if not is_told:
                is_told = True
                for part in await prompt_parts(
                    message.id,
                    plan.like.prompt,
                    choices.prompt_logprobs,
                    means.model,
                    skip_special_tokens=plan.skip_special_tokens,
                ):
                    yield part
            if plan.best_of > plan.n:
                choices.all[number].tokens.append(token)
            else:
                yield _tokens(message.id, number, [token], with_logprobs=has_logprobs)
        for number, choice in enumerate(_best(plan, choices)):
            for tokens in _cut(choice.tokens):
                yield _tokens(message.id, number, tokens, with_logprobs=has_logprobs)
        yield _done(message, plan, choices, means)
    finally:
        await choices.close()


def _best(plan: Plan, choices: Choices) -> list[Choice]:
    """The `n` that are most likely by token, the likeliest first; all if those are asked for."""
    if plan.best_of == plan.n:
        return choices.all
    return sorted(choices.all, key=_likelihood, reverse=True)[: plan.n]


def _likelihood(choice: Choice) -> float:
    return sum(token.logprob for token in choice.tokens) / len(choice.tokens)


def _cut(tokens: Sequence[TextToken]) -> Iterator[Sequence[TextToken]]:
    for start in range(0, len(tokens), _MAX_TOKENS_IN_MESSAGE):
        yield tokens[start : start + _MAX_TOKENS_IN_MESSAGE]


def _tokens(
    request_id: int, number: int, tokens: Sequence[TextToken], *, with_logprobs: bool
) -> Tokens:
    return Tokens(
        id=request_id,
        tokens=[
            Token(
                index=token.index,
                token_id=token.token_id,
                text=token.text,
                logprob=finite(token.logprob) if with_logprobs else None,
                top_logprobs=_finite(token.top_logprobs) if with_logprobs else [],
                choice=number,
            )
            for token in tokens
        ],
        finish_reason=tokens[-1].finish_reason,
    )


def _finite(top_logprobs: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(token_id, finite(logprob)) for token_id, logprob in top_logprobs]


async def prompt_parts(
    request_id: int,
    prompt: Sequence[int],
    logprobs: Sequence[backend.PromptToken],
    model: TextModel,
    *,
    skip_special_tokens: bool,
    choice: int = 0,
) -> list[Prompt]:
    """A prompt's tokens, with the text that each completes. `logprobs`, if there are any, begin
    with the second token."""

    def tokens() -> list[PromptToken]:
        detokenizer = model.detokenizer(skip_special_tokens=skip_special_tokens)
        texts = [detokenizer.add(token_id) for token_id in prompt]
        texts[-1] += detokenizer.flush()
        likely = [None, *logprobs] if logprobs else [None] * len(prompt)
        return [
            PromptToken(
                index=index,
                token_id=token_id,
                text=text,
                logprob=None if found is None else finite(found.logprob),
                top_logprobs=[] if found is None else _finite(found.top_logprobs),
            )
            for index, (token_id, text, found) in enumerate(zip(prompt, texts, likely, strict=True))
        ]

    is_short = len(prompt) <= _MAX_TOKENS_ON_LOOP
    shown = tokens() if is_short else await asyncio.to_thread(tokens)
    return [
        Prompt(id=request_id, tokens=shown[start : start + _MAX_TOKENS_IN_MESSAGE], choice=choice)
        for start in range(0, len(shown), _MAX_TOKENS_IN_MESSAGE)
    ]


def _done(message: Generate, plan: Plan, choices: Choices, means: Means) -> Done:
    """Where only the end of the request was lost there is no stream: no worker was needed."""
    finished: list[FinishedChoice] = [each.finished() for each in _best(plan, choices)]
    now, stream = means.clock.now(), choices.stream
    return Done(
        id=message.id,
        finish_reason=finished[0].finish_reason,
        usage=choices.usage(),
        timings=_timings(stream.timeline, now) if stream else Timings(num_attempts=0),
        request_id=plan.like.request_id,
        choices=finished if plan.n > 1 or plan.tools is not None else [],
        explanation=explain(stream, now, time.time()) if message.explain and stream else None,
    )


def _timings(timeline: backend.Timeline, now: float) -> Timings:
    """A request that a stop string ended has no `finished_at`: it was cancelled, just now."""

    def since_received_ms(at: float) -> float:
        return round((at - timeline.received_at) * 1000, 3) if at else 0.0

    return Timings(
        placed_ms=since_received_ms(timeline.placed_at),
        prefilled_ms=since_received_ms(timeline.prefilled_at),
        handed_over_ms=since_received_ms(timeline.handed_over_at),
        first_token_ms=since_received_ms(timeline.first_token_at),
        finished_ms=since_received_ms(timeline.finished_at or now),
        prefill_worker=timeline.prefill_worker,
        decode_worker=timeline.decode_worker,
        num_attempts=timeline.num_attempts,
    )
