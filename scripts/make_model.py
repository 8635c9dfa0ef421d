"""Writes a Hugging Face folder of random weights, with a tokenizer, in a supported family.

The command is `scripts/make_model OUT --family llama`. Tests call `make_model`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.engine.config import ARCHITECTURES, ModelError, load_config
from common.engine.kv_cache import TORCH_DTYPES
from scripts.model_files import BOS_ID, EOS_ID, write_json, write_tokenizer_config
from scripts.random_tokenizer import random_tokenizer
from scripts.random_weights import write_weights

ROPE_SCALINGS = ("none", "linear", "llama3")
SHAPE_OPTIONS = (
    "layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "context",
)  # fmt: skip
# The shapes of SmolLM2-135M, Qwen3-0.6B and Llama-3.2-1B; any family can take any of them, save
# that qwen2 needs hidden = heads * head_dim.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "135m": {
        "layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "head_dim": 64,
        "intermediate": 1536, "vocab": 49152, "context": 8192, "tied": True,
    },
    "600m": {
        "layers": 28, "hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 128,
        "intermediate": 3072, "vocab": 151936, "context": 40960, "tied": True,
    },
    "1b": {
        "layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64,
        "intermediate": 8192, "vocab": 128256, "context": 131072, "tied": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What fixes names and shapes of a model's tensors."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool


def make_model(
    out: Path,
    *,
    family: str = "llama",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int | None = None,
    vocab: int = 512,
    context: int = 2048,
    rope_theta: float = 10000.0,
    rope_scaling: str = "none",
    sliding_window: int | None = None,
    tied: bool = False,
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
    eos: int | None = EOS_ID,
) -> Path:
    """Write the folder `out` and return it; the same arguments give the same bytes.

    `head_dim` is hidden / heads unless given, `intermediate` 2.75 * hidden in steps of 8. `context`
    and `sliding_window` count tokens. `eos` None writes a model that never stops by itself. Raises
    ValueError for sizes that do not fit together or that the family does not know.
    """
    if min(layers, hidden, heads, kv_heads, vocab, context) < 1:
        raise ValueError("layers, hidden, heads, kv_heads, vocab and context must be at least 1")
    sizes = Sizes(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads if head_dim is None else head_dim,
        intermediate=-(-hidden * 11 // 32) * 8 if intermediate is None else intermediate,
        vocab=vocab,
        tied=tied,
    )
    check_sizes(sizes)
    config = base_config(sizes, context=context, dtype=dtype, eos=eos)
    config |= {"rope_theta": rope_theta, "rope_scaling": scaling_config(rope_scaling, context)}
    config |= window_config(family, layers, context, sliding_window)
    tokenizer = random_tokenizer(vocab)
    clear_weights(out)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": eos})
    tokenizer.save(str(out / "tokenizer.json"))
    write_tokenizer_config(out, context)
    write_weights(out, load_config(out), shards=shards, seed=seed)
    return out


def clear_weights(out: Path) -> None:
    """Make the folder, or free it of an earlier call's weights: old shards must not stay."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("model*.safetensors"), *out.glob("model.safetensors.index.json")):
        old.unlink()


def check_sizes(sizes: Sizes) -> None:
    """Raise ValueError for an unknown family or sizes that do not fit together."""
    if sizes.family not in ARCHITECTURES:
        raise ValueError(f"family is {sizes.family}: it must be one of {', '.join(ARCHITECTURES)}")
    if sizes.heads % sizes.kv_heads:
        raise ValueError(f"heads ({sizes.heads}) must be a multiple of kv_heads ({sizes.kv_heads})")
    if sizes.head_dim % 2:
        raise ValueError(f"head_dim is {sizes.head_dim}: rotary positions need an even one")
    if sizes.family == "qwen2" and sizes.head_dim * sizes.heads != sizes.hidden:
        raise ValueError("qwen2 has no head_dim of its own: it must be hidden / heads")


def base_config(sizes: Sizes, *, context: int, dtype: str, eos: int | None) -> dict[str, Any]:
    """Return the fields of config.json that do not depend on rope or a window."""
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"dtype is {dtype}: it must be one of {', '.join(TORCH_DTYPES)}")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[sizes.family]],
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": context,
        "model_type": sizes.family,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-5 if sizes.family in {"llama", "mistral"} else 1e-6,
        "tie_word_embeddings": sizes.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": sizes.vocab,
    }
    if sizes.family != "qwen2":
        config["head_dim"] = sizes.head_dim
    if sizes.family in {"llama", "qwen3"}:
        config["attention_bias"] = False
    if sizes.family == "llama":
        config["mlp_bias"] = False
    return config


def scaling_config(kind: str, context: int) -> dict[str, Any] | None:
    """Return config.json's rope_scaling, by the names that models on disk use."""
    if kind == "none":
        return None
    if kind == "linear":
        return {"type": "linear", "factor": 4.0}
    if kind == "llama3":
        return {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": context // 8,
            "rope_type": "llama3",
        }
    raise ValueError(f"rope_scaling is {kind}: it must be one of {', '.join(ROPE_SCALINGS)}")


def window_config(family: str, layers: int, context: int, window: int | None) -> dict[str, Any]:
    """Return the fields that say which layers see only the last `window` tokens."""
    if family == "llama":
        if window is not None:
            raise ValueError("llama has no sliding window: take mistral, qwen2 or qwen3")
        return {}
    if family == "mistral":
        return {"sliding_window": window}
    return {
        "use_sliding_window": window is not None,
        "sliding_window": context if window is None else window,
        # Layers from this one on use the window.
        "max_window_layers": layers if window is None else 0,
    }


def parse_options(arguments: list[str] | None = None) -> dict[str, Any]:
    """Return make_model's arguments from a command line; what is given there beats the preset."""
    parser = argparse.ArgumentParser(prog="make_model", description=__doc__)
    add = parser.add_argument
    add("out", type=Path, help="folder to write")
    add("--preset", choices=PRESETS, default="tiny", help="sizes to start from (default: tiny)")
    add("--family", choices=ARCHITECTURES)
    for name in SHAPE_OPTIONS:
        add(f"--{name.replace('_', '-')}", type=int)
    add("--rope-theta", type=float)
    add("--rope-scaling", choices=ROPE_SCALINGS)
    add("--sliding-window", type=int, metavar="N", help="tokens (not for llama)")
    add("--tied", action=argparse.BooleanOptionalAction, help="one tensor as embedding and head")
    add("--untied", dest="tied", action="store_false", default=None, help="the same as --no-tied")
    add("--dtype", choices=TORCH_DTYPES)
    add("--shards", type=int, metavar="N")
    add("--seed", type=int)
    add("--eos", type=int, metavar="ID", help="id that ends a text; -1: none does")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items()
             if value is not None}  # fmt: skip
    preset = PRESETS[given.pop("preset")]
    if given.get("eos") == -1:
        given["eos"] = None
    return preset | given


def main() -> None:
    """Write one model as the command line says, and name its folder."""
    options = parse_options()
    try:
        print(make_model(options.pop("out"), **options))
    except (ValueError, ModelError) as error:
        raise SystemExit(f"make_model: {error}") from None


if __name__ == "__main__":
    main()
