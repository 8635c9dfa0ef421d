"""The model that ships with the project: it loads, here and in transformers, and writes Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.engine.work import Work
from common.kv.planes import compress, decompress
from scripts.model_files import CHAT_TEMPLATE
from tests.unit.engine_models import GREEDY, kv, make_engine, reference_greedy

FOLDER = Path(__file__).resolve().parents[2] / "models" / "demo"
SNIPPET = '''def read(self, size=-1):
    """Return at most size bytes."""
    if size < 0:
        return self.file.read()
    return self.file.read(size)
'''


@pytest.fixture(scope="module")
def model() -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_a_greedy_completion_is_transformers_and_is_text(model: Any, tokenizer: Any) -> None:
    tokens: list[int] = tokenizer.encode("def ").ids
    prompt = list(tokens)
    engine = make_engine(FOLDER, dtype="float32")
    while len(tokens) < len(prompt) + 48:
        start = 0 if len(tokens) == len(prompt) else len(tokens) - 1
        work = Work(tokens, len(prompt), start, len(tokens) - start, range(4), GREEDY)
        (result,) = engine.step_sync([work])
        assert result is not None
        tokens.append(result.token_id)
    engine.close()
    assert tokens[len(prompt) :] == reference_greedy(model, prompt, 48)
    text = tokenizer.decode(tokens[len(prompt) :])
    assert "(self" in text
    assert "�" not in text  # what is no UTF-8 would be read as


def test_it_has_learnt_python(model: Any, tokenizer: Any) -> None:
    """Knowing nothing costs ln 2048 = 7.6 nats a token; the card says 2.9 for the library."""
    ids = torch.tensor([tokenizer.encode(SNIPPET).ids])
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 3.5


def test_the_card_gives_the_size(model: Any) -> None:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"{millions:.2f} M parameters" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_chat_template_is_the_one_it_was_trained_with(tokenizer: Any) -> None:
    loaded = AutoTokenizer.from_pretrained(FOLDER)
    assert (FOLDER / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    prompt = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|system|>s<|user|>hi<|assistant|>"
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    assert ids == loaded(prompt, add_special_tokens=False).input_ids
    assert [tokenizer.id_to_token(ids[place]) for place in (0, 1, -1)] == [
        "<|bos|>",
        "<|system|>",
        "<|assistant|>",
    ]


def test_kv_of_the_model_is_compressed_by_a_fifth_and_comes_back_bit_for_bit(
    tokenizer: Any,
) -> None:
    tokens: list[int] = tokenizer.encode(SNIPPET * 4).ids[:64]
    engine = make_engine(FOLDER, dtype="bfloat16")
    slots = [3, 0, 2, 1]
    engine.step_sync([Work(tokens, len(tokens), 0, len(tokens), slots, GREEDY)])
    for slot in slots:
        block = kv(engine)[slot].contiguous().view(torch.uint8).numpy().tobytes()
        frame = compress(block)
        assert len(frame) < 0.8 * len(block)
        assert bytes(decompress(frame, len(block))) == block
