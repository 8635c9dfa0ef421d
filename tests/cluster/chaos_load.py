"""What clients ask of a cluster under chaos, and what they must get: see chaos.py."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from kvbaton import AsyncClient
from kvbaton.errors import KvbatonError

DEADLINE_S = 60.0
NUM_REQUESTS = 40  # in the catalogue
_VOCAB_SIZE = 2048  # of the demo model
_FIRST_TOKEN = 5
_HTTP_PAUSE_S = 0.1  # before a request is repeated at another gateway
_RETRIED = (429, 500, 502, 503, 504)

# Of each token: its id (text over HTTP) and log-probabilities, which must be equal to the last bit.
Output = list[Any]


@dataclass(frozen=True)
class Request:
    """One of the catalogue: `number` is its place there."""

    number: int
    prompt: tuple[int, ...]
    options: dict[str, Any]
    is_http: bool


@dataclass
class Answer:
    """What came of a request, and when. `lost` says why it failed."""

    request: Request
    output: Output = field(default_factory=list)
    token_at: list[float] = field(default_factory=list)
    started_at: float = 0.0
    ended_at: float = 0.0
    num_attempts: int = 1  # as its gateway counts; 0 where it does not tell
    lost: str = ""

    def next_token_after(self, when: float) -> float | None:
        """The first token after a moment at which it was under way."""
        return next((at for at in self.token_at if at > when), None)


def catalogue() -> list[Request]:
    """Greedy and sampled ones, with penalties and without; half of the prompts begin alike."""
    rng = Random(20)
    common = [[_token(rng) for _ in range(90)] for _ in range(3)]
    made = []
    for number in range(NUM_REQUESTS):
        prompt = [_token(rng) for _ in range(rng.randrange(50, 200))]
        if number % 2:
            prompt = common[number % 3] + prompt
        options: dict[str, Any] = {
            "max_tokens": rng.randrange(20, 61),
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": 2,
        }
        if number % 3:
            options |= {
                "temperature": 0.9,
                "top_p": 0.9,
                "top_k": 50,
                "seed": rng.randrange(2**32),
                "repetition_penalty": 1.1,
                "frequency_penalty": 0.3,
                "presence_penalty": 0.2,
            }
        made.append(Request(number, tuple(prompt), options, is_http=number % 5 == 0))
    return made


def _token(rng: Random) -> int:
    return rng.randrange(_FIRST_TOKEN, _VOCAB_SIZE)


class Clients:
    """A client of the msgpack library, and one of HTTP that repeats what failed."""

    def __init__(self, endpoints: Sequence[str], base_urls: Sequence[str]) -> None:
        self._client = AsyncClient(endpoints)
        self._http = httpx.AsyncClient(timeout=DEADLINE_S)
        self._base_urls = base_urls

    async def close(self) -> None:
        await self._client.close()
        await self._http.aclose()

    async def answer(self, request: Request, key: str) -> Answer:
        """All of it. `key` is the request's Idempotency-Key."""
        answer = Answer(request, started_at=time.monotonic())
        try:
            async with asyncio.timeout(DEADLINE_S):
                if request.is_http:
                    await self._over_http(request, key, answer)
                else:
                    await self._over_msgpack(request, answer)
        except (KvbatonError, httpx.HTTPError, TimeoutError) as error:
            answer.lost = repr(error)
        answer.ended_at = time.monotonic()
        return answer

    async def _over_msgpack(self, request: Request, answer: Answer) -> None:
        stream = self._client.generate(token_ids=request.prompt, **request.options)
        indices = []
        async for token in stream:
            answer.token_at.append(time.monotonic())
            answer.output.append((token.token_id, token.text, token.logprob, token.top_logprobs))
            indices.append(token.index)
        if indices != list(range(request.options["max_tokens"])):
            answer.lost = f"indices {indices}"
        answer.num_attempts = stream.timings.num_attempts if stream.timings else 0

    async def _over_http(self, request: Request, key: str, answer: Answer) -> None:
        body = {"prompt": list(request.prompt), "stream": True, **request.options}
        failure: Exception | None = None
        for base_url in itertools.cycle(self._base_urls):
            answer.output.clear()  # the whole answer comes again
            try:
                async with self._http.stream(
                    "POST",
                    f"{base_url}/v1/completions",
                    json=body,
                    headers={"idempotency-key": key},
                ) as response:
                    if response.status_code not in _RETRIED:
                        response.raise_for_status()
                        if await _read(response, answer):
                            answer.num_attempts = 0
                            return
            except httpx.TransportError as error:
                failure = error
            await asyncio.sleep(_HTTP_PAUSE_S)
        raise failure or TimeoutError


async def _read(response: httpx.Response, answer: Answer) -> bool:
    """Whether the stream came to its end, and not to an error that may pass."""
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return True
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            return False
        for choice in chunk["choices"]:
            if logprobs := choice.get("logprobs"):
                columns = zip(
                    logprobs["tokens"],
                    logprobs["token_logprobs"],
                    logprobs["top_logprobs"],
                    strict=True,
                )
                tokens = list(columns)
                # A repeated answer brings again what had come: only what is new counts as progress.
                num_new = len(answer.output) + len(tokens) - len(answer.token_at)
                answer.token_at += [time.monotonic()] * max(0, num_new)
                answer.output += tokens
    return False
