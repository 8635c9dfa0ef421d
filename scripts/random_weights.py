"""Random values for the weights of a model."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.engine.config import ModelConfig
from common.engine.kv_cache import TORCH_DTYPES
from common.engine.weights import expected_tensors
from scripts.model_files import write_json

# Factors on 1/sqrt(fan_in). Queries are larger so that attention prefers some positions, the two
# writers to the residual so that the context outweighs the last token's embedding, and the head so
# that the best logit stands clear of the next and rounding does not change a greedy choice.
GAINS = {"q_proj": 2.0, "o_proj": 2.0, "down_proj": 2.0, "lm_head": 4.0}


def random_tensor(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Return one float32 tensor; its values depend on seed, name, shape and tying alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return values.mul_(0.1).add_(1.0)
    if name.endswith(".bias"):
        return values.mul_(0.5)
    if "embed_tokens" in name:
        # A tied embedding is the head too. At std 1 a token's logit for itself would outweigh all
        # others, and a greedy continuation would repeat one token.
        return values.mul_(2.0 * shape[1] ** -0.5) if config.tie_word_embeddings else values
    part = name.split(".")[-2]
    return values.mul_(GAINS.get(part, 1.0) * shape[1] ** -0.5)


def write_weights(folder: Path, config: ModelConfig, *, shards: int, seed: int) -> None:
    """Write the tensors in the config's dtype, as one file or as `shards` files with an index.

    One shard is in memory at a time. Raises ValueError if there are fewer tensors than shards.
    """
    named = list(expected_tensors(config).items())
    if not 1 <= shards <= len(named):
        raise ValueError(f"shards is {shards}: it must be from 1 to {len(named)}")
    weight_map: dict[str, str] = {}
    total = 0
    for shard in range(shards):
        file = "model.safetensors"
        if shards > 1:
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = named[shard * len(named) // shards : (shard + 1) * len(named) // shards]
        tensors = {
            name: random_tensor(name, shape, config, seed).to(TORCH_DTYPES[config.dtype])
            for name, shape in part
        }
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file leaves it readable by its owner alone
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
