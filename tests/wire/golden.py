"""One message of every kind, by the name of the file that holds its bytes in hexadecimal."""

from __future__ import annotations

from pathlib import Path

from kvbaton.admin import HandoffAudit, HistoryEvent, MemberAudit, StoreAudit, StoreHistory
from kvbaton.protocol import (
    Accepted,
    Audit,
    Audited,
    Cancel,
    ChatMessage,
    ClientMessage,
    Done,
    Error,
    GatewayMessage,
    Generate,
    Hello,
    Ping,
    Pong,
    Resume,
    Timings,
    Token,
    Tokens,
    Told,
    Usage,
    Welcome,
    Why,
)
from kvbaton.sampling import SamplingParams

FOLDER = Path(__file__).parent / "golden"

CLIENT_MESSAGES: dict[str, ClientMessage] = {
    "hello": Hello(protocol_version=1, client="example"),
    "generate": Generate(id=1, text="def f(", sampling=SamplingParams(max_tokens=2)),
    "generate_token_ids": Generate(
        id=2**32,
        token_ids=[0, 127, 128, 65535, 65536],
        model="demo",
        sampling=SamplingParams(
            max_tokens=256,
            temperature=0.0,
            top_p=0.5,
            top_k=40,
            min_p=0.25,
            presence_penalty=-1.0,
            frequency_penalty=1.5,
            repetition_penalty=2.0,
            seed=2**64 - 1,
            stop_token_ids=[1, 2],
            min_tokens=1,
            ignore_eos=True,
            logprobs=2,
        ),
        stop=["\n\n", "ö"],
        deadline_ms=30_000,
    ),
    "generate_messages": Generate(
        id=3,
        messages=[
            ChatMessage(role="system", content="Be brief."),
            ChatMessage(role="user", content="What is a baton?"),
        ],
    ),
    "generate_resume": Generate(
        id=1,
        text="def f(",
        sampling=SamplingParams(max_tokens=2),
        resumable=True,
        resume=Resume(request_id="0123456789abcdef0123456789abcdef", seed=7, tokens=[88]),
    ),
    "generate_resume_end": Generate(
        id=1,
        text="def f(",
        resume=Resume(
            request_id="0123456789abcdef0123456789abcdef",
            seed=2**63 - 1,
            tokens=[88, 1],
            finish_reason="stop",
        ),
    ),
    "cancel": Cancel(id=1),
    "ping": Ping(),
    "audit": Audit(id=2, admin_key="a key of 16 chars"),
    "why_block": Why(id=3, admin_key="a key of 16 chars", block=17, store=1),
    "why_request": Why(id=3, admin_key="a key of 16 chars", name="chatcmpl-0123abcd"),
}

GATEWAY_MESSAGES: dict[str, GatewayMessage] = {
    "welcome": Welcome(
        protocol_version=1,
        instance_id="0123456789abcdef0123456789abcdef",
        model="demo",
        max_model_len=2048,
    ),
    "accepted": Accepted(id=1, request_id="0123456789abcdef0123456789abcdef", seed=7),
    "tokens": Tokens(id=1, tokens=[Token(index=0, token_id=88, text="x")]),
    "tokens_last": Tokens(id=1, tokens=[Token(index=1, token_id=1)], finish_reason="stop"),
    "tokens_logprobs": Tokens(
        id=2**32,
        tokens=[
            Token(
                index=0,
                token_id=300,
                text=" ",
                logprob=-0.5,
                top_logprobs=[(300, -0.5), (7, -1.25)],
            )
        ],
    ),
    "done": Done(
        id=1,
        finish_reason="stop",
        usage=Usage(num_prompt_tokens=3, num_output_tokens=2, num_cached_tokens=0),
        timings=Timings(
            placed_ms=0.25,
            prefilled_ms=12.5,
            handed_over_ms=12.75,
            first_token_ms=12.5,
            finished_ms=20.0,
            prefill_worker="prefill.1",
            decode_worker="decode.1",
        ),
    ),
    "done_request_id": Done(
        id=1,
        finish_reason="length",
        usage=Usage(num_prompt_tokens=3, num_output_tokens=2, num_cached_tokens=0),
        timings=Timings(),
        request_id="0123456789abcdef0123456789abcdef",
    ),
    "audited": Audited(
        id=2,
        closes=True,
        stores=[StoreAudit(endpoint="tcp://127.0.0.1:5570", num_blocks=8, blocks={"free": 8})],
    ),
    "audited_differs": Audited(
        id=2,
        closes=False,
        stores=[
            StoreAudit(
                store=1,
                endpoint="tcp://127.0.0.1:5570",
                num_blocks=8,
                blocks={"free": 5, "granted": 1, "committed": 0, "cached": 1, "quarantined": 1},
                handoffs={"aborting": 1},
                members=[
                    MemberAudit(
                        member_id="0123456789abcdef0123456789abcdef",
                        name="decode.1",
                        role="decode",
                        num_leased=1,
                        num_quarantined=1,
                        quarantined=[7],
                        answer="differs",
                        waits_for="decode.1 must end its step",
                    )
                ],
                oldest_handoffs=[
                    HandoffAudit(
                        handoff_id="fedcba9876543210fedcba9876543210",
                        request_id="0123abcd",
                        state="aborting",
                        age_s=0.5,
                        holder="decode.1",
                        waits_for="decode.1 to quit or end",
                    )
                ],
                discrepancies=["decode.1: it holds block 3 in 2 places"],
            ),
            StoreAudit(problem="it cannot be reached"),
        ],
    ),
    "told": Told(
        id=3,
        stores=[
            StoreHistory(
                now="free, stamp 4",
                events=[
                    HistoryEvent(
                        age_s=1.5,
                        event="handoff_filled",
                        handoff_id="fedcba9876543210fedcba9876543210",
                        request_id="0123abcd",
                        member="prefill.1",
                        num_blocks=2,
                        blocks=[(17, 4), (18, 2)],
                    )
                ],
            )
        ],
    ),
    "pong": Pong(instance_id="0123456789abcdef0123456789abcdef"),
    "error": Error(
        id=1,
        code="invalid_request",
        message="top_p must be above 0 and at most 1, got 2.0",
        field="top_p",
    ),
    "error_overloaded": Error(
        id=1, code="overloaded", message="the queue is full", retry_after_s=1.5
    ),
    "error_cancelled": Error(id=1, code="cancelled", message="the request was cancelled"),
    "error_hello_required": Error(id=1, code="hello_required", message="say hello first"),
    "error_forbidden": Error(
        id=2,
        code="forbidden",
        message="this is not the gateway's admin key",
        field="admin_key",
    ),
    "error_no_id": Error(code="protocol_error", message="a message is one frame, got 2"),
}


def golden_bytes(name: str) -> bytes:
    return bytes.fromhex((FOLDER / f"{name}.hex").read_text())
