"""Seeded chaos on real processes: whatever befalls one, no request notices but by the clock.

Requests of a catalogue run against two gateways, a store, two prefill and two decode workers with
the demo model. The oracle is what the same requests gave on the same cluster undisturbed: tokens,
text and log-probabilities are equal bit for bit. See docs/chaos.md.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from kvbaton.ask import audit
from kvbaton.errors import KvbatonError
from kvbaton.protocol import Audited
from tests.cluster.chaos_faults import COUNTS, DEEDS, KINDS, POLL_S, Chaotic, Kind
from tests.cluster.chaos_load import Answer, Clients, Output, catalogue
from tests.cluster.processes import Cluster

ADMIN_KEY = "only the operators of this cluster know it"
SECONDS_PER_SEED = 4.0
SETTLE_S = 10.0
RECENT_S = 0.5  # a stream that had a token so shortly before was running
_WORKER = {"batch_invariant": "true", "max_num_seqs": 16}


@dataclass
class Strike:
    """A fault, and when it began."""

    kind: Kind
    name: str
    at: float


@dataclass
class Report:
    """What one seed came to. `broken` lists what must not be."""

    seed: int
    num_requests: int = 0
    strikes: list[Strike] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    took_s: float = 0.0

    def line(self) -> str:
        """One line for people."""
        verdict = f"BROKEN ({len(self.broken)})" if self.broken else "ok"
        faults = ", ".join(f"{each.kind} {each.name}" for each in self.strikes)
        return (
            f"seed {self.seed}: {verdict}, {self.num_requests} requests, "
            f"{faults}, {self.took_s:.1f} s"
        )


class Session:
    """A cluster under chaos, and what its requests must give."""

    def __init__(self, chaotic: Chaotic, clients: Clients) -> None:
        self.chaotic = chaotic
        self._clients = clients
        self._requests = catalogue()
        self._expected: dict[int, Output] = {}

    async def learn(self) -> None:
        """Let every request of the catalogue run undisturbed."""
        answers = await asyncio.gather(
            *(self._clients.answer(each, f"oracle-{each.number}") for each in self._requests)
        )
        for answer in answers:
            assert not answer.lost, f"{answer.lost}\n{self.chaotic.cluster.logs()}"
            self._expected[answer.request.number] = answer.output

    async def run(self, seed: int, kinds: Sequence[Kind], seconds: float) -> Report:
        """Load for so long, with a fault of one of these kinds at a moment that the seed gives."""
        rng, report = Random(seed), Report(seed)
        num_callers = rng.randrange(8, 17)
        is_over = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, is_over.set)
        harm = self._strike(rng, kinds, seconds, report)
        return await self._under_load(report, num_callers, harm, is_over)

    async def replace_all(self, names: Sequence[str], pause_s: float) -> Report:
        """Drain and replace these processes one by one, under load."""
        report, is_over = Report(seed=0), asyncio.Event()

        async def replace() -> None:
            for name in names:
                await asyncio.sleep(pause_s)
                kind = KINDS[f"{name.partition('.')[0]}-drain"]
                report.strikes.append(Strike(kind, name, time.monotonic()))
                await DEEDS[kind.deed](self.chaotic, name)
                await self.chaotic.ready()
            is_over.set()

        return await self._under_load(report, 8, replace(), is_over)

    async def _under_load(
        self, report: Report, num_callers: int, harm: Coroutine[Any, Any, None], over: asyncio.Event
    ) -> Report:
        started_at = time.monotonic()
        answers: list[Answer] = []
        async with asyncio.TaskGroup() as group:
            for caller in range(num_callers):
                choices = Random(f"{report.seed}/{caller}")
                key = f"{report.seed}-{caller}"
                group.create_task(self._call(choices, key, over, answers))
            group.create_task(harm)
        await self.chaotic.ready()
        report.num_requests = len(answers)
        report.broken += [self._differs(each) for each in answers if self._differs(each)]
        report.broken += await self._unsettled()
        report.recoveries = recoveries(answers, report.strikes)
        report.took_s = time.monotonic() - started_at
        return report

    async def _call(
        self, rng: Random, key: str, over: asyncio.Event, answers: list[Answer]
    ) -> None:
        count = 0
        while not over.is_set():
            request = rng.choice(self._requests)
            answers.append(await self._clients.answer(request, f"{key}-{count}"))
            count += 1

    async def _strike(
        self, rng: Random, kinds: Sequence[Kind], seconds: float, report: Report
    ) -> None:
        await asyncio.sleep(rng.uniform(0.1, 0.5) * seconds)
        kind = rng.choice(list(kinds))
        name = f"{kind.role}.{rng.randrange(1, COUNTS[kind.role] + 1)}"
        report.strikes.append(Strike(kind, name, time.monotonic()))
        await DEEDS[kind.deed](self.chaotic, name)

    def _differs(self, answer: Answer) -> str:
        request = answer.request
        what = f"request {request.number} ({'HTTP' if request.is_http else 'msgpack'})"
        if answer.lost:
            return f"{what} was lost: {answer.lost}"
        expected = self._expected[request.number]
        if answer.output == expected:
            return ""
        pairs = enumerate(zip(answer.output, expected, strict=False))
        index = next((i for i, (got, want) in pairs if got != want), "the end")
        return f"{what} differs from the undisturbed run from token {index} on"

    async def _unsettled(self) -> list[str]:
        """What the audit says when all is over: nothing, if the books close and nothing is held."""
        deadline = time.monotonic() + SETTLE_S
        while wrong := await self._audit():
            if time.monotonic() > deadline:
                return wrong
            await asyncio.sleep(POLL_S)
        return []

    async def _audit(self) -> list[str]:
        try:
            answer = await asyncio.to_thread(audit, self.chaotic.endpoints[0], ADMIN_KEY)
        except KvbatonError as error:
            return [f"the audit: {error!r}"]
        return held(answer)


def held(answer: Audited) -> list[str]:
    """What does not add up, or is still somebody's."""
    wrong = [] if answer.closes else ["the audit does not close"]
    for store in answer.stores:
        wrong += [*store.discrepancies, *([store.problem] if store.problem else [])]
        wrong += [f"handoffs {state}: {count}" for state, count in store.handoffs.items() if count]
        wrong += [
            f"blocks {state}: {store.blocks[state]}"
            for state in ("committed", "quarantined")
            if store.blocks.get(state)
        ]
    return wrong


def recoveries(answers: Iterable[Answer], strikes: Iterable[Strike]) -> dict[str, list[float]]:
    """Seconds from each fault to the next new token of the requests that it hit, by its kind.

    A request was hit if it was running and was placed again. Store and gateways hit all that run.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for strike in strikes:
        for answer in answers:
            if not answer.started_at < strike.at < answer.ended_at:
                continue
            is_worker = strike.kind.role in ("prefill", "decode")
            if is_worker and answer.num_attempts < 2:
                continue
            is_running = any(strike.at - RECENT_S < at <= strike.at for at in answer.token_at)
            came_at = answer.next_token_after(strike.at)
            if came_at is not None and (is_running or strike.kind.role == "prefill"):
                found[str(strike.kind)].append(came_at - strike.at)
    return found


def table(reports: Iterable[Report]) -> list[str]:
    """Recovery by kind of fault: how many, p50, p99 and the longest, in milliseconds."""
    times: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for report in reports:
        for strike in report.strikes:
            counts[str(strike.kind)] += 1
        for kind, values in report.recoveries.items():
            times[kind] += values
    lines = [f"{'fault':<16}{'faults':>7}{'hit':>7}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}"]
    for kind in sorted(counts):
        values = sorted(times[kind])
        figures = [_quantile(values, q) for q in (0.5, 0.99, 1.0)]
        shown = "".join(f"{value * 1000:>9.0f}" for value in figures if value is not None)
        lines.append(f"{kind:<16}{counts[kind]:>7}{len(values):>7}{shown}")
    return lines


def _quantile(values: Sequence[float], q: float) -> float | None:
    return values[max(0, math.ceil(q * len(values)) - 1)] if values else None


def kinds_of(names: str) -> list[Kind]:
    """From "decode-kill,prefill-kill". Raises KeyError."""
    return [KINDS[name] for name in names.split(",")]


@asynccontextmanager
async def session(folder: Path, worker: dict[str, Any] | None = None) -> AsyncIterator[Session]:
    """A cluster that is ready and has told what its answers are. It ends in order or that fails."""
    key_file = folder / "admin.key"
    key_file.touch(mode=0o600)
    key_file.write_text(ADMIN_KEY)
    with Cluster(folder) as cluster:
        chaotic = Chaotic(cluster, _WORKER | (worker or {}), {"admin_key_file": key_file})
        chaotic.start_all()
        await chaotic.ready()
        clients = Clients(chaotic.endpoints, chaotic.base_urls)
        try:
            made = Session(chaotic, clients)
            await made.learn()
            yield made
        finally:
            await clients.close()
