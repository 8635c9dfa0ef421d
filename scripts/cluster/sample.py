"""What a user sees first of a running cluster: a completion, its timeline, and what to paste."""

from __future__ import annotations

import json
import shlex
import time
from typing import TYPE_CHECKING

from kvbaton.errors import UnavailableError
from kvbaton.protocol import Timings, Usage
from scripts.cluster.admin_key import admin_key_file
from scripts.cluster.identity import ROOT
from scripts.cluster.keys import client_file
from scripts.cluster.options import Plan
from scripts.cluster.terminal import BOLD, DIM, Screen

if TYPE_CHECKING:
    from kvbaton import Client, Generation

PROMPT = "def fibonacci(n):\n"
MAX_TOKENS = 48
SEED = 1
TIMEOUT_S = 60.0
NUM_ATTEMPTS = 25
ATTEMPT_INTERVAL_S = 0.2


def show_sample(plan: Plan, screen: Screen) -> None:
    """Stream one completion. Raises KvbatonError if the cluster does not give it."""
    from kvbaton import Client

    screen.line()
    screen.part(screen.styled(PROMPT, BOLD))
    with Client(plan.client_endpoint, keys=plan.keys or "") as client:
        generation = _first_answer(client, screen)
        for token in generation:
            screen.part(token.text)
    screen.part("\n")
    assert generation.timings is not None
    assert generation.usage is not None
    screen.line()
    for line in timeline(generation.timings, generation.usage):
        screen.line(screen.styled(line, DIM))


def _first_answer(client: Client, screen: Screen) -> Generation:
    """A completion whose first token is there and shown. Of several gateways, which share the HTTP
    port, another one may have said that it is ready: this one may need a moment more."""
    for _ in range(NUM_ATTEMPTS):
        generation = client.generate(
            PROMPT, max_tokens=MAX_TOKENS, temperature=0.7, seed=SEED, deadline_s=TIMEOUT_S
        )
        try:
            first = next(generation, None)
        except UnavailableError as error:
            last = error
            time.sleep(ATTEMPT_INTERVAL_S)
        else:
            screen.part(first.text if first else "")
            return generation
    raise last


def timeline(timings: Timings, usage: Usage) -> list[str]:
    """Where a request's time went, one line for each thing that happened."""
    workers = list(dict.fromkeys([timings.prefill_worker, timings.decode_worker]))
    events = [
        (timings.placed_ms, f"placed on {' and '.join(workers)}"),
        (timings.prefilled_ms, f"{usage.num_prompt_tokens} prompt tokens prefilled"),
        (timings.first_token_ms, "first token"),
        (timings.finished_ms, _speed(timings, usage)),
    ]
    if len(workers) > 1:
        events.append((timings.handed_over_ms, f"handed over to {timings.decode_worker}"))
    events = sorted((event for event in events if event[0] > 0), key=lambda event: event[0])
    return [f"{at_ms:8.1f} ms  {text}" for at_ms, text in events]


def _speed(timings: Timings, usage: Usage) -> str:
    text = f"{usage.num_output_tokens} tokens"
    elapsed_s = (timings.finished_ms - timings.first_token_ms) / 1000
    if usage.num_output_tokens > 1 and elapsed_s > 0:
        text += f", {(usage.num_output_tokens - 1) / elapsed_s:.0f} a second after the first"
    return text


def show_hints(plan: Plan, screen: Screen) -> None:
    """Where the cluster is reached, and lines to paste."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": MAX_TOKENS, "stream": True})
    places = {
        "OpenAI API": f"{plan.http_url}/v1",
        "msgpack": plan.client_endpoint,
        "metrics": f"{plan.http_url}/metrics",
    }
    screen.line()
    for name, address in places.items():
        screen.line(f"{name:<12}{screen.styled(address, BOLD)}")
    screen.line()
    screen.line(f"curl -N {plan.http_url}/v1/completions -H 'Content-Type: application/json' \\")
    if plan.gateway.get("KVBATON_API_KEYS"):
        screen.line("  -H 'Authorization: Bearer YOUR-API-KEY' \\")
    screen.line(f"  -d '{body}'")
    screen.line()
    screen.line("from kvbaton import Client")
    keys = f", keys={json.dumps(str(client_file(plan.keys)))}" if plan.keys else ""
    screen.line(f'with Client("{plan.client_endpoint}"{keys}) as client:')
    screen.line(f"    for token in client.generate({json.dumps(PROMPT)}, max_tokens={MAX_TOKENS}):")
    screen.line('        print(token.text, end="", flush=True)')
    screen.line()
    if key_file := admin_key_file(plan.gateway):
        ask = [str(ROOT / ".venv/bin/python"), "-m", "kvbaton", "audit"]
        flags = ["--gateway", plan.client_endpoint, "--admin-key-file", str(key_file)]
        flags += ["--keys", str(plan.keys or "")]
        screen.line(shlex.join(ask + flags))
        screen.line()
    screen.line(screen.styled("Ctrl-C stops everything.", DIM))
