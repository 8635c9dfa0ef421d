"""Real processes under load: every stream gets its own text, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from common.engine.mock import mock_output
from kvbaton import AsyncClient
from kvbaton.errors import UnavailableError
from tests.cluster.processes import cpu_seconds, metrics, running

MOCK = {"engine": "mock", "mock_step_ms": 2}


def random_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(5, 2000) for _ in range(rng.randrange(1, 400))]


@pytest.mark.parametrize("mover", ["shm", "zmq"])
async def test_200_streams_at_once_each_get_their_own_tokens(tmp_path: Path, mover: str) -> None:
    rng = random.Random(1)
    prompts = [random_prompt(rng) for _ in range(200)]
    with running(tmp_path, num_prefill=2, num_decode=2, worker=MOCK | {"mover": mover}) as cluster:
        async with AsyncClient(f"tcp://127.0.0.1:{cluster.client_port}") as client:

            async def one(prompt: list[int]) -> list[int]:
                stream = client.generate(token_ids=prompt, max_tokens=20, temperature=0)
                return [token.token_id async for token in stream]

            outputs = await asyncio.gather(*(one(prompt) for prompt in prompts))
        assert outputs == [mock_output(prompt, 20) for prompt in prompts]
        await nothing_is_held(cluster.base_url)


async def test_200_http_streams_at_once_give_the_text_of_their_tokens(tmp_path: Path) -> None:
    rng = random.Random(2)
    prompts = [random_prompt(rng) for _ in range(200)]
    with running(tmp_path, num_prefill=2, num_decode=2, worker=MOCK) as cluster:
        async with AsyncOpenAI(base_url=f"{cluster.base_url}/v1", api_key="none") as client:

            async def one(prompt: list[int]) -> str:
                stream = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=20, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            texts = await asyncio.gather(*(one(prompt) for prompt in prompts))
        from services.gateway.text.model import TextModel

        text_model = TextModel(Path("models/demo"))
        for prompt, text in zip(prompts, texts, strict=True):
            detokenizer = text_model.detokenizer()
            pieces = [detokenizer.add(token) for token in mock_output(prompt, 20)]
            assert text == "".join(pieces) + detokenizer.flush()
        await nothing_is_held(cluster.base_url)


async def nothing_is_held(base_url: str) -> None:
    """Within a few heartbeats all blocks are free or cached, and no request is left."""
    names = ("granted", "committed", "quarantined")
    async with httpx.AsyncClient(base_url=base_url) as http:
        for _ in range(100):
            stats = metrics((await http.get("/metrics")).text)
            held = sum(stats[f"kvbaton_gateway_kv_blocks_{name}"] for name in names)
            if held == stats["kvbaton_gateway_handoffs"] == 0:
                return
            await asyncio.sleep(0.1)
    raise AssertionError(stats)


def test_clients_that_leave_free_what_their_requests_held(tmp_path: Path) -> None:
    with running(tmp_path, worker=MOCK) as cluster:
        client = OpenAI(base_url=f"{cluster.base_url}/v1", api_key="none")
        for _ in range(5):
            stream = client.completions.create(
                model="demo", prompt="def f", max_tokens=2000, stream=True
            )
            next(iter(stream))
            stream.close()
        asyncio.run(nothing_is_held(cluster.base_url))


def test_without_a_decode_worker_requests_are_refused(tmp_path: Path) -> None:
    """After a moment in which it may be restarting."""
    with running(tmp_path, worker=MOCK) as cluster:
        assert cluster.terminate("decode.1") == 0
        for _ in range(100):
            answer = httpx.get(f"{cluster.base_url}/ready")
            if answer.status_code == 503:
                break
            time.sleep(0.05)
        answer = httpx.post(f"{cluster.base_url}/v1/completions", json={"prompt": "x"}, timeout=30)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "no decode worker" in answer.json()["error"]["message"]
        with cluster.client(resume_s=0) as client, pytest.raises(UnavailableError):
            list(client.generate("x"))
        # A worker started by hand joins the running cluster.
        cluster.start("decode", 2, **MOCK)
        cluster.wait_ready(2)
        with cluster.client() as client:
            assert len(list(client.generate("x", max_tokens=3))) == 3


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_streams_survive_the_kill_of_a_worker(tmp_path: Path, role: str) -> None:
    rng = random.Random(3)
    prompts = [random_prompt(rng) for _ in range(12)]
    with running(tmp_path, num_prefill=2, num_decode=2, worker=MOCK) as cluster:

        async def serve() -> list[list[int]]:
            async with AsyncClient(f"tcp://127.0.0.1:{cluster.client_port}") as client:
                streams = [
                    client.generate(token_ids=prompt, max_tokens=300, temperature=0)
                    for prompt in prompts
                ]
                started = [await anext(stream) for stream in streams]
                cluster.kill(f"{role}.1")
                rest = [[token.token_id async for token in stream] for stream in streams]
                attempts = [stream.timings.num_attempts for stream in streams if stream.timings]
                if role == "decode":
                    assert max(attempts) > 1, "the fault must have hit something"
                return [
                    [first.token_id, *tokens] for first, tokens in zip(started, rest, strict=True)
                ]

        assert asyncio.run(serve()) == [mock_output(prompt, 300) for prompt in prompts]


def test_an_idle_cluster_uses_hardly_any_cpu(tmp_path: Path) -> None:
    with running(tmp_path, worker=MOCK) as cluster:
        with cluster.client() as client:
            list(client.generate("x", max_tokens=3))
        pids = [process.pid for process in cluster.processes.values()]
        time.sleep(2)
        before, started_at = cpu_seconds(pids), time.monotonic()
        time.sleep(15)
        share = (cpu_seconds(pids) - before) / (time.monotonic() - started_at)
        assert share < 0.01, f"{share:.2%} of one core"
