"""What a msgpack client's `generate` comes to: checked, tokenized, and ready to be submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from common.seams import Clock, Rng
from kvbaton.errors import InvalidRequestError
from kvbaton.protocol import Generate, Resume, Resumed
from kvbaton.sampling import SamplingParams, check_sampling
from kvbaton.traceparent import read_traceparent
from services.gateway.backend import Backend, GenerationRequest
from services.gateway.clients.fields import check_deadline, check_given, http_fields
from services.gateway.clients.resumption import check_resume, most_tokens
from services.gateway.http.openai import params
from services.gateway.http.openai.grammars import Grammars, Source
from services.gateway.http.openai.intake import MAX_SESSION_CHARS, Intake, check_model, check_name
from services.gateway.http.openai.prompts import parse_messages
from services.gateway.http.openai.schema import ChatRequest
from services.gateway.http.openai.tools.request import ToolUse, parse_tools, wanted_structure
from services.gateway.text.generation import (
    bad_word_tokens,
    check_cache_salt,
    check_stop,
    check_token_ids,
    tokenize,
)
from services.gateway.text.model import TextModel


@dataclass(frozen=True, slots=True)
class Means:
    """What it takes to answer clients."""

    backend: Backend
    model: TextModel
    grammars: Grammars
    clock: Clock
    rng: Rng

    @property
    def intake(self) -> Intake:
        """What this face has in common with the other."""
        return Intake(self.backend, self.model, self.clock, self.rng)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request. `like` is the first choice's; `resumed` has what the client has of each.

    `most` is how many tokens a choice can have, as far as that is known.
    """

    like: GenerationRequest
    n: int
    best_of: int
    stop: Sequence[str]
    include_stop: bool
    skip_special_tokens: bool
    tools: ToolUse | None
    shows_prompt: bool
    resumed: Sequence[Resumed]
    most: int | None


async def make_plan(message: Generate, means: Means, tenant: str) -> Plan:
    """Raises InvalidRequestError and NotFoundError, naming the field, and OverloadedError."""
    received_at = means.clock.now()
    field = _check(message, means)
    fields = http_fields(message)
    n, best_of = params.num_choices(fields, 1)
    tools = parse_tools(fields, means.model.tool_format) if message.messages is not None else None
    source = wanted_structure(fields, tools)
    prompt = await _prompt(message, fields, tools, means, field)
    begun, resumed = _resumed(message, n, means.rng)
    has_begun = any(each.tokens for each in resumed)
    sampling = await _sampling(message, means, source, seed=begun.seed, has_begun=has_begun)
    if best_of > n:
        resumed = [Resumed()] * best_of  # which are the best is known at the end alone
        logprobs = 0 if sampling.logprobs is None else sampling.logprobs
        sampling = msgspec.structs.replace(sampling, logprobs=logprobs)
    like = GenerationRequest(
        request_id=begun.request_id,
        prompt=prompt,
        sampling=sampling,
        n=best_of,
        tenant=tenant,
        owner=tenant,
        cache_salt=check_cache_salt(message.cache_salt),
        deadline_s=None if message.deadline_ms is None else message.deadline_ms / 1000,
        priority=params.priority(fields),
        session_id=message.session_id or "",
        targets=params.targets(fields),
        traceparent=read_traceparent(message.traceparent),
        received_at=received_at,
    )
    most = most_tokens(sampling, len(prompt), means.backend.max_model_len)
    if message.resume is not None:
        check_resume(message.resume, resumed, means.model.vocab_size, most)
    return Plan(
        like=like,
        n=n,
        best_of=best_of,
        stop=message.stop,
        include_stop=message.include_stop_str_in_output,
        skip_special_tokens=message.skip_special_tokens
        and not (tools is not None and tools.shows_special_tokens),
        tools=tools,
        shows_prompt=not has_begun
        and (message.echo or message.sampling.prompt_logprobs is not None),
        resumed=resumed,
        most=most,
    )


def _check(message: Generate, means: Means) -> str:
    """Everything that needs no prompt ids. Returns the field that holds the prompt."""
    field = check_given(message, ("text", "token_ids", "messages"))
    model, sampling = means.model, message.sampling
    check_model(model, message.model)
    if sampling.grammar:
        raise InvalidRequestError(
            "a grammar is given as structured_outputs or response_format", field="grammar"
        )
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        check_token_ids(getattr(sampling, name), model.vocab_size, field=name)
    for word in sampling.bad_words:
        check_token_ids(word, model.vocab_size, field="bad_words")
    check_sampling(sampling)
    check_stop(message.stop)
    check_deadline(message.deadline_ms)
    check_name(message.session_id or "", "session_id", MAX_SESSION_CHARS)
    return field


async def _prompt(
    message: Generate, fields: ChatRequest, tools: ToolUse | None, means: Means, field: str
) -> list[int]:
    intake, model, most = means.intake, means.model, message.sampling.max_tokens
    if message.messages is not None:
        options = {} if tools is None else {"tools": tools.for_template()}
        return await intake.conversation(fields, parse_messages(fields.messages), most, **options)
    if message.token_ids is not None:
        return intake.fitted(message.token_ids, fields, most, field)
    text = message.text or ""
    prompt = await tokenize(
        len(text),
        lambda: model.encode(
            text,
            add_special_tokens=message.add_special_tokens is not False,
            most_tokens=means.backend.max_model_len,
            is_end_enough=message.truncate_prompt_tokens is not None,
            field=field,
        ),
    )
    return intake.fitted(prompt, fields, most, field)


def _resumed(message: Generate, n: int, rng: Rng) -> tuple[Resume, list[Resumed]]:
    """What names the request, and the output that its client has. A new request goes on after
    nothing. Raises InvalidRequestError for another number of choices."""
    resume = message.resume
    if resume is None:
        seed = message.sampling.seed
        resume = Resume(request_id=rng.new_id(), seed=rng.new_seed() if seed is None else seed)
    only = Resumed(tokens=resume.tokens, finish_reason=resume.finish_reason)
    if n == 1 and not resume.choices:
        return resume, [only]
    if resume.choices and (len(resume.choices) != n or only != Resumed()):
        raise InvalidRequestError(
            f"resume.choices has one entry for each of the {n} choices, got {len(resume.choices)}, "
            "and stands in place of resume.tokens",
            field="resume.choices",
        )
    if not resume.choices and only != Resumed():
        raise InvalidRequestError(
            f"resume.tokens is for one choice, not {n}", field="resume.tokens"
        )
    return resume, resume.choices or [Resumed()] * n


async def _sampling(
    message: Generate, means: Means, source: Source | None, *, seed: int, has_begun: bool
) -> SamplingParams:
    """With what the rest of the request adds. Whoever has tokens has the prompt's too."""
    given, words = message.sampling, message.bad_words

    def encode(word: str) -> list[int]:
        return means.model.encode(word, add_special_tokens=False, field="bad_words")

    found = await tokenize(sum(map(len, words)), lambda: bad_word_tokens(words, encode))
    of_echo = given.logprobs if message.echo else None
    asked = of_echo if given.prompt_logprobs is None else given.prompt_logprobs
    sampling = msgspec.structs.replace(
        given,
        seed=seed,
        bad_words=[*given.bad_words, *found],
        prompt_logprobs=None if has_begun else asked,
        grammar="" if source is None else await means.grammars.compile(source),
    )
    check_sampling(sampling)
    return sampling
