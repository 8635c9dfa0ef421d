"""Forced calls of tools and answers by a schema come out alike, whoever computed the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from tests.cluster.processes import running

SHAPES: dict[str, dict[str, Any]] = {
    "disaggregated": {},
    "colocated": {"mode": "colocated", "num_prefill": 0, "num_decode": 1},
}
# Bounded on every side: a model that knows nothing comes to an end of it too.
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["list", "dict"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "name": {"type": "string", "maxLength": 8},
    },
    "required": ["kind", "size", "name"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "make", "strict": True, "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "make"}}
WISHES: tuple[dict[str, Any], ...] = (
    {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": [TOOL], "tool_choice": NAMED},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
)


def answers(folder: Path, shape: dict[str, Any]) -> list[Any]:
    """What each wish comes to, with its tokens and their log probabilities."""
    folder.mkdir()
    with (
        running(folder, worker={"batch_invariant": True}, **shape) as cluster,
        httpx.Client(base_url=cluster.base_url, timeout=60) as client,
    ):
        choices = []
        for wish in WISHES:
            body = {
                "messages": [{"role": "user", "content": "Write a function that makes one."}],
                "temperature": 0.8, "seed": 3, "max_tokens": 200,
                "logprobs": True, "return_token_ids": True, **wish,
            }  # fmt: skip
            response = client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            (choice,) = response.json()["choices"]
            for call in choice["message"].get("tool_calls", []):
                del call["id"]
            choices.append(choice)
    return choices


def test_calls_and_schemas_do_not_show_where_they_were_computed(tmp_path: Path) -> None:
    found = {name: answers(tmp_path / name, shape) for name, shape in SHAPES.items()}
    assert found["colocated"] == found["disaggregated"]
    required, named, formed = found["disaggregated"]
    assert [each["finish_reason"] for each in (required, named, formed)] == [
        "tool_calls", "stop", "stop"
    ]  # fmt: skip
    for choice in (required, named):
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "make"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    jsonschema.validate(json.loads(formed["message"]["content"]), SCHEMA)
