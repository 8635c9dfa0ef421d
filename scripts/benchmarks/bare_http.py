"""Servers to hold the gateway against, each a process of its own: python -m ...bare_http KIND PORT.

starlette: a bare application on uvicorn that streams constants. face: the gateway's own HTTP face
over a backend that only waits. Either sends a token every `--step-ms`; the face sends none for a
prompt that begins with IDLE.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from services.gateway.backend import GenerationRequest, TokenEvent
from tests.unit.gateway_fakes import FakeBackend, FakeStream, running_face

IDLE = 7  # a token id
_TOKEN = 100
_EVENT = b"data: " + json.dumps({
    "id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 0, "model": "demo",
    "choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None}],
}).encode() + b"\n\n"  # fmt: skip


def starlette(port: int, step_s: float) -> None:
    """Serve constants until killed."""

    async def events(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            if step_s:
                await asyncio.sleep(step_s)
            yield _EVENT
        yield b"data: [DONE]\n\n"

    async def complete(request: Request) -> Response:
        fields = json.loads(await request.body())
        return StreamingResponse(events(fields["max_tokens"]), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
    uvicorn.run(app, port=port, log_level="error", access_log=False, loop="uvloop")


class TimedBackend(FakeBackend):
    """Feeds each stream a token at a time."""

    def __init__(self, step_s: float) -> None:
        super().__init__()
        self._step_s = step_s
        self._feeding: set[asyncio.Task[None]] = set()

    def submit(self, request: GenerationRequest) -> FakeStream:
        stream = super().submit(request)
        self.requests.clear()
        self.streams.clear()
        if request.prompt[0] != IDLE:
            task = asyncio.create_task(self._feed(stream, request.sampling.max_tokens or 1))
            self._feeding.add(task)
            task.add_done_callback(self._feeding.discard)
        return stream

    async def _feed(self, stream: FakeStream, count: int) -> None:
        for index in range(count):
            await asyncio.sleep(self._step_s)
            finish_reason = "length" if index == count - 1 else None
            stream.feed([TokenEvent(index, _TOKEN, finish_reason=finish_reason)])


async def face(port: int, step_s: float) -> None:
    """Serve until killed."""
    async with running_face(TimedBackend(step_s), port=port, backlog=4096):
        await asyncio.Event().wait()


def main() -> None:
    """Serve as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["starlette", "face"])
    parser.add_argument("port", type=int)
    parser.add_argument("--step-ms", type=float, default=0.0)
    options = parser.parse_args()
    if options.kind == "starlette":
        starlette(options.port, options.step_ms / 1000)
    else:
        import uvloop

        uvloop.run(face(options.port, options.step_ms / 1000))


if __name__ == "__main__":
    main()
