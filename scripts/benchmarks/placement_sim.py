"""A cluster of prefill and decode workers on virtual time, and the policies that place a trace's
requests in it, for `scripts/bench placement`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush

from common.step_times import StepTimes, due_at
from common.worker.sequence import Sequence as Prompt
from scripts.benchmarks.latency import TOKEN_BYTES, opt_66b
from scripts.benchmarks.placement_workers import BLOCK_SIZE, DecodeSim, Job, Lru, PrefillSim
from scripts.benchmarks.trace import Arrival
from services.gateway.routing.candidates import Candidate, Wanted
from services.gateway.routing.estimates import GUESSED_PROMPT_STEPS, resolved
from services.gateway.routing.line import Line
from services.gateway.routing.placement import choose
from services.gateway.routing.prefixes import PrefixIndex

_RUN_UP_S = 0.5  # as in services/gateway/routing/placer.py
_RUN_UP_REQUESTS = 2
_MAX_NUM_SEQS = 256
_END_S = 1e6  # when all is over


@dataclass(frozen=True, slots=True)
class Cluster:
    """How many workers, what each one's host remembers, and how fast blocks come to it."""

    num_prefill: int = 8
    num_decode: int = 8
    num_blocks: int = 6000  # of 512 tokens: 1 TB on each host
    bytes_per_s: float = 12.5e9
    max_tokens: int = 2048  # that a prefill step computes


@dataclass(frozen=True, slots=True)
class Policy:
    """`kind` chooses the prefill worker: at random, by load, by load and what it holds (cache), or
    as the gateway does (ours). With `fetches` blocks come from the store, else only a worker's own
    are used. With `is_ordered` prompts are computed as they are due, else as they came."""

    name: str
    kind: str
    fetches: bool = False
    is_ordered: bool = False
    max_local_tokens: int = 0
    tpot_target_s: float = 0.0


BASELINES = (
    Policy("random", "random"),
    Policy("least load", "load"),
    Policy("cache-aware", "cache"),
)
OURS = Policy("ours", "ours", fetches=True, is_ordered=True)


class Simulation:
    """One replay."""

    def __init__(self, cluster: Cluster, policy: Policy, seed: int = 1) -> None:
        self.jobs: list[Job] = []
        self._cluster, self._policy = cluster, policy
        self._rng = random.Random(seed)  # noqa: S311
        latency = opt_66b(cluster.max_tokens)
        self._prefills = [
            PrefillSim(
                number,
                latency.prompts,
                cluster.num_blocks,
                in_order_of_arrival=not policy.is_ordered,
            )
            for number in range(cluster.num_prefill)
        ]
        self._decodes = [
            DecodeSim(number, latency.tokens, latency.prompts)
            for number in range(cluster.num_decode)
        ]
        self._store = Lru(cluster.num_blocks * cluster.num_prefill)
        self._index = PrefixIndex(cluster.num_blocks * cluster.num_prefill)
        self._line: Line[Job] = Line()
        self._decode_of: dict[Job, DecodeSim] = {}
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0

    def run(self, arrivals: list[Arrival], speed: float) -> list[Job]:
        """Replay a trace; returns its requests with what became of them."""
        for arrival in arrivals:
            keys = [key.to_bytes(8, "little") for key in arrival.keys]
            job = Job(arrival, arrival.at / speed, keys)
            self.jobs.append(job)
            self._at(job.at, partial(self._arrive, job))
        while self._events:
            self._now, _, happen = heappop(self._events)
            happen()
        for decode in self._decodes:
            decode.advance(_END_S)
        return self.jobs

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        self._num_events += 1
        heappush(self._events, (when, self._num_events, happen))

    # ---- placement ------------------------------------------------------------------------------

    def _arrive(self, job: Job) -> None:
        if self._policy.kind != "ours" or (not self._line and self._has_opening()):
            self._place(job)
            return
        takes_s = self._prompt_steps(None).prompt_s(job.arrival.num_tokens, 0)
        self._line.add(
            job,
            priority=0,
            tenant="",
            num_tokens=job.arrival.num_tokens,
            takes_s=takes_s,
            due_at=due_at(self._now, takes_s),
            has_target=False,
        )

    def _let_in(self) -> None:
        while self._line and self._has_opening():
            self._place(self._line.take(self._now))

    def _has_opening(self) -> bool:
        return any(
            len(each.backlog) < _RUN_UP_REQUESTS
            or each.backlog.seconds(self._prompt_steps(each)) < _RUN_UP_S
            for each in self._prefills
        )

    def _prompt_steps(self, worker: PrefillSim | None) -> StepTimes:
        own = None if worker is None else worker.fits.prompts
        return resolved(own, [each.fits.prompts for each in self._prefills], GUESSED_PROMPT_STEPS)

    def _place(self, job: Job) -> None:
        job.placed_at = self._now
        for decode in self._decodes:
            decode.advance(self._now)
        if self._policy.kind == "ours":
            worker, decode = self._ours(job)
        else:
            worker, decode = (
                self._baseline(job),
                min(self._decodes, key=lambda each: each.num_assigned),
            )
        decode.assign(job)
        self._find(job, worker)
        if worker is None:
            job.is_local = True
            self._first_token(
                job, decode, decode.prefill(job, self._now, self._policy.tpot_target_s)
            )
        else:
            self._give(job, worker, decode)

    def _find(self, job: Job, worker: PrefillSim | None) -> None:
        """What is there of the prompt; its last token is always computed."""
        usable = job.keys[: (job.arrival.num_tokens - 1) // BLOCK_SIZE]
        memory = worker.held if worker is not None and not self._policy.fetches else self._store
        num_found = memory.num_leading(usable)
        job.num_cached = num_found * BLOCK_SIZE
        self._index.opened(job.keys, num_found)

    def _baseline(self, job: Job) -> PrefillSim:
        if self._policy.kind == "random":
            return self._rng.choice(self._prefills)
        if self._policy.kind == "load":
            return min(self._prefills, key=lambda each: each.queued_s())

        def takes_s(worker: PrefillSim) -> float:
            num_cached = worker.held.num_leading(job.keys) * BLOCK_SIZE
            num_cached = min(num_cached, job.arrival.num_tokens - 1)
            return worker.queued_s() + worker.compute_s(job, num_cached)

        return min(self._prefills, key=takes_s)

    def _ours(self, job: Job) -> tuple[PrefillSim | None, DecodeSim]:
        usable = job.keys[: (job.arrival.num_tokens - 1) // BLOCK_SIZE]
        found = usable[: self._index.num_found(usable)]
        num_held = self._index.num_held(found, range(len(self._prefills)))
        target_s = self._policy.tpot_target_s
        choice = choose(
            Wanted(
                num_tokens=job.arrival.num_tokens,
                num_cached=len(found) * BLOCK_SIZE,
                token_bytes=TOKEN_BYTES,
                num_answer_tokens=128,
                waited_s=self._now - job.at,
            ),
            [
                Candidate(
                    name=f"prefill.{each.number}",
                    num_sequences=0,
                    max_num_seqs=_MAX_NUM_SEQS,
                    backlog=each.backlog,
                    prompt_steps=each.fits.prompts,
                    moves=True,
                    bytes_per_s=self._cluster.bytes_per_s,
                    pushed_bytes_per_s=math.inf,  # decode fetches from where it was computed
                    num_held=num_held[each.number] * BLOCK_SIZE,
                    num_placed=each.num_placed,
                )
                for each in self._prefills
            ],
            [
                Candidate(
                    name=f"decode.{each.number}",
                    num_sequences=each.num_assigned,
                    max_num_seqs=_MAX_NUM_SEQS,
                    num_context_tokens=each.num_assigned_tokens,
                    others_s=max(0.0, each.now - self._now) if self._policy.max_local_tokens else 0,
                    token_steps=each.steps,
                    moves=True,
                    bytes_per_s=self._cluster.bytes_per_s,
                    tpot_limit_s=target_s or float("inf"),
                    num_placed=each.num_placed,
                )
                for each in self._decodes
            ],
            self._now,
            max_local_tokens=self._policy.max_local_tokens,
        )
        job.predicted_s = (choice.decision.chosen.ttft_ms - choice.decision.chosen.line_ms) / 1000
        decode = self._decodes[int(choice.decode.name.removeprefix("decode."))]
        if choice.decision.is_prefilled_by_decode:
            return None, decode
        return self._prefills[int(choice.prefill.name.removeprefix("prefill."))], decode

    # ---- workers --------------------------------------------------------------------------------

    def _give(self, job: Job, worker: PrefillSim, decode: DecodeSim) -> None:
        worker.num_placed += 1
        num_held = min(worker.held.num_leading(job.keys) * BLOCK_SIZE, job.num_cached)
        num_tokens = job.arrival.num_tokens - job.num_cached
        worker.backlog.add(job, num_tokens, job.num_cached, self._now)
        prompt = worker.expect(job, self._now)
        moves_s = (job.num_cached - num_held) * TOKEN_BYTES / self._cluster.bytes_per_s
        worker.link_free_at = max(worker.link_free_at, self._now) + moves_s

        def ready() -> None:
            worker.ready(prompt)
            if not worker.is_running:
                self._step(worker)

        self._decode_of[job] = decode
        self._at(worker.link_free_at if moves_s else self._now, ready)

    def _step(self, worker: PrefillSim) -> None:
        plan, takes_s = worker.step()
        worker.is_running = bool(plan)
        if plan:
            self._at(self._now + takes_s, partial(self._stepped, worker, plan))

    def _stepped(self, worker: PrefillSim, plan: list[tuple[Prompt, int]]) -> None:
        for job in worker.stepped(plan):
            worker.backlog.remove(job, self._now)
            worker.held.add(job.keys)
            self._index.add(job.keys, [worker.number])
            self._first_token(job, self._decode_of.pop(job), self._now)
        self._let_in()
        self._step(worker)

    def _first_token(self, job: Job, decode: DecodeSim, at: float) -> None:
        job.first_token_at = at
        self._store.add(job.keys)
        joins_at = at
        if not job.is_local:  # decode fetches blocks while others are computed
            moves_s = job.arrival.num_tokens * TOKEN_BYTES / self._cluster.bytes_per_s
            joins_at = max(at, job.placed_at + moves_s)
        self._at(joins_at, lambda: decode.join(job, joins_at))
