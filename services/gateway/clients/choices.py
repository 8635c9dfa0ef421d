"""The choices of a msgpack client's request: begun, or gone on with, read as they come, counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import msgspec

from kvbaton.conversation import FunctionCall, ToolCall
from kvbaton.protocol import FinishedChoice, Usage
from services.gateway.backend import PromptToken, TokenStream
from services.gateway.clients.plan import Means, Plan
from services.gateway.clients.resumption import take_in
from services.gateway.text.generation import Generation, TextOutput, TextToken, prompt_logprobs
from services.gateway.text.merged import Merged


class Choice:
    """One output: its text and, where there are tools, the calls of them that it has."""

    def __init__(self, plan: Plan, number: int, means: Means) -> None:
        self.finish_reason: str | None = None
        self.tokens: list[TextToken] = []  # kept where the best choices are to be found
        self.output = TextOutput(
            means.model.detokenizer(skip_special_tokens=plan.skip_special_tokens),
            plan.stop,
            min_tokens=plan.like.sampling.min_tokens,
            include_stop=plan.include_stop,
        )
        self._tools = plan.tools
        self._id_base = f"{plan.like.request_id}/{number}"
        self._texts: list[str] = []  # kept where there are tools

    def take(self, text: str, finish_reason: str | None) -> None:
        """The next piece of its text."""
        self.finish_reason = finish_reason
        if self._tools is not None:
            self._texts.append(text)

    def finished(self) -> FinishedChoice:
        """How it ended."""
        ended = FinishedChoice(
            finish_reason=self.finish_reason or "", num_output_tokens=self.output.num_tokens
        )
        if self._tools is None:
            return ended
        found = self._tools.heard(self._id_base).add("".join(self._texts), is_last=True)
        calls = [
            ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in found.calls
        ]
        # A call that the client itself has named ends with "stop", as at the HTTP API.
        is_called = bool(calls) and ended.finish_reason == "stop" and not self._tools.named
        return msgspec.structs.replace(
            ended,
            finish_reason="tool_calls" if is_called else ended.finish_reason,
            content=found.content,
            tool_calls=calls,
        )


class Choices:
    """All of them. `begin` comes first, and `close` must be called.

    The first is submitted at once, the others with its first token: then the prompt is computed,
    and they find it cached. Those that go on have found it before.
    """

    def __init__(self, plan: Plan, means: Means) -> None:
        self.all = [Choice(plan, number, means) for number in range(plan.best_of)]
        self.first: Generation | None = None  # that was submitted
        self._plan = plan
        self._backend = means.backend
        self._open: list[int] = []
        self._merged = Merged(0)

    async def begin(self) -> None:
        """Take in what clients have, and submit what is not finished with that. Raises what
        Backend.submit raises, and InvalidRequestError (resume.tokens)."""
        plan = self._plan
        for choice, resumed in zip(self.all, plan.resumed, strict=True):
            text, reason = await take_in(resumed, choice.output, plan.like.sampling, plan.most)
            choice.take(text, reason)
        self._open = [number for number, each in enumerate(self.all) if each.finish_reason is None]
        if not self._open:
            return
        self._merged = Merged(len(self._open))
        self.first = self._submit(self._open[0])
        if any(each.tokens for each in plan.resumed):
            self._submit_rest()

    @property
    def stream(self) -> TokenStream | None:
        """That of the first choice that was not finished before."""
        return None if self.first is None else self.first.stream

    @property
    def prompt_logprobs(self) -> list[PromptToken]:
        """Those of the prompt, once there is a token; none if they were not asked for."""
        like = self._plan.like
        if self.stream is None or like.sampling.prompt_logprobs is None:
            return []
        return prompt_logprobs(self.stream, like.prompt)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TextToken]:
        """The next token of any choice, and that choice's number."""
        if len(self.all) == 1 and self.first is not None:
            number, token = 0, await anext(self.first)
        else:
            number, token = await anext(self._merged)
            self._submit_rest()
        self.all[number].take(token.text, token.finish_reason)
        return number, token

    def _submit(self, number: int) -> Generation:
        plan = self._plan
        sampling = plan.like.sampling
        if number != self._open[0]:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        request_id = plan.like.request_id
        stream = self._backend.submit(
            replace(
                plan.like,
                request_id=f"{request_id}#{number}" if number else request_id,
                sampling=sampling,
                choice=number,
                resumed=tuple(plan.resumed[number].tokens),
            )
        )
        generation = Generation(stream, self.all[number].output)
        if len(self.all) > 1:
            self._merged.add(number, generation)
        return generation

    def _submit_rest(self) -> None:
        """Does nothing the second time."""
        rest, self._open = self._open[1:], self._open[:1]
        for number in rest:
            self._submit(number)

    def usage(self) -> Usage:
        """The counts."""
        return Usage(
            num_prompt_tokens=len(self._plan.like.prompt),
            num_output_tokens=sum(each.output.num_tokens for each in self.all),
            num_cached_tokens=0 if self.stream is None else self.stream.num_cached_tokens,
        )

    async def close(self) -> None:
        """Cancel what still runs."""
        if self.first is not None:
            self.first.cancel()
        await self._merged.close()
