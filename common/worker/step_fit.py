"""What a worker's steps take, fitted to those it ran. Pure.

Least squares with forgetting: sums fade, so a worker that slows down is believed within a few
hundred steps. No coefficient is negative, as a prediction for more work must not be sooner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Many
from itertools import combinations

import msgspec

from common.engine.work import Work
from common.step_times import StepTimes, attended
from common.worker.sequence import Sequence

_KEPT = 0.99  # of the sums, at each step
_SOLVED_EVERY = 32  # steps
_SOLVED_EARLY = (1, 2, 4, 8, 16)
_BELIEVED_AFTER = 8  # steps, beyond which one that took very long is taken for a stall
_STALL = 4.0  # times what was expected
_NUM = 3
_PACED_KEPT = 0.9  # of the sums behind paced_token_s, at each step
_LEAST_S = 1e-6  # a token takes

Vector = list[float]


class StepFit:
    """The fit of one kind of steps."""

    def __init__(
        self, max_tokens: int, doubts: tuple[float, float, float], full_tokens: int = 0
    ) -> None:
        """`doubts`: how unwilling to explain time by base, tokens and context while steps are too
        much alike to tell those apart."""
        self._doubts = doubts
        self._products = [[0.0] * _NUM for _ in range(_NUM)]
        self._with_ms = [0.0] * _NUM
        self._num_steps = 0
        self._times = StepTimes(max_tokens=max_tokens, full_tokens=full_tokens)

    @property
    def times(self) -> StepTimes | None:
        """None before the first step."""
        return self._times if self._num_steps else None

    def add(self, num_tokens: int, context: float, step_s: float) -> None:
        """A step was run."""
        if self._num_steps >= _BELIEVED_AFTER:
            step_s = min(step_s, _STALL * self._times.step_s(num_tokens, context))
        features = (1.0, float(num_tokens), context)
        for row, one in zip(self._products, features, strict=True):
            for column, other in enumerate(features):
                row[column] = _KEPT * row[column] + one * other
        self._with_ms = [
            _KEPT * old + feature * step_s * 1000
            for old, feature in zip(self._with_ms, features, strict=True)
        ]
        self._num_steps += 1
        if self._num_steps % _SOLVED_EVERY == 0 or self._num_steps in _SOLVED_EARLY:
            base, token, per_context = self._solve()
            self._times = msgspec.structs.replace(
                self._times, base_ms=base, token_ms=token, context_ms=per_context
            )

    def _solve(self) -> Vector:
        """The best coefficients of which none is negative: those of the best choice of features."""
        scales = [self._products[i][i] ** 0.5 or 1.0 for i in range(_NUM)]
        matrix = [
            [self._products[i][j] / (scales[i] * scales[j]) for j in range(_NUM)]
            for i in range(_NUM)
        ]
        for i, doubt in enumerate(self._doubts):
            matrix[i][i] += doubt
        wanted = [value / scale for value, scale in zip(self._with_ms, scales, strict=True)]
        best, best_gain = [0.0] * _NUM, 0.0
        for count in range(1, _NUM + 1):
            for chosen in combinations(range(_NUM), count):
                found = _solved(
                    [[matrix[i][j] for j in chosen] for i in chosen], [wanted[i] for i in chosen]
                )
                gain = sum(wanted[i] * value for i, value in zip(chosen, found, strict=True))
                if min(found) >= 0 and gain > best_gain:
                    best_gain, best = gain, [0.0] * _NUM
                    for i, value in zip(chosen, found, strict=True):
                        best[i] = value / scales[i]
        return best


class StepFits:
    """The fits of a worker: steps in which each sequence gets one token, and those with more."""

    def __init__(self, max_tokens: int, full_tokens: int = 0) -> None:
        """See StepTimes."""
        self._tokens = StepFit(max_tokens, (1e-6, 1e-4, 1e-4), full_tokens)
        self._prompts = StepFit(max_tokens, (1e-4, 1e-6, 1e-4), full_tokens)
        self._paced_s = self._num_paced = 0.0  # of the latest prompts

    @property
    def tokens(self) -> StepTimes | None:
        """Of steps that compute one token for each sequence."""
        return self._tokens.times

    @property
    def prompts(self) -> StepTimes | None:
        """Of steps that compute prompts."""
        return self._prompts.times

    def queued_s(self, sequences: Iterable[Sequence]) -> float:
        """How long what is uncomputed of these takes; 0.0 before the first step of the kind."""
        times = self.prompts
        if times is None:
            return 0.0
        queued = [(each.num_uncomputed, each.num_computed) for each in sequences]
        context = sum(attended(num_tokens, start) for num_tokens, start in queued)
        return times.prompt_s(sum(num_tokens for num_tokens, _ in queued), context)

    def num_prompt_tokens(self, within_s: float, *, num_running: int, context: int) -> float:
        """How many tokens of a prompt a step of `within_s` has room for beside a token of each
        running sequence, which attend to `context` positions. 0 until enough is known."""
        if math.isinf(within_s):
            return math.inf
        if not self._num_paced or (num_running and self.tokens is None):
            return 0
        taken_s = 0.0
        if num_running and self.tokens is not None:
            taken_s = self.tokens.step_s(num_running, context)
        return max(0.0, within_s - taken_s) / max(self.paced_token_s, _LEAST_S)

    @property
    def paced_token_s(self) -> float:
        """What one more token of a prompt takes in a step, on average of the latest such steps; 0.0
        before any. It holds for steps of about their length: whoever makes these longer or shorter
        by it comes to the right length in a few steps. The fits cannot tell what each step takes
        from what each token does while all steps are alike."""
        return self._paced_s / self._num_paced if self._num_paced else 0.0

    def add(self, works: Many[Work], step_s: float) -> None:
        """A step was run."""
        num_tokens = sum(work.num_tokens for work in works)
        prompts = [work for work in works if work.num_tokens > 1]
        (self._prompts if prompts else self._tokens).add(num_tokens, _context(works), step_s)
        if prompts:
            singles = [work for work in works if work.num_tokens == 1]
            if singles and self.tokens is not None:
                step_s -= self.tokens.step_s(len(singles), _context(singles))
            self._paced_s = _PACED_KEPT * self._paced_s + max(0.0, step_s)
            self._num_paced = _PACED_KEPT * self._num_paced + num_tokens - len(singles)


def _context(works: Many[Work]) -> float:
    return sum(attended(work.num_tokens, work.start) for work in works)


def _solved(matrix: list[Vector], wanted: Vector) -> Vector:
    """Gaussian elimination; the matrix is positive definite."""
    rows = [[*row, value] for row, value in zip(matrix, wanted, strict=True)]
    for i, pivot in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            row[i:] = [a - factor * b for a, b in zip(row[i:], pivot[i:], strict=True)]
    found: Vector = [0.0] * len(rows)
    for i in reversed(range(len(rows))):
        known = sum(rows[i][j] * found[j] for j in range(i + 1, len(rows)))
        found[i] = (rows[i][-1] - known) / rows[i][i]
    return found
