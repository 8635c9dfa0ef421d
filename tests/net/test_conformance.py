"""Our answers beside those that OpenAI and vLLM document: status, fields, types, order of events.

tests/data/conformance has the recorded answers, each with its source and with the fields of it that
this server does not have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.unit.gateway_fakes import FakeBackend, running_face, says

_FOLDER = Path(__file__).parents[1] / "data" / "conformance"
RECORDED = [
    (path.stem, case)
    for path in sorted(_FOLDER.glob("*.json"))
    for case in json.loads(path.read_text())
]
IDS = [f"{origin}-{case['name']}" for origin, case in RECORDED]
# OpenAI's own definitions of the same, by path: of an answer, and of an event.
TYPES: dict[str, tuple[Any, Any]] = {
    "/v1/chat/completions": (ChatCompletion, ChatCompletionChunk),
    "/v1/completions": (Completion, Completion),
    "/v1/responses": (Response, ResponseStreamEvent),
}
# These say something: they are equal, not just of one type.
TELLING = ("object", "type", "status", "role", "finish_reason", "code", "content", "delta")


def differences(found: Any, recorded: Any, absent: list[str], at: str = "") -> list[str]:
    """What the recorded answer has and ours has not, or has otherwise. Of a list's entries the
    first stands for all."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        places = {key: f"{at}.{key}".lstrip(".") for key in recorded}
        missing = [places[key] for key in recorded.keys() - found.keys()]
        inner = [
            each
            for key in sorted(recorded.keys() & found.keys())
            for each in differences(found[key], recorded[key], absent, places[key])
        ]
        return [place for place in missing if place not in absent] + inner
    if isinstance(recorded, list) and isinstance(found, list):
        if bool(found) != bool(recorded):
            return [f"{at}: {len(found)} entries"]
        return differences(found[0], recorded[0], absent, at) if found else []
    is_telling = at.rpartition(".")[2] in TELLING and not isinstance(recorded, list | dict)
    if is_telling and found == recorded:
        return []
    if is_telling or (recorded is not None and type(found) is not type(recorded)):
        return [f"{at}: {found!r} for {recorded!r}"]
    return []


async def ask(case: dict[str, Any]) -> httpx.Response:
    backend = FakeBackend(lambda _request: says(case["says"], stops=True))
    async with (
        running_face(backend) as face,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}") as client,
    ):
        if case["request"] is None:
            return await client.get(case["path"])
        return await client.post(case["path"], json=case["request"])


def events_of(text: str) -> list[Any]:
    """The events of a stream; a name before one is that of its type."""
    events: list[Any] = []
    for block in text.strip().split("\n\n"):
        *names, data = block.split("\n")
        body = data.removeprefix("data: ")
        events.append(body if body == "[DONE]" else json.loads(body))
        assert not names or names == [f"event: {events[-1]['type']}"]
    return events


def condensed(events: list[Any]) -> list[Any]:
    """Runs of deltas as their first: how many tokens a text has is the tokenizer's affair."""
    kept: list[Any] = []
    for event in events:
        if not (kept and _is_delta(event) and _is_delta(kept[-1])):
            kept.append(event)
    return kept


def _is_delta(event: Any) -> bool:
    if event == "[DONE]":
        return False
    if "choices" in event:
        choices = event["choices"]
        return (
            bool(choices) and not choices[0]["finish_reason"] and "role" not in choices[0]["delta"]
        )
    return str(event["type"]).endswith(".delta")


@pytest.mark.parametrize(("_origin", "case"), RECORDED, ids=IDS)
async def test_answers_are_as_documented(_origin: str, case: dict[str, Any]) -> None:
    answer = await ask(case)
    assert answer.status_code == case["status"], answer.text
    whole, chunk = TYPES.get(case["path"], (None, None))
    if "events" in case:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer.text)
        for event in events:
            if event != "[DONE]":
                TypeAdapter(chunk).validate_python(event)
        found = condensed(events)
        assert len(found) == len(case["events"])
        for each, recorded in zip(found, case["events"], strict=True):
            deltas = [f"choices.delta.{name}" for name in ("content", "role")]
            is_last = each != "[DONE]" and bool(each.get("choices")) and not _is_delta(each)
            absent = [*case["absent"], *(deltas if is_last else ())]
            assert differences(_without_text(each), _without_text(recorded), absent) == []
        return
    assert differences(answer.json(), case["answer"], case["absent"]) == []
    if answer.status_code == 200 and whole is not None:
        TypeAdapter(whole).validate_python(answer.json())


def _without_text(event: Any) -> Any:
    """An event whose pieces of text are known to be texts, whatever they say."""
    if event == "[DONE]":
        return event
    shown = json.loads(json.dumps(event))
    for choice in shown.get("choices", []):
        if isinstance(choice["delta"].get("content"), str):
            choice["delta"]["content"] = ""
    if "delta" in shown:
        shown["delta"] = ""
    return shown


def test_a_difference_is_seen() -> None:
    recorded = {"a": [{"object": "x", "n": 1}], "b": None}
    assert differences({"a": [{"object": "x", "n": 2}], "b": 5}, recorded, []) == []
    assert differences({"a": [{"object": "y", "n": 1}], "b": 5}, recorded, []) == [
        "a.object: 'y' for 'x'"
    ]
    assert differences({"a": [{"object": "x", "n": "1"}]}, recorded, ["b"]) == ["a.n: '1' for 1"]
    assert differences({"a": []}, recorded, []) == ["b", "a: 0 entries"]
