"""The explanation of a request, for the golden bytes of the message that carries it."""

from __future__ import annotations

from kvbaton.explanation import (
    Bound,
    Chunk,
    Explanation,
    Moved,
    Option,
    Placement,
    Stage,
    Verdict,
)


def _option(prefill_worker: str, queue_ms: float) -> Option:
    return Option(
        prefill_worker=prefill_worker,
        decode_worker="decode.1",
        line_ms=0.0,
        queue_ms=queue_ms,
        transfer_ms=0.25,
        compute_ms=10.0,
        ttft_ms=queue_ms + 10.25,
        tpot_ms=5.5,
        num_cached_tokens=0,
        meets_targets=True,
    )


EXPLANATION = Explanation(
    id="0123456789abcdef0123456789abcdef",
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
    received_at=1700000000.5,
    outcome="stop",
    num_prompt_tokens=3,
    num_cached_tokens=0,
    num_loaded_tokens=0,
    num_output_tokens=2,
    num_attempts=1,
    prefill_worker="prefill.1",
    decode_worker="decode.1",
    total_ms=20.0,
    ttft_ms=12.5,
    tpot_ms=7.5,
    predicted_ttft_ms=11.75,
    predicted_tpot_ms=None,
    num_preemptions=0,
    preempted_ms=0.0,
    stages=[
        Stage(name="tokenize", start_ms=0.0, end_ms=0.25),
        Stage(name="prefill", start_ms=0.25, end_ms=12.5, worker="prefill.1", attempt=1),
        Stage(name="decode", start_ms=12.5, end_ms=20.0, worker="decode.1", attempt=1),
    ],
    chunks=[
        Chunk(
            start_ms=1.0,
            end_ms=12.0,
            num_tokens=3,
            num_batched_tokens=300,
            num_steps=1,
            worker="prefill.1",
            attempt=1,
        )
    ],
    moved=[Moved(worker="decode.1", attempt=1, num_early_bytes=2**32, num_late_bytes=32768)],
    placements=[
        Placement(
            attempt=1,
            reason="it is expected to serve the request soonest",
            chosen=_option("prefill.1", 1.5),
            num_considered=2,
            alternatives=[_option("prefill.2", 80.0)],
        )
    ],
    failures=[],
    verdict=Verdict(
        ttft=Bound(by="prefill", ms=11.0, share=0.88),
        tpot=Bound(by="decode", ms=7.5, share=1.0),
        text="the first token came in 12.5 ms, 88% of it computing the prompt",
    ),
)
