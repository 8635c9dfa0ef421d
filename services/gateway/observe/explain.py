"""What a request's answer, /debug/requests and spans tell of how it went. Pure."""

from __future__ import annotations

from typing import Protocol

from kvbaton.explanation import BreakEven, Explanation, Option, Placement
from kvbaton.traceparent import trace_id
from services.gateway.backend import Timeline
from services.gateway.observe.stages import chunks, moved, stages
from services.gateway.observe.timeline import AttemptTimes
from services.gateway.observe.verdict import verdict
from services.gateway.routing import decision


class Explained(Protocol):
    """What there is to know of a request."""

    request_id: str
    timeline: Timeline
    num_cached_tokens: int


def explain(request: Explained, now: float, unix_now: float) -> Explanation:
    """A request that has ended, or has just given its last token. `unix_now` is `now` as the rest
    of the world counts it."""
    timeline, attempts = request.timeline, request.timeline.attempts
    end = timeline.finished_at or now
    told = [attempts[0], attempts[-1]] if len(attempts) > 1 else list(attempts)
    all_stages = stages(timeline, end)
    all_chunks = [c for each in told for c in chunks(each, timeline.received_at, end)]
    ttft_ms, tpot_ms = _ttft_ms(timeline), _tpot_ms(timeline, end)
    preempted_ms = sum(each.preempted_ms for each in attempts)
    chosen = attempts[0].decision.chosen if attempts and attempts[0].decision else None
    return Explanation(
        id=request.request_id,
        trace_id=trace_id(timeline.traceparent),
        received_at=round(unix_now - (now - timeline.received_at), 6),
        outcome=timeline.finish_reason or timeline.error or "cancelled",
        num_prompt_tokens=timeline.num_prompt_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_loaded_tokens=min(
            sum(each.num_loaded_tokens for each in told[:1]), request.num_cached_tokens
        ),
        num_output_tokens=timeline.num_output_tokens,
        num_attempts=timeline.num_attempts,
        prefill_worker=timeline.prefill_worker,
        decode_worker=timeline.decode_worker,
        total_ms=all_stages[-1].end_ms,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        predicted_ttft_ms=None if chosen is None else round(chosen.ttft_ms, 3),
        predicted_tpot_ms=None if chosen is None else round(chosen.tpot_ms, 3),
        num_preemptions=sum(each.num_preemptions for each in attempts),
        preempted_ms=round(preempted_ms, 3),
        stages=all_stages,
        chunks=all_chunks,
        moved=[each for attempt in told for each in moved(attempt)],
        placements=[each for attempt in told for each in _placement(attempt)],
        failures=[each.failure for each in attempts if each.failure],
        verdict=verdict(
            all_stages, all_chunks, ttft_ms=ttft_ms, tpot_ms=tpot_ms, preempted_ms=preempted_ms
        ),
    )


def server_timing(explanation: Explanation) -> str:
    """The stages as a Server-Timing header has them, which browsers show."""
    totals: dict[str, float] = {}
    for stage in explanation.stages:
        totals[stage.name] = totals.get(stage.name, 0.0) + stage.end_ms - stage.start_ms
    totals["total"] = explanation.total_ms
    return ", ".join(f"{name};dur={round(ms, 3):g}" for name, ms in totals.items())


def _ttft_ms(timeline: Timeline) -> float | None:
    if not timeline.first_token_at:
        return None
    return round((timeline.first_token_at - timeline.received_at) * 1000, 3)


def _tpot_ms(timeline: Timeline, end: float) -> float | None:
    """The mean after the first token."""
    if timeline.num_output_tokens < 2:
        return None
    passed_s = end - timeline.first_token_at
    return round(passed_s * 1000 / (timeline.num_output_tokens - 1), 3)


def _placement(attempt: AttemptTimes) -> list[Placement]:
    found = attempt.decision
    if found is None:
        return []
    return [
        Placement(
            attempt=attempt.number,
            reason=found.reason,
            chosen=_option(found.chosen),
            num_considered=found.num_considered,
            alternatives=[_option(each) for each in found.alternatives],
        )
    ]


def _option(option: decision.Option) -> Option:
    return Option(
        prefill_worker=option.prefill,
        decode_worker=option.decode,
        line_ms=round(option.line_ms, 3),
        queue_ms=round(option.queue_ms, 3),
        transfer_ms=round(option.transfer_ms, 3),
        compute_ms=round(option.compute_ms, 3),
        ttft_ms=round(option.ttft_ms, 3),
        tpot_ms=round(option.tpot_ms, 3),
        num_cached_tokens=option.num_cached_tokens,
        meets_targets=option.meets_targets,
        break_even=_break_even(option.break_even),
    )


def _break_even(found: decision.BreakEven | None) -> BreakEven | None:
    if found is None:
        return None
    return BreakEven(
        num_bytes=found.num_bytes,
        bytes_per_s=round(found.bytes_per_s),
        transfer_ms=round(found.transfer_ms, 3),
        residue_ms=round(found.residue_ms, 3),
        local_ms=round(found.local_ms, 3),
        pays=found.pays,
    )
