"""What msgpack clients ask beside `generate`: scores, tokens, texts, models, counts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from kvbaton.errors import InvalidRequestError
from kvbaton.questions import (
    MAX_DETOKENIZED,
    MAX_SCORED,
    Answer,
    Counted,
    Detokenize,
    Detokenized,
    ModelCard,
    ModelList,
    Models,
    Prompt,
    Question,
    Score,
    Scored,
    Tokenize,
    Tokenized,
)
from kvbaton.sampling import MAX_TOP_LOGPROBS, SamplingParams
from services.gateway.backend import GenerationRequest
from services.gateway.clients.fields import check_deadline, check_given, http_fields
from services.gateway.clients.plan import Means
from services.gateway.clients.request import prompt_parts
from services.gateway.http.openai.intake import check_model
from services.gateway.http.openai.params import priority
from services.gateway.http.openai.prompts import parse_messages
from services.gateway.http.openai.schema import GenerationFields
from services.gateway.http.openai.template_options import template_options
from services.gateway.http.openai.tools.request import parse_tools
from services.gateway.text.generation import (
    Generation,
    TextOutput,
    check_cache_salt,
    check_prompt,
    check_token_ids,
    prompt_logprobs,
    tokenize,
)


async def answer_question(
    message: Question, means: Means, tenant: str
) -> AsyncGenerator[Prompt | Answer, None]:
    """The answer. Raises the KvbatonError that the question ends with."""
    if isinstance(message, Score | Tokenize | Detokenize):
        check_model(means.model, message.model)
    if isinstance(message, Score):
        scores = _Scores(message, means)
        try:
            async with contextlib.aclosing(scores.answer(tenant)) as parts:
                async for part in parts:
                    yield part
        finally:
            scores.close()
    elif isinstance(message, Tokenize):
        yield await _tokenized(message, means)
    elif isinstance(message, Detokenize):
        yield await _detokenized(message, means)
    elif isinstance(message, Models):
        card = ModelCard(
            id=means.model.name,
            vocab_size=means.model.vocab_size,
            max_model_len=means.backend.max_model_len,
        )
        yield ModelList(id=message.id, models=[card])
    else:
        yield Counted(id=message.id, stats=means.backend.stats())


class _Scores:
    """A `score`: each text is a prompt whose one token of output is of no interest."""

    def __init__(self, message: Score, means: Means) -> None:
        self._message = message
        self._means = means
        self._generations: list[Generation] = []

    async def answer(self, tenant: str) -> AsyncGenerator[Prompt | Scored, None]:
        message, means = self._message, self._means
        prompts = await self._prompts()
        like = self._request(tenant)
        for number, prompt in enumerate(prompts):
            stream = means.backend.submit(_numbered(like, number, prompt))
            output = TextOutput(means.model.detokenizer())
            self._generations.append(Generation(stream, output))
        for number, (prompt, generation) in enumerate(zip(prompts, self._generations, strict=True)):
            async for _ in generation:
                pass
            for part in await prompt_parts(
                message.id,
                prompt,
                prompt_logprobs(generation.stream, prompt),
                means.model,
                skip_special_tokens=True,
                choice=number,
            ):
                yield part
        yield Scored(
            id=message.id,
            num_prompt_tokens=sum(map(len, prompts)),
            num_cached_tokens=sum(each.stream.num_cached_tokens for each in self._generations),
        )

    def close(self) -> None:
        for generation in self._generations:
            generation.cancel()

    async def _prompts(self) -> list[list[int]]:
        message, means = self._message, self._means
        field = check_given(message, ("texts", "token_ids"))
        texts, prompts = message.texts or [], message.token_ids or []
        num_given = len(texts) + len(prompts)
        if not 1 <= num_given <= MAX_SCORED:
            raise InvalidRequestError(
                f"{field} holds 1 to {MAX_SCORED} texts, got {num_given}", field=field
            )
        if texts:
            prompts = await tokenize(
                sum(map(len, texts)), lambda: [self._encode(text, field) for text in texts]
            )
        for prompt in prompts:
            check_prompt(prompt, means.model.vocab_size, means.backend.max_model_len, field=field)
        return prompts

    def _encode(self, text: str, field: str) -> list[int]:
        return self._means.model.encode(
            text,
            add_special_tokens=self._message.add_special_tokens,
            most_tokens=self._means.backend.max_model_len,
            field=field,
        )

    def _request(self, tenant: str) -> GenerationRequest:
        message, means = self._message, self._means
        if not 0 <= message.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequestError(
                f"top_logprobs must be at least 0 and at most {MAX_TOP_LOGPROBS}, got "
                f"{message.top_logprobs}",
                field="top_logprobs",
            )
        check_deadline(message.deadline_ms)
        return GenerationRequest(
            request_id=means.rng.new_id(),
            prompt=[],
            sampling=SamplingParams(
                max_tokens=1, temperature=0.0, seed=0, prompt_logprobs=message.top_logprobs
            ),
            tenant=tenant,
            owner=tenant,
            cache_salt=check_cache_salt(message.cache_salt),
            deadline_s=None if message.deadline_ms is None else message.deadline_ms / 1000,
            priority=priority(GenerationFields(priority=message.priority)),
            received_at=means.clock.now(),
        )


def _numbered(like: GenerationRequest, number: int, prompt: list[int]) -> GenerationRequest:
    """The first goes by the id that its client could be told."""
    request_id = f"{like.request_id}#{number}" if number else like.request_id
    return replace(like, request_id=request_id, prompt=prompt)


async def _tokenized(message: Tokenize, means: Means) -> Tokenized:
    """What does not fit the model is told too, if it is not sure to be far too long."""
    model, most = means.model, means.backend.max_model_len
    check_given(message, ("text", "messages"))
    if message.messages is not None:
        token_ids = await _conversation(message, means)
    else:
        text = message.text or ""
        token_ids = await tokenize(
            len(text),
            lambda: model.encode(
                text,
                add_special_tokens=message.add_special_tokens is not False,
                most_tokens=most,
                field="text",
            ),
        )
    return Tokenized(
        id=message.id,
        token_ids=token_ids,
        token_strs=await _names(token_ids, means) if message.return_token_strs else [],
        max_model_len=most,
    )


async def _conversation(message: Tokenize, means: Means) -> list[int]:
    fields = http_fields(message)
    tools = parse_tools(fields, means.model.tool_format)
    options: dict[str, Any] = {} if tools is None else {"tools": tools.for_template()}
    return await means.model.chat(
        parse_messages(fields.messages),
        most_tokens=means.backend.max_model_len,
        add_special_tokens=bool(fields.add_special_tokens),
        continues=bool(fields.continue_final_message),
        **template_options(fields),
        **options,
    )


async def _names(token_ids: Sequence[int], means: Means) -> list[str]:
    return await tokenize(
        len(token_ids), lambda: [means.model.token_name(each) for each in token_ids]
    )


async def _detokenized(message: Detokenize, means: Means) -> Detokenized:
    token_ids, model = message.token_ids, means.model
    if len(token_ids) > MAX_DETOKENIZED:
        raise InvalidRequestError(
            f"token_ids holds at most {MAX_DETOKENIZED} ids, got {len(token_ids)}",
            field="token_ids",
        )
    check_token_ids(token_ids, model.vocab_size, field="token_ids")
    text = await asyncio.to_thread(
        model.decode, token_ids, skip_special_tokens=message.skip_special_tokens
    )
    return Detokenized(id=message.id, text=text)
