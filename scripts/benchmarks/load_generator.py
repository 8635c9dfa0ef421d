"""A load on an OpenAI endpoint, from a process of its own: python -m scripts.benchmarks.load_...

It reads a LoadSpec as JSON, runs it, and writes a line of JSON for each request as it ends, for
each burst, and at the end. It imports little and computes little: on a small machine it shares the
cores with the servers.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Coroutine, Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec

from scripts.benchmarks.arrivals import FIRST_TOKEN, Planned, mix_of, new_prompts, plan
from scripts.benchmarks.attainment import Outcome, Targets, most_missed
from scripts.benchmarks.http_streams import Reader, Streamed, request_bytes

_LEAD_S = 0.05  # before the first request


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask for, and when.

    With `rate` the `count` requests come at that many a second, whatever becomes of those before;
    without it `clients` ask one after the other or, with `is_burst`, all at once, again when all
    have their answers. `first_url`: a server that is asked for one token of each prompt before
    `url` is asked for all. `fields`: more fields of each request. With `targets` the load ends as
    soon as too many requests have missed them.
    """

    url: str
    mix: str
    vocab: int
    count: int
    rate: float = 0.0
    clients: int = 1
    is_burst: bool = False
    seed: int = 0
    first_url: str = ""
    fields: dict[str, Any] = msgspec.field(default_factory=dict)
    targets: Targets | None = None


class Burst(msgspec.Struct, frozen=True, tag=True):
    """Median gap between tokens while all streams of a burst were past their first token."""

    step_s: float


class End(msgspec.Struct, frozen=True, tag=True):
    """The load is over: after so many seconds, of which this process computed `cpu_s`.

    `is_lost`: it was ended early, as too many had missed their targets.
    """

    seconds: float
    cpu_s: float
    is_lost: bool


class _Load:
    def __init__(self, spec: LoadSpec) -> None:
        self._spec = spec
        mix = mix_of(spec.mix)
        self._plan = plan(mix, spec.count, spec.rate, spec.seed)
        prompts = new_prompts(self._plan, mix.shared, spec.vocab)
        self._requests = [
            request_bytes(prompt, each.num_output, temperature=0, **spec.fields)
            for prompt, each in zip(prompts, self._plan, strict=True)
        ]
        self._first_requests = [
            request_bytes(prompt, 1, temperature=0, **spec.fields)
            for prompt in (prompts if spec.first_url else ())
        ]
        # Whoever shares a prefix finds it cached, so that all requests of a load are alike.
        opening = [*prompts[0][: mix.shared], FIRST_TOKEN]
        self._opening = request_bytes(opening, 1, temperature=0, **spec.fields)
        self._has_opening = mix.shared > 0
        self._num_missed = 0
        self._lost = asyncio.Event()
        self._begun = 0.0

    async def run(self) -> None:
        """All of it, or until it is lost."""
        if self._has_opening:
            await self._stream(self._spec.url, self._opening, time.perf_counter())
        cpu_s = time.process_time()
        self._begun = time.perf_counter() + _LEAD_S
        await self._until_lost(self._open() if self._spec.rate else self._closed())
        now, cpu_s = time.perf_counter(), time.process_time() - cpu_s
        _tell(End(now - self._begun, cpu_s, self._lost.is_set()))

    async def _until_lost(self, work: Coroutine[Any, Any, None]) -> None:
        load, lost = asyncio.create_task(work), asyncio.create_task(self._lost.wait())
        await asyncio.wait((load, lost), return_when=asyncio.FIRST_COMPLETED)
        for task in (load, lost):
            task.cancel()
        for result in await asyncio.gather(load, lost, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def _open(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, planned in enumerate(self._plan):
                await asyncio.sleep(self._begun + planned.at - time.perf_counter())
                group.create_task(self._one(number, self._begun + planned.at))

    async def _closed(self) -> None:
        spec, numbers = self._spec, iter(range(self._spec.count))
        if not spec.is_burst:
            await asyncio.gather(*(self._client(numbers) for _ in range(spec.clients)))
            return
        for first in range(0, spec.count, spec.clients):
            now = time.perf_counter()
            burst = range(first, min(first + spec.clients, spec.count))
            found = await asyncio.gather(*(self._one(number, now) for number in burst))
            step_s = _step_s([each for each in found if each is not None])
            if step_s:
                _tell(Burst(step_s))

    async def _client(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            await self._one(number, time.perf_counter())

    async def _one(self, number: int, due: float) -> Streamed | None:
        """Ask, read, tell; None if there is no whole answer."""
        planned, spec = self._plan[number], self._spec
        at, late_s = due - self._begun, time.perf_counter() - due
        found: Streamed | None = None
        try:
            if spec.first_url:
                await self._stream(spec.first_url, self._first_requests[number], due)
            found = await self._stream(spec.url, self._requests[number], due)
            outcome = _outcome(found, planned, at, late_s)
        except (OSError, RuntimeError) as error:
            outcome = Outcome(at, late_s, error=str(error))
        _tell(outcome)
        if spec.targets is not None:
            self._num_missed += not outcome.meets(spec.targets)
            if self._num_missed > most_missed(spec.count, spec.targets.share):
                self._lost.set()
        return None if outcome.error else found

    @staticmethod
    async def _stream(url: str, request: bytes, due: float) -> Streamed:
        address = urlsplit(url)
        reader = Reader(address.port or 80, address.hostname or "127.0.0.1")
        await reader.open()
        try:
            await reader.ask(request)
            return await reader.read(due)
        finally:
            reader.close()


def _outcome(found: Streamed, planned: Planned, at: float, late_s: float) -> Outcome:
    if found.error or not found.is_full:
        error = found.error or f"it ended after {found.num_tokens} of {planned.num_output} tokens"
        return Outcome(at, late_s, error=error)
    times = found.token_times
    return Outcome(
        at,
        late_s,
        ttft_s=found.ttft,
        tpot_s=(times[-1] - times[0]) / max(1, planned.num_output - 1),
        worst_gap_s=max(found.gaps, default=0.0),
        e2e_s=times[-1] - found.asked_at,
        num_tokens=found.num_tokens,
    )


def _step_s(found: list[Streamed]) -> float:
    """See Burst; 0 if there was no such time."""
    begin = max((each.token_times[0] for each in found), default=0.0)
    end = min((each.token_times[-1] for each in found), default=0.0)
    gaps = [
        gap
        for each in found
        for gap, time_s in zip(each.gaps, each.token_times[1:], strict=True)
        if begin < time_s - gap and time_s <= end
    ]
    return statistics.median(gaps) if gaps else 0.0


def _tell(line: Outcome | Burst | End) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Run the load that standard input describes."""
    import uvloop

    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=LoadSpec)

    async def run() -> None:
        await _Load(spec).run()

    uvloop.run(run())


if __name__ == "__main__":
    main()
