"""The GPU's engine against the CPU's, against transformers, and against itself."""

from __future__ import annotations

import importlib.util
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.engine.cuda.engine import DeviceEngine
from common.engine.runner import TorchEngine
from scripts.gpu.engines import cpu_engine, decode, device_engine, logits_of
from scripts.gpu.parts import Result
from scripts.make_model import make_model

LENGTHS = (1, 63, 64, 65, 130, 200, 300, 17, 5)  # across blocks; nine fill up to sixteen
WIDTH = 6  # blocks of each
NUM_TOKENS = 24
VOCAB = 512
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "heads": 8, "kv_heads": 2, "head_dim": 64, "hidden": 256},
    "qwen3": {"family": "qwen3", "heads": 4, "kv_heads": 4, "head_dim": 128, "hidden": 256},
}
# A bf16 engine may err by so many times what the CPU's errs, both against float32.
MOST_TIMES_CPU_ERROR = 2.0
MOST_FLOAT32_ERROR = 2e-3
LEAST_EQUAL = 7  # of the prompts: a near tie in bfloat16 may fall the other way


@dataclass(frozen=True)
class Case:
    """One model, and the prompts that all engines are given."""

    name: str
    model: Path
    device: str
    prompts: list[list[int]]

    def logits(self, engine: TorchEngine) -> Tensor:
        """Of an engine that is used for nothing else."""
        logits = logits_of(engine, self.prompts, WIDTH)
        engine.close()
        return logits

    def cpu(self, dtype: str) -> TorchEngine:
        return cpu_engine(self.model, len(LENGTHS) * WIDTH, dtype)

    def gpu(self, dtype: str) -> DeviceEngine:
        return device_engine(self.model, len(LENGTHS) * WIDTH, self.device, dtype=dtype)


def main() -> None:
    """Write what was found to the file that is named."""
    out, device = Path(sys.argv[1]), sys.argv[2]
    rng = random.Random(1)  # noqa: S311 - the same each time
    prompts = [[rng.randrange(5, VOCAB) for _ in range(length)] for length in LENGTHS]
    result = Result("parity")
    for name, sizes in MODELS.items():
        with tempfile.TemporaryDirectory(prefix="kvbaton-gpu-model-") as folder:
            model = make_model(Path(folder), layers=3, vocab=VOCAB, dtype="bfloat16", **sizes)
            case = Case(name, model, device, prompts)
            compare_logits(result, case)
            compare_ways(result, case)
    result.save(out)


def compare_logits(result: Result, case: Case) -> None:
    """float32 must agree closely; bfloat16 must not err much more than the CPU's does."""
    exact, single = case.logits(case.cpu("float32")), case.logits(case.gpu("float32"))
    name = f"{case.name}: float32 logits and the CPU's"
    result.check(name, distance(single, exact), MOST_FLOAT32_ERROR)
    if importlib.util.find_spec("transformers"):
        name = f"{case.name}: float32 logits and transformers'"
        result.check(name, distance(single, transformers_logits(case)), MOST_FLOAT32_ERROR)
    expected = distance(case.logits(case.cpu("bfloat16")), exact)
    error = distance(case.logits(case.gpu("bfloat16")), exact)
    result.check(
        f"{case.name}: error in bfloat16 over the CPU's", error / expected, MOST_TIMES_CPU_ERROR
    )


def compare_ways(result: Result, case: Case) -> None:
    """One engine in bfloat16: however a sequence is computed, the tokens are the same, up to
    rounding where the sizes of the products differ."""
    engine = case.gpu("bfloat16")
    result.tell(f"{case.name}: attention", engine.model.name)

    def run(**how: Any) -> list[list[int]]:
        return decode(engine, case.prompts, WIDTH, NUM_TOKENS, **how)

    expected = run()
    all_of_them = len(case.prompts)
    result.agree(f"{case.name}: tokens once more", run(), expected, all_of_them)
    by_arena = run(by_arena=True)
    result.agree(f"{case.name}: tokens by way of the arena", by_arena, expected, all_of_them)
    result.agree(f"{case.name}: tokens in chunks", run(chunk=48), expected, LEAST_EQUAL)
    one_by_one = [decode(engine, [prompt], WIDTH, NUM_TOKENS)[0] for prompt in case.prompts]
    result.agree(f"{case.name}: tokens one by one", one_by_one, expected, LEAST_EQUAL)
    if engine._graphs is not None:
        engine._graphs = None
        result.agree(f"{case.name}: tokens without graphs", run(), expected, LEAST_EQUAL)
    engine.close()


def transformers_logits(case: Case) -> Tensor:
    """After each prompt, [prompts, vocab_size]."""
    import transformers

    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(case.model, dtype=torch.float32).to(case.device).eval()
    with torch.inference_mode():
        rows = [
            model(torch.tensor([prompt], device=case.device)).logits[0, -1]
            for prompt in case.prompts
        ]
    return torch.stack(rows).float().cpu()


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two logits."""
    return float((ours - theirs).abs().max())


if __name__ == "__main__":
    main()
