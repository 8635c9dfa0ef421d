"""Fields of the HTTP API that need a model to mean something, with real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.processes import running

PROMPT = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1)" * 3


def test_a_real_model_does_what_requests_ask(tmp_path: Path) -> None:
    worker = {"batch_invariant": True}
    with (
        running(tmp_path, worker=worker) as cluster,
        httpx.Client(base_url=cluster.base_url, timeout=60) as client,
    ):

        def ask(**values: Any) -> dict[str, Any]:
            body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, **values}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

        assert client.get("/health_generate").status_code == 200
        choices_find_their_prompt(ask)
        an_echo_scores_what_was_drawn(ask)
        lengths_are_exact(ask)
        tokens_are_kept_out(ask)
        assert client.post("/reset_prefix_cache").json()["num_blocks"] > 0
        assert cached(ask()) == 0


def cached(answer: dict[str, Any]) -> int:
    num: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return num


def choices_find_their_prompt(ask: Any) -> None:
    several = ask(n=4, temperature=1, seed=5)
    assert len({choice["text"] for choice in several["choices"]}) > 1
    assert cached(several) == 0, "nobody had asked this before"
    again = ask(n=4, temperature=1, seed=5)
    assert again["choices"] == several["choices"]
    assert cached(again) > 0
    best = ask(n=1, best_of=4, temperature=1, seed=5)
    assert best["choices"][0]["text"] in {choice["text"] for choice in several["choices"]}


def an_echo_scores_what_was_drawn(ask: Any) -> None:
    drawn = ask(logprobs=1, return_token_ids=True)["choices"][0]
    ids = [*drawn["prompt_token_ids"], *drawn["token_ids"]]
    for max_tokens in (0, 1):
        scored = ask(prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens)
        logprobs = scored["choices"][0]["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + max_tokens
        assert scored["usage"]["completion_tokens"] == max_tokens
        assert logprobs["token_logprobs"][0] is None
        num = len(drawn["token_ids"])
        begin = len(ids) - num
        found = logprobs["token_logprobs"][begin : begin + num]
        assert found == pytest.approx(drawn["logprobs"]["token_logprobs"], abs=1e-4)
        tops = logprobs["top_logprobs"][begin : begin + num]
        tokens = logprobs["tokens"][begin : begin + num]
        assert [max(top, key=top.get) for top in tops] == tokens, "they were drawn greedily"


def lengths_are_exact(ask: Any) -> None:
    for length in (1, 2, 17):
        answer = ask(max_tokens=length, min_tokens=length, ignore_eos=True, temperature=1)
        assert answer["usage"]["completion_tokens"] == length
        assert answer["choices"][0]["finish_reason"] == "length"


def tokens_are_kept_out(ask: Any) -> None:
    free = ask(return_token_ids=True)["choices"][0]
    first, *_ = free["token_ids"]
    banned = ask(return_token_ids=True, logit_bias={str(first): -100})["choices"][0]
    assert first not in banned["token_ids"]
    wanted = ask(return_token_ids=True, allowed_token_ids=[first])["choices"][0]
    assert set(wanted["token_ids"]) == {first}
