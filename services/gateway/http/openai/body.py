"""Request bodies, bounded while they are read: each of them, and all of them together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from starlette.exceptions import HTTPException
from starlette.requests import Request

from kvbaton.errors import OverloadedError, TooLargeError

MAX_BODY_BYTES = 8 * 1024 * 1024
_MAX_HELD_BYTES = 32 * MAX_BODY_BYTES
# Most clients read no answer before they have sent everything: too large a body is read and thrown
# away up to here, so that they see the refusal and not a broken connection.
_MAX_DRAINED_BYTES = 8 * MAX_BODY_BYTES
_TIMEOUT_S = 60.0


class BodyReader:
    """Reads JSON bodies and accounts for the memory they take."""

    def __init__(self) -> None:
        self._num_held_bytes = 0

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[bytes]:
        """The body; its bytes count as held until the context is left.

        Raises TooLargeError above MAX_BODY_BYTES, declared or not, OverloadedError when all
        bodies together take too much memory, HTTPException for other media types than JSON, for
        compressed bodies, and for bodies that take more than a minute.
        """
        _check_headers(request)
        held = bytearray()
        try:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await self._read(request, held)
            except TimeoutError as error:
                raise HTTPException(408, f"no whole body within {_TIMEOUT_S:.0f} s") from error
            yield bytes(held)
        finally:
            self._num_held_bytes -= len(held)

    async def _read(self, request: Request, held: bytearray) -> None:
        num_bytes = 0
        async with aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > _MAX_DRAINED_BYTES:
                    break
                if num_bytes <= MAX_BODY_BYTES:
                    held += chunk
                    self._num_held_bytes += len(chunk)
                if self._num_held_bytes > _MAX_HELD_BYTES:
                    raise OverloadedError("too many large requests at once", retry_after_s=1)
        if num_bytes > MAX_BODY_BYTES:
            raise _too_large()


def _check_headers(request: Request) -> None:
    headers = request.headers
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Content-Encoding is not supported, send the body as it is")
    # Also keeps web pages out: browsers ask before they send JSON to another origin.
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Content-Type must be application/json")
    declared = int(headers.get("content-length", "0"))
    waits = headers.get("expect", "").lower() == "100-continue"
    if declared > (MAX_BODY_BYTES if waits else _MAX_DRAINED_BYTES):
        raise _too_large()


def _too_large() -> TooLargeError:
    return TooLargeError(f"the body is larger than the limit of {MAX_BODY_BYTES} bytes")
