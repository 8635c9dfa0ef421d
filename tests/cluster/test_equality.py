"""The first oracle: where a token is computed does not matter.

In batch-invariant mode a request's tokens and log-probabilities are the same bits whether its
prompt was computed by a prefill worker or by decode itself, whether its KV was shared or moved,
whether its prefix was found or computed, and whatever else was in flight.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvbaton import AsyncClient
from scripts.make_model import make_model
from tests.cluster.processes import running

NUM_TOKENS = 40
VOCAB = 512
MODES: dict[str, dict[str, Any]] = {
    "shm": {"worker": {"mover": "shm"}},
    "zmq": {"worker": {"mover": "zmq"}},
    "compressed": {"worker": {"mover": "zmq", "kv_compression": "lossless", "data_connections": 2}},
    "colocated": {"mode": "colocated", "num_prefill": 0, "num_decode": 2},
}


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    options: dict[str, Any]

    @property
    def is_greedy(self) -> bool:
        return bool(self.options["temperature"] == 0)


Scored = list[tuple[int, float | None, tuple[tuple[int, float], ...]]]
Output = tuple[Scored, Scored]  # the prompt's tokens, if it was scored, and those drawn

FEW = list(range(40, 60))
# What else a request can ask for. tests/sim/test_sampling_fields.py has more of it.
FEATURES: tuple[dict[str, Any], ...] = (
    {"logit_bias": {7: 6.0, 8: 5.5, 9: -100.0}},
    {
        "allowed_token_ids": FEW,
        "bad_words": [[first, second] for first in FEW for second in FEW[:9]],
    },
    {"structured_outputs": {"regex": "([a-e]{2}-){9,30}"}},
    {"prompt_logprobs": 2},
    {"prompt_logprobs": 0, "temperature": 0},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return make_model(folder, family="qwen3", vocab=VOCAB, head_dim=32, seed=3)


def requests() -> list[Request]:
    """Lengths from 1 to beyond blocks and chunks; half of the prompts begin alike."""
    rng = random.Random(5)
    common = [rng.randrange(5, VOCAB) for _ in range(70)]
    made = []
    for index in range(16 + len(FEATURES)):
        length = [1, 15, 16, 17, 31, 64, 65, 200, 2, 90, 120][index // 2]
        tokens = [rng.randrange(5, VOCAB) for _ in range(length)]
        options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 3}
        options |= {"temperature": 0}
        if index % 2:
            options |= {
                "temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "seed": index,
                "presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.2,
            }  # fmt: skip
        if index >= 16:
            options |= {"temperature": 0.9, "seed": index} | FEATURES[index - 16]
        prompt = common + tokens if index // 2 % 2 else tokens
        made.append(Request(prompt, options))
    return made


async def ask(endpoint: str, asked: list[Request]) -> tuple[list[Output], int]:
    """All at once, twice: outputs of the second time, and how many prompt tokens it found."""
    async with AsyncClient(endpoint) as client:

        async def one(request: Request) -> tuple[Output, int]:
            stream = client.generate(token_ids=request.prompt, **request.options)
            drawn = [
                (token.token_id, token.logprob, tuple(token.top_logprobs)) async for token in stream
            ]
            assert stream.usage is not None
            scored = [
                (token.token_id, token.logprob, tuple(token.top_logprobs))
                for token in stream.prompt
            ]
            return (scored, drawn), stream.usage.num_cached_tokens

        first = await asyncio.gather(*(one(request) for request in asked))
        second = await asyncio.gather(*(one(request) for request in reversed(asked)))
        assert [output for output, _ in first] == [output for output, _ in reversed(second)]
        return [output for output, _ in first], sum(cached for _, cached in second)


def outputs_of(
    folder: Path, model: Path, mode: str, dtype: str, prefix_cache: bool, **options: str
) -> list[Output]:
    worker = {
        "model": model, "dtype": dtype, "batch_invariant": True, "max_num_batched_tokens": 48,
    } | options | MODES[mode].get("worker", {})  # fmt: skip
    shape = {key: value for key, value in MODES[mode].items() if key != "worker"}
    folder.mkdir()
    with running(
        folder,
        worker=worker,
        store={"prefix_cache": prefix_cache},
        gateway={"model": model},
        **shape,
    ) as cluster:
        endpoint = f"tcp://127.0.0.1:{cluster.client_port}"
        outputs, num_cached = asyncio.run(ask(endpoint, requests()))
    assert (num_cached > 0) is prefix_cache
    return outputs


def reference(loaded: Any, request: Request) -> list[int]:
    """transformers' greedy continuation."""
    prompt = torch.tensor([request.prompt])
    with torch.no_grad():
        tokens = loaded.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return [int(token) for token in tokens[0, len(request.prompt) :]]


def check_scores(loaded: Any, request: Request, scored: Scored) -> None:
    """The prompt's log-probabilities are transformers'."""
    with torch.no_grad():
        logprobs = loaded(torch.tensor([request.prompt])).logits[0].log_softmax(-1)
    assert [token for token, _, _ in scored] == request.prompt
    assert scored[0][1:] == (None, ())
    for place, (token, logprob, top) in enumerate(scored[1:]):
        assert len(top) == request.options["prompt_logprobs"]
        for each, value in ((token, logprob), *top):
            assert value == pytest.approx(float(logprobs[place, each]), abs=1e-4)


@pytest.mark.parametrize(
    ("dtype", "prefix_cache"), [("float32", True), ("float32", False), ("bfloat16", True)]
)
def test_every_path_gives_the_same_bits(
    tmp_path: Path, model: Path, dtype: str, prefix_cache: bool
) -> None:
    moved = "compressed" if dtype == "bfloat16" else "zmq"
    modes = ("shm", moved, "colocated")
    outputs = {
        mode: outputs_of(tmp_path / mode, model, mode, dtype, prefix_cache) for mode in modes
    }
    for mode in modes:
        assert outputs[mode] == outputs["shm"], mode
    assert len({tuple(drawn) for _, drawn in outputs["shm"]}) == len(requests())
    assert all(len(drawn) == NUM_TOKENS for _, drawn in outputs["shm"])
    if dtype == "float32":
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        loaded.generation_config.eos_token_id = None
        for request, (scored, drawn) in zip(requests(), outputs["shm"], strict=True):
            if request.is_greedy:
                assert [token for token, _, _ in drawn] == reference(loaded, request)
            if "prompt_logprobs" in request.options:
                check_scores(loaded, request, scored)


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["int8", "w8a8_int8"])
def test_int8_changes_nothing_of_that(tmp_path: Path, model: Path, quantization: str) -> None:
    """KV is rounded once, when it is written, and moves as it is; weights in 8 bits as well."""
    options = {"quantization": quantization, "kv_cache_dtype": "int8"}
    outputs = {
        mode: outputs_of(tmp_path / mode, model, mode, "bfloat16", True, **options)
        for mode in MODES
    }
    for mode in MODES:
        assert outputs[mode] == outputs["shm"], mode
    assert all(len(drawn) == NUM_TOKENS for _, drawn in outputs["shm"])


def test_eight_bits_a_number_are_served_without_a_digest_that_does_not_fit(
    tmp_path: Path, model: Path
) -> None:
    worker = {"model": model, "dtype": "bfloat16", "mover": "zmq", "kv_compression": "int8"}
    with running(tmp_path, worker=worker, gateway={"model": model}) as cluster:
        with cluster.client() as client:
            for turn in range(2):
                stream = client.generate(
                    token_ids=list(range(5, 105)), max_tokens=NUM_TOKENS, temperature=0
                )
                assert len(list(stream)) == NUM_TOKENS
                assert stream.usage is not None
                assert (stream.usage.num_cached_tokens > 0) is (turn > 0)
        assert "blocks_corrupt" not in cluster.logs()
