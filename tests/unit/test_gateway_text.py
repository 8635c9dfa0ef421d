"""Model folders: what tokenizer and chat template give, and the error for each broken file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from kvbaton.errors import InvalidRequestError
from services.gateway.text.model import TextModel, TextModelError
from tests.unit.gateway_fakes import DEMO, EOS, demo_model

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Größer? 🦊"},
]


def folder_with(path: Path, template: str | None = None, **config: Any) -> Path:
    """The demo tokenizer with another configuration and template."""
    shutil.copy(DEMO / "tokenizer.json", path)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


async def rendered(model: TextModel, messages: list[dict[str, Any]], **options: Any) -> str:
    return "".join(map(model.token_text, await model.chat(messages, **options)))


async def test_chat_gives_the_tokens_of_transformers() -> None:
    reference = AutoTokenizer.from_pretrained(DEMO)
    wanted: Any = reference.apply_chat_template(CHAT, add_generation_prompt=True)
    assert await demo_model().chat(CHAT) == wanted["input_ids"]


@pytest.mark.parametrize("text", ["2", " 2 is", "2 ", "Größer? 🦊", "<|user|>What", "2\n\n"])
async def test_an_answer_goes_on_where_transformers_says(text: str) -> None:
    begun = [*CHAT, {"role": "assistant", "content": text}]
    reference = AutoTokenizer.from_pretrained(DEMO)
    wanted: Any = reference.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    options = {"continues": True, "add_generation_prompt": False}
    token_ids = await demo_model().chat(begun, **options)
    assert token_ids == demo_model().encode(wanted, add_special_tokens=False)


async def test_an_answer_goes_on_though_the_template_strips_it(tmp_path: Path) -> None:
    template = "{% for each in messages %}[{{ each.content | trim }}]{% endfor %}"
    model = TextModel(folder_with(tmp_path, template))
    try:
        for text in ("yes", " yes", "yes ", "\nyes\n"):
            begun = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": text}]
            token_ids = await model.chat(begun, continues=True, add_generation_prompt=False)
            assert model.decode(token_ids) == "[yes][yes"
    finally:
        model.close()


def test_the_end_of_a_long_text_may_be_enough() -> None:
    text = "one two three " * 50_000
    whole = demo_model().encode(text)
    ids = demo_model().encode(text, most_tokens=100, is_end_enough=True)
    assert ids[-100:] == whole[-100:]
    assert len(ids) < len(whole) / 10
    with pytest.raises(InvalidRequestError, match="does not fit"):
        demo_model().encode(text, most_tokens=100)


def test_encode_adds_special_tokens_unless_told_not_to() -> None:
    model = demo_model()
    plain = model.encode("hello", add_special_tokens=False)
    assert model.encode("hello") == [0, *plain]


def test_names_sizes_and_special_tokens(tmp_path: Path) -> None:
    assert (demo_model().name, demo_model().vocab_size) == ("demo", 2048)
    assert demo_model().token_text(EOS) == "<|eos|>"
    assert demo_model().token_text(100_000) == ""
    folder = folder_with(tmp_path)
    assert TextModel(folder, "served").name == "served"
    assert TextModel(folder).vocab_size == 2048
    (folder / "config.json").write_text('{"vocab_size": 4096}')
    assert TextModel(folder).vocab_size == 4096


def test_cutting_and_padding_of_a_tokenizer_file_are_switched_off(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("one").ids) == 50
    assert TextModel(folder).encode("one two three") == demo_model().encode("one two three")


async def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<|bos|>", "special": True}, "eos_token": None}
    model = TextModel(folder_with(tmp_path, "{{ bos_token }}[{{ eos_token }}]", **config))
    assert await rendered(model, CHAT) == "<|bos|>[]"


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": "T{{ messages | length }}"},
        {"chat_template": [{"name": "tool_use", "template": "no"},
                           {"name": "default", "template": "T{{ messages | length }}"}]},
    ],
)  # fmt: skip
async def test_templates_in_the_tokenizer_configuration(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    assert await rendered(TextModel(folder_with(tmp_path, **config)), CHAT) == "T4"


async def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    model = TextModel(folder_with(tmp_path, "file", chat_template="configuration"))
    assert await rendered(model, CHAT) == "file"


async def test_templates_find_what_transformers_gives_them(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}{{ extra }}"
    )
    model = TextModel(folder_with(tmp_path, template))
    text = await rendered(model, [{"role": "user", "content": "<&>"}, *CHAT], extra=7)
    assert text == '{"role": "user", "content": "<&>"}4True7'


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[99]['content'] + 1 }}", "refuses the messages"),
        ("{{ 'a' + 1 }}", "refuses the messages"),
        ("{{ 1 / 0 }}", "refuses the messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('x' * 5000) }}", "refuses the messages: x{300}$"),
        (None, "has no chat template"),
    ],
)
async def test_a_template_that_fails_is_the_messages_fault(
    tmp_path: Path, template: str | None, words: str
) -> None:
    model = TextModel(folder_with(tmp_path, template))
    with pytest.raises(InvalidRequestError, match=words) as error:
        await model.chat(CHAT)
    assert error.value.field == "messages"


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        demo_model().encode("\ud800")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", "[", "not readable as JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("config.json", "nonsense", "not readable as JSON"),
        ("chat_template.jinja", "{% if %}", "chat template"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat template"),
        ("tokenizer_config.json", '{"chat_template": [{}]}', "chat template"),
    ],
)
def test_a_broken_folder_is_refused_by_file_and_reason(
    tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    folder = folder_with(tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(TextModelError, match=words) as error:
        TextModel(folder)
    assert str(folder / name) in str(error.value)
