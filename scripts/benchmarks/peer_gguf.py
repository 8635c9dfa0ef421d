"""Writes a Hugging Face folder of the llama family as one GGUF file, in bf16.

It runs in an environment with the gguf package and imports nothing of ours:
python peer_gguf.py FOLDER OUT.gguf. Rows of queries and keys are put in llama.cpp's order (its
rotary halves are interleaved), as its own convert_hf_to_gguf.py does; norms are fp32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_NORMAL, _CONTROL = 1, 3  # kinds of tokens


def main() -> None:
    """Convert."""
    import gguf

    folder, out = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(out, "llama")
    _add_sizes(writer, config)
    _add_tokens(writer, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for path in sorted(folder.glob("*.safetensors")):
        for name, numbers in _tensors(path):
            shown = _ggml_name(name)
            if numbers.ndim == 1:
                writer.add_tensor(shown, _float32(numbers))
                continue
            num_heads = heads.get(name.split(".")[-2])
            rows = _permuted(numbers, num_heads) if num_heads else numbers
            writer.add_tensor(
                shown,
                np.ascontiguousarray(rows).view(np.uint8),
                raw_dtype=gguf.GGMLQuantizationType.BF16,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokens(writer: Any, tokenizer: dict[str, Any]) -> None:
    """A byte-level BPE; how text is split before does not matter, as prompts are token ids."""
    model = tokenizer["model"]
    special = {each["id"]: each["content"] for each in tokenizer["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()} | special
    order = sorted(texts)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([texts[index] for index in order])
    writer.add_token_types([_CONTROL if index in special else _NORMAL for index in order])
    merges = model["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _tensors(path: Path) -> Any:
    """Names and numbers, bf16 as its 16 bits (the format: an 8-byte length, JSON, bytes)."""
    data = np.memmap(path, np.uint8, "r")
    end = 8 + int(data[:8].view("<u8")[0])
    for name, entry in json.loads(bytes(data[8:end])).items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        first, last = entry["data_offsets"]
        yield name, data[end + first : end + last].view(np.uint16).reshape(entry["shape"])


def _ggml_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _permuted(rows: np.ndarray, num_heads: int) -> np.ndarray:
    shape = (num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def _float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


if __name__ == "__main__":
    main()
