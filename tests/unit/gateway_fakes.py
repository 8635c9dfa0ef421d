"""A backend that says what a test tells it to, and a running HTTP face in front of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

from common.seams import LiveClock
from common.service import Tasks
from services.gateway.backend import GenerationRequest, PromptToken, Timeline, TokenEvent
from services.gateway.http.face import HttpFace
from services.gateway.routing.decision import Decision
from services.gateway.text.model import TextModel

DEMO = Path(__file__).parents[2] / "models" / "demo"
EOS = 1

Script = Iterable[TokenEvent | Exception]


@cache
def demo_model() -> TextModel:
    return TextModel(DEMO)


def events(token_ids: Sequence[int], finish_reason: str = "length") -> list[TokenEvent]:
    """Each token with logprob -index-1, and the two next ids as less likely ones."""
    last = len(token_ids) - 1
    return [
        TokenEvent(
            index=index,
            token_id=token_id,
            logprob=-1.0 - index,
            top_logprobs=((token_id, -1.0 - index), (token_id + 1, -9.0)),
            finish_reason=finish_reason if index == last else None,
        )
        for index, token_id in enumerate(token_ids)
    ]


def looked_at(request: GenerationRequest) -> list[PromptToken]:
    """What a worker says of the prompt, if it is asked: each token half as likely as the last, and
    the next id as the likelier one."""
    count = request.sampling.prompt_logprobs
    if count is None:
        return []
    return [
        PromptToken(token_id, -index, ((token_id + 1, -0.1), (token_id, -index))[:count])
        for index, token_id in enumerate(request.prompt[1:], 1)
    ]


def says(text: str, *, stops: bool = False) -> list[TokenEvent]:
    """The events of an answer; with `stops`, eos follows it."""
    token_ids = demo_model().encode(text, add_special_tokens=False)
    return events([*token_ids, EOS], "stop") if stops else events(token_ids)


class FakeStream:
    """A TokenStream fed by the test."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request_id = request.request_id
        self.timeline = Timeline()
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[PromptToken] = []
        self.placement: Decision | None = None
        self.num_cancels = 0
        self.cancelled = asyncio.Event()
        self._events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()

    def feed(self, script: Script) -> None:
        for event in script:
            self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.finish_reason is not None:
                return

    def cancel(self) -> None:
        self.num_cancels += 1
        self.cancelled.set()


class FakeBackend:
    """Every request is answered by what `script` gives for it; without one it waits for feeding."""

    def __init__(self, script: Callable[[GenerationRequest], Script] | None = None) -> None:
        self.max_model_len: int | None = 2048
        self.ready = True
        self.script = script or (lambda _request: ())
        self.requests: list[GenerationRequest] = []
        self.streams: list[FakeStream] = []
        self.num_cached_tokens = 0
        self._grown = asyncio.Event()

    async def submitted(self, count: int = 1) -> None:
        """Returns when there were that many requests."""
        async with asyncio.timeout(10):
            while len(self.streams) < count:
                self._grown.clear()
                await self._grown.wait()

    def submit(self, request: GenerationRequest) -> FakeStream:
        script = list(self.script(request))
        if script and isinstance(script[0], RefusedError):
            raise script[0].error
        stream = FakeStream(request)
        stream.num_cached_tokens = self.num_cached_tokens
        stream.prompt_logprobs = looked_at(request)
        stream.feed(script)
        self.requests.append(request)
        self.streams.append(stream)
        self._grown.set()
        return stream

    def stats(self) -> dict[str, float]:
        return {"fake_requests": float(len(self.requests))}


class RefusedError(Exception):
    """As the first event of a script: submit itself raises `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class FakeRng:
    """Counts: the n-th id and the n-th seed are n."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._seeds = itertools.count(1)

    def new_id(self) -> str:
        return f"{next(self._ids):032x}"

    def new_seed(self) -> int:
        return next(self._seeds)


@asynccontextmanager
async def running_face(backend: FakeBackend, **options: Any) -> AsyncIterator[HttpFace]:
    """An HTTP face on a free port; a failure of its server fails the test."""
    common: dict[str, Any] = {"model": demo_model(), "rng": FakeRng(), "port": 0}
    options = {"clock": LiveClock(), **common, **options}
    failures: list[BaseException] = []
    tasks = Tasks(failures.append)
    face = HttpFace(backend, tasks=tasks, **options)
    await face.start()
    try:
        yield face
    finally:
        await face.close()
        await tasks.close()
    assert failures == []
