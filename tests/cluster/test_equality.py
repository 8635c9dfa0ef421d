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

NUM_REQUESTS = 16
NUM_TOKENS = 40
VOCAB = 512
MODES: dict[str, dict[str, Any]] = {
    "shm": {"worker": {"mover": "shm"}},
    "zmq": {"worker": {"mover": "zmq"}},
    "colocated": {"mode": "colocated", "num_prefill": 0, "num_decode": 2},
}


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    options: dict[str, Any]

    @property
    def is_greedy(self) -> bool:
        return bool(self.options["temperature"] == 0)


Output = list[tuple[int, float | None, tuple[tuple[int, float], ...]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return make_model(folder, family="qwen3", vocab=VOCAB, head_dim=32, eos=None, seed=3)


def requests() -> list[Request]:
    """Lengths from 1 to beyond blocks and chunks; half of the prompts begin alike."""
    rng = random.Random(5)
    common = [rng.randrange(5, VOCAB) for _ in range(70)]
    made = []
    for index in range(NUM_REQUESTS):
        length = [1, 15, 16, 17, 31, 64, 65, 200][index // 2]
        tokens = [rng.randrange(5, VOCAB) for _ in range(length)]
        options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "logprobs": 3, "temperature": 0}
        if index % 2:
            options |= {
                "temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "seed": index,
                "presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.2,
            }  # fmt: skip
        prompt = common + tokens if index // 2 % 2 else tokens
        made.append(Request(prompt, options))
    return made


async def ask(endpoint: str, asked: list[Request]) -> tuple[list[Output], int]:
    """All at once, twice: outputs of the second time, and how many prompt tokens it found."""
    async with AsyncClient(endpoint) as client:

        async def one(request: Request) -> tuple[Output, int]:
            stream = client.generate(token_ids=request.prompt, **request.options)
            output = [
                (token.token_id, token.logprob, tuple(token.top_logprobs)) async for token in stream
            ]
            assert stream.usage is not None
            return output, stream.usage.num_cached_tokens

        first = await asyncio.gather(*(one(request) for request in asked))
        second = await asyncio.gather(*(one(request) for request in reversed(asked)))
        assert [output for output, _ in first] == [output for output, _ in reversed(second)]
        return [output for output, _ in first], sum(cached for _, cached in second)


def outputs_of(
    folder: Path, model: Path, mode: str, dtype: str, prefix_cache: bool
) -> list[Output]:
    worker = {
        "model": model, "dtype": dtype, "batch_invariant": True, "max_num_batched_tokens": 48,
    } | MODES[mode].get("worker", {})  # fmt: skip
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


def reference(model: Path, request: Request) -> list[int]:
    """transformers' greedy continuation."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
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


@pytest.mark.parametrize(
    ("dtype", "prefix_cache"), [("float32", True), ("float32", False), ("bfloat16", True)]
)
def test_every_path_gives_the_same_bits(
    tmp_path: Path, model: Path, dtype: str, prefix_cache: bool
) -> None:
    outputs = {
        mode: outputs_of(tmp_path / mode, model, mode, dtype, prefix_cache) for mode in MODES
    }
    for mode in MODES:
        assert outputs[mode] == outputs["shm"], mode
    assert len({tuple(output) for output in outputs["shm"]}) == NUM_REQUESTS
    assert all(len(output) == NUM_TOKENS for output in outputs["shm"])
    if dtype == "float32":
        for request, output in zip(requests(), outputs["shm"], strict=True):
            if request.is_greedy:
                assert [token for token, _, _ in output] == reference(model, request)
