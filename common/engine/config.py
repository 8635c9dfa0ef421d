"""A model's shape, read from its config.json and checked before anything is allocated. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import StartError

ARCHITECTURES = {  # by model_type
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE_TYPES = ("default", "linear", "llama3")
_DTYPES = ("float32", "bfloat16", "float16")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_MOST = 2**31 - 1  # of any size: positions are int32
_MOST_LAYERS = 4096


class ModelError(StartError):
    """A model folder, or a setting of the engine, that cannot be served: says which, and why."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base, and how its frequencies are stretched (default, linear, llama3)."""

    theta: float
    kind: str
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer, with the options that tell the supported families apart.

    `windows[i]` is how many positions layer i sees, its own included; None means all of them.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: RopeConfig
    dtype: str
    eos_token_ids: tuple[int, ...]


class _Fields:
    """The fields of one JSON file, read with their type checked and errors that say where."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def fail(self, message: str) -> ModelError:
        return ModelError(f"{self.path}: {message}")

    def integer(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = _MOST
    ) -> int:
        """A whole number from `least` to `most`; null counts as missing."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int or not least <= value <= most:
            raise self.fail(f"{name} must be a whole number from {least} to {most}, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above zero; null counts as missing."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.fail(f"{name} must be a number above 0, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(f"{name} must be true or false, got {value!r}")
        return value

    def choice(self, name: str, value: object, supported: tuple[str, ...]) -> str:
        if not isinstance(value, str) or value not in supported:
            raise self.fail(f"{name} {value!r} is not supported; supported: {', '.join(supported)}")
        return value


def load_config(folder: Path) -> ModelConfig:
    """Parse `folder`/config.json (and generation_config.json for the end-of-sequence ids).

    Raises ModelError, naming file and field, for whatever the engine would not compute exactly.
    """
    path = folder / "config.json"
    fields = _Fields(path, read_json(path))
    if fields.values.get("quantization_config") is not None:
        raise fields.fail("quantization_config: quantized checkpoints are not supported; use bf16")
    architecture = _architecture(fields)
    fields.choice("hidden_act", fields.values.get("hidden_act", "silu"), ("silu",))
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = _num_kv_heads(fields, architecture, num_heads)
    attention_bias = fields.flag("attention_bias")
    if attention_bias and architecture in ("MistralForCausalLM", "Qwen2ForCausalLM"):
        raise fields.fail(f"attention_bias true is not supported for {architecture}")
    mlp_bias = fields.flag("mlp_bias")
    if mlp_bias and architecture != "LlamaForCausalLM":
        raise fields.fail(f"mlp_bias true is not supported for {architecture}")
    num_layers = fields.integer("num_hidden_layers", most=_MOST_LAYERS)
    dtype = fields.values.get("dtype") or fields.values.get("torch_dtype") or "float32"
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, architecture, num_heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        windows=_windows(fields, architecture, num_layers),
        rope=_rope(fields),
        dtype=fields.choice("dtype", dtype, _DTYPES),
        eos_token_ids=_eos_token_ids(folder, fields),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError, naming the file, where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; a Hugging Face model folder has one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return values


def _architecture(fields: _Fields) -> str:
    named = fields.values.get("architectures")
    if isinstance(named, list) and named:
        return fields.choice("architectures", named[0], tuple(ARCHITECTURES.values()))
    model_type = fields.choice("model_type", fields.values.get("model_type"), tuple(ARCHITECTURES))
    return ARCHITECTURES[model_type]


def _num_kv_heads(fields: _Fields, architecture: str, num_heads: int) -> int:
    """Absent, families differ in their default: only Llama's, one per query head, is taken."""
    if "num_key_value_heads" not in fields.values and architecture != "LlamaForCausalLM":
        raise fields.fail("num_key_value_heads is missing")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.fail(
            f"num_attention_heads {num_heads} must be a multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    return num_kv_heads


def _head_dim(fields: _Fields, architecture: str, num_heads: int) -> int:
    hidden_size = fields.integer("hidden_size")
    if fields.values.get("head_dim") is not None:
        head_dim = fields.integer("head_dim")
    elif architecture == "Qwen3ForCausalLM":
        head_dim = 128  # what transformers' Qwen3Config says where the file says nothing
    elif hidden_size % num_heads:
        raise fields.fail(f"hidden_size {hidden_size} is not a multiple of {num_heads} heads")
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise fields.fail(f"head_dim must be even for rotary embedding, got {head_dim}")
    return head_dim


def _windows(fields: _Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Positions visible per layer, after transformers' masking_utils.sliding_window_overlay.

    A window of w shows w positions, the query's own included: kv > query - w.
    """
    values = fields.values
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        if "sliding_window" in values and values["sliding_window"] is None:
            return (None,) * num_layers
        return (fields.integer("sliding_window", 4096),) * num_layers
    used = fields.flag("use_sliding_window") and values.get("sliding_window", 4096) is not None
    window = fields.integer("sliding_window", 4096) if used else None
    kinds = values.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", 28, least=0)
        return tuple(window if index >= first else None for index in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.fail(f"layer_types must list {num_layers} layers")
    sliding = [
        fields.choice("layer_types", kind, _LAYER_TYPES) == _LAYER_TYPES[1] for kind in kinds
    ]
    if any(sliding) and window is None:
        raise fields.fail("layer_types has sliding_attention, but use_sliding_window is not on")
    return tuple(window if slides else None for slides in sliding)


def _rope(fields: _Fields) -> RopeConfig:
    """Rotary settings from rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    values = fields.values
    name = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    given = values.get(name) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise fields.fail(f"{name} must be one flat object; one per layer type is not supported")
    rope = _Fields(fields.path, given)
    kind = rope.choice(f"{name} type", given.get("rope_type") or given.get("type") or "default",
                       _ROPE_TYPES)  # fmt: skip
    for partial in (given.get("partial_rotary_factor"), values.get("partial_rotary_factor")):
        if partial not in (None, 1, 1.0):
            raise fields.fail(f"partial_rotary_factor {partial} is not supported; only 1.0 is")
    scaled = kind != "default"
    return RopeConfig(
        theta=rope.number("rope_theta", fields.number("rope_theta", 10000.0)),
        kind=kind,
        factor=rope.number("factor") if scaled else 1.0,
        low_freq_factor=rope.number("low_freq_factor") if kind == "llama3" else 1.0,
        high_freq_factor=rope.number("high_freq_factor") if kind == "llama3" else 1.0,
        original_max_position=rope.integer(
            "original_max_position_embeddings", fields.integer("max_position_embeddings")
        ),
    )


def _eos_token_ids(folder: Path, fields: _Fields) -> tuple[int, ...]:
    """End-of-sequence ids; generation_config.json, where there is one, knows better."""
    sources = [fields]
    path = folder / "generation_config.json"
    if path.exists():
        sources.insert(0, _Fields(path, read_json(path)))
    for source in sources:
        found = source.values.get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise source.fail(f"eos_token_id must be an id or a list of ids, got {found!r}")
        return tuple(ids)
    return ()
