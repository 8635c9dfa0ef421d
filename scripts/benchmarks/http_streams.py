"""Streams of an OpenAI endpoint read with as little work as can be, so that the server shows."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

_END = b"0\r\n\r\n"  # of a chunked answer
_DONE = b"[DONE]"
_EVENT = b"data: "


@dataclass
class Streamed:
    """One stream: seconds to its first token, and between the arrivals of those that follow."""

    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0


class Reader:
    """One connection, which asks for one stream after the other."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    async def ask(self, prompt: list[int], num_tokens: int) -> None:
        """Send a request for a stream of so many tokens."""
        assert self._writer is not None
        fields = {"prompt": prompt, "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
        body = json.dumps(fields).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        await self._writer.drain()

    async def read(self) -> Streamed:
        """The answer. Raises RuntimeError if it is none."""
        assert self._reader is not None
        found, begun = Streamed(), time.perf_counter()
        last, text = begun, b""
        while not text.endswith(_END):
            piece = await self._reader.read(1 << 16)
            now = time.perf_counter()
            text += piece
            if not piece or not text.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"the server answered {text[:300]!r}")
            num_events = piece.count(_EVENT) - piece.count(_EVENT + _DONE)
            if num_events and not found.num_tokens:
                found.ttft = now - begun
            elif num_events:
                found.gaps += [(now - last) / num_events] * num_events
            if num_events:
                found.num_tokens, last = found.num_tokens + num_events, now
        return found

    def close(self) -> None:
        """Leave."""
        if self._writer is not None:
            self._writer.close()


async def streams(
    port: int, prompts: list[list[int]], num_tokens: int, seconds: float
) -> list[Streamed]:
    """What `len(prompts)` clients read in so many seconds, each asking again when it has all."""
    until = time.perf_counter() + seconds
    found: list[Streamed] = []

    async def client(prompt: list[int]) -> None:
        reader = Reader(port)
        await reader.open()
        try:
            while time.perf_counter() < until:
                await reader.ask(prompt, num_tokens)
                found.append(await reader.read())
        finally:
            reader.close()

    await asyncio.gather(*map(client, prompts))
    return found
