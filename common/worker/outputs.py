"""Tokens on their way to gateways: those of a step wait for each other and share a message."""

from __future__ import annotations

from collections.abc import Callable

from common.engine.work import Sampled
from common.messages import Load, Message, OutputToken, OutputTokens
from common.seams import Clock
from common.worker.progress import Progress
from common.worker.sequence import Sequence


class Outputs:
    """Of one worker. `send(gateway, message)` sends; `block_bytes` are those of its KV blocks."""

    def __init__(
        self, send: Callable[[bytes, Message], object], clock: Clock, block_bytes: int
    ) -> None:
        self._send = send
        self._clock = clock
        self._block_bytes = block_bytes
        self._waiting: dict[bytes, list[OutputToken]] = {}  # by gateway

    def add(self, sequence: Sequence, sampled: Sampled, finish_reason: str | None) -> None:
        """The newest token of a sequence; it leaves when the step's are complete."""
        token = OutputToken(
            handoff_id=sequence.handoff_id,
            index=sequence.num_outputs - 1,
            token_id=sampled.token_id,
            logprob=sampled.logprob,
            top_logprobs=list(sampled.top_logprobs),
            finish_reason=finish_reason,
            prompt_scores=sequence.take_scores(),
        )
        if sequence.progress.joined_at:
            token.report = sequence.progress.report(
                self._clock.now(),
                arrived_at=sequence.arrived_at,
                num_moved=sequence.num_moved,
                block_bytes=self._block_bytes,
            )
            sequence.progress = Progress(num_blocks_before=sequence.num_moved)
        self._waiting.setdefault(sequence.gateway, []).append(token)

    def leave(self, load: Callable[[], Load]) -> None:
        """The step has ended: send what waits, and how the worker is now."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        now = load()
        for gateway, tokens in waiting.items():
            # Scores are large: no two of them share a message.
            parts = [[token] for token in tokens if token.prompt_scores]
            parts.append([token for token in tokens if not token.prompt_scores])
            for part in filter(None, parts):
                self._send(gateway, OutputTokens(tokens=part, load=now))

    def forget(self, gateway: bytes) -> None:
        """It cannot be sent to."""
        self._waiting.pop(gateway, None)
