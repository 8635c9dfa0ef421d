"""GET /debug/requests: how the last requests of the caller's tenant went; for an operator, all."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from kvbaton.errors import InvalidRequestError
from services.gateway.access.api_keys import Caller
from services.gateway.observe.recent import Recent

_DEFAULT_LIMIT = 50
_MAX_LIMIT = 1000


class DebugRequests:
    """The handler."""

    def __init__(self, recent: Recent) -> None:
        self._recent = recent

    async def show(self, request: Request) -> Response:
        """`limit`: how many at most, the latest first."""
        given = request.query_params.get("limit", str(_DEFAULT_LIMIT))
        limit = int(given) if given.isascii() and given.isdigit() and len(given) < 5 else 0
        if not 1 <= limit <= _MAX_LIMIT:
            raise InvalidRequestError(
                f"limit is a number from 1 to {_MAX_LIMIT}, got {given[:20]!r}", field="limit"
            )
        caller: Caller = request.state.caller
        text = self._recent.latest(limit, None if caller.is_operator else caller.tenant)
        return Response(text, media_type="application/json")
