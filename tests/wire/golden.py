"""One message of every kind, by the name of the file that holds its bytes in hexadecimal."""

from __future__ import annotations

from pathlib import Path

from kvbaton.protocol import (
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
    Timings,
    Token,
    Tokens,
    Usage,
    Welcome,
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
    "cancel": Cancel(id=1),
    "ping": Ping(),
}

GATEWAY_MESSAGES: dict[str, GatewayMessage] = {
    "welcome": Welcome(
        protocol_version=1,
        instance_id="0123456789abcdef0123456789abcdef",
        model="demo",
        max_model_len=2048,
    ),
    "tokens": Tokens(id=1, tokens=[Token(index=0, token_id=88, text="x")]),
    "tokens_last": Tokens(id=1, tokens=[Token(index=1, token_id=1)]),
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
    "error_no_id": Error(code="protocol_error", message="a message is one frame, got 2"),
}


def golden_bytes(name: str) -> bytes:
    return bytes.fromhex((FOLDER / f"{name}.hex").read_text())
