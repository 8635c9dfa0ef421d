"""What happened to a sequence on its worker until the next token tells its gateway. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import MAX_CHUNKS, ChunkReport, WorkReport


@dataclass(slots=True)
class _Steps:
    """Engine steps that computed a part of the sequence, one after another."""

    started_at: float
    ended_at: float
    num_tokens: int
    num_batched_tokens: int
    num_steps: int = 1

    def with_next(self, later: _Steps) -> _Steps:
        return _Steps(
            self.started_at,
            later.ended_at,
            self.num_tokens + later.num_tokens,
            self.num_batched_tokens + later.num_batched_tokens,
            self.num_steps + later.num_steps,
        )


@dataclass(slots=True)
class Progress:
    """Times are on the worker's clock, 0.0 = not. Blocks that were moved count as early until
    `num_early_blocks` is set."""

    joined_at: float = 0.0  # since then it can be planned
    suspended_at: float = 0.0
    num_blocks_before: int = 0  # that were moved for what was told before
    num_early_blocks: int = 0
    _steps: list[_Steps] = field(default_factory=list)

    def step(
        self, started_at: float, ended_at: float, num_tokens: int, num_batched_tokens: int
    ) -> None:
        """A step computed `num_tokens` of the sequence. Of many, neighbours become one."""
        if len(self._steps) == MAX_CHUNKS:
            pairs = zip(self._steps[::2], self._steps[1::2], strict=True)
            self._steps = [first.with_next(second) for first, second in pairs]
        self._steps.append(_Steps(started_at, ended_at, num_tokens, num_batched_tokens))

    def report(
        self, now: float, *, arrived_at: float, num_moved: int, block_bytes: int
    ) -> WorkReport:
        """What the gateway is told. `num_moved` blocks were moved for the sequence so far."""

        def ago_ms(at: float) -> float:
            return round((now - at) * 1000, 3)

        num_early = self.num_early_blocks
        num_late = num_moved - self.num_blocks_before - num_early
        return WorkReport(
            arrived_ms=ago_ms(arrived_at),
            joined_ms=ago_ms(self.joined_at),
            suspended_ms=ago_ms(self.suspended_at) if self.suspended_at else 0.0,
            chunks=[
                ChunkReport(
                    started_ms=ago_ms(steps.started_at),
                    ended_ms=ago_ms(steps.ended_at),
                    num_tokens=steps.num_tokens,
                    num_batched_tokens=steps.num_batched_tokens,
                    num_steps=steps.num_steps,
                )
                for steps in self._steps
            ],
            num_early_bytes=num_early * block_bytes,
            num_late_bytes=num_late * block_bytes,
        )
