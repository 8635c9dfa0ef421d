"""What bounded a request: where the largest share of its time went, in words too. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.explanation import Bound, Chunk, Stage, Verdict

_WORDS = {
    "tokenize": "reading and tokenizing the request",
    "queue": "waiting for its turn at the gateway, or for workers",
    "store": "waiting for room at the KV store, or for its disk",
    "decode_place": "waiting for a place in the decode worker's batch",
    "blocks": "waiting for blocks, and for the bytes of cached ones",
    "prefill_queue": "waiting behind other prompts at the prefill worker",
    "prefill": "computing the prompt",
    "prefill_interleaved": "waiting for other prompts' steps between its own",
    "handoff": "the handoff to the decode worker",
    "join": "waiting for the decode worker's next step",
    "decode": "the decode worker's steps",
    "preemption": "being suspended, its blocks were needed by others",
    "retry": "waiting to be placed again",
}


def verdict(
    stages: Sequence[Stage],
    chunks: Sequence[Chunk],
    *,
    ttft_ms: float | None,
    tpot_ms: float | None,
    preempted_ms: float,
) -> Verdict:
    """`stages` are all of the request's. Without a first token all its time went before it."""
    end_ms = stages[-1].end_ms
    first_ms = end_ms if ttft_ms is None else ttft_ms
    before = _totals(stages, 0.0, first_ms)
    if "prefill" in before:
        computing_ms = sum(_overlap(each, 0.0, first_ms) for each in chunks)
        # Without chunks nobody told how it was divided.
        waiting_ms = max(0.0, before["prefill"] - computing_ms) if chunks else 0.0
        before["prefill"] -= waiting_ms
        before["prefill_interleaved"] = waiting_ms
    after = _totals(stages, first_ms, end_ms) if tpot_ms is not None else {}
    if preempted_ms and "decode" in after:
        after["preemption"] = min(preempted_ms, after["decode"])
        after["decode"] -= after["preemption"]
    ttft, tpot = _largest(before), _largest(after)
    return Verdict(ttft=ttft, tpot=tpot, text=_text(ttft, tpot, first_ms, ttft_ms, tpot_ms))


def _text(
    ttft: Bound | None,
    tpot: Bound | None,
    first_ms: float,
    ttft_ms: float | None,
    tpot_ms: float | None,
) -> str:
    what = "no token came" if ttft_ms is None else "the first token came"
    text = f"{what} in {first_ms:.1f} ms"
    if ttft is not None:
        text += f", {ttft.share:.0%} of it {_WORDS[ttft.by]}"
    if tpot_ms is not None and tpot is not None:
        text += f"; then {tpot_ms:.2f} ms a token, {tpot.share:.0%} of it {_WORDS[tpot.by]}"
    return text


def _overlap(part: Stage | Chunk, start_ms: float, end_ms: float) -> float:
    return max(0.0, min(part.end_ms, end_ms) - max(part.start_ms, start_ms))


def _totals(stages: Sequence[Stage], start_ms: float, end_ms: float) -> dict[str, float]:
    totals: dict[str, float] = {}
    for stage in stages:
        totals[stage.name] = totals.get(stage.name, 0.0) + _overlap(stage, start_ms, end_ms)
    return totals


def _largest(totals: dict[str, float]) -> Bound | None:
    whole = sum(totals.values())
    if whole <= 0:
        return None
    by = max(totals, key=lambda name: totals[name])
    return Bound(by=by, ms=round(totals[by], 3), share=round(totals[by] / whole, 4))
