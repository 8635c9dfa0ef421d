"""One `generate` of a msgpack client: checked, tokenized, submitted, and its answers one by one."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import msgspec

from common.seams import Clock, Rng
from kvbaton.errors import InvalidRequestError, NotFoundError
from kvbaton.protocol import (
    MAX_DEADLINE_MS,
    Accepted,
    Done,
    Generate,
    Resume,
    Timings,
    Token,
    Tokens,
    Usage,
)
from kvbaton.sampling import check_sampling
from services.gateway.backend import Backend, GenerationRequest, Timeline
from services.gateway.generation import (
    Generation,
    TextOutput,
    TextToken,
    check_cache_salt,
    check_prompt,
    check_stop,
    tokenize,
)
from services.gateway.resumption import check_resume, most_tokens, take_in
from services.gateway.text import TextModel

_MAX_NAME_CHARS = 64


async def answer(
    message: Generate, backend: Backend, model: TextModel, *, clock: Clock, rng: Rng, tenant: str
) -> AsyncGenerator[Accepted | Tokens | Done, None]:
    """`accepted` if it is wanted, the tokens as they come, `done`. Raises what the request ends by.

    Closing the iterator frees what the request holds.
    """
    field = _check(message, model)
    prompt = await _tokenized(message, model, backend.max_model_len)
    check_prompt(prompt, model.vocab_size, backend.max_model_len, field=field)
    most = most_tokens(message.sampling, len(prompt), backend.max_model_len)
    if message.resume is not None:
        check_resume(message.resume, model.vocab_size, most)
    begun = message.resume or _begin(message, rng)
    sampling = msgspec.structs.replace(message.sampling, seed=begun.seed)
    output = TextOutput(model.detokenizer(), message.stop, min_tokens=sampling.min_tokens)
    finish_reason = await take_in(begun, output, sampling, most)
    if finish_reason is not None:
        yield _nothing_left(message, begun, finish_reason, len(prompt))
        return
    stream = backend.submit(
        GenerationRequest(
            request_id=begun.request_id,
            prompt=prompt,
            sampling=sampling,
            tenant=tenant,
            deadline_s=None if message.deadline_ms is None else message.deadline_ms / 1000,
            cache_salt=check_cache_salt(message.cache_salt),
            resumed=tuple(begun.tokens),
        )
    )
    generation = Generation(stream, output)
    try:
        if message.resumable:
            yield Accepted(id=message.id, request_id=begun.request_id, seed=begun.seed)
        async for token in generation:
            finish_reason = token.finish_reason
            yield Tokens(
                id=message.id,
                tokens=[_on_the_wire(token, with_logprobs=sampling.logprobs is not None)],
                finish_reason=finish_reason,
            )
    finally:
        generation.cancel()
    yield Done(
        id=message.id,
        finish_reason=finish_reason or "",
        usage=Usage(
            num_prompt_tokens=len(prompt),
            num_output_tokens=generation.num_output_tokens,
            num_cached_tokens=stream.num_cached_tokens,
        ),
        timings=_timings(stream.timeline, clock.now()),
        request_id=stream.request_id,
    )


def _begin(message: Generate, rng: Rng) -> Resume:
    """A new request goes on after nothing."""
    seed = message.sampling.seed
    return Resume(request_id=rng.new_id(), seed=rng.new_seed() if seed is None else seed)


def _nothing_left(
    message: Generate, resume: Resume, finish_reason: str, num_prompt_tokens: int
) -> Done:
    """Only the end of the request was lost: no worker is needed to say it again."""
    return Done(
        id=message.id,
        finish_reason=finish_reason,
        usage=Usage(
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=len(resume.tokens),
            num_cached_tokens=0,
        ),
        timings=Timings(num_attempts=0),
        request_id=resume.request_id,
    )


def _check(message: Generate, model: TextModel) -> str:
    """Everything that needs no prompt ids. Returns the field that holds the prompt."""
    names = ("text", "token_ids", "messages")
    given = [name for name in names if getattr(message, name) is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"exactly one of text, token_ids and messages is given, got {given or 'none'}",
            field=given[1] if given else "text",
        )
    if message.messages is not None and not message.messages:
        raise InvalidRequestError("messages is empty", field="messages")
    if message.model is not None and message.model != model.name:
        raise NotFoundError(
            f"there is no model {message.model[:_MAX_NAME_CHARS]!r} here, only {model.name!r}",
            field="model",
        )
    check_sampling(message.sampling)
    for token_id in message.sampling.stop_token_ids:
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequestError(
                f"stop_token_ids has token id {token_id}, the model's are 0 to "
                f"{model.vocab_size - 1}",
                field="stop_token_ids",
            )
    check_stop(message.stop)
    if message.deadline_ms is not None and not 1 <= message.deadline_ms <= MAX_DEADLINE_MS:
        raise InvalidRequestError(
            f"deadline_ms must be at least 1 and at most {MAX_DEADLINE_MS}, got "
            f"{message.deadline_ms}",
            field="deadline_ms",
        )
    return given[0]


async def _tokenized(message: Generate, model: TextModel, most: int | None) -> list[int]:
    if message.token_ids is not None:
        return message.token_ids
    if message.messages is None:
        text = message.text or ""
        return await tokenize(len(text), lambda: model.encode(text, most_tokens=most))
    turns = [{"role": turn.role, "content": turn.content} for turn in message.messages]
    return await model.chat(turns, most_tokens=most)


def _on_the_wire(token: TextToken, *, with_logprobs: bool) -> Token:
    return Token(
        index=token.index,
        token_id=token.token_id,
        text=token.text,
        logprob=token.logprob if with_logprobs else None,
        top_logprobs=list(token.top_logprobs) if with_logprobs else [],
    )


def _timings(timeline: Timeline, now: float) -> Timings:
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
