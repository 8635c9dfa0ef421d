"""Streams of an OpenAI endpoint read with as little work as can be, so that the server shows."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise

_ANSWER = b"HTTP/1.1 200"
_END = b"\n0\r\n\r\n"  # of a chunked answer
_EVENT = b"\ndata: "
_DONE = b"\ndata: [DONE]"
_FAILED = b'\ndata: {"error"'
_FULL = (b'"finish_reason":"length"', b'"finish_reason": "length"')


class Streamed:
    """When the tokens of one stream arrived, from its bytes as they come.

    `asked_at`: when it was asked for. `token_times`: when each event was there, of which every one
    is a token. `is_full`: it ended because it had as many tokens as were wanted. `error`: what an
    event told instead. `is_over`: nothing comes any more. Nothing is parsed: JSON has no bare line
    ends, so an event is a line that begins as they do, and the framing of chunks has its own lines.
    """

    def __init__(self, asked_at: float) -> None:
        self.asked_at = asked_at
        self.token_times: list[float] = []
        self.is_full = self.is_over = False
        self.error = ""
        self._rest = b""  # from the last line end on
        self._tail = b""

    def feed(self, piece: bytes, now: float) -> None:
        """Take what was read at `now`. Raises RuntimeError if it begins no answer to a request."""
        if not self._tail and not piece.startswith(_ANSWER):
            raise RuntimeError(f"the server answered {piece[:300]!r}")
        text = self._rest + piece
        cut = max(0, text.rfind(b"\n"))
        lines, self._rest = text[:cut], text[cut:]
        num_events = lines.count(_EVENT) - lines.count(_DONE)
        if num_events:
            self.token_times += [now] * num_events
            self.is_full = self.is_full or any(full in lines for full in _FULL)
            if _FAILED in lines:
                self.error = lines[lines.index(_FAILED) :][:300].decode(errors="replace").strip()
        self._tail = (self._tail + piece)[-len(_END) :]
        self.is_over = self._tail == _END

    @property
    def ttft(self) -> float:
        """Seconds to the first token. IndexError if there was none."""
        return self.token_times[0] - self.asked_at

    @property
    def gaps(self) -> list[float]:
        """Seconds between the arrivals of tokens."""
        return [later - sooner for sooner, later in pairwise(self.token_times)]

    @property
    def num_tokens(self) -> int:
        """How many came."""
        return len(self.token_times)


def request_bytes(prompt: list[int], num_tokens: int, **fields: object) -> bytes:
    """A request for a stream of so many tokens after `prompt`; `fields` are more of its body."""
    asked = {"prompt": prompt, "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
    body = json.dumps(asked | fields).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Reader:
    """One connection, which asks for one stream after the other."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._address = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection(*self._address)

    async def ask(self, request: bytes) -> None:
        """Send one of `request_bytes`."""
        assert self._writer is not None
        self._writer.write(request)
        await self._writer.drain()

    async def read(self, asked_at: float | None = None) -> Streamed:
        """The answer; `asked_at` is now unless given. Raises RuntimeError if it is none."""
        assert self._reader is not None
        found = Streamed(time.perf_counter() if asked_at is None else asked_at)
        while not found.is_over:
            piece = await self._reader.read(1 << 16)
            if not piece:
                raise RuntimeError(f"the stream broke off after {found.num_tokens} tokens")
            found.feed(piece, time.perf_counter())
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

    async def client(request: bytes) -> None:
        reader = Reader(port)
        await reader.open()
        try:
            while time.perf_counter() < until:
                await reader.ask(request)
                found.append(await reader.read())
        finally:
            reader.close()

    await asyncio.gather(*(client(request_bytes(prompt, num_tokens)) for prompt in prompts))
    return found
