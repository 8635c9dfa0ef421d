"""The client for programs without an event loop: it runs one on a thread of its own.

from kvbaton import Client

with Client("tcp://127.0.0.1:5555") as client:
    for token in client.generate("def f(", max_tokens=32):
        print(token.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

from kvbaton.asking import Questions, ScoredText
from kvbaton.client import CONNECT_TIMEOUT_S, DEFAULT_ENDPOINT
from kvbaton.errors import ConnectionLostError
from kvbaton.gateways import Gateways
from kvbaton.generation import GenerationBase
from kvbaton.keys import client_curve
from kvbaton.protocol import PING_INTERVAL_S, Generate, Token, Welcome
from kvbaton.questions import ModelCard, Tokenized
from kvbaton.request import RequestOptions, Turn, make_request
from kvbaton.resume import RESUME_S, ResumableRequest
from kvbaton.session import Event

T = TypeVar("T")


class _ClientThread:
    """An event loop on a daemon thread, and what lives on it."""

    def __init__(self, gateways: Gateways) -> None:
        self.gateways = gateways
        self.loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._is_stopped = False
        self._lock = threading.Lock()  # nothing is handed to the loop once it was told to stop
        is_running = threading.Event()
        self._thread = threading.Thread(
            target=asyncio.run, args=(self._main(is_running),), name="kvbaton-client", daemon=True
        )
        self._thread.start()
        is_running.wait()

    def call_soon(self, call: Callable[[], object]) -> None:
        """Run `call` on the loop. Raises ConnectionLostError after `stop`."""
        with self._open():
            self.loop.call_soon_threadsafe(call)

    def result(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What a coroutine on the loop returns. Raises ConnectionLostError after `stop`."""
        with self._open():
            future = asyncio.run_coroutine_threadsafe(call(), self.loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise ConnectionLostError("the client was closed") from error
        except KeyboardInterrupt:
            future.cancel()
            raise

    def stop(self) -> None:
        """Close all and end the thread. Idempotent; the garbage collector may call it."""
        with self._lock:
            if not self._is_stopped:
                self._is_stopped = True
                self.loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            if self._is_stopped:
                raise ConnectionLostError("the client was closed")
            yield

    async def _main(self, is_running: threading.Event) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        is_running.set()
        await self._stop.wait()
        self.gateways.close()


class Generation(GenerationBase):
    """The tokens of one request, as an iterator for one thread."""

    def __init__(self, client: Client, thread: _ClientThread, message: Generate) -> None:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = ResumableRequest(message, events.put)
        super().__init__(message, thread.loop, partial(thread.gateways.cancel, request.id))
        self._client = client  # who only keeps this keeps the client from being closed
        self._events = events
        thread.call_soon(partial(thread.gateways.start, request))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        while (token := self._next_token()) is None:
            if self._has_ended:
                raise StopIteration
            try:
                event = self._events.get()
            except KeyboardInterrupt:
                self.cancel()
                raise
            self._take(event)
        return token

    def finish(self) -> Self:
        """Read to the end."""
        for _ in self:
            pass
        return self


class Client:
    """As AsyncClient, for plain threads, several at once. Closed at exit if the program forgot."""

    def __init__(
        self,
        endpoints: str | Sequence[str] = DEFAULT_ENDPOINT,
        *,
        keys: Path | str | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        ping_interval_s: float = PING_INTERVAL_S,
        resume_s: float = RESUME_S,
    ) -> None:
        gateways = Gateways(
            endpoints,
            curve=client_curve(keys),
            connect_timeout_s=connect_timeout_s,
            ping_interval_s=ping_interval_s,
            resume_s=resume_s,
        )
        self._thread = _ClientThread(gateways)
        self._request_ids = itertools.count(1)
        self._questions = Questions(gateways, self._request_ids)
        weakref.finalize(self, self._thread.stop)

    def connect(self) -> Welcome:
        """Connect now, and learn which model is served.

        Raises ConnectionLostError without a welcome in time, ProtocolError if it is refused.
        """
        return self._thread.result(self._thread.gateways.connect)

    def generate(self, text: str | None = None, **options: Unpack[RequestOptions]) -> Generation:
        """Start a request; iterate over what is returned. See AsyncClient.generate."""
        message = make_request(next(self._request_ids), text, options)
        return Generation(self, self._thread, message)

    def score(
        self,
        texts: Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        model: str | None = None,
        top_logprobs: int = 0,
        add_special_tokens: bool = True,
        deadline_s: float | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> list[ScoredText]:
        """How likely the model finds each text. See AsyncClient.score."""
        return self._thread.result(
            partial(
                self._questions.score,
                texts,
                token_ids=token_ids,
                model=model,
                top_logprobs=top_logprobs,
                add_special_tokens=add_special_tokens,
                deadline_s=deadline_s,
                cache_salt=cache_salt,
                priority=priority,
            )
        )

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Turn] | None = None,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        return_token_strs: bool = False,
    ) -> Tokenized:
        """The tokens of a text or a conversation. See AsyncClient.tokenize."""
        return self._thread.result(
            partial(
                self._questions.tokenize,
                text,
                messages=messages,
                model=model,
                add_special_tokens=add_special_tokens,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
                tools=tools,
                return_token_strs=return_token_strs,
            )
        )

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        skip_special_tokens: bool = False,
    ) -> str:
        """The text of tokens."""
        return self._thread.result(
            partial(
                self._questions.detokenize,
                token_ids,
                model=model,
                skip_special_tokens=skip_special_tokens,
            )
        )

    def models(self) -> list[ModelCard]:
        """The models that are served."""
        return self._thread.result(self._questions.models)

    def stats(self) -> dict[str, float]:
        """A gateway's counts and gauges. See AsyncClient.stats."""
        return self._thread.result(self._questions.stats)

    def close(self) -> None:
        """Cancel what is in flight and close the connections. Idempotent."""
        self._thread.stop()

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
