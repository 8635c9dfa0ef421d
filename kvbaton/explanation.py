"""How a request went: its timeline, what was moved for it, why it was placed so, what bounded it.

Times are in milliseconds since the gateway received the request, durations in milliseconds. Where
processes have clocks of their own, what a worker reports is counted back from when it arrived.
"""

from __future__ import annotations

import msgspec


class Stage(msgspec.Struct, kw_only=True, frozen=True):
    """One part of a request's time. Stages follow each other without gaps, from when the request
    was received to its end. `attempt` counts from 1; 0 is before the first.

    name: "tokenize" (read, checked, tokenized), "queue" (its turn at the gateway, and workers to
    serve it), "store" (room for its blocks, cached ones from the disk), "decode_place" (a place in
    decode's batch), "blocks" (the computing worker gets its blocks, and the bytes of cached ones),
    "prefill_queue" (behind other prompts), "prefill", "handoff" (to decode), "join" (until decode's
    next step), "decode", "retry" (between one attempt and the next).
    """

    name: str
    start_ms: float
    end_ms: float
    worker: str = ""
    attempt: int = 0


class Chunk(msgspec.Struct, kw_only=True, frozen=True):
    """Engine steps that computed a part of the prompt, one after another, with other requests in
    the same batch: `num_batched_tokens` counts those too."""

    start_ms: float
    end_ms: float
    num_tokens: int
    num_batched_tokens: int
    num_steps: int
    worker: str
    attempt: int


class Moved(msgspec.Struct, kw_only=True, frozen=True):
    """KV bytes that moved to a worker; none where both see the same memory. `num_late_bytes` are
    the residue: those that were still to come when they were needed."""

    worker: str
    attempt: int
    num_early_bytes: int
    num_late_bytes: int


class BreakEven(msgspec.Struct, kw_only=True, frozen=True):
    """What it takes to move a prompt's KV to the decode worker, beside what that worker would need
    to have it without (`local_ms`: fetch what is cached, compute the rest). `num_bytes` go the
    slower of the ways, to the store and from there, at `bytes_per_s` as measured; both take
    `transfer_ms`, of which `residue_ms` are left when the prompt is computed. Moving `pays` while
    `transfer_ms` is not more than `local_ms`."""

    num_bytes: int
    bytes_per_s: float
    transfer_ms: float
    residue_ms: float
    local_ms: float
    pays: bool


class Option(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A pair of workers as placement saw it, and what it expected of it. The first token is
    expected at `ttft_ms`, the sum of the four before it. `break_even` is the pair's or, where the
    decode worker computes the prompt itself, that of the best pair with it; left out where nothing
    would move."""

    prefill_worker: str
    decode_worker: str
    line_ms: float
    queue_ms: float
    transfer_ms: float
    compute_ms: float
    ttft_ms: float
    tpot_ms: float
    num_cached_tokens: int
    meets_targets: bool
    break_even: BreakEven | None = None


class Placement(msgspec.Struct, kw_only=True, frozen=True):
    """Why an attempt was made where it was. `alternatives` are the best of the others."""

    attempt: int
    reason: str
    chosen: Option
    num_considered: int
    alternatives: list[Option]


class Bound(msgspec.Struct, kw_only=True, frozen=True):
    """What took the largest share of a time: a stage's name, or "prefill_interleaved" (the steps of
    other prompts between one's own), "preemption" (its blocks were needed by others)."""

    by: str
    ms: float
    share: float  # of the whole, 0 to 1


class Verdict(msgspec.Struct, kw_only=True, frozen=True):
    """What bounded the time to the first token, and the time of those after it, in a sentence
    too."""

    ttft: Bound | None
    tpot: Bound | None
    text: str


class Explanation(msgspec.Struct, kw_only=True, frozen=True):
    """All of it. `received_at` is in seconds since 1970. `outcome` is the finish reason, or the
    code of the error that ended the request. Of many attempts, the first and the latest are told.
    """

    id: str
    trace_id: str
    received_at: float
    outcome: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_loaded_tokens: int  # of the cached ones, those that came from the disk
    num_output_tokens: int
    num_attempts: int
    prefill_worker: str
    decode_worker: str
    total_ms: float
    ttft_ms: float | None
    tpot_ms: float | None
    predicted_ttft_ms: float | None
    predicted_tpot_ms: float | None
    num_preemptions: int
    preempted_ms: float
    stages: list[Stage]
    chunks: list[Chunk]
    moved: list[Moved]
    placements: list[Placement]
    failures: list[str]  # why attempts ended that were not the last
    verdict: Verdict
