"""The engine on a model of a billion random weights, against what this GPU can move and multiply,
measured in the same run."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.engine.cuda.engine import DeviceEngine
from common.engine.work import Work
from scripts.gpu.blank_model import fill_weights, write_blank_model
from scripts.gpu.engines import GREEDY, device_engine, follower_of, tables, whole
from scripts.gpu.parts import Result

# The shape of Llama-3.2-1B; in a rehearsal on the CPU, one that is quick to compute.
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64,
        "intermediate": 8192, "vocab": 128256, "tied": True,
    },
    "cpu": {
        "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
        "intermediate": 96, "vocab": 512, "tied": True,
    },
}  # fmt: skip
BATCHES = (1, 8, 64)
CONTEXT = 1024
PROMPT = 2048
ROUNDS = 20
LEAST_DECODE_SHARE = 0.6  # of the bandwidth, at the largest batch
LEAST_PREFILL_SHARE = 0.5  # of the matrix rate


def main() -> None:
    """Write what was found to the file that is named."""
    out, device = Path(sys.argv[1]), sys.argv[2]
    result = Result("speed")
    bandwidth, matrix_rate = measure_limits(result, device)
    width = PROMPT // 64
    with tempfile.TemporaryDirectory(prefix="kvbaton-gpu-model-") as folder:
        model = write_blank_model(Path(folder), context=PROMPT, **SIZES[device])
        engine = device_engine(model, max(BATCHES) * width // 2, device)
    weight_bytes = fill_weights(engine)
    result.tell("attention", engine.model.name)
    measure_decode(result, engine, weight_bytes, bandwidth)
    measure_prefill(result, engine, matrix_rate)
    measure_copies(result, engine)
    engine.close()
    result.save(out)


def median_s(work: Callable[[], object], rounds: int = ROUNDS, warm_up: int = 3) -> float:
    """Seconds, with all that the GPU does for it."""
    times = []
    for number in range(warm_up + rounds):
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= warm_up:
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure_limits(result: Result, device: str) -> tuple[float, float]:
    """Bytes per second, the better of a copy and of a matrix times a vector, which only reads; and
    operations per second of a large bfloat16 product."""
    size, edge = (1 << 30, 8192) if device == "cuda" else (1 << 22, 256)
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copied = 2 * size / median_s(lambda: target.copy_(source))
    matrix = source.view(-1, 4096)
    vector = torch.ones(4096, dtype=torch.bfloat16, device=device)
    read = size / median_s(lambda: torch.mv(matrix, vector))
    left, right = (
        torch.empty(edge, edge, dtype=torch.bfloat16, device=device).normal_() for _ in range(2)
    )
    rate = 2 * edge**3 / median_s(lambda: left @ right)
    bandwidth = max(copied, read)
    result.tell("bandwidth", f"{bandwidth / 1e9:.0f} GB/s", copied=copied, read=read)
    result.tell("matrix rate", f"{rate / 1e12:.1f} TFLOP/s", rate=rate)
    return bandwidth, rate


def measure_decode(
    result: Result, engine: DeviceEngine, weight_bytes: int, bandwidth: float
) -> None:
    """Whole steps, from the scheduler's list to drawn tokens."""
    layout = engine.info.layout
    places = tables(max(BATCHES), CONTEXT // layout.block_size)
    tokens = [1] * CONTEXT
    for batch in BATCHES:
        works = [Work(tokens, 1, CONTEXT - 1, 1, table, GREEDY) for table in places[:batch]]

        def step(works: list[Work] = works) -> object:
            return engine.step_sync(works)

        step()  # all KV is in the pool now
        follower_of(engine).pool.blocks.normal_()
        step_s = median_s(step)
        kv_bytes = batch * CONTEXT * layout.block_bytes // layout.block_size
        share = (weight_bytes + kv_bytes) / step_s / bandwidth
        text = f"{step_s * 1e3:.2f} ms, {batch / step_s:.0f} tokens/s, {share:.0%} of bandwidth"
        name = f"decode, {batch} x {CONTEXT}"
        result.tell(name, text, seconds=step_s, share=share)
        if batch == max(BATCHES):
            result.aim(f"{name}: share of bandwidth", share, LEAST_DECODE_SHARE)


def measure_prefill(result: Result, engine: DeviceEngine, matrix_rate: float) -> None:
    """One prompt in one step, up to its first token."""
    config = engine.model.config
    (table,) = tables(1, PROMPT // engine.info.layout.block_size)
    works = [whole([5 + place % 400 for place in range(PROMPT)], table)]
    step_s = median_s(lambda: engine.step_sync(works))
    *linears, head = engine.model.linears()
    in_products = sum(2 * PROMPT * each.in_features * each.out_features for each in linears)
    in_products += 2 * head.in_features * head.out_features
    attended = config.num_heads * config.head_dim * PROMPT * (PROMPT + 1) // 2
    share = (in_products + 4 * config.num_layers * attended) / step_s / matrix_rate
    text = f"{step_s * 1e3:.2f} ms, {PROMPT / step_s:.0f} tokens/s, {share:.0%} of matrix rate"
    result.tell(f"prefill, {PROMPT}", text, seconds=step_s, share=share)
    result.aim(f"prefill, {PROMPT}: share of matrix rate", share, LEAST_PREFILL_SHARE)


def measure_copies(result: Result, engine: DeviceEngine) -> None:
    """The KV of a prompt out to the arena and in again, as a handoff between two processes does."""
    follower, layout = follower_of(engine), engine.info.layout
    (slots,) = tables(1, PROMPT // layout.block_size)
    num_bytes = len(slots) * layout.block_bytes
    prompt = whole([5] * PROMPT, slots)
    times: dict[str, list[float]] = {"out": [], "in": []}
    for _ in range(ROUNDS):
        engine.step_sync([prompt])  # it is unsaved again
        for name, copy in (("out", follower.save_sync), ("in", follower.fetch_sync)):
            begun = time.perf_counter()
            copy(dict.fromkeys(slots, b""))
            times[name].append(time.perf_counter() - begun)
    for name, seconds in times.items():
        copy_s = statistics.median(seconds)
        rate = num_bytes / copy_s
        text = f"{copy_s * 1e3:.2f} ms, {rate / 1e9:.1f} GB/s"
        result.tell(f"KV of {PROMPT} tokens {name}", text, seconds=copy_s, rate=rate)


if __name__ == "__main__":
    main()
