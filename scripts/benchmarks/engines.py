"""Engines with work to do: models, arenas full of KV, decode and prefill steps."""

from __future__ import annotations

import argparse
import contextlib
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from common.engine.config import load_config
from common.engine.kv_cache import KvCache, quantised_rows
from common.engine.runner import TorchEngine
from common.engine.work import Work
from kvbaton.sampling import SamplingParams
from scripts.make_model import PRESETS, make_model

_RANDOM_BLOCKS = 64
ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
GREEDY = SamplingParams(temperature=0)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="135m", help="sizes of a made bf16 model")
    add("--model", type=Path, metavar="FOLDER", help="measure this model instead")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and how long to measure."""
    add_model_options(parser)
    add = parser.add_argument
    add("--core", type=int, metavar="N", help="core to stay on (default: the last)")
    add("--rounds", type=int, default=15, help="alternated rounds (default: 15)")


def name_of(options: argparse.Namespace) -> str:
    """How the report calls the model."""
    return str(options.preset if options.model is None else options.model.resolve().name)


@contextlib.contextmanager
def model_folder(options: argparse.Namespace) -> Iterator[Path]:
    """The folder that --model names, or one made of random weights for as long as it is needed."""
    if options.model is not None:
        yield options.model.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="kvbaton-bench-") as folder:
        yield make_model(Path(folder) / "model", dtype="bfloat16", **PRESETS[options.preset])


def vocab_of(model: Path) -> int:
    """How many tokens the model of a folder knows."""
    return load_config(model).vocab_size


@dataclass(frozen=True)
class Bench:
    """An engine, its arena filled with random KV, and a block table for each sequence."""

    engine: TorchEngine
    arena: memoryview
    tables: list[list[int]]

    def decode(self, num_sequences: int, context: int, sampling: SamplingParams) -> None:
        """One decode step in which each sequence's KV then holds `context` positions."""
        tokens = [1] * context
        self.engine.step_sync(
            [
                Work(tokens, 1, context - 1, 1, table, sampling)
                for table in self.tables[:num_sequences]
            ]
        )

    def prefill(self, num_tokens: int) -> None:
        """One prompt in one step, up to its first token."""
        tokens = [5 + index % (self.engine.info.vocab_size - 5) for index in range(num_tokens)]
        self.engine.step_sync([Work(tokens, num_tokens, 0, num_tokens, self.tables[0], GREEDY)])


def make_bench(engine: TorchEngine, num_sequences: int, num_tokens: int) -> Bench:
    """Room for sequences of `num_tokens` positions each, their blocks scattered over the arena."""
    layout = engine.info.layout
    per_sequence = -(-num_tokens // layout.block_size)
    count = num_sequences * per_sequence
    arena = memoryview(mmap.mmap(-1, count * layout.block_bytes))
    fill(KvCache(layout, arena))
    engine.attach(arena)
    slots: list[int] = np.random.default_rng(0).permutation(count).tolist()
    tables = [slots[at : at + per_sequence] for at in range(0, count, per_sequence)]
    return Bench(engine, arena, tables)


def fill(cache: KvCache) -> None:
    """Random KV; some blocks of it, again and again."""
    shape = (_RANDOM_BLOCKS, *cache.blocks.shape[1:-1], cache.layout.head_dim)
    numbers = torch.randn(shape)
    rows = quantised_rows(numbers) if cache.is_int8 else numbers.to(cache.blocks.dtype)
    for blocks in torch.split(cache.blocks, _RANDOM_BLOCKS):
        blocks.copy_(rows[: len(blocks)])


def source_prompts(folder: Path, count: int, length: int) -> list[list[int]]:
    """Prompts of `length` tokens each: pieces of this project's own source, by the tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    files: Sequence[Path] = sorted((ROOT / "common").rglob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    starts = np.random.default_rng(0).integers(0, len(ids) - length, count).tolist()
    return [ids[start : start + length] for start in starts]
