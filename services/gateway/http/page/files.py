"""The page's files, served from memory. A browser runs nothing but these."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent
_KINDS = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "dom.js": "text/javascript",
    "live.js": "text/javascript",
    "prompt.js": "text/javascript",
    "waterfall.js": "text/javascript",
}
# They tell nothing: what they show is asked for with a key, where keys are needed.
PATHS = frozenset({"/", *(f"/page/{name}" for name in _KINDS if name != "index.html")})
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def file_routes() -> list[Route]:
    """GET / and what it loads."""
    return [_route(name, kind) for name, kind in _KINDS.items()]


def _route(name: str, kind: str) -> Route:
    content = (_FOLDER / name).read_bytes()

    async def send(_request: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return Route("/" if name == "index.html" else f"/page/{name}", send, methods=["GET"])
