"""Model folders: what is read from them, and the error for each way of being wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.engine.config import ModelError, load_config
from common.engine.runner import TorchEngine
from tests.unit.engine_models import build

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def write_config(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    assert config.head_dim == 16
    assert config.rms_norm_eps == 1e-6
    assert config.rope.theta == 10000.0
    assert config.rope.kind == "default"
    assert config.windows == (None,) * 4
    assert config.eos_token_ids == ()
    assert not config.tie_word_embeddings


def test_old_and_new_rope_settings_mean_the_same(tmp_path: Path) -> None:
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = load_config(
        write_config(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3})
    )
    new = load_config(
        write_config(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    )
    assert old == new
    oldest = load_config(write_config(tmp_path, rope_scaling={"type": "linear", "factor": 4.0}))
    assert (oldest.rope.kind, oldest.rope.factor) == ("linear", 4.0)


def test_windows_follow_each_family(tmp_path: Path) -> None:
    def windows(architecture: str, **changes: object) -> tuple[int | None, ...]:
        return load_config(write_config(tmp_path, architectures=[architecture], **changes)).windows

    assert windows("LlamaForCausalLM", sliding_window=9) == (None,) * 4
    assert windows("MistralForCausalLM", sliding_window=9) == (9,) * 4
    assert windows("MistralForCausalLM") == (4096,) * 4
    assert windows("MistralForCausalLM", sliding_window=None) == (None,) * 4
    assert windows("Qwen2ForCausalLM", sliding_window=9) == (None,) * 4
    sliding = {"use_sliding_window": True, "sliding_window": 9}
    assert windows("Qwen2ForCausalLM", max_window_layers=3, **sliding) == (None, None, None, 9)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert windows("Qwen3ForCausalLM", layer_types=kinds, **sliding) == (None, 9, None, 9)


def test_eos_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=2)
    assert load_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert load_config(tmp_path).eos_token_ids == (3, 5)
    (tmp_path / "generation_config.json").write_text(json.dumps({}))
    assert load_config(tmp_path).eos_token_ids == (2,)


def test_the_family_can_come_from_model_type(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, architectures=None, model_type="qwen3"))
    assert config.architecture == "Qwen3ForCausalLM"
    assert config.head_dim == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures 'GPT2LMHeadModel'"),
        ({"architectures": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling type 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a number"),
        ({"rope_parameters": {"full_attention": {}}}, "one flat object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": 0}, "hidden_size must be a whole number from 1 to 2147483647, got 0"),
        ({"vocab_size": 2**31}, "vocab_size must be"),
        ({"num_hidden_layers": 4097}, "num_hidden_layers must be a whole number from 1 to 4096"),
        ({"intermediate_size": None}, "intermediate_size must be .* got None"),
        ({"hidden_size": True}, "hidden_size must be"),
        ({"hidden_size": 66}, "not a multiple"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"architectures": ["Qwen2ForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"architectures": ["MistralForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["chunked_attention"] * 4},
            "layer_types",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 4},
            "use_sliding_window",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": []}, "must list 4 layers"),
        ({"architectures": ["Qwen2ForCausalLM"], "max_window_layers": "x"}, "max_window_layers"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window must be"),
    ],
)
def test_what_is_not_supported_is_named(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_config(write_config(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)


def test_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_config(tmp_path)
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="JSON"):
            load_config(tmp_path)
    values = {name: value for name, value in CONFIG.items() if name != "num_key_value_heads"}
    values["architectures"] = ["Qwen2ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="num_key_value_heads is missing"):
        load_config(tmp_path)


def test_harmless_extra_tensors_are_ignored(tmp_path: Path) -> None:
    build("llama_mha_tied", tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(tmp_path, add)
    TorchEngine(tmp_path).close()


def test_tensors_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    build("llama", tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
        tensors["model.norm.weight"] = torch.ones(63)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.int32)

    edit_weights(tmp_path, spoil)
    with pytest.raises(ModelError) as caught:
        TorchEngine(tmp_path)
    text = str(caught.value)
    assert "missing: lm_head.weight" in text
    assert "unexpected: model.layers.0.self_attn.q_proj.bias" in text
    assert "model.norm.weight is [63], expected [64]" in text
    assert "model.layers.1.mlp.up_proj.weight is I32" in text


def test_long_lists_of_missing_tensors_are_cut_short(tmp_path: Path) -> None:
    build("llama", tmp_path)
    edit_config(tmp_path, num_hidden_layers=30)
    with pytest.raises(ModelError, match="and 244 more"):
        TorchEngine(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    build("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    for bad, message in (
        (b"", "cut short"),
        (good[:100], "cut short"),
        (good[:-4], "cut short"),
        ((2**62).to_bytes(8, "little") + good[8:], "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]" + good[10:], "damaged"),
        ((5).to_bytes(8, "little") + b"hello" + good[13:], "damaged"),
        ((9000).to_bytes(8, "little") + b"[" * 9000, "damaged"),
        (good.replace(b'"F32","shape":[64]', b'"F16","shape":[64]', 1), "cannot be read"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ModelError, match=message) as caught:
            TorchEngine(tmp_path)
        assert str(path) in str(caught.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        TorchEngine(tmp_path)
    path.rmdir()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        TorchEngine(tmp_path)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/passwd", "model.bin", "..", ""])
def test_an_index_cannot_reach_out_of_its_folder(name: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"not the name of a \.safetensors file"):
        TorchEngine(tmp_path)


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    build("llama", tmp_path, max_shard_size="60KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    cases: list[tuple[object, str]] = [
        ({}, "must map"),
        ([], "must hold a JSON object"),
        ({"weight_map": {}}, "must map"),
        ({"weight_map": {"a": 1}}, "must map"),
        ({"weight_map": {"model.norm.weight": "absent.safetensors"}}, "absent.* No such file"),
        ({"weight_map": {"lm_head.bias": shards[0]}}, "does not hold: lm_head.bias"),
    ]
    for content, message in cases:
        path.write_text(json.dumps(content))
        with pytest.raises(ModelError, match=message):
            TorchEngine(tmp_path)


def test_settings_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    build("llama", tmp_path)
    for options, message in (
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"device": "cuda"}, "device 'cuda'"),
        ({"attention": "flash"}, "attention 'flash' is not available"),
        ({"attention": "xformers"}, "needs device cuda"),
        ({"max_model_len": 513}, "max_model_len must be from 1 to .* 512, got 513"),
        ({"max_model_len": 0}, "max_model_len must be"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        (
            {"quantization": "int4"},
            "quantization 'int4' is not supported; use none or int8 or w8a8_int8",
        ),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8' is not supported; use auto or int8"),
    ):
        with pytest.raises(ModelError, match=message):
            TorchEngine(tmp_path, **options)


def fingerprint_of(folder: Path, **options: Any) -> str:
    engine = TorchEngine(folder, **options)
    engine.close()
    return engine.info.fingerprint


def test_the_fingerprint_tells_apart_what_gives_different_kv(tmp_path: Path) -> None:
    def take(**options: Any) -> str:
        return fingerprint_of(tmp_path, **options)

    build("llama", tmp_path)
    first = take()
    assert first == take() == take(threads=2, max_model_len=100, attention="torch")
    assert len(first) == 64
    seen = {first, take(dtype="bfloat16"), take(block_size=32), take(batch_invariant=True)}

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][50, 3] += 1

    edit_weights(tmp_path, nudge)
    seen.add(take())
    edit_config(tmp_path, rms_norm_eps=1e-5)
    seen.add(take())
    assert len(seen) == 6


def test_only_equal_kernels_share_kv_that_must_be_equal_to_the_bit(tmp_path: Path) -> None:
    build("llama", tmp_path)
    native = fingerprint_of(tmp_path, batch_invariant=True)
    assert native == fingerprint_of(tmp_path, batch_invariant=True, threads=2)
    assert native != fingerprint_of(tmp_path, batch_invariant=True, attention="torch")
