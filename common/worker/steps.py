"""The step loop: wait for work, plan, run one engine step on the engine's thread, apply."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Many
from typing import Protocol

import structlog

from common.engine.work import Engine, Sampled, Work
from common.messages import WorkerCounts
from common.notify import Notifier
from common.seams import Clock
from common.worker.endings import Endings
from common.worker.sequence import Sequence
from common.worker.step_fit import StepFits

log = structlog.get_logger()

_RATE_SHARE = 0.1  # of the latest step in the running mean of tokens per second


class Planner(Protocol):
    """Whoever decides on steps and takes their results."""

    def plan_step(self) -> list[tuple[Sequence, Work]]:
        """The next step; empty when there is nothing to do now."""

    def advance(self, sequence: Sequence, work: Work, sampled: Sampled | None) -> None:
        """What the step brought for a sequence that is not over."""

    def step_ended(self) -> None:
        """All results of the step are applied."""


class StepLoop:
    """Runs an engine for a planner. `wake` is set when there may be something to do.

    `notifier` hears of every turn of the loop: none comes while a step hangs."""

    def __init__(
        self,
        engine: Engine,
        planner: Planner,
        endings: Endings,
        clock: Clock,
        notifier: Notifier,
        *,
        fits: StepFits,
        counts: WorkerCounts,
    ) -> None:
        self.wake = asyncio.Event()
        self.engine_free = asyncio.Lock()  # held while a step runs
        self.tokens_per_s = 0.0
        self.fits = fits
        self.num_tokens_computed = 0
        self._engine = engine
        self._planner = planner
        self._endings = endings
        self._clock = clock
        self._notifier = notifier
        self._counts = counts

    async def run(self) -> None:
        """Never ends."""
        while True:
            async with self.engine_free:
                begun_at, before_s = self._clock.now(), self._engine.arithmetic_s
                plan = self._planner.plan_step()
                if plan:
                    await self._step(plan)
                    self._counts.busy_s += self._clock.now() - begun_at
                    self._counts.arithmetic_s += self._engine.arithmetic_s - before_s
            self._notifier.beat()
            if not plan:
                await self._notifier.wait(self.wake)
                self.wake.clear()

    async def _step(self, plan: list[tuple[Sequence, Work]]) -> None:
        for sequence, _ in plan:
            self._endings.hold(sequence)
        started_at = self._clock.now()
        results = await self._compute([work for _, work in plan])
        ended_at = self._clock.now()
        num_tokens = self._measure(plan, ended_at - started_at)
        for (sequence, work), result in zip(plan, results, strict=True):
            if sequence.progress.joined_at:
                sequence.progress.step(started_at, ended_at, work.num_tokens, num_tokens)
            if isinstance(result, Exception):
                self._endings.drop(sequence, "internal_error", f"the engine failed: {result}")
            elif work.error is not None:
                error = work.error
                self._endings.drop(sequence, error.code, error.message, field=error.field)
            elif not sequence.is_over:
                self._planner.advance(sequence, work, result)
            self._endings.release(sequence)
        self._planner.step_ended()

    def _measure(self, plan: list[tuple[Sequence, Work]], step_s: float) -> int:
        """Returns how many tokens the step computed."""
        self.fits.add([work for _, work in plan], step_s)
        num_tokens = sum(work.num_tokens for _, work in plan)
        self.num_tokens_computed += num_tokens
        self._counts.step(num_tokens, step_s)
        rate = num_tokens / max(step_s, 1e-6)
        share = _RATE_SHARE if self.tokens_per_s else 1.0
        self.tokens_per_s += share * (rate - self.tokens_per_s)
        return num_tokens

    async def _compute(self, works: list[Work]) -> Many[Sampled | Exception | None]:
        """Run a step. If it fails run each work alone, so that one bad request fails no other."""
        try:
            return await self._engine.step(works)
        except Exception as error:
            log.exception("step_failed", num_sequences=len(works))
            if len(works) == 1:
                return [error]
        return [(await self._compute([work]))[0] for work in works]
