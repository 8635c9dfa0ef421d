"""Chat templates that would hang or exhaust whoever renders them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from kvbaton.errors import InvalidRequestError, OverloadedError
from services.gateway.text import templates
from services.gateway.text.model import TextModel, TextModelError
from services.gateway.text.templates import ChatTemplate, TemplateFailedError
from tests.security.http_keys import client_of
from tests.unit.gateway_fakes import DEMO, FakeBackend, running_face, says

FINE = [{"role": "user", "content": "hello"}]
BOMB = [{"role": "user", "content": "bomb"}]
LOOP = "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}"


def model_with(folder: Path, bomb: str) -> TextModel:
    """A model whose template is fine until somebody says bomb."""
    shutil.copy(DEMO / "tokenizer.json", folder)
    template = f"{{% if messages[0].content == 'bomb' %}}{bomb}{{% else %}}fine{{% endif %}}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return TextModel(folder)


@pytest.mark.parametrize(
    ("bomb", "words"),
    [
        (LOOP, "did not end within its limits of 1 s"),
        ("{{ (messages | length + 9) ** (10 ** 8) }}", "did not end within its limits"),
        ("{{ 'a' * (messages | length * 10 ** 9) }}", "too much memory"),
        (
            "{% for i in range(99) %}{{ 'x' * (messages | length * 10 ** 6) }}{% endfor %}",
            "more than",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "too much memory or depth"),
        ("{{ range(10 ** 9) | list }}", "[Rr]ange"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.environ }}", "unsafe"),
    ],
)
async def test_a_bomb_hurts_only_the_request_that_sets_it_off(
    bomb: str, words: str, tmp_path: Path
) -> None:
    model = model_with(tmp_path, bomb)
    with pytest.raises(InvalidRequestError, match=words) as error:
        await model.chat(BOMB)
    assert error.value.field == "messages"
    assert await model.chat(FINE) == model.encode("fine", add_special_tokens=False)
    model.close()


def test_a_template_that_hurts_while_it_is_compiled_is_no_template(tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ 9 ** (9 ** 9) }}")
    with pytest.raises(TextModelError, match="chat template: its process has died"):
        TextModel(tmp_path)


async def test_others_are_served_while_a_bomb_goes_off(tmp_path: Path) -> None:
    backend = FakeBackend(lambda _request: says("x"))
    model = model_with(tmp_path, LOOP)
    async with running_face(backend, model=model) as face, client_of(face) as client:
        name = {"model": model.name}
        path = "/v1/chat/completions"
        bomb = asyncio.create_task(client.post(path, json={**name, "messages": BOMB}))
        await asyncio.sleep(0.1)
        for _ in range(5):
            response = await client.post("/v1/completions", json={**name, "prompt": "x"})
            assert response.status_code == 200
        assert not bomb.done()
        fine = await client.post(path, json={**name, "messages": FINE})
        assert fine.status_code == 200
        refused = await bomb
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"
    model.close()


async def test_not_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_MAX_WAITING", 2)
    template = ChatTemplate("{{ word }}")
    waiting = [asyncio.create_task(template.render({"word": word})) for word in "abc"]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert results[:2] == ["a", "b"]
    assert isinstance(results[2], OverloadedError)
    template.close()


async def test_a_process_that_was_killed_is_replaced_unnoticed() -> None:
    others = _children()
    template = ChatTemplate("{{ word }}")
    assert await template.render({"word": "a"}) == "a"
    (child,) = _children() - others
    _kill(child)
    assert await template.render({"word": "b"}) == "b"
    template.close()


async def test_a_process_that_stands_still_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_TIMEOUT_S", 0.5)
    others = _children()
    template = ChatTemplate("{{ word }}")
    (child,) = _children() - others
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(TemplateFailedError, match="did not end"):
        await template.render({"word": "a"})
    assert child not in _children()
    monkeypatch.setattr(templates, "_TIMEOUT_S", 10)
    assert await template.render({"word": "b"}) == "b"
    template.close()


def _children() -> set[int]:
    found = Path("/proc/self/task").glob("*/children")
    return {int(child) for file in found for child in file.read_text().split()}


def _kill(child: int) -> None:
    """Returns once it is dead, and leaves it to its parent."""
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
