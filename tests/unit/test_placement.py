"""Placement by value: what each pair is expected to take, and which is chosen."""

from __future__ import annotations

from typing import Any

import pytest

from common.step_times import StepTimes
from services.gateway.routing.candidates import Candidate, Wanted
from services.gateway.routing.decision import MAX_ALTERNATIVES, Decision
from services.gateway.routing.estimates import Backlog
from services.gateway.routing.placement import Choice, choose

PROMPTS = StepTimes(base_ms=10, token_ms=1, max_tokens=100)  # 100 tokens: 110 ms
TOKENS = StepTimes(base_ms=20, token_ms=1)
BYTES = 1000  # of a token's KV


def worker(name: str, queued: int = 0, **fields: Any) -> Candidate:
    """A worker that has been given a prompt of `queued` tokens just now."""
    backlog = Backlog()
    if queued:
        backlog.add("before", queued, 0, 0.0)
    defaults: dict[str, Any] = {
        "num_sequences": 0,
        "max_num_seqs": 8,
        "backlog": backlog,
        "prompt_steps": PROMPTS,
        "token_steps": TOKENS,
    }
    return Candidate(name, **defaults | fields)


def chosen(
    wanted: Wanted,
    prefills: list[Candidate],
    decodes: list[Candidate] | None = None,
    max_local_tokens: int | None = 0,
) -> Choice[Candidate]:
    return choose(
        wanted, prefills, decodes or [worker("d")], 0.0, max_local_tokens=max_local_tokens
    )


def names(choice: Choice[Candidate]) -> tuple[str, str]:
    return choice.prefill.name, choice.decode.name


FAST = StepTimes(base_ms=5, token_ms=0.5, max_tokens=100)


@pytest.mark.parametrize(
    ("queued", "steps", "num_tokens", "best"),
    [
        ((80, 0), (PROMPTS, PROMPTS), 100, "b"),  # the shorter queue
        ((0, 0), (PROMPTS, FAST), 100, "b"),  # the faster of two idle ones
        ((80, 0), (FAST, PROMPTS), 300, "a"),  # faster is worth a queue
        ((80, 0), (FAST, PROMPTS), 50, "b"),  # but for a short prompt not any queue
    ],
)
def test_a_prompt_goes_to_the_prefill_worker_that_is_done_first(
    queued: tuple[int, int], steps: tuple[StepTimes, StepTimes], num_tokens: int, best: str
) -> None:
    workers = [
        worker(name, count, prompt_steps=times)
        for name, count, times in zip("ab", queued, steps, strict=True)
    ]
    assert chosen(Wanted(num_tokens), workers).prefill.name == best


def test_the_first_token_is_queue_and_transfer_and_computing_the_rest() -> None:
    prefill = worker("p", 50, moves=True, bytes_per_s=1e6, num_held=20)
    wanted = Wanted(200, num_cached=120, token_bytes=BYTES, waited_s=0.5)
    option = chosen(wanted, [prefill]).decision.chosen
    assert option.queue_ms == pytest.approx(60)
    assert option.transfer_ms == pytest.approx(100)  # of 120 cached tokens 20 are there
    assert option.compute_ms == pytest.approx(90)
    assert option.ttft_ms == pytest.approx(750)
    assert option.tpot_ms == pytest.approx(21)
    assert option.num_cached_tokens == 120


def test_a_worker_that_holds_the_prefix_is_preferred_until_its_queue_costs_more() -> None:
    wanted = Wanted(200, num_cached=160, token_bytes=BYTES)

    def best(num_queued: int) -> str:
        holder = worker("holder", moves=True, bytes_per_s=1e6, num_held=160)
        for number in range(num_queued):
            holder.backlog.add(number, 40, 0, 0.0)
        other = worker("other", moves=True, bytes_per_s=1e6)
        return chosen(wanted, [holder, other]).prefill.name

    assert best(0) == "holder"
    assert best(2) == "holder"  # 100 ms of queue against 160 of transfer
    assert best(4) == "other"


def test_a_hot_prefix_spreads_as_its_requests_pile_up() -> None:
    holder = worker("holder", moves=True, bytes_per_s=1e6, num_held=100)
    others = [worker(name, moves=True, bytes_per_s=1e6) for name in ("x", "y")]
    counts = dict.fromkeys(("holder", "x", "y"), 0)
    for number in range(30):
        choice = chosen(Wanted(150, num_cached=100, token_bytes=BYTES), [holder, *others])
        counts[choice.prefill.name] += 1
        choice.prefill.backlog.add(number, 50, 100, 0.0)
    assert counts["holder"] >= 10
    assert min(counts.values()) >= 8


def test_of_two_where_it_would_wait_alike_the_one_where_it_delays_fewer_is_taken() -> None:
    # Both long prompts would let it pass after their running steps, as long in both.
    crowded, quiet = worker("crowded", 5000), worker("quiet", 5000)
    crowded.backlog.add("another", 5000, 0, 0.0)
    decision = chosen(Wanted(100), [crowded, quiet]).decision
    assert decision.chosen.prefill == "quiet"
    assert decision.chosen.ttft_ms == pytest.approx(decision.alternatives[0].ttft_ms)


def test_decode_goes_where_the_next_token_takes_least() -> None:
    slow = StepTimes(base_ms=20, token_ms=1, context_ms=0.1)
    decodes = [
        worker("long", num_sequences=1, num_context_tokens=2000, token_steps=slow),
        worker("short", num_sequences=3, num_context_tokens=300, token_steps=slow),
        worker("full", num_sequences=8, token_steps=slow),
    ]
    choice = chosen(Wanted(100), [worker("p")], decodes)
    assert choice.decode.name == "short"
    assert choice.decision.chosen.tpot_ms == pytest.approx(20 + 4 + 40)


def test_a_full_decode_worker_is_taken_only_if_all_are() -> None:
    full, busy = worker("full", num_sequences=8), worker("busy", num_sequences=7)
    assert chosen(Wanted(10), [worker("p")], [full, busy]).decode.name == "busy"
    only = chosen(Wanted(10), [worker("p")], [full])
    assert only.decision.reason == "every decode worker is full"


def test_of_pairs_that_meet_the_targets_one_with_little_work_and_waiting_is_taken() -> None:
    holder = worker("holder", 100, moves=True, bytes_per_s=1e6, num_held=300)
    idle = worker("idle", moves=True, bytes_per_s=3e6)
    plain = Wanted(400, num_cached=300, token_bytes=BYTES)
    quick = worker("quick", moves=True, bytes_per_s=1e8)
    pair = [holder, quick]
    assert chosen(plain, pair).prefill.name == "quick"  # soonest
    patient = Wanted(400, num_cached=300, token_bytes=BYTES, ttft_target_s=1.0)
    relaxed = chosen(patient, [holder, idle])
    assert relaxed.prefill.name == "holder"  # waits 10 ms longer, but moves nothing
    near = worker("near", moves=True, bytes_per_s=1e7)
    assert chosen(patient, [holder, near]).prefill.name == "near"  # what takes it 30 ms saves 80
    assert "meets the targets" in relaxed.decision.reason
    hasty = Wanted(400, num_cached=300, token_bytes=BYTES, ttft_target_s=0.01)
    late = chosen(hasty, pair)
    assert late.prefill.name == "quick"
    assert not late.decision.chosen.meets_targets
    assert "none meets the targets" in late.decision.reason


def test_a_worker_of_unknown_speed_is_taken_for_an_average_one() -> None:
    known = [worker("slow"), worker("fast", prompt_steps=FAST)]
    new = worker("new", prompt_steps=None)
    decision = chosen(Wanted(100), [*known, new]).decision
    computes = {each.prefill: each.compute_ms for each in (decision.chosen, *decision.alternatives)}
    assert computes["slow"] > computes["new"] > computes["fast"]


def test_equals_take_turns() -> None:
    workers = [worker(name) for name in "abc"]
    turns = ""
    for _ in range(7):
        prefill = chosen(Wanted(10), workers).prefill
        prefill.num_placed += 1
        turns += prefill.name
    assert turns == "abcabca"


def test_a_session_likes_its_workers_but_not_at_any_price() -> None:
    wanted = Wanted(100, session=("b", "d"))
    again = chosen(wanted, [worker("a"), worker("b")])
    assert again.prefill.name == "b"
    assert "session" in again.decision.reason
    assert chosen(wanted, [worker("a"), worker("b", 90)]).prefill.name == "a"


# ---- a decode worker computes the prompt itself -------------------------------------------------


def test_a_short_rest_is_computed_by_decode_when_that_is_sooner() -> None:
    busy, idle = worker("p", 100), worker("d")
    local = chosen(Wanted(120, num_cached=100), [busy], [idle], max_local_tokens=32)
    assert names(local) == ("d", "d")
    assert local.decision.is_prefilled_by_decode
    assert "computes the 20 uncached tokens itself" in local.decision.reason
    too_long = chosen(Wanted(140, num_cached=100), [busy], [idle], max_local_tokens=32)
    assert names(too_long) == ("p", "d")
    assert names(chosen(Wanted(120, num_cached=100), [busy], [idle])) == ("p", "d")


def test_not_where_the_targets_of_those_that_run_there_leave_no_time() -> None:
    busy = worker("p", 100)
    strict = worker("d", num_sequences=2, tpot_limit_s=0.025)  # a step without a prompt takes 23 ms
    lax = worker("d", num_sequences=2, tpot_limit_s=0.06)
    wanted = Wanted(120, num_cached=100)
    assert names(chosen(wanted, [busy], [strict], max_local_tokens=32)) == ("p", "d")
    assert names(chosen(wanted, [busy], [lax], max_local_tokens=32)) == ("d", "d")


def test_a_long_prompt_is_computed_by_decode_where_targets_pace_it() -> None:
    busy = worker("p", 150)  # 170 ms, then 220 of its own
    paced = worker("d", num_sequences=2, tpot_limit_s=0.1)  # of 90 ms 68 are left: 220 / 0.76
    free = worker("d", num_sequences=2)
    wanted = Wanted(200, ttft_target_s=0.35, tpot_target_s=0.1)
    local = chosen(wanted, [busy], [paced], max_local_tokens=32)
    assert names(local) == ("d", "d")
    assert local.decision.chosen.ttft_ms == pytest.approx(45 + 220 / (1 - 22 / 90), rel=0.001)
    awaiting = worker("d", num_sequences=2, num_awaited=2, tpot_limit_s=0.1)
    local = chosen(wanted, [busy], [awaiting], max_local_tokens=32)
    assert local.decision.chosen.ttft_ms == pytest.approx(45 + 220)
    known = worker("d", num_sequences=2, tpot_limit_s=0.1, paced_token_s=0.0005)
    local = chosen(wanted, [busy], [known], max_local_tokens=32)
    assert local.decision.chosen.ttft_ms == pytest.approx(45 + 100 / (1 - 22 / 90), rel=0.001)
    assert names(chosen(wanted, [busy], [paced], max_local_tokens=0)) == ("p", "d")
    assert names(chosen(wanted, [busy], [free], max_local_tokens=32)) == ("p", "d")
    assert names(chosen(wanted, [busy], [worker("d")], max_local_tokens=32)) == ("d", "d")
    assert names(chosen(Wanted(200), [busy], [worker("d")], max_local_tokens=32)) == ("p", "d")


def test_of_pairs_with_as_much_work_the_one_that_is_sooner() -> None:
    wanted = Wanted(200, ttft_target_s=1.0, tpot_target_s=0.1)
    paced = worker("d", num_sequences=2, tpot_limit_s=0.1)
    assert names(chosen(wanted, [worker("p", 150)], [paced], max_local_tokens=32)) == ("d", "d")
    assert names(chosen(wanted, [worker("p", 50)], [paced], max_local_tokens=32)) == ("p", "d")
    assert chosen(wanted, [worker("a", 150), worker("b")]).prefill.name == "b"


def test_a_target_per_token_alone_does_not_hide_a_queue() -> None:
    wanted = Wanted(100, tpot_target_s=0.1)
    assert chosen(wanted, [worker("a", 500), worker("b")]).prefill.name == "b"


def test_without_targets_not_where_others_lose_more_than_it_gains() -> None:
    wanted, busy = Wanted(120, num_cached=100), worker("p", 90)  # 100 + 30 ms
    few, many = worker("d", num_sequences=1), worker("d", num_sequences=7)
    assert names(chosen(wanted, [busy], [few], max_local_tokens=32)) == ("d", "d")
    assert names(chosen(wanted, [busy], [many], max_local_tokens=32)) == ("p", "d")


def test_colocated_work_goes_where_its_first_token_comes_soonest() -> None:
    decodes = [worker("a", 100), worker("b", 20), worker("full", num_sequences=8)]
    choice = chosen(Wanted(50), [], decodes, max_local_tokens=None)
    assert names(choice) == ("b", "b")


# ---- what is remembered -------------------------------------------------------------------------


def test_a_decision_remembers_the_best_alternatives_in_order() -> None:
    prefills = [worker(f"p{number}", 50 * number) for number in range(6)]
    decision: Decision = chosen(Wanted(10), prefills, [worker("d1"), worker("d2")]).decision
    assert decision.num_considered == 12
    assert len(decision.alternatives) == MAX_ALTERNATIVES
    ttft = [option.ttft_ms for option in (decision.chosen, *decision.alternatives)]
    assert ttft == sorted(ttft)
    assert decision.reason == "it is expected to serve the request soonest"


def test_of_many_workers_only_the_best_are_paired() -> None:
    prefills = [worker(f"p{number}", 10 + number) for number in range(100)]
    decodes = [worker(f"d{number}", num_sequences=number % 7) for number in range(100)]
    decision = chosen(Wanted(10), prefills, decodes).decision
    assert decision.num_considered <= 64
    assert decision.chosen.prefill == "p0"


def test_a_prefill_worker_keeps_what_decode_would_serve_too_slowly() -> None:
    wanted = Wanted(100, ttft_target_s=1, tpot_target_s=0.04)
    busy = worker("d", num_sequences=24, max_num_seqs=64)  # a step of 45 ms with this one
    keeper = worker("p", may_keep=True)
    kept = chosen(wanted, [keeper], [busy])
    assert names(kept) == ("p", "p")
    assert "stays at prefill" in kept.decision.reason
    assert names(chosen(wanted, [worker("p")], [busy])) == ("p", "d")  # an older version's
    assert names(chosen(wanted, [keeper], [worker("d", num_sequences=19, max_num_seqs=64)])) == (
        "p",
        "d",
    )
    assert names(chosen(Wanted(100), [keeper], [busy])) == ("p", "d")  # no target to miss
    strict = worker("p", may_keep=True, num_sequences=1, tpot_limit_s=0.024)
    assert names(chosen(wanted, [strict], [busy])) == ("p", "d")  # others there want theirs sooner


@pytest.mark.parametrize(
    ("ttft_target_s", "most"),
    [
        (1.0, 10),  # 31 of 36 ms: the next prompt's 110 ms come in 5 of each 36
        (0.5, 6),  # 27 of 36 ms: in 9
        (0.0, 6),  # 27 of 36 ms: a quarter is left to prompts
    ],
)
def test_a_prefill_worker_keeps_no_more_than_leaves_its_prompts_time(
    ttft_target_s: float, most: int
) -> None:
    wanted = Wanted(100, ttft_target_s=ttft_target_s, tpot_target_s=0.04)
    full = worker("d", num_sequences=8)

    def keeps(num_sequences: int) -> bool:
        keeper = worker("p", may_keep=True, num_sequences=num_sequences, max_num_seqs=64)
        return names(chosen(wanted, [keeper], [full])) == ("p", "p")

    assert [count for count in range(20) if keeps(count)] == list(range(most + 1))


def test_where_no_target_is_met_tokens_come_from_whoever_has_the_shorter_steps() -> None:
    # Nobody has time for another prompt.
    wanted = Wanted(100, num_answer_tokens=100, ttft_target_s=0.2, tpot_target_s=0.04)
    late = worker("d", num_sequences=39, max_num_seqs=64)  # 60 ms
    for num_sequences, served in ((0, "p"), (32, "p"), (33, "d"), (39, "d")):  # 53, 54, 60 ms
        keeper = worker("p", may_keep=True, num_sequences=num_sequences, max_num_seqs=64)
        assert names(chosen(wanted, [keeper], [late])) == ("p", served)


def test_a_prefill_worker_keeps_what_no_decode_worker_has_a_place_for() -> None:
    full = worker("d", num_sequences=8)
    assert names(chosen(Wanted(100), [worker("p", may_keep=True)], [full])) == ("p", "p")
    lodged = worker("p", may_keep=True, num_sequences=8)
    assert names(chosen(Wanted(100), [lodged], [full])) == ("p", "d")


def test_prompts_are_expected_later_where_prefill_decodes_too() -> None:
    wanted = Wanted(100, tpot_target_s=0.05)
    alone = chosen(wanted, [worker("p")]).decision.chosen
    beside = worker("p", num_sequences=5, tpot_limit_s=0.05, paced_token_s=0.001)
    shared = chosen(wanted, [beside]).decision.chosen
    # 25 of 45 ms are for the five that it decodes, and a step has just begun.
    assert alone.compute_ms == pytest.approx(110)
    assert shared.compute_ms == pytest.approx(100 / (1 - 25 / 45))
    assert shared.queue_ms == pytest.approx(22.5)


def test_no_worker_is_left_idle_to_save_a_little_work() -> None:
    """On a core of a CPU a prompt takes a little longer in short chunks beside others."""
    prompts = StepTimes(base_ms=16, token_ms=3, context_ms=0.001, max_tokens=512)
    prefill = worker("p", 1024, prompt_steps=prompts)
    decode = worker(
        "d", num_sequences=1, num_awaited=1, paced_token_s=0.0042, tpot_limit_s=0.06,
        num_context_tokens=1024, prompt_steps=prompts,
    )  # fmt: skip
    wanted = Wanted(1024, num_answer_tokens=32, ttft_target_s=10.8, tpot_target_s=0.06)
    choice = chosen(wanted, [prefill], [decode], max_local_tokens=256)
    assert names(choice) == ("d", "d")
    assert all(each.meets_targets for each in choice.decision.alternatives)
    assert choice.decision.alternatives[0].ttft_ms > 1.5 * choice.decision.chosen.ttft_ms
    # Colocated: nor to have tokens some milliseconds sooner.
    behind = worker("behind", 1024, prompt_steps=prompts, num_sequences=1, num_awaited=1)
    slow = worker("slow", prompt_steps=prompts, token_steps=StepTimes(base_ms=40, token_ms=1))
    assert names(chosen(wanted, [], [behind, slow], None)) == ("slow", "slow")
