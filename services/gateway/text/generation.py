"""From a stream of tokens to text with stop strings applied, and the checks both faces share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from kvbaton.errors import InvalidRequestError, KvbatonError
from kvbaton.protocol import MAX_CACHE_SALT_CHARS, MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS
from kvbaton.sampling import MAX_BAD_WORDS
from services.gateway.backend import PromptToken, TokenEvent, TokenStream
from services.gateway.text.detokenizer import Detokenizer, StopStrings

# About a millisecond of tokenizing: above it the event loop is not kept waiting.
_MAX_CHARS_ON_LOOP = 16 * 1024

T = TypeVar("T")


class TextToken(msgspec.Struct, frozen=True):
    """One output token and the text it completes.

    `text` is empty while a character is incomplete or a stop string may have begun; the last token
    carries what was held back, and alone has a finish reason: "stop" or "length".
    """

    index: int
    token_id: int
    text: str
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: str | None
    worker: str = ""  # who made it


class TextOutput:
    """The text of one output, token by token, up to a stop string.

    The token that ends a text (eos, a stop token id) counts but has no text of its own, and a stop
    string is not shown, unless `include_stop`. Stop strings are looked for in what comes after the
    first `min_tokens` tokens.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self.num_tokens = 0
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop, is_shown=include_stop)
        self._min_tokens = min_tokens
        self._shows_end = include_stop

    def add(self, event: TokenEvent) -> TextToken:
        """The next token. After one with a finish reason there is none."""
        self.num_tokens += 1
        is_shown = self._shows_end or event.finish_reason != "stop"
        text = self._detokenizer.add(event.token_id) if is_shown else ""
        if event.finish_reason is not None:
            text += self._detokenizer.flush()
        if self.num_tokens > self._min_tokens:
            text = self._stop.add(text)
        finish_reason = event.finish_reason
        if self._stop.matched is not None:
            finish_reason = "stop"
        elif finish_reason is not None:
            text += self._stop.flush()
        return TextToken(
            index=event.index,
            token_id=event.token_id,
            text=text,
            logprob=event.logprob,
            top_logprobs=event.top_logprobs,
            finish_reason=finish_reason,
            worker=event.worker,
        )


class Generation:
    """One choice of one request: tokens in order, with their text, ended by stop strings."""

    def __init__(self, stream: TokenStream, output: TextOutput) -> None:
        """`output` has the tokens that come before those of the stream, if there are any."""
        self.stream = stream
        self._output = output
        self._events = aiter(stream)
        self._is_over = False

    @property
    def num_output_tokens(self) -> int:
        return self._output.num_tokens

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> TextToken:
        """One TextToken a token; raises what the stream raises."""
        if self._is_over:
            raise StopAsyncIteration
        try:
            event = await anext(self._events)
        except StopAsyncIteration:
            raise KvbatonError("the token stream ended before its last token") from None
        token = self._output.add(event)
        self._is_over = token.finish_reason is not None
        if token.finish_reason is not None and event.finish_reason is None:
            self.stream.timeline.finish_reason = token.finish_reason
            self.stream.cancel()
        return token

    def cancel(self) -> None:
        """Free what the request holds. Idempotent; not needed after the last token."""
        self.stream.cancel()


def prompt_logprobs(stream: TokenStream, prompt: Sequence[int]) -> list[PromptToken]:
    """Those of a stream that was asked for them and has given a token."""
    if len(stream.prompt_logprobs) != len(prompt) - 1:
        raise KvbatonError("the worker sent no log probabilities of the prompt")
    return stream.prompt_logprobs


def check_stop(stop: Sequence[str]) -> None:
    """Raise InvalidRequestError (stop) for too many, too long or empty stop strings."""
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"stop holds at most {MAX_STOP_STRINGS} strings, got {len(stop)}", field="stop"
        )
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
            raise InvalidRequestError(
                f"a stop string has 1 to {MAX_STOP_STRING_CHARS} characters, got {len(text)}",
                field="stop",
            )


def check_token_ids(token_ids: Iterable[int], vocab_size: int, *, field: str) -> None:
    """Raise InvalidRequestError (`field`) for an id that the model does not have."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{field} has token id {token_id}, the model's are 0 to {vocab_size - 1}",
                field=field,
            )


def bad_word_tokens(words: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """The sequences of tokens that no output holds, so that it has none of these words.

    As vLLM has it: a word as it stands, and with a blank before it where that makes it another
    word of as many tokens. Raises InvalidRequestError (bad_words).
    """
    if len(words) > MAX_BAD_WORDS // 2:
        raise InvalidRequestError(
            f"bad_words holds at most {MAX_BAD_WORDS // 2} words, got {len(words)}",
            field="bad_words",
        )
    found = []
    for word in words:
        bare = word.lstrip()
        if not 1 <= len(bare) <= MAX_STOP_STRING_CHARS:
            raise InvalidRequestError(
                f"a bad word has 1 to {MAX_STOP_STRING_CHARS} characters, got {len(bare)}",
                field="bad_words",
            )
        plain, spaced = encode(bare), encode(f" {bare}")
        found.append(plain)
        if spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return found


def check_cache_salt(salt: str | None) -> str:
    """The salt, "" for none. Raises InvalidRequestError (cache_salt) if it is empty or too long."""
    if salt is not None and not 1 <= len(salt) <= MAX_CACHE_SALT_CHARS:
        raise InvalidRequestError(
            f"cache_salt has 1 to {MAX_CACHE_SALT_CHARS} characters, got {len(salt)}",
            field="cache_salt",
        )
    return salt or ""


def check_prompt(
    prompt: Sequence[int], vocab_size: int, max_model_len: int | None, *, field: str = "prompt"
) -> None:
    """Raise InvalidRequestError for a prompt that is empty, has unknown ids or leaves no room."""
    if not prompt:
        raise InvalidRequestError(f"{field} is empty", field=field)
    if max_model_len is not None and len(prompt) >= max_model_len:
        raise InvalidRequestError(
            f"{field} has {len(prompt)} tokens, which leaves no room for output in the model's "
            f"context of {max_model_len} tokens",
            field=field,
        )
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{field} has token id {token_id}, the model's are 0 to {vocab_size - 1}",
                field=field,
            )


async def tokenize(num_chars: int, call: Callable[[], T]) -> T:
    """What `call` returns, from a thread when there is so much text that the loop would stall."""
    if num_chars <= _MAX_CHARS_ON_LOOP:
        return call()
    return await asyncio.to_thread(call)
