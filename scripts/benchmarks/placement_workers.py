"""Prefill and decode workers on virtual time, for `scripts/bench placement`: the scheduler, the fit
of steps and the backlog are the services' own, a step's time is a latency model's."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from common.step_times import PACED_SHARE, StepTimes, attended, due_at
from common.worker.sequence import Sequence as Prompt
from common.worker.sequence import plan_chunks
from common.worker.step_fit import StepFits
from kvbaton.sampling import SamplingParams
from scripts.benchmarks.trace import Arrival
from services.gateway.routing.estimates import Backlog
from services.gateway.routing.placement import LEAST_SHARE
from services.prefill.scheduler import PrefillScheduler

BLOCK_SIZE = 512  # tokens, the trace's
_MAX_NUM_SEQS = 64


class Lru:
    """The blocks that a memory holds, least recently used first."""

    def __init__(self, num_blocks: int) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self._num_blocks = num_blocks

    def num_leading(self, keys: Sequence[bytes]) -> int:
        """How many blocks it has before the first that it lacks."""
        return next((i for i, key in enumerate(keys) if key not in self._blocks), len(keys))

    def add(self, keys: Iterable[bytes]) -> None:
        """These were computed, fetched or read."""
        for key in keys:
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._num_blocks:
            self._blocks.popitem(last=False)


@dataclass(slots=True, eq=False)
class Job:
    """A request under way. Times are in seconds since the trace's beginning."""

    arrival: Arrival
    at: float
    keys: list[bytes]
    num_cached: int = 0  # tokens
    predicted_s: float = 0.0  # to the first token, when it was placed
    placed_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0
    is_local: bool = False

    def prompt(self, now: float) -> Prompt:
        """The sequence as a prefill worker has it."""
        num_tokens = self.arrival.num_tokens
        return Prompt(
            handoff_id="",
            epoch=1,
            store=0,
            incarnation="",
            gateway=b"",
            root_key=b"",
            tokens=[0] * num_tokens,
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(),
            choice=0,
            arrived_at=now,
            block_size=BLOCK_SIZE,
            num_computed=self.num_cached,
        )


class PrefillSim:
    """A prefill worker with memory of its own, to which blocks come over its host's network."""

    def __init__(
        self, number: int, steps: StepTimes, num_blocks: int, *, in_order_of_arrival: bool
    ) -> None:
        self.number = number
        self.held = Lru(num_blocks)
        self.backlog = Backlog()
        self.num_placed = 0
        self.link_free_at = 0.0
        self.is_running = False
        self.fits = StepFits(steps.max_tokens)
        self._steps = steps
        self._scheduler = PrefillScheduler(_MAX_NUM_SEQS)
        self._in_order_of_arrival = in_order_of_arrival
        self._jobs: dict[Prompt, Job] = {}

    def queued_s(self) -> float:
        """How long everything that is here takes, known exactly."""
        queued = [(each.num_uncomputed, each.num_computed) for each in self._jobs]
        return self._steps.prompt_s(
            sum(num_tokens for num_tokens, _ in queued),
            sum(attended(num_tokens, start) for num_tokens, start in queued),
        )

    def compute_s(self, job: Job, num_cached: int) -> float:
        """How long the job's prompt takes here if so much of it is cached."""
        num_tokens = job.arrival.num_tokens - num_cached
        return self._steps.prompt_s(num_tokens, attended(num_tokens, num_cached))

    def expect(self, job: Job, now: float) -> Prompt:
        """The job is given to this worker; its cached blocks may still have to come."""
        prompt = job.prompt(now)
        self._jobs[prompt] = job
        return prompt

    def ready(self, prompt: Prompt) -> None:
        """Its cached blocks are here."""
        due = prompt.arrived_at
        if not self._in_order_of_arrival:
            due = due_at(prompt.arrived_at, self.fits.queued_s([prompt]))
        self._scheduler.add(prompt, due)

    def step(self) -> tuple[list[tuple[Prompt, int]], float]:
        """The next step and how long it takes; no prompts, no step."""
        plan = plan_chunks(self._scheduler.line(), self._steps.max_tokens)
        context = sum(attended(count, prompt.num_computed) for prompt, count in plan)
        takes_s = self._steps.step_s(sum(count for _, count in plan), context)
        self.fits.add([prompt.work(count) for prompt, count in plan], takes_s)
        return plan, takes_s

    def stepped(self, plan: list[tuple[Prompt, int]]) -> list[Job]:
        """A step has ended; returns whose first token it brought."""
        done = []
        for prompt, count in plan:
            prompt.num_computed += count
            if not prompt.num_uncomputed:
                self._scheduler.remove(prompt)
                done.append(self._jobs.pop(prompt))
        return done


@dataclass(slots=True)
class DecodeSim:
    """A decode worker. Between two that join or leave all steps are taken to be alike."""

    number: int
    steps: StepTimes
    prompt_steps: StepTimes
    now: float = 0.0
    num_placed: int = 0
    num_assigned: int = 0  # also those whose first token is still to come
    num_assigned_tokens: int = 0
    _num_context_tokens: int = 0
    _num_steps: int = 0
    _ends: list[tuple[int, int, Job]] = field(default_factory=list)  # the step that is its last
    _num_joined: int = 0

    def __len__(self) -> int:
        return len(self._ends)

    def assign(self, job: Job) -> None:
        """The job will come here."""
        self.num_placed += 1
        self.num_assigned += 1
        self.num_assigned_tokens += job.arrival.num_tokens

    def advance(self, until: float) -> None:
        """Run the steps that begin before then."""
        while self._ends and self.now < until:
            step_s = self.steps.step_s(len(self), self._num_context_tokens)
            num_steps = min(
                self._ends[0][0] - self._num_steps, math.ceil((until - self.now) / step_s)
            )
            self._run(num_steps, num_steps * step_s)
        self.now = max(self.now, until) if not self._ends else self.now

    def join(self, job: Job, at: float) -> None:
        """The job's first token is there."""
        self.advance(at)
        self.now = max(self.now, at)
        self._num_joined += 1
        num_left = max(1, job.arrival.num_outputs - 1)
        heappush(self._ends, (self._num_steps + num_left, self._num_joined, job))
        self._num_context_tokens += job.arrival.num_tokens

    def prefill(self, job: Job, at: float, tpot_target_s: float) -> float:
        """Compute a prompt between the tokens of the others, in steps as long as their target (0:
        none) allows; returns when its first token comes."""
        self.advance(at)
        self.now = max(self.now, at)
        num_tokens = job.arrival.num_tokens - job.num_cached
        context = attended(num_tokens, job.num_cached)
        left_s = self.prompt_steps.prompt_s(num_tokens, context)
        limit_s = PACED_SHARE * tpot_target_s or math.inf
        while left_s > 0:
            others_s = self.steps.step_s(len(self), self._num_context_tokens) if self._ends else 0.0
            room_s = max(limit_s - others_s, LEAST_SHARE * limit_s) if self._ends else math.inf
            self._run(1, others_s + min(left_s, room_s))
            left_s -= room_s
        return self.now

    def _run(self, num_steps: int, takes_s: float) -> None:
        self._num_steps += num_steps
        self.now += takes_s
        while self._ends and self._ends[0][0] <= self._num_steps:
            _, _, job = heappop(self._ends)
            job.finished_at = self.now
            self._num_context_tokens -= job.arrival.num_tokens
            self.num_assigned -= 1
            self.num_assigned_tokens -= job.arrival.num_tokens
