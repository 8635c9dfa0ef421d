"""OpenAI's own package in front of a model that says what a test tells it to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from openai import AsyncOpenAI
from pydantic import BaseModel

from services.gateway.backend import GenerationRequest
from services.gateway.http.face import HttpFace
from tests.unit.gateway_fakes import FakeBackend, demo_model, running_face, says

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
FLAT: Any = {"type": "function", "strict": True, **WEATHER["function"]}
HELLO: Any = [{"role": "user", "content": "How warm is it?"}]
PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome"}'
CALLS = (
    f'Let me see. <tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>'
)
FORCED = f'[{{"name":"get_weather","parameters":{PARIS}}}]'


class City(BaseModel):
    name: str
    population: int


class Talk:
    """A face whose model says `text`."""

    def __init__(self) -> None:
        self.text = "Hello"
        self.ending = True
        self.backend = FakeBackend(self._script)
        self.face: HttpFace

    def _script(self, _request: GenerationRequest) -> Any:
        return says(self.text, stops=self.ending)

    @property
    def last(self) -> GenerationRequest:
        return self.backend.requests[-1]

    @property
    def prompt(self) -> str:
        return demo_model().decode(self.last.prompt, skip_special_tokens=False)


@asynccontextmanager
async def talking() -> AsyncIterator[Talk]:
    talk = Talk()
    async with running_face(talk.backend) as talk.face:
        yield talk


@asynccontextmanager
async def asking(face: HttpFace) -> AsyncIterator[AsyncOpenAI]:
    url = f"http://127.0.0.1:{face.port}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client
