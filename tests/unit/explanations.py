"""Timelines as a gateway would have them, for tests of what is told of them."""

from __future__ import annotations

from common.messages import ChunkReport, WorkReport
from kvbaton.sampling import SamplingParams
from services.gateway.backend import GenerationRequest, Timeline
from services.gateway.observe.timeline import AttemptTimes
from services.gateway.routing.decision import Decision, Option
from services.gateway.routing.stream import RequestStream

START = 100.0  # on the gateway's clock


def at(ms: float) -> float:
    """So long after the request was received."""
    return START + ms / 1000


def option(prefill: str, decode: str, queue_ms: float) -> Option:
    return Option(
        prefill=prefill,
        decode=decode,
        line_ms=1.0,
        queue_ms=queue_ms,
        transfer_ms=2.0,
        compute_ms=7.0,
        tpot_ms=4.0,
        num_cached_tokens=16,
        meets_targets=True,
    )


def chunk(started_ms: float, ended_ms: float, num_tokens: int = 64) -> ChunkReport:
    return ChunkReport(
        started_ms=started_ms,
        ended_ms=ended_ms,
        num_tokens=num_tokens,
        num_batched_tokens=2 * num_tokens,
    )


def begin(timeline: Timeline, ms: float, *, colocated: bool = False) -> AttemptTimes:
    """The next attempt begins then."""
    timeline.num_attempts += 1
    prefill, decode = ("decode.1" if colocated else "prefill.1"), "decode.1"
    timeline.prefill_worker, timeline.decode_worker = prefill, decode
    decision = Decision(
        chosen=option(prefill, decode, 10.0),
        reason="first done",
        num_considered=3,
        alternatives=(option("prefill.2", decode, 30.0),),
    )
    number = timeline.num_attempts
    return timeline.attempts.begin(number, at(ms), prefill, decode, decision)


def stream_of(timeline: Timeline) -> RequestStream:
    stream = RequestStream(GenerationRequest("request-1", [5], SamplingParams()), START)
    stream.timeline = timeline
    return stream


def served(num_tokens: int = 5) -> RequestStream:
    """Received at 0, tokenized at 2, placed at 3, room at 5, a place at 10 ms; prefill had its
    blocks at 12, computed from 20 to 30 and from 40 to 60, and its token came at 61; decode joined
    at 65, began at 70, and the last token came at 101 ms."""
    timeline = Timeline(received_at=START, submitted_at=at(2), num_prompt_tokens=128)
    attempt = begin(timeline, 3)
    attempt.opened_at, attempt.started_at = at(5), at(11)
    report = WorkReport(
        arrived_ms=51.0,
        joined_ms=49.0,
        chunks=[chunk(41.0, 31.0), chunk(21.0, 1.0)],
        num_late_bytes=4096,
    )
    attempt.heard(report, at(61), by_decode=False)
    report = WorkReport(
        arrived_ms=70.0,
        joined_ms=15.0,
        chunks=[chunk(10.0, 0.0, 1)],
        num_early_bytes=65536,
        num_late_bytes=1024,
    )
    attempt.heard(report, at(80), by_decode=True)
    timeline.first_token_at = at(61)
    timeline.finished_at = attempt.ended_at = at(101)
    timeline.num_output_tokens, timeline.finish_reason = num_tokens, "length"
    return stream_of(timeline)
