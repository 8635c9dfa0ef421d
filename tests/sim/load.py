"""Clients of a simulated cluster: prompts that share beginnings, conversations, cancels, deadlines.

Each client keeps its own chance, so that what one meets changes nothing of what another wants.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import numpy as np

from common.engine.mock import _FIRST_TOKEN, _WORDS, MOCK_VOCAB_SIZE, _kv, _mix, mock_output
from kvbaton.errors import (
    ConnectionLostError,
    DeadlineError,
    KvbatonError,
    OverloadedError,
    UnavailableError,
)
from services.gateway.stream import RequestStream
from tests.sim.cluster import SimCluster, SimGateway
from tests.sim.trace import Trace

MOST_TOKENS = 180  # of a conversation, so that each fits the smallest pool
REFUSALS = (UnavailableError, OverloadedError, ConnectionLostError, DeadlineError)
_PAUSE_S = 0.25  # after a refusal


class Clients:
    """Ask until `num_requests` were made and `is_enough` is set. `outcomes` counts what became of
    the requests, `broken` says which were served wrongly."""

    def __init__(self, cluster: SimCluster, trace: Trace, seed: int, num_requests: int) -> None:
        self.is_enough = False
        self.num_requests = 0
        self.outcomes: Counter[str] = Counter()
        self.broken: list[str] = []
        self._cluster = cluster
        self._trace = trace
        self._seed = seed
        self._num_wanted = num_requests
        rng = random.Random(f"{seed} prefixes")
        self._prefixes = [_tokens(rng, length) for length in (16, 33, 64)]

    async def run(self, num_clients: int) -> None:
        """All clients, until they are done."""
        await asyncio.gather(*(self._client(index) for index in range(num_clients)))

    async def _client(self, index: int) -> None:
        rng = random.Random(f"{self._seed} client {index}")
        history: list[int] = []
        while self.num_requests < self._num_wanted or not self.is_enough:
            # Once enough was asked only the faults still need somebody to strike.
            await asyncio.sleep(rng.uniform(0, 2 if self.num_requests >= self._num_wanted else 0.3))
            prompt = self._prompt(rng, history)
            gateways = self._cluster.gateways
            if gateways:
                answer = await self.ask(rng, gateways[rng.randrange(len(gateways))], prompt)
                history = [*prompt, *answer] if answer else []
            else:
                await asyncio.sleep(_PAUSE_S)

    def _prompt(self, rng: random.Random, history: list[int]) -> list[int]:
        if history and len(history) < MOST_TOKENS - 60 and rng.random() < 0.6:
            return history + _tokens(rng, rng.randrange(1, 20))
        prefix = rng.choice([*self._prefixes, []])
        return prefix + _tokens(rng, rng.randrange(1, 60))

    async def ask(self, rng: random.Random, gateway: SimGateway, prompt: list[int]) -> list[int]:
        """One request, which may be cancelled, or must be done in time. Returns a whole answer."""
        self.num_requests += 1
        name = f"request {self.num_requests}"
        num_tokens = rng.randrange(1, 28)
        deadline_s = rng.uniform(0.02, 2.0) if rng.random() < 0.1 else None
        cancel_after_s = rng.choice([rng.uniform(0, 0.05), rng.uniform(0, 0.6)])
        is_cancelled = rng.random() < 0.2
        try:
            stream = self._cluster.submit(
                prompt, num_tokens, deadline_s=deadline_s, gateway=gateway
            )
        except KvbatonError as error:
            self._refused(name, error)
            await asyncio.sleep(_PAUSE_S)
            return []
        if is_cancelled:
            try:
                async with asyncio.timeout(cancel_after_s):
                    return await self._answer(name, stream, prompt, num_tokens)
            except TimeoutError:
                stream.cancel()
                self._check(name, prompt, stream.tokens)
                self._end(name, "cancelled", f"after {len(stream.tokens)} tokens")
                return []
        return await self._answer(name, stream, prompt, num_tokens)

    async def _answer(
        self, name: str, stream: RequestStream, prompt: list[int], num_tokens: int
    ) -> list[int]:
        tokens: list[int] = []
        try:
            async for event in stream:
                tokens.append(event.token_id)
                if event.finish_reason is not None:
                    break
        except KvbatonError as error:
            self._check(name, prompt, tokens)
            self._refused(name, error)
            return []
        if len(tokens) != num_tokens:
            self.broken.append(f"{name}: {len(tokens)} tokens instead of {num_tokens}")
        self._check(name, prompt, tokens)
        self._end(name, "answered", f"{len(tokens)} tokens, {stream.timeline.num_attempts} tries")
        return tokens

    def _check(self, name: str, prompt: list[int], tokens: list[int]) -> None:
        if not mock_agrees(prompt, tokens):
            expected = mock_output(prompt, len(tokens))
            first = next(i for i, token in enumerate(tokens) if token != expected[i])
            self.broken.append(f"{name}: token {first} of {len(tokens)} is wrong")

    def _refused(self, name: str, error: KvbatonError) -> None:
        if not isinstance(error, REFUSALS):
            self.broken.append(f"{name}: {error.code}: {error.message}")
        self._end(name, "refused", f"{error.code}: {error.message}")

    def _end(self, name: str, outcome: str, detail: str) -> None:
        self.outcomes[outcome] += 1
        self._trace.note(f"{name} {outcome}: {detail}")


def mock_agrees(prompt: list[int], output: list[int]) -> bool:
    """Whether `output` is mock_output of the prompt, much faster than by computing that."""
    if not output:
        return True
    words = _kv([*prompt, *output[:-1]], 0) * np.uint64(_WORDS)
    weights = _mix(np.arange(1, len(words) + 1, dtype=np.uint64)) | np.uint64(1)
    totals = np.cumsum(words * weights, dtype=np.uint64)[len(prompt) - 1 :]
    tokens = _FIRST_TOKEN + _mix(totals) % np.uint64(MOCK_VOCAB_SIZE - _FIRST_TOKEN)
    return bool((tokens == np.asarray(output, dtype=np.uint64)).all())


def _tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(5, 2000) for _ in range(length)]
