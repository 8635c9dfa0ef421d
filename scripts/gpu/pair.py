"""One prefill and one decode process on one GPU, against one process that does both."""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from kvbaton import Client
from scripts.gpu.parts import Result
from scripts.make_model import make_model
from tests.cluster.processes import Cluster, running

VOCAB = 2048
LENGTHS = (1, 60, 64, 200, 500, 900, 1300, 1700)
NUM_TOKENS = 48
HEARTBEATS_S = 3.0  # a few
LEAST_NEIGHBOUR_SHARE = 0.5  # of blocks; the last of a prompt, if it is not full, has no name
LEAST_EQUAL = 7  # a near tie in bfloat16 may fall the other way, where chunks differ
MODES: dict[str, dict[str, Any]] = {
    "1 prefill + 1 decode": {},
    "colocated": {"mode": "colocated", "num_prefill": 0},
}


def main() -> None:
    """Write what was found to the file that is named."""
    out, device = Path(sys.argv[1]), sys.argv[2]
    rng = random.Random(3)  # noqa: S311 - the same each time
    prompts = [[rng.randrange(5, VOCAB) for _ in range(length)] for length in LENGTHS]
    result = Result("pair")
    with tempfile.TemporaryDirectory(prefix="kvbaton-gpu-pair-") as name:
        folder = Path(name)
        model = make_model(
            folder / "model", layers=4, hidden=512, heads=8, kv_heads=2, head_dim=64, vocab=VOCAB,
            dtype="bfloat16", eos=None,
        )  # fmt: skip
        outputs = {
            mode: serve(result, mode, folder, {"model": model, "device": device}, prompts)
            for mode in MODES
        }
    first, second = outputs.values()
    result.agree("answers of both", first, second, LEAST_EQUAL)
    result.save(out)


def serve(
    result: Result, mode: str, folder: Path, worker: dict[str, Any], prompts: list[list[int]]
) -> list[list[int]]:
    """What a cluster answers, one request after another and then again, from what is cached."""
    logs = folder / mode.replace(" ", "-")
    logs.mkdir()
    with (
        running(logs, worker=worker, store={"kv_bytes": "512M"}, **MODES[mode]) as cluster,
        cluster.client() as client,
    ):
        answers = [answer(client, prompt)[0] for prompt in prompts]
        again, times = zip(*(answer(client, prompt) for prompt in prompts), strict=True)
        result.agree(f"{mode}: asked again", list(again), answers, LEAST_EQUAL)
        if worker["device"] == "cuda" and "num_prefill" not in MODES[mode]:
            share = neighbour_share(cluster)
            result.aim("blocks from prefill's memory by CUDA IPC", share, LEAST_NEIGHBOUR_SHARE)
    first_ms = statistics.median(each[0] for each in times) * 1e3
    next_ms = statistics.median(each[1] for each in times) * 1e3
    text = f"first token {first_ms:.1f} ms, next {next_ms:.2f} ms"
    result.tell(f"{mode}: cached prompts", text, first_ms=first_ms, next_ms=next_ms)
    return answers


def neighbour_share(cluster: Cluster) -> float:
    """Of the blocks that decode copied to its memory, as far as it has told of them."""
    time.sleep(HEARTBEATS_S)
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{cluster.base_url}/metrics").text):
        for sample in family.samples:
            if sample.labels.get("role") == "decode":
                counts[sample.name] += sample.value  # type: ignore[assignment]
    neighbours, all_of_them = (
        counts[f"kvbaton_worker_{name}_blocks_total"] for name in ("neighbour", "device")
    )
    return neighbours / max(1, all_of_them)


def answer(client: Client, prompt: list[int]) -> tuple[list[int], tuple[float, float]]:
    """The tokens, and the seconds to the first and from one to the next."""
    begun = time.perf_counter()
    stream = client.generate(
        token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True
    )
    tokens = [next(stream).token_id]
    first = time.perf_counter()
    tokens += [token.token_id for token in stream]
    each_s = (time.perf_counter() - first) / (len(tokens) - 1)
    return tokens, (first - begun, each_s)


if __name__ == "__main__":
    main()
