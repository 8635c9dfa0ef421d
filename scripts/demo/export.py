"""Writes the demo model's Hugging Face folder."""

import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from scripts.demo.network import Llama, Shape
from scripts.model_files import BOS_ID, EOS_ID, write_json, write_tokenizer_config


def hf_config(shape: Shape) -> dict[str, Any]:
    """Return config.json's fields, with the rope fields by the names that most folders use."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def export_model(network: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, configuration and tokenizer; the tied embedding is stored once, in bf16.

    The weights take their place by a rename, so that a reader never sees half a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in network.named_parameters()
    }
    unfinished = folder / "model.safetensors.part"
    save_file(tensors, str(unfinished), metadata={"format": "pt"})
    unfinished.chmod(0o644)  # save_file leaves it readable by its owner alone
    unfinished.replace(folder / "model.safetensors")
    write_json(folder / "config.json", hf_config(network.shape))
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    write_json(folder / "generation_config.json", generation | sampling)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder, network.shape.context)
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.exists():
        shutil.copyfile(licence, folder / "LICENSE-PSF.txt")
