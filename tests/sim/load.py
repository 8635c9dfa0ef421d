"""Clients of a simulated cluster: prompts that share beginnings, conversations, cancels, deadlines.

Each client keeps its own chance, so that what one meets changes nothing of what another wants.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import numpy as np

from common.engine.mock import _FIRST_TOKEN, _WORDS, MOCK_VOCAB_SIZE, _kv, _mix, mock_output
from kvbaton.errors import (
    ConnectionLostError,
    DeadlineError,
    KvbatonError,
    OverloadedError,
    UnavailableError,
)
from kvbaton.protocol import Generate
from kvbaton.sampling import SamplingParams
from tests.sim.client import PING_S, Call
from tests.sim.cluster import SimCluster
from tests.sim.loop import virtual_loop
from tests.sim.trace import Trace

MOST_TOKENS = 180  # of a conversation, so that each fits the smallest pool
REFUSALS = (UnavailableError, OverloadedError, ConnectionLostError, DeadlineError)
_HTTP_SHARE = 0.4  # of the requests, whose client does not go on at another gateway
_PAUSE_S = 0.25  # after a refusal


class Clients:
    """Ask until `num_requests` were made and `is_enough` is set. `outcomes` counts what became of
    the requests, `broken` says which were served wrongly.

    `must_finish`: an admitted request may not fail, unless it is a HTTP client's and its gateway
    is gone. There are no deadlines then.
    """

    def __init__(
        self,
        cluster: SimCluster,
        trace: Trace,
        seed: int,
        num_requests: int,
        *,
        must_finish: bool,
        heard: Callable[[str], None],
        ended: Callable[[str], None],
    ) -> None:
        """`heard(request_id)` is called with each new token, `ended(request_id)` after the last."""
        self.is_enough = False
        self.num_requests = 0
        self.num_resumed = 0
        self.last_done_at = 0.0
        self.outcomes: Counter[str] = Counter()
        self.broken: list[str] = []
        self.calls: dict[str, Call] = {}  # in flight, by request id
        self._cluster = cluster
        self._trace = trace
        self._seed = seed
        self._num_wanted = num_requests
        self._must_finish = must_finish
        self._heard = heard
        self._ended = ended
        rng = random.Random(f"{seed} prefixes")
        self._prefixes = [_tokens(rng, length) for length in (16, 33, 64)]

    async def run(self, num_clients: int) -> None:
        """All clients, until they are done."""
        pings = asyncio.ensure_future(self._ping())
        try:
            await asyncio.gather(*(self._client(index) for index in range(num_clients)))
        finally:
            pings.cancel()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            for call in self.calls.values():
                call.ping()

    async def _client(self, index: int) -> None:
        rng = random.Random(f"{self._seed} client {index}")
        history: list[int] = []
        while self.num_requests < self._num_wanted or not self.is_enough:
            # Once enough was asked only the faults still need somebody to strike.
            await asyncio.sleep(rng.uniform(0, 2 if self.num_requests >= self._num_wanted else 0.3))
            prompt = self._prompt(rng, history)
            answer = await self.ask(rng, prompt)
            history = [*prompt, *answer] if answer else []

    def _prompt(self, rng: random.Random, history: list[int]) -> list[int]:
        if history and len(history) < MOST_TOKENS - 60 and rng.random() < 0.6:
            return history + _tokens(rng, rng.randrange(1, 20))
        prefix = rng.choice([*self._prefixes, []])
        return prefix + _tokens(rng, rng.randrange(1, 60))

    async def ask(self, rng: random.Random, prompt: list[int]) -> list[int]:
        """One request, which may be cancelled, or must be done in time. Returns a whole answer."""
        self.num_requests += 1
        num_tokens = rng.randrange(1, 28)
        deadline_s = rng.uniform(0.02, 2.0) if rng.random() < 0.1 else None
        soon_s = rng.choice([rng.uniform(0, 0.05), rng.uniform(0, 0.6)])
        cancel_after_s = soon_s if rng.random() < 0.2 else None
        message = Generate(
            id=self.num_requests,
            token_ids=prompt,
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0),
            deadline_ms=None if deadline_s is None or self._must_finish else int(deadline_s * 1000),
        )
        is_resumable = rng.random() >= _HTTP_SHARE
        call = Call(self._cluster, message, rng=rng, is_resumable=is_resumable, heard=self._heard)
        self.calls[call.request_id] = call
        try:
            async with asyncio.timeout(cancel_after_s):
                await call.run()
        except TimeoutError:
            self._end(call, "cancelled", f"after {len(call.tokens)} tokens")
        else:
            await self._done(call, num_tokens)
        finally:
            del self.calls[call.request_id]
            self._ended(call.request_id)
            self.num_resumed += call.num_gateways > 1 and bool(call.tokens)
        self._check(call, prompt)
        return call.tokens if len(call.tokens) == num_tokens else []

    async def _done(self, call: Call, num_tokens: int) -> None:
        if call.error is not None:
            self._refused(call, call.error)
            await asyncio.sleep(_PAUSE_S)
            return
        if len(call.tokens) != num_tokens:
            self.broken.append(
                f"{call.request_id}: {len(call.tokens)} tokens instead of {num_tokens}"
            )
        self._end(call, "answered", f"{len(call.tokens)} tokens, {call.num_gateways} gateways")

    def _check(self, call: Call, prompt: list[int]) -> None:
        if call.broken:
            self.broken.append(f"{call.request_id}: {call.broken}")
        if not mock_agrees(prompt, call.tokens):
            expected = mock_output(prompt, len(call.tokens))
            first = next(i for i, token in enumerate(call.tokens) if token != expected[i])
            self.broken.append(f"{call.request_id}: token {first} of {len(call.tokens)} is wrong")

    def _refused(self, call: Call, error: KvbatonError) -> None:
        lost_its_gateway = call.gateway is not None and not self._cluster.is_alive(call.gateway)
        may_fail = (
            not self._must_finish
            or not call.was_admitted
            or (not call.is_resumable and lost_its_gateway)
        )
        if not isinstance(error, REFUSALS) or not may_fail:
            self.broken.append(f"{call.request_id}: {error.code}: {error.message}")
        self._end(
            call, "failed" if call.was_admitted else "refused", f"{error.code}: {error.message}"
        )

    def _end(self, call: Call, outcome: str, detail: str) -> None:
        self.outcomes[outcome] += 1
        self.last_done_at = virtual_loop().time()
        self._trace.note(f"{call.request_id} {outcome}: {detail}")


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
