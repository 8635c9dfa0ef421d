"""GET /openapi.json: what the server takes and gives, from its routes and their structs."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from services.gateway.http.openai.answer import Envelope
from services.gateway.http.openai.chat import ChatChoice
from services.gateway.http.openai.completions import CompletionChoice
from services.gateway.http.openai.endpoints import ModelCard
from services.gateway.http.openai.operations import AbortRequest, AbortRequests
from services.gateway.http.openai.responses.request import FunctionTool, Item, ResponsesRequest
from services.gateway.http.openai.schema import ChatRequest, CompletionRequest
from services.gateway.http.openai.structured import ResponseFormat, StructuredOutputs
from services.gateway.http.openai.tokenization import DetokenizeRequest, Tokenized, TokenizeRequest
from services.gateway.http.openai.tools.messages import PastCall
from services.gateway.http.openai.tools.request import NamedChoice, ToolSpec

_JSON = "application/json"
_EVENTS = "text/event-stream"
_REF = "#/components/schemas/{name}"

_REQUESTS: dict[str, Any] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/abort_requests": AbortRequests,
    "/abort_request": AbortRequest,
}
_ANSWERS: dict[str, Any] = {
    "/v1/completions": Envelope,
    "/v1/chat/completions": Envelope,
    "/v1/models/{model}": ModelCard,
    "/tokenize": Tokenized,
}
_STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
# What structs hold as raw JSON, by the field's name: it is read by whoever knows what it is.
_RAW: dict[str, Any] = {
    "choice": list[str],
    "ebnf": str,
    "grammar": str,
    "guided_choice": list[str],
    "guided_grammar": str,
    "guided_json": str | dict[str, Any],
    "guided_regex": str,
    "input": str | list[Item],
    "json": str | dict[str, Any],
    "json_schema": str,
    "prompt": str | list[str | int | list[int]],
    "regex": str,
    "response_format": ResponseFormat,
    "schema": dict[str, Any],
    "structured_outputs": StructuredOutputs,
    "tool_call_id": str,
    "tool_calls": list[PastCall],
    "tool_choice": str | NamedChoice,
    "tools": list[ToolSpec],
}
_OTHERS = (ChatChoice, CompletionChoice, FunctionTool)


class _Error(msgspec.Struct):
    """What went wrong. `param` names the field at fault."""

    message: str
    type: str
    code: int | str
    param: str | None = None


class Error(msgspec.Struct):
    """Every answer that is no success."""

    error: _Error


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    body = msgspec.json.encode(document(request.app.routes))
    return Response(body, media_type=_JSON)


def document(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    kinds = [*_REQUESTS.values(), *_ANSWERS.values(), *_OTHERS, *_RAW.values(), Error]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    for schema in schemas.values():
        _say_what_is_raw(schema, schema.get("required", ()))
    paths: dict[str, Any] = {}
    for route in routes:
        if isinstance(route, Route):
            path = route.path.replace(":path}", "}")
            for method in (route.methods or set()) - {"HEAD"}:
                paths.setdefault(path, {})[method.lower()] = _operation(path, method, route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvbaton", "version": version("kvbaton")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(path: str, method: str, route: Route) -> dict[str, Any]:
    content = {_JSON: {"schema": _schema(_ANSWERS.get(path, Any))}}
    if path in _STREAMED:
        content[_EVENTS] = {"schema": {"type": "string"}}
    error = {"description": "an error", "content": {_JSON: {"schema": _schema(Error)}}}
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{path.replace('/', '_').strip('{}')}",
        "summary": (route.endpoint.__doc__ or path).partition("\n")[0],
        "responses": {
            "200": {"description": "success", "content": content},
            "default": error,
        },
    }
    if path in _REQUESTS:
        schema = _schema(_REQUESTS[path])
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    return operation


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema


def _say_what_is_raw(schema: dict[str, Any], required: Iterable[str]) -> None:
    """msgspec cannot tell what is in raw JSON."""
    for name, field in schema.get("properties", {}).items():
        if name in _RAW and not field:
            kind = _schema(_RAW[name])
            choices = kind.get("anyOf", [kind])
            field["anyOf"] = choices if name in required else [*choices, {"type": "null"}]
