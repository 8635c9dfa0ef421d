"""From what a gateway saw and was told of a request to the stages of its time. Pure.

Each attempt passes marks: the store had room, decode had a place, and so on; a stage ends at each.
Workers' clocks are not the gateway's, and reports travel: what would be out of order is moved to
where it is not.
"""

from __future__ import annotations

from kvbaton.explanation import Chunk, Moved, Stage
from services.gateway.backend import Timeline
from services.gateway.observe.timeline import AttemptTimes, Heard

Mark = tuple[str, str, float]  # the stage that ends here, its worker, when: 0.0 = not that we know


def stages(timeline: Timeline, end: float) -> list[Stage]:
    """Without gaps, from when the request was received to its end."""
    received_at = timeline.received_at
    found: list[Stage] = []
    at = received_at

    def add(name: str, until: float, worker: str = "", attempt: int = 0) -> None:
        nonlocal at
        start, at = at, min(max(at, until), end)
        start_ms, end_ms = _ms(start, received_at), _ms(at, received_at)
        found.append(
            Stage(name=name, start_ms=start_ms, end_ms=end_ms, worker=worker, attempt=attempt)
        )

    add("tokenize", timeline.submitted_at)
    attempts = timeline.attempts
    add("queue", attempts[0].begun_at if attempts else end)
    for index, attempt in enumerate(attempts):
        is_last = index == len(attempts) - 1
        if index:
            add("retry", attempt.begun_at)
        until = end if is_last else attempt.ended_at
        passed, under_way = _passed(attempt)
        for name, worker, mark in passed:
            add(name, mark, worker, attempt.number)
        if at < min(until, end):
            add(under_way[0], until, under_way[1], attempt.number)
    if attempts and at < end:
        add("retry", end)
    return found


def chunks(attempt: AttemptTimes, received_at: float, end: float) -> list[Chunk]:
    """The steps that computed the prompt, in this attempt."""
    heard = attempt.decode if attempt.is_colocated else attempt.prefill
    if heard is None or attempt.is_whole:
        return []
    at = attempt.begun_at
    found = []
    for report in heard.report.chunks:
        start = min(max(at, heard.before(report.started_ms)), end)
        at = min(max(start, heard.before(report.ended_ms)), end)
        found.append(
            Chunk(
                start_ms=_ms(start, received_at),
                end_ms=_ms(at, received_at),
                num_tokens=report.num_tokens,
                num_batched_tokens=report.num_batched_tokens,
                num_steps=report.num_steps,
                worker=attempt.prefill_worker,
                attempt=attempt.number,
            )
        )
    return found


def moved(attempt: AttemptTimes) -> list[Moved]:
    """What was moved to the workers of this attempt."""
    heard = ((attempt.prefill_worker, attempt.prefill), (attempt.decode_worker, attempt.decode))
    return [
        Moved(
            worker=worker,
            attempt=attempt.number,
            num_early_bytes=each.report.num_early_bytes,
            num_late_bytes=each.report.num_late_bytes,
        )
        for worker, each in heard
        if each is not None and (each.report.num_early_bytes or each.report.num_late_bytes)
    ]


def _ms(at: float, received_at: float) -> float:
    return round((at - received_at) * 1000, 3)


def _passed(attempt: AttemptTimes) -> tuple[list[Mark], tuple[str, str]]:
    """The stages up to the last mark that is known, and the one after it with its worker."""
    marks = _marks(attempt)
    num_passed = max((i for i, (_, _, at) in enumerate(marks, 1) if at), default=0)
    name, worker, _ = marks[num_passed]
    # Who computes a prompt tells of it when it is done: not how far it got.
    under_way = "prefill" if name == "blocks" else name, worker
    return [mark for mark in marks[:num_passed] if mark[2]], under_way


def _marks(attempt: AttemptTimes) -> list[Mark]:
    prefill, decode = attempt.prefill_worker, attempt.decode_worker
    computed = attempt.decode if attempt.is_colocated else attempt.prefill
    placed_at = attempt.started_at
    if computed is not None and not attempt.is_colocated:  # known there before we heard that it is
        placed_at = computed.before(computed.report.arrived_ms)
    marks: list[Mark] = [("store", "", attempt.opened_at), ("decode_place", decode, placed_at)]
    if not attempt.is_whole:
        marks += [
            ("blocks", prefill, _joined_at(computed)),
            ("prefill_queue", prefill, _first_step_at(computed)),
            ("prefill", prefill, computed.at if computed else 0.0),
        ]
    if attempt.is_whole or not attempt.is_colocated:
        marks += [
            ("handoff", decode, _joined_at(attempt.decode)),
            ("join", decode, _first_step_at(attempt.decode)),
        ]
    return [*marks, ("decode", decode, 0.0)]


def _joined_at(heard: Heard | None) -> float:
    return 0.0 if heard is None else heard.before(heard.report.joined_ms)


def _first_step_at(heard: Heard | None) -> float:
    if heard is None or not heard.report.chunks:
        return 0.0
    return heard.before(heard.report.chunks[0].started_ms)
