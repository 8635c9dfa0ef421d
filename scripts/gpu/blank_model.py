"""A model folder whose weights are zeros that take no room on the disk: a device fills them in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from common.engine.config import load_config
from common.engine.linear import Linear
from common.engine.runner import TorchEngine
from common.engine.weights import expected_tensors
from scripts.make_model import Sizes, base_config
from scripts.model_files import EOS_ID, write_json
from scripts.random_tokenizer import random_tokenizer

_BYTES = 2  # of a bfloat16
_ONE = bytes((0x80, 0x3F))  # 1.0 in bfloat16


def write_blank_model(folder: Path, *, context: int, **sizes: Any) -> Path:
    """A llama of these sizes in bfloat16 with norms of one and all else zero; see make_model."""
    shape = Sizes(family="llama", **sizes)
    config = base_config(shape, context=context, dtype="bfloat16", eos=EOS_ID)
    write_json(folder / "config.json", config | {"rope_theta": 500000.0})
    random_tokenizer(512).save(str(folder / "tokenizer.json"))
    entries: dict[str, Any] = {}
    end = 0
    tensors = expected_tensors(load_config(folder))
    for name, dimensions in tensors.items():
        begin, end = end, end + _BYTES * math.prod(dimensions)
        entries[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        file.truncate(start + end)
        for name, dimensions in tensors.items():
            if "norm" in name:
                file.seek(start + entries[name]["data_offsets"][0])
                file.write(_ONE * math.prod(dimensions))
    return folder


def fill_weights(engine: TorchEngine) -> int:
    """Random values for all matrices, made where they lie; those that are packed for a CPU stay
    zeros. The head is the embedding too, where it is tied. Returns the bytes that a decode step
    reads of them."""
    num_bytes = 0
    with torch.no_grad():
        for linear in engine.model.linears():
            if isinstance(linear, Linear) and not linear.packed:
                linear.weight.normal_(0.0, linear.in_features**-0.5)
            num_bytes += linear.in_features * linear.out_features * linear.dtype.itemsize
    return num_bytes
