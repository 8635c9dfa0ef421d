"""Small random models on disk, their counterparts in transformers, and engines to run them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from common.engine.runner import TorchEngine
from common.engine.work import Work
from kvbaton.sampling import SamplingParams

VOCAB = 257
NUM_BLOCKS = 64
GREEDY = SamplingParams(temperature=0)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_mha_tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama_linear": ("Llama", {"rope_parameters": _LINEAR}),
    "llama_llama3_biased": (
        "Llama",
        {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    # 6 heads on 1, and sizes that are no multiples of a vector
    "llama_odd": (
        "Llama",
        {
            "hidden_size": 78,
            "intermediate_size": 100,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "head_dim": 12,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 21, "head_dim": 32}),
    "mistral_wide": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"sliding_window": 20}),
    "qwen2_sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def build(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, **saving: Any
) -> torch.nn.Module:
    """Save a random model of `family` to `folder`; returns transformers' model of it."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**_BASE, **options})
    model: Any = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale, shift = (0.1, 0.0) if parameter.dim() > 1 else (0.3, 0.0)
            shift = 1.0 if "norm" in parameter_name else shift
            parameter.copy_(noise * scale + shift)
    model.save_pretrained(folder, **saving)
    assert isinstance(model, torch.nn.Module)
    return model


def reference_logits(model: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    """transformers' logits at every position, [len(tokens), VOCAB] in fp32."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(tokens)])).logits[0].float()
    return logits


def reference_greedy(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that transformers' generate continues with, ends of text included."""
    prompt = torch.tensor([list(tokens)])
    model.generation_config.eos_token_id = None
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count
    )
    continuation: list[int] = output[0, len(tokens) :].tolist()
    return continuation


def make_engine(folder: Path, **options: Any) -> TorchEngine:
    """An engine over its own arena, which holds NaN, so that nothing unwritten is ever used."""
    engine = TorchEngine(folder, **options)
    arena = memoryview(bytearray(NUM_BLOCKS * engine.info.layout.block_bytes))
    engine.attach(arena)
    fill_with_nan(kv(engine))
    return engine


def fill_with_nan(blocks: Tensor) -> None:
    """In int8 it is the scales that are."""
    blocks.fill_(-1 if blocks.dtype is torch.int8 else float("nan"))


def kv(engine: TorchEngine) -> Tensor:
    """All KV of the engine, as KvCache.blocks."""
    assert engine._cache is not None
    return engine._cache.blocks


def sequence_kv(engine: TorchEngine, slots: Sequence[int], length: int) -> Tensor:
    """KV of one sequence in order of position, [layers, 2, kv_heads, length, head_dim]."""
    blocks = kv(engine)[list(slots)].permute(1, 2, 3, 0, 4, 5)
    return blocks.flatten(3, 4)[..., :length, :].clone()


def logits_of(engine: TorchEngine, works: Sequence[Work]) -> Tensor:
    """Raw logits of the works' sampled rows."""
    with torch.inference_mode():
        hidden, step = engine._forward(works)
        return engine.model.logits(hidden, step.sample_rows).clone()


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]


def whole(tokens: Sequence[int], slots: Sequence[int], start: int = 0) -> Work:
    """All of `tokens` from `start` on in one work, and the token after them."""
    return Work(tokens, len(tokens), start, len(tokens) - start, slots, GREEDY)


def part(tokens: Sequence[int], slots: Sequence[int], start: int, stop: int) -> Work:
    """Positions [start, stop) of `tokens`, nothing sampled."""
    return Work(tokens, len(tokens), start, stop - start, slots, GREEDY, sample=False)
