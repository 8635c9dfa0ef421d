"""make_model: what it writes is what transformers reads."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.make_model import make_model, parse_options
from scripts.random_tokenizer import SMALLEST, random_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROOT = Path(__file__).resolve().parents[2]


def load(folder: Path) -> Any:
    """Load with transformers, and check that no weight was missing, spare or of another shape."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind]
    return model.eval()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return float32 logits [length, vocab] of one sequence."""
    with torch.no_grad():
        out: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return out


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file by its name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all weight files together."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_loads_and_runs(tmp_path: Path, family: str, tied: bool) -> None:
    model = load(make_model(tmp_path, family=family, tied=tied))
    assert model.config.model_type == family
    out = logits(model, list(range(5, 25)))
    assert out.shape == (20, 512)
    assert torch.isfinite(out).all()
    assert len(set(out.argmax(-1).tolist())) > 10, "the best token hardly depends on the text"
    best = out.topk(2, dim=-1).values
    assert (best[:, 0] - best[:, 1]).median() > 0.1


def test_qwen_tensors_of_their_own(tmp_path: Path) -> None:
    qwen2 = tensors(make_model(tmp_path / "qwen2", family="qwen2"))
    assert qwen2["model.layers.1.self_attn.k_proj.bias"].abs().min() > 0
    qwen3 = tensors(make_model(tmp_path / "qwen3", family="qwen3", head_dim=32))
    assert qwen3["model.layers.0.self_attn.q_norm.weight"].shape == (32,)
    assert qwen3["model.layers.0.self_attn.q_proj.weight"].shape == (4 * 32, 64)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ("none", {"rope_type": "default"}),
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        ("llama3", {"rope_type": "llama3", "original_max_position_embeddings": 256}),
    ],
)
def test_rope_is_read_from_the_older_names(
    tmp_path: Path, scaling: str, expected: dict[str, Any]
) -> None:
    out = make_model(tmp_path, rope_scaling=scaling, rope_theta=5000.0)
    assert "rope_parameters" not in json.loads((out / "config.json").read_text())
    read = load(out).config.rope_parameters
    assert read == read | expected | {"rope_theta": 5000.0}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_sliding_window_hides_what_lies_further_back(tmp_path: Path, family: str) -> None:
    model = load(make_model(tmp_path, family=family, layers=1, sliding_window=8))
    ids = list(range(10, 40))
    changed = [99, *ids[1:]]
    one, other = logits(model, ids), logits(model, changed)
    assert not torch.allclose(one[7], other[7])
    torch.testing.assert_close(one[8:], other[8:])


def test_shards_hold_the_same_as_one_file(tmp_path: Path) -> None:
    one = tensors(make_model(tmp_path / "one", family="qwen3"))
    folder = make_model(tmp_path / "three", family="qwen3", shards=3)
    three = tensors(folder)
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    load(folder)


def test_a_later_call_leaves_no_shards_behind(tmp_path: Path) -> None:
    make_model(tmp_path, shards=3)
    make_model(tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first = hashes(make_model(tmp_path / "a", seed=7, dtype="bfloat16"))
    assert hashes(make_model(tmp_path / "b", seed=7, dtype="bfloat16")) == first
    other = hashes(make_model(tmp_path / "c", seed=8, dtype="bfloat16"))
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_tokenizer_round_trip_and_chat(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path))
    text = "def f():\n        return 'höhe', 3  # 語\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|user|>hi<|assistant|>"
    assert tokenizer(prompt, add_special_tokens=False).input_ids[1] == 2


@pytest.mark.parametrize("vocab", [SMALLEST, 512, 4096])
def test_tokenizer_has_a_text_for_every_id(vocab: int) -> None:
    tokenizer = random_tokenizer(vocab)
    assert tokenizer.get_vocab_size() == vocab
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(vocab))


@pytest.mark.parametrize(
    "wrong",
    [
        {"family": "gpt2"},
        {"heads": 0},
        {"layers": -1},
        {"heads": 4, "kv_heads": 3},
        {"head_dim": 15},
        {"family": "qwen2", "head_dim": 32},
        {"sliding_window": 8},
        {"rope_scaling": "yarn"},
        {"dtype": "float16"},
        {"shards": 0},
        {"shards": 100},
        {"vocab": 100},
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        make_model(tmp_path, **wrong)


def test_options_beat_the_preset() -> None:
    options = parse_options(["x", "--preset", "135m", "--layers", "3", "--untied", "--eos", "-1"])
    assert (options["layers"], options["hidden"], options["tied"]) == (3, 576, False)
    assert options["eos"] is None


def test_command_needs_no_transformers(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "from scripts.make_model import main\n"
        "main()\n"
    )
    out = tmp_path / "a b"
    command = [sys.executable, "-c", code, str(out), "--family", "qwen3", "--layers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(out)
    assert (out / "model.safetensors").exists()
