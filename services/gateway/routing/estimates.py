"""What a worker is expected to take, from what it reported and from what this gateway has given
it. Pure.

Workers fit their own steps (common/worker/step_fit.py) and report the fit with their load: a
gateway that has just started predicts as well as one that has seen every step.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from common.step_times import StepTimes, attended, due_at, mean

# Before anybody has computed anything. Small, so that nobody is refused for it.
GUESSED_PROMPT_STEPS = StepTimes(base_ms=1.0, token_ms=0.02)
GUESSED_TOKEN_STEPS = StepTimes(base_ms=1.0, token_ms=0.1)


@dataclass(frozen=True, slots=True, order=True)
class _Job:
    given_at: float
    num_tokens: int
    context: float

    def seconds(self, times: StepTimes) -> float:
        return times.prompt_s(self.num_tokens, self.context)

    def step_s(self, times: StepTimes) -> float:
        """One of its steps."""
        return self.seconds(times) / max(1, times.num_steps(self.num_tokens))

    def part_s(self, times: StepTimes, room: int) -> float:
        """So many of its tokens in another's step, or all that it has."""
        num_tokens = min(room, self.num_tokens)
        context = self.context * num_tokens / max(1, self.num_tokens)
        return (num_tokens * times.token_ms + context * times.context_ms) / 1000


@dataclass(slots=True)
class Backlog:
    """Prompts that this gateway has given a worker, and whose first token has not come."""

    _jobs: dict[Hashable, _Job] = field(default_factory=dict)
    _since: float = 0.0  # the one that is computed now began, as far as we know

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, key: Hashable, num_tokens: int, start: int, now: float) -> None:
        """The worker is to compute `num_tokens` after `start` that are cached."""
        if not self._jobs:
            self._since = now
        self._jobs[key] = _Job(now, num_tokens, attended(num_tokens, start))

    def remove(self, key: Hashable, now: float) -> None:
        """Its first token has come, or will not."""
        if self._jobs.pop(key, None) is not None:
            self._since = now

    def seconds(self, times: StepTimes) -> float:
        """How long all of it takes."""
        return sum(job.seconds(times) for job in self._jobs.values())

    def ahead_s(
        self, times: StepTimes, num_tokens: int, own_s: float, now: float
    ) -> tuple[float, int]:
        """How long a prompt that comes now waits for others here, and how many wait for it. It has
        `num_tokens` to compute, which take `own_s`."""
        jobs = sorted(
            (due_at(job.given_at, takes_s), takes_s, job)
            for job in self._jobs.values()
            for takes_s in [job.seconds(times)]
        )
        if not jobs:
            return 0.0, 0
        own_due_at = due_at(now, own_s)
        before_s = sum(takes_s for due, takes_s, _ in jobs if due <= own_due_at)
        if before_s:
            before_s -= min(now - self._since, jobs[0][1])
        else:
            before_s = jobs[0][2].step_s(times) / 2  # the step that runs
        # What its last step has room for is computed with it.
        behind = [job for due, _, job in jobs if due > own_due_at]
        room = times.room_beside(num_tokens)
        return before_s + (behind[0].part_s(times, room) if behind else 0.0), len(behind)


def resolved(
    known: StepTimes | None, peers: Iterable[StepTimes | None], guess: StepTimes
) -> StepTimes:
    """What a worker reported, or else what its peers did on average, or else a guess."""
    if known is not None:
        return known
    others = [times for times in peers if times is not None]
    return mean(others) if others else guess
