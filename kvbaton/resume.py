"""One request across as many gateways as it takes. Pure: the time is passed in.

Sampling depends on the seed, the choice and the position alone: a gateway that is told the seed and
the tokens so far goes on as the one that was lost would have done. What that takes is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from kvbaton.errors import (
    ConnectionLostError,
    KvbatonError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
)
from kvbaton.protocol import Accepted, Generate, Resume, Resumed, Token, Tokens
from kvbaton.questions import Prompt, PromptToken
from kvbaton.request import encode_request
from kvbaton.retry import Retried
from kvbaton.session import Event

RESUME_S = 60.0

T = TypeVar("T", Token, PromptToken)


@dataclass(slots=True)
class _Choice:
    """What is known of one choice's output."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class ResumableRequest(Retried):
    """What a request's `sink` hears is one run: no token is missing or comes twice."""

    def __init__(self, message: Generate, sink: Callable[[Event], None]) -> None:
        """Raises UnprocessableError and TooLargeError for what cannot be sent."""
        super().__init__(message.id, sink)
        self._message = msgspec.structs.replace(message, resumable=True)
        self._raw = encode_request(self._message)  # until it is sent
        self._accepted: Accepted | None = None
        self._choices: dict[int, _Choice] = {}  # that have tokens
        self._num_prompt_tokens = 0  # of those that are sent back

    def encoded(self, now: float) -> bytes:
        deadline_ms = self._message.deadline_ms
        if self._raw:
            raw, self._raw = self._raw, b""
            self._begin_deadline(deadline_ms, now)
            return raw
        message = msgspec.structs.replace(
            self._message, deadline_ms=self._rest_of(deadline_ms, now)
        )
        return encode_request(message if self._accepted is None else self._going_on(message))

    def _take(self, event: Event) -> None:
        if isinstance(event, Accepted):
            self._accepted = event
        elif isinstance(event, Tokens):
            self._take_tokens(event)
        elif isinstance(event, Prompt):
            self._take_prompt(event)
        else:
            self.end(event)

    def _going_on(self, message: Generate) -> Generate:
        """The seed stands in both places: a gateway that does not know `resume` begins again, and
        with this seed gives the same."""
        assert self._accepted is not None
        seed = self._accepted.seed
        resume = Resume(request_id=self._accepted.request_id, seed=seed)
        outputs = [self._choices.get(index, _Choice()) for index in range(message.n)]
        if len(outputs) == 1:
            (only,) = outputs
            resume = msgspec.structs.replace(
                resume, tokens=only.tokens, finish_reason=only.finish_reason
            )
        else:
            choices = [
                Resumed(tokens=each.tokens, finish_reason=each.finish_reason) for each in outputs
            ]
            resume = msgspec.structs.replace(resume, choices=choices)
        return msgspec.structs.replace(
            message,
            sampling=msgspec.structs.replace(message.sampling, seed=seed),
            resume=resume,
        )

    def _may_go_on_after(self, error: KvbatonError) -> bool:
        """What was accepted once is not given up because there is much to do elsewhere. What has
        tokens but was not, by a gateway that does not know how, cannot go on."""
        if self._accepted is None and (self._choices or isinstance(error, OverloadedError)):
            return False
        return isinstance(error, ConnectionLostError | UnavailableError | OverloadedError)

    def _take_tokens(self, event: Tokens) -> None:
        number = event.tokens[0].choice if event.tokens else 0
        if not 0 <= number < self._message.n or any(each.choice != number for each in event.tokens):
            self.end(ProtocolError("the gateway sent tokens of a choice that was not asked for"))
            return
        choice = self._choices.get(number) or _Choice()
        new = self._following(event.tokens, len(choice.tokens), "token")
        if new:
            self._choices[number] = choice
            choice.tokens += [token.token_id for token in new]
            choice.finish_reason = event.finish_reason
            self._news()
            self._sink(msgspec.structs.replace(event, tokens=new))

    def _take_prompt(self, event: Prompt) -> None:
        new = self._following(event.tokens, self._num_prompt_tokens, "token of the prompt")
        if new:
            self._num_prompt_tokens += len(new)
            self._news()
            self._sink(msgspec.structs.replace(event, tokens=new))

    def _following(self, tokens: Sequence[T], num_known: int, what: str) -> list[T]:
        """Those that are new. If they leave one out it is over."""
        new = [token for token in tokens if token.index >= num_known]
        if [token.index for token in new] == list(range(num_known, num_known + len(new))):
            return new
        self.end(ProtocolError(f"{what} {num_known} was due, the gateway sent others"))
        return []
