"""One message of every kind, by the name of the file that holds its bytes in hexadecimal."""

from __future__ import annotations

from pathlib import Path

from kvbaton.admin import HandoffAudit, HistoryEvent, MemberAudit, StoreAudit, StoreHistory
from kvbaton.conversation import ChatMessage, FunctionCall, ToolCall
from kvbaton.operations import (
    Drain,
    Drained,
    LogLevelSet,
    MemberStatus,
    SetLogLevel,
    Standing,
    Status,
    StoreStatus,
)
from kvbaton.protocol import (
    Accepted,
    Audit,
    Audited,
    Cancel,
    ClientMessage,
    Done,
    Error,
    FinishedChoice,
    GatewayMessage,
    Generate,
    Hello,
    Ping,
    Pong,
    Resume,
    Resumed,
    Timings,
    Token,
    Tokens,
    Told,
    Usage,
    Welcome,
    Why,
)
from kvbaton.questions import (
    Counted,
    Detokenize,
    Detokenized,
    ModelCard,
    ModelList,
    Models,
    Prompt,
    PromptToken,
    Score,
    Scored,
    Stats,
    Tokenize,
    Tokenized,
)
from kvbaton.sampling import SamplingParams
from tests.wire.golden_explanation import EXPLANATION

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
    "generate_n": Generate(
        id=4,
        text="x = ",
        sampling=SamplingParams(
            prompt_logprobs=1,
            logit_bias={88: -100.0, 7: 1.5},
            allowed_token_ids=[7, 88],
            bad_words=[[5, 6]],
        ),
        n=2,
        best_of=3,
        echo=True,
        bad_words=["eval"],
        include_stop_str_in_output=True,
        truncate_prompt_tokens=-1,
        add_special_tokens=False,
        skip_special_tokens=False,
        response_format={"type": "json_object"},
        priority=-1,
        user="someone",
        session_id="session-1",
        ttft_target_ms=200.0,
        tpot_target_ms=20.5,
        explain=True,
    ),
    "generate_tools": Generate(
        id=5,
        messages=[
            ChatMessage(role="user", content="How warm is it?", name="ann"),
            ChatMessage(
                role="assistant",
                tool_calls=[
                    ToolCall(id="call_1", function=FunctionCall(name="measure", arguments="{}"))
                ],
            ),
            ChatMessage(role="tool", content="21", tool_call_id="call_1"),
        ],
        add_generation_prompt=False,
        continue_final_message=True,
        chat_template_kwargs={"enable_thinking": False},
        structured_outputs={"choice": ["warm", "cold"]},
        tools=[{"type": "function", "function": {"name": "measure"}}],
        tool_choice={"type": "function", "function": {"name": "measure"}},
    ),
    "generate_resume_n": Generate(
        id=1,
        text="def f(",
        n=2,
        resume=Resume(
            request_id="0123456789abcdef0123456789abcdef",
            seed=7,
            choices=[Resumed(tokens=[88, 1], finish_reason="stop"), Resumed()],
        ),
    ),
    "score": Score(id=6, texts=["x = 1", "x = y"], top_logprobs=1),
    "score_token_ids": Score(
        id=6,
        token_ids=[[1, 2], [3]],
        model="demo",
        add_special_tokens=False,
        deadline_ms=1000,
        cache_salt="salt",
        priority=2,
    ),
    "tokenize": Tokenize(id=7, text="x = 1", return_token_strs=True),
    "tokenize_messages": Tokenize(
        id=7,
        messages=[ChatMessage(role="user", content="hello")],
        model="demo",
        add_special_tokens=True,
        add_generation_prompt=False,
        continue_final_message=True,
        chat_template_kwargs={"enable_thinking": False},
        tools=[{"type": "function", "function": {"name": "measure"}}],
    ),
    "detokenize": Detokenize(id=8, token_ids=[92, 4], model="demo", skip_special_tokens=True),
    "models": Models(id=9),
    "stats": Stats(id=10),
    "cancel": Cancel(id=1),
    "ping": Ping(),
    "audit": Audit(id=2, admin_key="a key of 16 chars"),
    "why_block": Why(id=3, admin_key="a key of 16 chars", block=17, store=1),
    "why_request": Why(id=3, admin_key="a key of 16 chars", name="chatcmpl-0123abcd"),
    "status": Status(id=4, admin_key="a key of 16 chars"),
    "drain": Drain(id=5, admin_key="a key of 16 chars", member="decode.1"),
    "drain_forced": Drain(id=5, admin_key="a key of 16 chars", member="0123abcd", force=True),
    "log_level": SetLogLevel(id=6, admin_key="a key of 16 chars", member="all", level="debug"),
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
    "tokens_choice": Tokens(id=4, tokens=[Token(index=0, token_id=88, text="x", choice=1)]),
    "prompt": Prompt(
        id=6,
        tokens=[
            PromptToken(index=0, token_id=0),
            PromptToken(index=1, token_id=92, text="x", logprob=-2.5, top_logprobs=[(310, -0.5)]),
        ],
        choice=1,
    ),
    "done_choices": Done(
        id=4,
        finish_reason="tool_calls",
        usage=Usage(num_prompt_tokens=3, num_output_tokens=12, num_cached_tokens=0),
        timings=Timings(),
        choices=[
            FinishedChoice(
                finish_reason="tool_calls",
                num_output_tokens=10,
                content="",
                tool_calls=[
                    ToolCall(id="call_1", function=FunctionCall(name="measure", arguments="{}"))
                ],
            ),
            FinishedChoice(finish_reason="length", num_output_tokens=2, content="It is"),
        ],
    ),
    "done_explained": Done(
        id=1,
        finish_reason="stop",
        usage=Usage(num_prompt_tokens=3, num_output_tokens=2, num_cached_tokens=0),
        timings=Timings(),
        explanation=EXPLANATION,
    ),
    "scored": Scored(id=6, num_prompt_tokens=8, num_cached_tokens=4),
    "tokenized": Tokenized(
        id=7, token_ids=[0, 92, 338], token_strs=["<s>", "x", "="], max_model_len=2048
    ),
    "detokenized": Detokenized(id=8, text="x ="),
    "model_list": ModelList(
        id=9, models=[ModelCard(id="demo", vocab_size=2048, max_model_len=2048)]
    ),
    "counted": Counted(id=10, stats={"requests_running": 2.0, "decode_workers": 1.0}),
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
    "standing": Standing(
        id=4,
        gateway="gateway.1",
        model="demo",
        version="0.1.0",
        members=[
            MemberStatus(
                member_id="0123456789abcdef0123456789abcdef",
                name="decode.1",
                role="decode",
                state="ready",
                version="0.1.0",
                age_s=1.5,
                host_id="h",
                pid=17,
                endpoint="tcp://127.0.0.1:40001",
                num_running=2,
                num_places=64,
            )
        ],
        stores=[
            StoreStatus(
                endpoint="tcp://127.0.0.1:5570",
                name="kvstore.1",
                version="0.1.0",
                age_s=2.5,
                num_blocks=8,
                blocks={"free": 8},
            )
        ],
    ),
    "drained": Drained(id=5, name="decode.1", member_id="0123456789abcdef0123456789abcdef"),
    "log_level_set": LogLevelSet(
        id=6, names=["gateway.1", "kvstore.1"], problems={"decode.1": "no answer in time"}
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
