"""The tokens of one request, put in order: what a face reads and the dispatcher writes."""

from __future__ import annotations

import asyncio

from common.messages import OutputToken
from kvbaton.errors import KvbatonError
from services.gateway.backend import GenerationRequest, PromptToken, Timeline, TokenEvent


class RequestStream:
    """Implements backend.TokenStream. `tokens` is the output so far, without gaps."""

    def __init__(self, request: GenerationRequest, received_at: float) -> None:
        self.request = request
        self.request_id = request.request_id
        self.timeline = Timeline(received_at=received_at)
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[PromptToken] = []
        self._was_opened = False
        self.tokens = list(request.resumed)
        self.is_over = False
        self.task: asyncio.Task[None] | None = None  # serves the request
        self._early: dict[int, OutputToken] = {}  # came before one with a smaller index
        self._events: asyncio.Queue[TokenEvent | KvbatonError] = asyncio.Queue()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenEvent:
        event = await self._events.get()
        if isinstance(event, KvbatonError):
            raise event
        return event

    def cancel(self) -> None:
        """Free what the request holds anywhere in the cluster. Idempotent, never blocks."""
        if not self.is_over:
            self.is_over = True
            if self.task is not None:
                self.task.cancel()

    def opened(self, num_cached_tokens: int) -> None:
        """An attempt found so much of the prompt. What an earlier one had to compute, or a later
        one computes again, was not cached for this request."""
        num_cached_tokens = min(num_cached_tokens, len(self.request.prompt))  # not what was resumed
        if not self._was_opened or num_cached_tokens < self.num_cached_tokens:
            self.num_cached_tokens = num_cached_tokens
        self._was_opened = True

    def deliver(self, token: OutputToken) -> bool:
        """Take a token, in any order and any number of times. True once the last has come."""
        if token.index >= len(self.tokens):
            self._early[token.index] = token
        while not self.is_over and (next_token := self._early.pop(len(self.tokens), None)):
            self.tokens.append(next_token.token_id)
            self.is_over = next_token.finish_reason is not None
            self._events.put_nowait(
                TokenEvent(
                    index=next_token.index,
                    token_id=next_token.token_id,
                    logprob=next_token.logprob,
                    top_logprobs=tuple(next_token.top_logprobs),
                    finish_reason=next_token.finish_reason,
                )
            )
        return self.is_over

    def restart(self) -> None:
        """The request is placed again after `tokens`: what came early will come again."""
        self._early.clear()

    def give_up(self, error: KvbatonError) -> None:
        """As `cancel`, and the reader is told why."""
        if not self.is_over:
            self._events.put_nowait(error)
            self.cancel()

    def fail(self, error: KvbatonError) -> None:
        """The request cannot be finished."""
        if not self.is_over:
            self.is_over = True
            self._events.put_nowait(error)
