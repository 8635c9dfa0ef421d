"""From a request's fields to the job that they ask for: checked, tokenized, charged for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import structlog
from starlette.requests import Request

from common.seams import Clock, Rng
from kvbaton.errors import InvalidRequestError, NotFoundError
from kvbaton.sampling import SamplingParams
from kvbaton.traceparent import read_traceparent
from services.gateway.access.api_keys import Caller
from services.gateway.access.quotas import Charge, over_quota
from services.gateway.backend import Backend, GenerationRequest
from services.gateway.http.idempotency import HEADER as IDEMPOTENCY_KEY
from services.gateway.http.idempotency import DerivedRng, read_key
from services.gateway.http.openai import params
from services.gateway.http.openai.choices import Job
from services.gateway.http.openai.prompts import truncated
from services.gateway.http.openai.schema import IGNORED_FIELDS, ChatRequest, GenerationFields
from services.gateway.http.openai.template_options import template_options
from services.gateway.http.openai.unsupported import UnsupportedFields
from services.gateway.text.generation import (
    bad_word_tokens,
    check_cache_salt,
    check_prompt,
    check_stop,
    check_token_ids,
    tokenize,
)
from services.gateway.text.model import TextModel

log = structlog.get_logger()

MAX_ID_CHARS = 128
MAX_SESSION_CHARS = 256

# Names are looked for in requests of ordinary size only: a list of millions would cost memory.
_MAX_BYTES_SEARCHED = 64 * 1024
_MAX_NAMES_LOGGED = 16
_MAX_NAME_CHARS = 64


class Intake:
    """What the endpoints have in common before anything is submitted."""

    def __init__(self, backend: Backend, model: TextModel, clock: Clock, rng: Rng) -> None:
        self._backend = backend
        self._model = model
        self._clock = clock
        self._rng = rng

    def rng_of(self, request: Request, body: bytes) -> Rng:
        """Where the request's seeds come from. With an Idempotency-Key its id does too."""
        key = read_key(request.headers.getlist(IDEMPOTENCY_KEY))
        if key is None:
            return self._rng
        caller: Caller = request.state.caller
        rng = DerivedRng(tenant=caller.tenant, key=key, model=self._model.name, body=body)
        request.state.request_id = rng.new_id()
        return rng

    def check(
        self,
        request: Request,
        body: bytes,
        fields: GenerationFields,
        unsupported: UnsupportedFields,
    ) -> None:
        """Everything that needs neither the prompt nor the backend."""
        self._log_unknown(request, body, fields, unsupported)
        unsupported.check(body)
        check_model(self._model, fields.model)
        check_stop(params.stop_strings(fields))
        for field in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            given = getattr(fields, field)
            check_token_ids(given or (), self._model.vocab_size, field=field)
        params.check_streaming(fields)

    def _log_unknown(
        self,
        request: Request,
        body: bytes,
        fields: GenerationFields,
        unsupported: UnsupportedFields,
    ) -> None:
        """One line that names the fields that nobody reads."""
        if len(body) > _MAX_BYTES_SEARCHED:
            return
        names = msgspec.json.decode(body, type=dict[str, msgspec.Raw]).keys()
        unknown = names - unsupported.names - IGNORED_FIELDS - set(fields.__struct_fields__)
        if unknown:
            shown = [name[:_MAX_NAME_CHARS] for name in sorted(unknown)[:_MAX_NAMES_LOGGED]]
            log.warning(
                "unknown_fields_ignored",
                request=request.state.request_id,
                fields=shown,
                num_fields=len(unknown),
            )

    async def sampling(
        self,
        fields: GenerationFields,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        grammar: str = "",
    ) -> SamplingParams:
        """The checked sampling parameters. Raises InvalidRequestError."""
        words = fields.bad_words or []
        bad_words = await tokenize(
            sum(map(len, words)),
            lambda: bad_word_tokens(
                words, lambda word: self._model.encode(word, add_special_tokens=False)
            ),
        )
        return params.sampling_params(
            fields,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            bad_words=bad_words,
            grammar=grammar,
        )

    async def tokenized(
        self,
        fields: GenerationFields,
        prompts: Sequence[str] | Sequence[list[int]],
        max_tokens: int | None,
    ) -> list[list[int]]:
        """The ids of the prompts of a completion."""
        num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await tokenize(
            num_chars, lambda: [self._encode(prompt, fields, max_tokens) for prompt in prompts]
        )

    def _encode(
        self, prompt: str | list[int], fields: GenerationFields, max_tokens: int | None
    ) -> list[int]:
        if isinstance(prompt, str):
            prompt = self._model.encode(
                prompt,
                add_special_tokens=fields.add_special_tokens is not False,
                most_tokens=self._backend.max_model_len,
                is_end_enough=fields.truncate_prompt_tokens is not None,
            )
        return self.fitted(prompt, fields, max_tokens, "prompt")  # before the next is tokenized

    async def conversation(
        self,
        fields: ChatRequest,
        messages: list[dict[str, Any]],
        max_tokens: int | None,
        **options: Any,
    ) -> list[int]:
        """The ids of a conversation; `options` reach the model's template."""
        prompt = await self._model.chat(
            messages,
            most_tokens=self._backend.max_model_len,
            is_end_enough=fields.truncate_prompt_tokens is not None,
            add_special_tokens=bool(fields.add_special_tokens),
            continues=bool(fields.continue_final_message),
            **template_options(fields),
            **options,
        )
        return self.fitted(prompt, fields, max_tokens, "messages")

    def fitted(
        self, prompt: list[int], fields: GenerationFields, max_tokens: int | None, field: str
    ) -> list[int]:
        """A prompt that the model takes, cut if that is wanted. Raises InvalidRequestError."""
        max_model_len = self._backend.max_model_len
        prompt = truncated(prompt, fields.truncate_prompt_tokens, max_tokens, max_model_len)
        check_prompt(prompt, self._model.vocab_size, max_model_len, field=field)
        return prompt

    def job(
        self,
        request: Request,
        fields: GenerationFields,
        prompts: list[list[int]],
        sampling: SamplingParams,
        *,
        rng: Rng,
        received_at: float,
        drops_output: bool = False,
    ) -> Job:
        """All of it together. Raises OverloadedError when the caller has used up its tokens."""
        n, best_of = params.num_choices(fields, len(prompts))
        if best_of > n and sampling.logprobs is None:
            sampling = msgspec.structs.replace(sampling, logprobs=0)  # to rank them by
        caller: Caller = request.state.caller
        like = GenerationRequest(
            request_id=self._request_id(request, fields),
            prompt=[],
            sampling=sampling,
            tenant=caller.cache_tenant,
            cache_salt=_cache_salt(fields),
            priority=params.priority(fields),
            session_id=_session_id(request, fields),
            targets=params.targets(fields).or_else(caller.targets),
            traceparent=read_traceparent(request.headers.get("traceparent")),
            owner=caller.tenant,
            received_at=received_at,
        )
        return Job(
            like=like,
            prompts=prompts,
            n=n,
            best_of=best_of,
            stop=params.stop_strings(fields),
            include_stop=bool(fields.include_stop_str_in_output),
            skip_special_tokens=fields.skip_special_tokens is not False,
            drops_output=drops_output,
            is_explained=bool(fields.explain),
            charge=self._charge(caller, prompts, best_of, sampling),
            rng=rng,
        )

    def _request_id(self, request: Request, fields: GenerationFields) -> str:
        """The header's, else the body's, else our own; with an Idempotency-Key the one that
        follows from that."""
        given = fields.request_id or fields.rid
        is_free = not ({"x-request-id", IDEMPOTENCY_KEY.lower()} & set(request.headers.keys()))
        if given is not None and is_free:
            field = "request_id" if fields.request_id else "rid"
            check_name(given, field, MAX_ID_CHARS)
            request.state.request_id = given
        request_id: str = request.state.request_id
        return request_id

    def _charge(
        self, caller: Caller, prompts: list[list[int]], best_of: int, sampling: SamplingParams
    ) -> Charge:
        """Sets aside the most tokens that the request can use. Raises OverloadedError."""
        num_tokens = 0
        for prompt in prompts:
            room = (self._backend.max_model_len or len(prompt)) - len(prompt)
            most = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
            num_tokens += len(prompt) + best_of * most
        refusal = caller.quota.take_tokens(num_tokens, self._clock.now())
        if refusal is not None:
            raise over_quota(refusal)
        return Charge(caller.quota, num_tokens)


def check_model(model: TextModel, name: str | None) -> None:
    """Raise NotFoundError for the name of another model; none means the one there is."""
    if name and name != model.name:
        raise NotFoundError(
            f"there is no model {name[:_MAX_NAME_CHARS]!r} here, only {model.name!r}",
            field="model",
        )


def _cache_salt(fields: GenerationFields) -> str:
    """With SGLang's name for more of it, both count."""
    salt = check_cache_salt(fields.cache_salt)
    return check_cache_salt(f"{salt}\0{fields.extra_key}") if fields.extra_key else salt


def _session_id(request: Request, fields: GenerationFields) -> str:
    given = fields.session_id or request.headers.get("x-session-id", "")
    if given:
        check_name(given, "session_id", MAX_SESSION_CHARS)
    return given


def check_name(given: str, field: str, most_chars: int) -> None:
    """Raise InvalidRequestError for what is not safe to print."""
    if not (len(given) <= most_chars and given.isascii() and given.isprintable()):
        raise InvalidRequestError(
            f"{field} has 1 to {most_chars} printable ASCII characters", field=field
        )
