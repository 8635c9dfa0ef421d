"""`ask`: one completion, as it comes, and how fast it came."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import msgspec

from kvbaton.commands.options import keys
from kvbaton.sync_client import Client, Generation

STDIN = "-"


def ask(options: argparse.Namespace) -> int:
    """Returns 0 when the completion has ended."""
    prompt = sys.stdin.read() if options.prompt == STDIN else options.prompt
    given: dict[str, Any] = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    if options.chat:
        given["messages"] = [{"role": "user", "content": prompt}]
    with Client(options.gateway, keys=keys(options)) as client:
        started_at = time.monotonic()
        stream = client.generate(None if options.chat else prompt, **given)
        times = _read(stream, show=not options.json)
    if options.json:
        print(json.dumps(_answer(stream, started_at, times)))
        return 0
    if not stream.text.endswith("\n"):
        print()
    print(_figures(stream, started_at, times), file=sys.stderr)
    return 0


def _read(stream: Generation, *, show: bool) -> list[float]:
    """When each token came."""
    times = []
    for token in stream:
        times.append(time.monotonic())
        if show:
            print(token.text, end="", flush=True)
    return times


def _latencies(started_at: float, times: list[float]) -> tuple[float, float | None]:
    """Milliseconds to the first token, and from each to the next; None of a single one."""
    ttft_ms = (times[0] - started_at) * 1000
    if len(times) == 1:
        return ttft_ms, None
    return ttft_ms, (times[-1] - times[0]) * 1000 / (len(times) - 1)


def _answer(stream: Generation, started_at: float, times: list[float]) -> dict[str, Any]:
    ttft_ms, tpot_ms = _latencies(started_at, times)
    return {
        "text": stream.text,
        "finish_reason": stream.finish_reason,
        "request_id": stream.request_id,
        "ttft_ms": ttft_ms,
        "tpot_ms": tpot_ms,
        "usage": msgspec.to_builtins(stream.usage),
    }


def _figures(stream: Generation, started_at: float, times: list[float]) -> str:
    ttft_ms, tpot_ms = _latencies(started_at, times)
    tpot = "" if tpot_ms is None else f", TPOT {tpot_ms:.1f} ms"
    how = f"{len(times)} tokens, {stream.finish_reason}"
    return f"TTFT {ttft_ms:.1f} ms{tpot}, {how}, request {stream.request_id}"
