"""Text to tokens and back, as vLLM's servers offer it: /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvbaton.errors import InvalidRequestError
from services.gateway.backend import Backend
from services.gateway.http.openai.body import BodyReader
from services.gateway.http.openai.decoding import decode_body
from services.gateway.http.openai.endpoints import json_response
from services.gateway.http.openai.intake import check_model
from services.gateway.http.openai.prompts import parse_messages
from services.gateway.http.openai.schema import ChatRequest, Unread
from services.gateway.http.openai.template_options import template_options
from services.gateway.http.openai.tools.request import parse_tools
from services.gateway.text.generation import check_token_ids, tokenize
from services.gateway.text.model import TextModel

MAX_DETOKENIZED = 1024 * 1024


class TokenizeRequest(msgspec.Struct, frozen=True):
    """POST /tokenize: a prompt or, with the other fields of a chat request, messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Unread = msgspec.UNSET
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class Tokenized(msgspec.Struct, frozen=True):
    """`token_strs` are the tokens as the vocabulary has them."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Tokenization:
    """Request handlers."""

    def __init__(self, backend: Backend, model: TextModel, bodies: BodyReader) -> None:
        self._backend = backend
        self._model = model
        self._bodies = bodies

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        async with self._bodies.open(request) as body:
            fields = decode_body(body, TokenizeRequest)
            check_model(self._model, fields.model)
            is_chat = fields.messages is not msgspec.UNSET and bytes(fields.messages) != b"null"
            if is_chat == (fields.prompt is not None):
                raise InvalidRequestError(
                    "exactly one of prompt and messages is given", field="prompt"
                )
            if is_chat:
                tokens = await self._chat(decode_body(body, ChatRequest))
            else:
                tokens = await self._text(fields)
        model = self._model
        names = [model.token_name(each) for each in tokens] if fields.return_token_strs else None
        shown = Tokenized(len(tokens), self._backend.max_model_len, tokens, names)
        return json_response(shown)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        async with self._bodies.open(request) as body:
            fields = decode_body(body, DetokenizeRequest)
            check_model(self._model, fields.model)
            if len(fields.tokens) > MAX_DETOKENIZED:
                raise InvalidRequestError(
                    f"tokens holds at most {MAX_DETOKENIZED} ids, got {len(fields.tokens)}",
                    field="tokens",
                )
            check_token_ids(fields.tokens, self._model.vocab_size, field="tokens")
            text = await tokenize(
                len(fields.tokens) * 4,
                lambda: self._model.decode(fields.tokens, skip_special_tokens=False),
            )
        return json_response({"prompt": text})

    # What does not fit the model is counted too, if it is not sure to be far too long.

    async def _text(self, fields: TokenizeRequest) -> list[int]:
        text = fields.prompt or ""
        return await tokenize(
            len(text),
            lambda: self._model.encode(
                text,
                add_special_tokens=fields.add_special_tokens is not False,
                most_tokens=self._backend.max_model_len,
            ),
        )

    async def _chat(self, fields: ChatRequest) -> list[int]:
        tools = parse_tools(fields, self._model.tool_format)
        options: dict[str, Any] = {} if tools is None else {"tools": tools.for_template()}
        return await self._model.chat(
            parse_messages(fields.messages),
            most_tokens=self._backend.max_model_len,
            add_special_tokens=bool(fields.add_special_tokens),
            continues=bool(fields.continue_final_message),
            **template_options(fields) | options,
        )
