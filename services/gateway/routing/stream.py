"""The tokens of one request, put in order: what a face reads and the dispatcher writes."""

from __future__ import annotations

import asyncio
from collections import deque

from common.messages import OutputToken
from common.scores import MAX_SCORES, unpack_scores
from kvbaton.errors import InvalidRequestError, KvbatonError
from services.gateway.backend import GenerationRequest, PromptToken, Timeline, TokenEvent
from services.gateway.routing.decision import Decision


class RequestStream:
    """Implements backend.TokenStream. `tokens` is the output so far, without gaps."""

    def __init__(self, request: GenerationRequest, received_at: float) -> None:
        self.request = request
        self.request_id = request.request_id
        self.timeline = Timeline(
            received_at=request.received_at or received_at,
            submitted_at=received_at,
            num_prompt_tokens=len(request.prompt),
            traceparent=request.traceparent,
        )
        self.num_cached_tokens = 0
        _check_prompt_logprobs(request)
        self.prompt_logprobs: list[PromptToken] = []
        self.cache_salt = request.cache_salt  # what the keys of its blocks begin with
        self.placement: Decision | None = None
        self._was_opened = False
        self.tokens = list(request.resumed)
        self.last_token_at = 0.0
        self.is_over = False
        self.task: asyncio.Task[None] | None = None  # serves the request
        self._early: dict[int, tuple[OutputToken, str]] = {}  # came before one with a smaller index
        self._events: deque[TokenEvent | KvbatonError] = deque()
        self._news: asyncio.Future[None] | None = None  # what the reader waits for

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._events:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        event = self._events.popleft()
        if isinstance(event, KvbatonError):
            raise event
        return event

    def cancel(self) -> None:
        """Free what the request holds anywhere in the cluster. Idempotent, never blocks."""
        if not self.is_over:
            self.is_over = True
            if self.task is not None:
                self.task.cancel()

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """Whether its prompt is still to be scored. Then nothing of it must be found, neither
        cached nor as an earlier attempt left it: only what is computed has logits."""
        is_wanted = self.request.sampling.prompt_logprobs is not None
        return is_wanted and len(self.prompt_logprobs) < len(self.request.prompt) - 1

    def take_scores(self, raw: bytes) -> None:
        """The prompt's log-probabilities (common/scores.py). Raises ValueError if they are not
        whole."""
        tokens = self.request.prompt[1:]
        rows = unpack_scores(raw, len(tokens))
        if [row[0][0] for row in rows] != tokens:
            raise ValueError("scores of another prompt")
        self.prompt_logprobs = [
            PromptToken(token_id, logprob, tuple(top)) for (token_id, logprob), *top in rows
        ]

    def opened(self, num_cached_tokens: int) -> None:
        """An attempt found so much of the prompt. What an earlier one had to compute, or a later
        one computes again, was not cached for this request."""
        num_cached_tokens = min(num_cached_tokens, len(self.request.prompt))  # not what was resumed
        if not self._was_opened or num_cached_tokens < self.num_cached_tokens:
            self.num_cached_tokens = num_cached_tokens
        self._was_opened = True

    def deliver(self, token: OutputToken, worker: str = "") -> bool:
        """Take a token that a worker made, in any order and any number of times. True once the
        last has come."""
        if token.index >= len(self.tokens):
            self._early[token.index] = token, worker
        while not self.is_over and (early := self._early.pop(len(self.tokens), None)):
            next_token, maker = early
            self.tokens.append(next_token.token_id)
            self.timeline.num_output_tokens += 1
            self.is_over = next_token.finish_reason is not None
            self.timeline.finish_reason = next_token.finish_reason or ""
            self._tell(
                TokenEvent(
                    index=next_token.index,
                    token_id=next_token.token_id,
                    logprob=next_token.logprob,
                    top_logprobs=tuple(next_token.top_logprobs),
                    finish_reason=next_token.finish_reason,
                    worker=maker,
                )
            )
        return self.is_over

    def restart(self) -> None:
        """The request is placed again after `tokens`: what came early will come again."""
        self._early.clear()

    def give_up(self, error: KvbatonError) -> None:
        """As `cancel`, and the reader is told why."""
        if not self.is_over:
            self._tell(error)
            self.timeline.error = error.code
            self.cancel()

    def fail(self, error: KvbatonError) -> None:
        """The request cannot be finished."""
        if not self.is_over:
            self.is_over = True
            self.timeline.error = error.code
            self._tell(error)

    def _tell(self, event: TokenEvent | KvbatonError) -> None:
        self._events.append(event)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


def _check_prompt_logprobs(request: GenerationRequest) -> None:
    """Raise InvalidRequestError where they are more than a message holds."""
    count = request.sampling.prompt_logprobs
    num_scores = 0 if count is None else (len(request.prompt) - 1) * (1 + count)
    if num_scores > MAX_SCORES:
        raise InvalidRequestError(
            f"prompt_logprobs {count} for a prompt of {len(request.prompt)} tokens is {num_scores} "
            f"log-probabilities, the limit is {MAX_SCORES}",
            field="prompt_logprobs",
        )
