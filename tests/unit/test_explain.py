"""What is told of a request adds up, whatever was and was not seen of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import WorkReport
from kvbaton.explanation import BreakEven, Explanation
from services.gateway.backend import Timeline
from services.gateway.observe.explain import explain, server_timing
from services.gateway.routing import decision
from services.gateway.routing.stream import RequestStream
from tests.unit.explanations import START, at, begin, chunk, served, stream_of


def told(stream: RequestStream, end_ms: float = 200) -> Explanation:
    return explain(stream, at(end_ms), 1_700_000_000.0 + end_ms / 1000)


def assert_adds_up(explanation: Explanation) -> None:
    stages = explanation.stages
    assert stages[0].start_ms == 0
    assert stages[-1].end_ms == explanation.total_ms
    assert all(stage.start_ms <= stage.end_ms for stage in stages)
    for before, after in itertools.pairwise(stages):
        assert before.end_ms == after.start_ms
    for piece in explanation.chunks:
        assert 0 <= piece.start_ms <= piece.end_ms <= explanation.total_ms


def test_a_request_served_by_two_workers() -> None:
    explanation = told(served())
    assert_adds_up(explanation)
    assert [(s.name, s.start_ms, s.end_ms, s.worker, s.attempt) for s in explanation.stages] == [
        ("tokenize", 0, 2, "", 0),
        ("queue", 2, 3, "", 0),
        ("store", 3, 5, "", 1),
        ("decode_place", 5, 10, "decode.1", 1),
        ("blocks", 10, 12, "prefill.1", 1),
        ("prefill_queue", 12, 20, "prefill.1", 1),
        ("prefill", 20, 61, "prefill.1", 1),
        ("handoff", 61, 65, "decode.1", 1),
        ("join", 65, 70, "decode.1", 1),
        ("decode", 70, 101, "decode.1", 1),
    ]
    assert [(c.start_ms, c.end_ms, c.num_tokens) for c in explanation.chunks] == [
        (20, 30, 64),
        (40, 60, 64),
    ]
    assert [(m.worker, m.num_early_bytes, m.num_late_bytes) for m in explanation.moved] == [
        ("prefill.1", 0, 4096),
        ("decode.1", 65536, 1024),
    ]
    assert (explanation.ttft_ms, explanation.tpot_ms, explanation.total_ms) == (61, 10, 101)
    assert (explanation.predicted_ttft_ms, explanation.predicted_tpot_ms) == (20, 4)
    assert explanation.received_at == 1_700_000_000.0
    assert explanation.outcome == "length"


def test_the_placement_is_told_with_what_else_there_was() -> None:
    (placement,) = told(served()).placements
    assert placement.reason == "first done"
    assert placement.num_considered == 3
    assert placement.chosen.prefill_worker == "prefill.1"
    assert placement.chosen.ttft_ms == 20
    assert [each.ttft_ms for each in placement.alternatives] == [40]
    assert b"break_even" not in msgspec.json.encode(placement)  # nothing moves


def test_where_kv_moves_its_costs_are_told_beside_what_they_save() -> None:
    even = decision.BreakEven(10_000, 1e6 / 3, 30.00004, 20.0, 25.0, pays=False)
    stream = served()
    attempt = next(iter(stream.timeline.attempts))
    assert attempt.decision is not None
    chosen = replace(attempt.decision.chosen, break_even=even)
    attempt.decision = replace(attempt.decision, chosen=chosen)
    (placement,) = told(stream).placements
    assert placement.chosen.break_even == BreakEven(
        num_bytes=10_000,
        bytes_per_s=333_333,
        transfer_ms=30.0,
        residue_ms=20.0,
        local_ms=25.0,
        pays=False,
    )
    assert placement.alternatives[0].break_even is None


def test_the_verdict_names_the_largest_share_before_and_after_the_first_token() -> None:
    verdict = told(served()).verdict
    assert verdict.ttft is not None
    assert verdict.tpot is not None
    # Of the 41 ms of prefill 30 were its own steps.
    assert (verdict.ttft.by, verdict.ttft.ms, verdict.ttft.share) == ("prefill", 30, 0.4918)
    assert (verdict.tpot.by, verdict.tpot.ms, verdict.tpot.share) == ("decode", 31, 0.775)
    assert verdict.text == (
        "the first token came in 61.0 ms, 49% of it computing the prompt; then 10.00 ms a token, "
        "78% of it the decode worker's steps"
    )


@pytest.mark.parametrize(
    ("name", "value", "by"),
    [
        ("submitted_at", 60, "tokenize"),
        ("begun_at", 60, "queue"),
        ("opened_at", 60, "store"),
        ("arrived_ms", 1.0, "decode_place"),
        ("joined_ms", 1.0, "blocks"),
        ("chunks", [chunk(1.0, 0.5)], "prefill_queue"),
        ("chunks", [chunk(50.0, 49.0), chunk(2.0, 1.0)], "prefill_interleaved"),
    ],
)
def test_every_wait_before_the_first_token_can_be_what_bounded_it(
    name: str, value: object, by: str
) -> None:
    stream = served()
    attempt = stream.timeline.attempts[0]
    assert attempt.prefill is not None
    if isinstance(value, int):
        setattr(stream.timeline if name == "submitted_at" else attempt, name, at(value))
    else:
        setattr(attempt.prefill.report, name, value)
    explanation = told(stream)
    assert_adds_up(explanation)
    assert explanation.verdict.ttft is not None
    assert explanation.verdict.ttft.by == by


def test_what_was_suspended_is_not_counted_as_steps() -> None:
    stream = served()
    attempt = stream.timeline.attempts[0]
    report = WorkReport(arrived_ms=90.0, joined_ms=5.0, suspended_ms=20.0)
    attempt.heard(report, at(100), by_decode=True)
    explanation = told(stream)
    assert_adds_up(explanation)
    assert (explanation.num_preemptions, explanation.preempted_ms) == (1, 20)
    assert explanation.verdict.tpot is not None
    assert (explanation.verdict.tpot.by, explanation.verdict.tpot.ms) == ("preemption", 20)


def test_a_decode_worker_that_computes_the_prompt_itself_hands_nothing_over() -> None:
    timeline = Timeline(received_at=START, submitted_at=at(1))
    attempt = begin(timeline, 1, colocated=True)
    attempt.opened_at, attempt.started_at = at(2), at(4)
    report = WorkReport(arrived_ms=17.0, joined_ms=15.0, chunks=[chunk(10.0, 0.0)])
    attempt.heard(report, at(20), by_decode=True)
    timeline.first_token_at = at(20)
    timeline.finished_at = at(30)
    timeline.num_output_tokens, timeline.finish_reason = 2, "stop"
    explanation = told(stream_of(timeline))
    assert_adds_up(explanation)
    assert [(s.name, s.end_ms) for s in explanation.stages] == [
        ("tokenize", 1), ("queue", 1), ("store", 2), ("decode_place", 4), ("blocks", 5),
        ("prefill_queue", 10), ("prefill", 20), ("decode", 30),
    ]  # fmt: skip
    assert {stage.worker for stage in explanation.stages[3:]} == {"decode.1"}
    assert len(explanation.chunks) == 1


def test_what_needs_no_computing_goes_from_its_place_to_the_handoff() -> None:
    timeline = Timeline(received_at=START, submitted_at=at(1))
    attempt = begin(timeline, 1)
    attempt.opened_at, attempt.started_at, attempt.is_whole = at(2), at(4), True
    report = WorkReport(arrived_ms=9.0, joined_ms=4.0, chunks=[chunk(3.0, 0.0, 1)])
    attempt.heard(report, at(10), by_decode=True)
    explanation = told(stream_of(timeline), 20)
    assert_adds_up(explanation)
    assert [stage.name for stage in explanation.stages[2:]] == [
        "store", "decode_place", "handoff", "join", "decode",
    ]  # fmt: skip
    assert explanation.chunks == []


def test_several_attempts_follow_each_other() -> None:
    timeline = Timeline(received_at=START, submitted_at=at(1))
    first = begin(timeline, 1)
    first.opened_at, first.started_at, first.ended_at = at(2), at(4), at(50)
    first.failure = "prefill.1 is gone"
    second = begin(timeline, 70)
    second.opened_at, second.started_at = at(71), at(72)
    explanation = told(stream_of(timeline), 90)
    assert_adds_up(explanation)
    assert [(s.name, s.attempt, s.end_ms) for s in explanation.stages] == [
        ("tokenize", 0, 1), ("queue", 0, 1),
        ("store", 1, 2), ("decode_place", 1, 4), ("prefill", 1, 50),
        ("retry", 0, 70),
        ("store", 2, 71), ("decode_place", 2, 72), ("prefill", 2, 90),
    ]  # fmt: skip
    assert explanation.failures == ["prefill.1 is gone"]
    assert explanation.ttft_ms is None
    assert explanation.outcome == "cancelled"
    assert explanation.verdict.text.startswith("no token came in 90.0 ms, 71% of it computing")


def test_of_very_many_attempts_the_first_and_the_latest_are_told() -> None:
    timeline = Timeline(received_at=START, submitted_at=START)
    for number in range(100):
        begin(timeline, number).ended_at = at(number + 0.5)
    explanation = told(stream_of(timeline), 100)
    assert_adds_up(explanation)
    assert explanation.num_attempts == 100
    assert [each.attempt for each in explanation.placements] == [1, 100]
    assert len(timeline.attempts) == 16


def test_a_request_that_was_never_placed_waited_in_the_queue() -> None:
    timeline = Timeline(received_at=START, submitted_at=at(1), error="unavailable")
    explanation = told(stream_of(timeline), 5000)
    assert_adds_up(explanation)
    assert [stage.name for stage in explanation.stages] == ["tokenize", "queue"]
    assert explanation.outcome == "unavailable"
    assert explanation.verdict.ttft is not None
    assert explanation.verdict.ttft.by == "queue"


def test_a_header_has_the_stages_and_the_whole() -> None:
    assert server_timing(told(served())) == (
        "tokenize;dur=2, queue;dur=1, store;dur=2, decode_place;dur=5, blocks;dur=2, "
        "prefill_queue;dur=8, prefill;dur=41, handoff;dur=4, join;dur=5, decode;dur=31, "
        "total;dur=101"
    )


def test_an_explanation_survives_both_encodings() -> None:
    explanation = told(served())
    assert msgspec.json.decode(msgspec.json.encode(explanation), type=Explanation) == explanation
    packed = msgspec.msgpack.encode(explanation)
    assert msgspec.msgpack.decode(packed, type=Explanation) == explanation


ago = st.floats(0, 1e6)


@st.composite
def reports(draw: st.DrawFn) -> WorkReport:
    """Any that a worker could send, also one whose clock has jumped."""
    pieces = draw(st.lists(st.builds(chunk, ago, ago), max_size=4))
    suspended_ms = draw(st.sampled_from([0.0, 5.0, 1e6]))
    return WorkReport(
        arrived_ms=draw(ago), joined_ms=draw(ago), suspended_ms=suspended_ms, chunks=pieces
    )


moments = st.one_of(st.just(0.0), st.floats(START, START + 200))


@given(st.data())
def test_whatever_was_seen_it_adds_up(data: st.DataObject) -> None:
    timeline = Timeline(received_at=START, submitted_at=START + data.draw(st.floats(0, 1)))
    for _ in range(data.draw(st.integers(0, 3))):
        attempt = begin(timeline, data.draw(st.floats(0, 200)), colocated=data.draw(st.booleans()))
        attempt.opened_at, attempt.started_at = data.draw(moments), data.draw(moments)
        attempt.ended_at = data.draw(moments)
        attempt.is_whole = data.draw(st.booleans())
        for by_decode in data.draw(st.lists(st.booleans(), max_size=3)):
            attempt.heard(data.draw(reports()), data.draw(moments), by_decode=by_decode)
    timeline.num_output_tokens = data.draw(st.integers(0, 3))
    if timeline.num_output_tokens:
        timeline.first_token_at = START + data.draw(st.floats(0, 150))
    explanation = told(stream_of(timeline), 150_000)
    assert_adds_up(explanation)
    for bound in (explanation.verdict.ttft, explanation.verdict.tpot):
        assert bound is None or 0 < bound.share <= 1
