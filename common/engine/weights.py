"""Checkpoints: safetensors, single or sharded, checked against the model before a byte is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.engine.config import ModelConfig, ModelError, read_json
from common.kv.layout import KvLayout

_DTYPES = ("F32", "BF16", "F16")
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
# What a header that is not as the format says raises while it is read.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: byte range [begin, end) of `file`, from the start of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the model needs, under Hugging Face names."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linears = (
        ("self_attn.q_proj", q_rows, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_rows, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_rows, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_rows, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        for name, rows, columns, bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


class Checkpoint:
    """The tensors of a model folder, memory-mapped: a tensor's pages are read when it is."""

    def __init__(self, folder: Path, config: ModelConfig, device: torch.device) -> None:
        """Raises ModelError, listing them, where tensors are missing, unexpected or misshapen."""
        self._folder, self._config = folder, config
        self.entries = read_entries(folder)
        _check(folder, self.entries, config)
        self._open: dict[Path, Any] = {}
        self._device = device

    def again(self) -> Checkpoint:
        """The same, mapped by itself: its pages are given up when it and its tensors are."""
        return Checkpoint(self._folder, self._config, self._device)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in `dtype` on the device; on a CPU a view of the mapped file where `dtype` is
        its own."""
        return self.stored(name).to(self._device, dtype)

    def stored(self, name: str) -> torch.Tensor:
        """The tensor as it is: a view of the mapped file."""
        file = self.entries[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{file}: {name} cannot be read: {error}") from error
        return tensor


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder's model.safetensors, or of the shards its index names."""
    index_path = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        return _file_entries(single)
    if not index_path.exists():
        raise ModelError(
            f"{folder}: has neither model.safetensors nor model.safetensors.index.json; other "
            "weight formats are not supported"
        )
    weight_map = _read_index(index_path)
    shards = {
        name: _file_entries(_shard_path(index_path, name)) for name in set(weight_map.values())
    }
    lost = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if lost:
        raise ModelError(f"{index_path}: tensors that their shard does not hold: {_some(lost)}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    valid = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    if not valid or not weight_map:
        raise ModelError(f"{path}: weight_map must map tensor names to file names")
    return dict(weight_map)


def _shard_path(index_path: Path, name: str) -> Path:
    """A shard is a plain file name beside its index, so that an index cannot reach elsewhere."""
    if name != Path(name).name or not name.endswith(".safetensors"):
        raise ModelError(f"{index_path}: {name!r} is not the name of a .safetensors file beside it")
    return index_path.parent / name


def _file_entries(path: Path) -> dict[str, TensorEntry]:
    """Parse the header: 8 bytes of length, JSON, then the data (the safetensors format)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelError(f"{path}: not a safetensors file, or cut short")
            header = json.loads(file.read(length))
        base = 8 + length
        entries = {
            name: TensorEntry(
                path,
                tuple(int(extent) for extent in item["shape"]),
                str(item["dtype"]),
                base + int(item["data_offsets"][0]),
                base + int(item["data_offsets"][1]),
            )
            for name, item in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except _DAMAGE as error:
        raise ModelError(f"{path}: the safetensors header is damaged: {error}") from error
    if any(not base <= entry.begin <= entry.end <= size for entry in entries.values()):
        raise ModelError(f"{path}: tensors lie outside the file; it was cut short")
    return entries


def _check(folder: Path, entries: Mapping[str, TensorEntry], config: ModelConfig) -> None:
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in entries]
    unexpected = [name for name in entries if name not in expected and not _harmless(name, config)]
    misshapen = [
        f"{name} is {list(entries[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in entries and entries[name].shape != shape
    ]
    foreign = [
        f"{name} is {entries[name].dtype}"
        for name in expected
        if name in entries and entries[name].dtype not in _DTYPES
    ]
    problems = [
        f"{title}: {_some(names)}"
        for title, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", misshapen),
            (f"dtype not among {', '.join(_DTYPES)}", foreign),
        )
        if names
    ]
    if problems:
        raise ModelError(f"{folder}: weights do not fit config.json; " + "; ".join(problems))


def _harmless(name: str, config: ModelConfig) -> bool:
    """Buffers of old checkpoints, and the copy that some tools save of tied embeddings."""
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    return name.endswith("rotary_emb.inv_freq")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def fingerprint(
    folder: Path, entries: Mapping[str, TensorEntry], layout: KvLayout, arithmetic: str
) -> str:
    """SHA-256 (hexadecimal) of what decides the KV: workers with equal ones may share blocks.

    Covers config.json, each tensor's name, place and type, file sizes, sampled bytes of each tensor
    (16 windows of 4 KiB, so that large models stay cheap), the KV layout with its dtype, and
    `arithmetic`: what the bits of the KV depend on besides.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    files = sorted({entry.file for entry in entries.values()})
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            digest.update(f"{path.name} {os.fstat(descriptor).st_size}\n".encode())
            for name, entry in sorted(entries.items()):
                if entry.file == path:
                    digest.update(f"{name} {entry.shape} {entry.dtype} {entry.begin}\n".encode())
                    _sample(digest.update, descriptor, entry)
        finally:
            os.close(descriptor)
    digest.update(f"{layout} {arithmetic}".encode())
    return digest.hexdigest()


def _sample(update: Callable[[bytes], None], descriptor: int, entry: TensorEntry) -> None:
    length = entry.end - entry.begin
    if length <= _SAMPLES * _SAMPLE_BYTES:
        update(os.pread(descriptor, length, entry.begin))
        return
    for window in range(_SAMPLES):
        offset = (length - _SAMPLE_BYTES) * window // (_SAMPLES - 1)
        update(os.pread(descriptor, _SAMPLE_BYTES, entry.begin + offset))
