"""When things happened in each attempt at a request, as its gateway saw and was told it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from common.messages import HandoffOpened, WorkReport
from services.gateway.routing.decision import Decision

_MOST = 16


@dataclass(slots=True)
class Heard:
    """A worker's report, and when it came: its times count back from there."""

    at: float
    report: WorkReport

    def before(self, ago_ms: float) -> float:
        """When it was, on our clock."""
        return self.at - ago_ms / 1000


@dataclass(slots=True)
class AttemptTimes:
    """One attempt; times are on the gateway's clock in seconds, 0.0 = not yet.

    `opened_at`: the store had room; `started_at`: decode had a place, and prefill was told.
    """

    number: int
    prefill_worker: str
    decode_worker: str
    begun_at: float
    decision: Decision | None
    is_whole: bool = False  # nothing had to be computed before decode could go on
    num_loaded_tokens: int = 0
    opened_at: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0
    failure: str = ""
    prefill: Heard | None = None
    decode: Heard | None = None
    num_preemptions: int = 0
    preempted_ms: float = 0.0

    def opened(self, message: HandoffOpened, block_size: int, now: float) -> None:
        """The store has room."""
        self.opened_at, self.is_whole = now, message.is_whole
        self.num_loaded_tokens = message.num_loaded_blocks * block_size

    @property
    def is_colocated(self) -> bool:
        """Whether the decode worker computes the prompt itself."""
        return self.prefill_worker == self.decode_worker

    @property
    def num_parts(self) -> int:
        """How much there is to tell of it."""
        reports = [heard.report for heard in (self.prefill, self.decode) if heard is not None]
        num_options = 0 if self.decision is None else len(self.decision.alternatives)
        return 10 + num_options + sum(len(report.chunks) for report in reports)

    def heard(self, report: WorkReport, now: float, *, by_decode: bool) -> None:
        """A worker's first token of this attempt tells how it came to be; it tells again when it
        had to suspend the request."""
        if not by_decode:
            self.prefill = Heard(now, report)
        elif self.decode is None:
            self.decode = Heard(now, report)
        if report.suspended_ms:
            self.num_preemptions += 1
            self.preempted_ms += report.suspended_ms


class Attempts(list[AttemptTimes]):
    """Those of one request, of which the first and the latest are kept."""

    def begin(
        self,
        number: int,
        now: float,
        prefill_worker: str,
        decode_worker: str,
        decision: Decision | None,
    ) -> AttemptTimes:
        """An attempt has found its place."""
        if len(self) == _MOST:
            del self[1]
        self.append(AttemptTimes(number, prefill_worker, decode_worker, now, decision))
        return self[-1]
