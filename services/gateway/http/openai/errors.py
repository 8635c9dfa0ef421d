"""Errors in the shape that OpenAI clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kvbaton.errors import KvbatonError

# By status; the names are vLLM's where it has one.
TYPES = {
    400: "BadRequestError",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFoundError",
    405: "MethodNotAllowed",
    408: "RequestTimeout",
    413: "RequestEntityTooLarge",
    415: "UnsupportedMediaType",
    422: "UnprocessableEntity",
    429: "RateLimitError",
    431: "RequestHeaderFieldsTooLarge",
    499: "ClientClosedRequest",
    500: "InternalServerError",
    501: "NotImplemented",
    502: "BadGateway",
    503: "ServiceUnavailableError",
}
_RETRY_AFTER_S = 1.0
# The rest of the body may still be on its way; it is not read as the next request.
_CLOSING = (408, 413, 415)


def error_body(status: int, message: str, field: str | None = None) -> bytes:
    """The JSON body of an error answer, also sent as an event when a stream fails."""
    error = {"message": message, "type": TYPES[status], "param": field, "code": status}
    return msgspec.json.encode({"error": error})


def kvbaton_error_body(error: KvbatonError) -> bytes:
    """The same for one of our own errors."""
    return error_body(error.status, error.message, error.field)


async def on_kvbaton_error(_request: Request, error: Exception) -> Response:
    """Answers a request that failed."""
    assert isinstance(error, KvbatonError)
    return kvbaton_error_response(error)


def kvbaton_error_response(error: KvbatonError) -> Response:
    """The answer to a request that ends with it; 429 and 503 say when to come back."""
    headers = {}
    if error.status in (429, 503):
        headers["retry-after"] = str(math.ceil(error.retry_after_s or _RETRY_AFTER_S))
    return _response(error.status, kvbaton_error_body(error), headers)


def no_key_response() -> Response:
    """The answer to a request without a key, or with one that nobody has."""
    message = "this server needs an API key: Authorization: Bearer KEY"
    return _response(401, error_body(401, message), {"www-authenticate": "Bearer"})


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answers what the router or the body reader refused: unknown paths, methods, media types."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"there is no {request.url.path}"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    body = error_body(error.status_code, message)
    return _response(error.status_code, body, dict(error.headers or {}))


def _response(status: int, body: bytes, headers: dict[str, str]) -> Response:
    if status in _CLOSING:
        headers["connection"] = "close"
    return Response(body, status, headers, media_type="application/json")
