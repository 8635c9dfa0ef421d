"""A conversation's way from a request's fields to the job that continues it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from starlette.requests import Request

from common.seams import Rng
from services.gateway.http.openai import params
from services.gateway.http.openai.chat import ChatShow, ChatView
from services.gateway.http.openai.choices import Choices, Job
from services.gateway.http.openai.grammars import Grammars
from services.gateway.http.openai.intake import Intake
from services.gateway.http.openai.logprobs import TokenNames
from services.gateway.http.openai.prompts import parse_messages
from services.gateway.http.openai.schema import ChatRequest
from services.gateway.http.openai.tools.request import ToolUse, parse_tools, wanted_structure
from services.gateway.http.openai.tools.view import ToolView
from services.gateway.text.model import TextModel


@dataclass(frozen=True, slots=True)
class Chat:
    """A checked chat request."""

    job: Job
    show: ChatShow
    tools: ToolUse | None

    def view(self, choices: Choices, names: TokenNames) -> ChatView:
        """How its answers are shown."""
        if self.tools is None:
            return ChatView(choices, self.show, names)
        return ToolView(choices, self.show, names, self.tools, self.job.rng.new_id())


class Chats:
    """Reads chat requests."""

    def __init__(self, intake: Intake, model: TextModel, grammars: Grammars) -> None:
        self._intake = intake
        self._model = model
        self._grammars = grammars

    async def read(
        self, request: Request, fields: ChatRequest, *, rng: Rng, received_at: float
    ) -> Chat:
        """Raises what is wrong with it: InvalidRequestError, OverloadedError."""
        max_tokens = params.most_tokens(fields)
        params.num_choices(fields, 1)
        tools = parse_tools(fields, self._model.tool_format)
        source = wanted_structure(fields, tools)
        sampling = await self._intake.sampling(
            fields,
            max_tokens=max_tokens,
            logprobs=params.chat_logprobs(fields),
            prompt_logprobs=params.prompt_logprobs(fields),
            grammar="" if source is None else await self._grammars.compile(source),
        )
        messages = parse_messages(fields.messages)
        options = {} if tools is None else {"tools": tools.for_template()}
        prompt = await self._intake.conversation(fields, messages, max_tokens, **options)
        show = ChatShow(
            logprobs=bool(fields.logprobs),
            prompt_logprobs=sampling.prompt_logprobs,
            echo=params.echoed(fields, messages),
            token_ids=bool(fields.return_token_ids),
        )
        if tools is not None and tools.shows_special_tokens:
            fields = msgspec.structs.replace(fields, skip_special_tokens=False)
        job = self._intake.job(
            request, fields, [prompt], sampling, rng=rng, received_at=received_at
        )
        return Chat(job, show, tools)
