"""The gateways that a client may use, and its requests, wherever they are served just now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

import zmq

from kvbaton.backoff import backoff_s
from kvbaton.connection import Gateway
from kvbaton.errors import ConnectionLostError, KvbatonError, UnavailableError
from kvbaton.protocol import Tokens, Welcome
from kvbaton.questions import Prompt
from kvbaton.retry import Retried
from kvbaton.session import Event, Session
from kvbaton.sockets import Curve

_AVOID_S = 1.0  # a gateway that takes nothing new now, unless it said for how long


@dataclass(slots=True, eq=False)
class _Held:
    """A request that is not over. Without a session it waits for one."""

    request: Retried
    session: Session | None = None
    limit: asyncio.TimerHandle | None = None  # when it has waited long enough
    retry: asyncio.TimerHandle | None = None  # when it may be placed again, whoever is there

    def stop_waiting(self) -> None:
        for timer in (self.limit, self.retry):
            if timer is not None:
                timer.cancel()
        self.limit = self.retry = None


class Gateways:
    """Keeps a connection to each gateway from the first use on. A request goes to the one where we
    have fewest; where it is lost or refused for now, it goes on at another, or at the same.

    `resume_s`: how long a request waits for that, from its loss or its start until its next token;
    before any gateway was there it is `connect_timeout_s`. All methods belong to one event loop.
    Requests are known by the caller's numbers, never reused.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        curve: Curve | None,
        connect_timeout_s: float,
        ping_interval_s: float,
        resume_s: float,
    ) -> None:
        names = [endpoints] if isinstance(endpoints, str) else list(dict.fromkeys(endpoints))
        if not names:
            raise ValueError("a client needs the endpoint of a gateway")
        self._names = ", ".join(names)
        self._connect_timeout_s = connect_timeout_s
        self._resume_s = resume_s
        self._was_welcome = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._held: dict[int, _Held] = {}
        self._changed = asyncio.Event()
        self._gateways = [
            Gateway(
                self._context,
                name,
                curve=curve,
                ping_interval_s=ping_interval_s,
                on_change=self._on_change,
            )
            for name in names
        ]

    async def connect(self) -> Welcome:
        """A gateway's welcome. Raises ConnectionLostError, or ProtocolError if all refuse us."""
        self._connect()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                while (gateway := self._best()) is None:
                    if (refusal := self._refusal()) is not None:
                        raise refusal
                    self._changed.clear()
                    await self._changed.wait()
                    self._check_open()
        except TimeoutError as error:
            raise ConnectionLostError(self._nobody(self._connect_timeout_s)) from error
        assert gateway.session is not None
        assert gateway.session.welcome is not None
        return gateway.session.welcome

    def start(self, request: Retried) -> None:
        """Have a request served; its sink hears everything about it, failures too."""
        try:
            self._connect()
        except KvbatonError as error:
            request.end(error)
            return
        held = self._held[request.id] = _Held(request)
        self._place(held)

    def ask(self, question_id: int, raw: bytes, sink: Callable[[Event], None]) -> None:
        """Send an encoded `audit` or `why` to a gateway that is there."""
        gateway = self._best()
        if gateway is None or gateway.session is None:
            sink(ConnectionLostError(self._nobody(0)))
        else:
            gateway.session.start(question_id, raw, sink)

    def cancel(self, request_id: int) -> None:
        """Ask for the end of a request. Does nothing once it has ended."""
        held = self._held.get(request_id)
        if held is None:
            return
        held.request.cancel()
        if held.session is not None:
            held.session.cancel(request_id)
        else:
            held.request.cancelled()
            self._drop(held)

    def close(self) -> None:
        """Close for good. May block for a moment where a gateway is gone. Idempotent."""
        for held in list(self._held.values()):
            self._drop(held)
            held.request.end(ConnectionLostError("the client was closed"))
        for gateway in self._gateways:
            gateway.close()
        self._context.term()
        self._changed.set()

    def _connect(self) -> None:
        self._check_open()
        for gateway in self._gateways:
            gateway.connect()

    def _check_open(self) -> None:
        if self._context.closed:
            raise ConnectionLostError("the client was closed")

    def _best(self) -> Gateway | None:
        now = asyncio.get_running_loop().time()
        live = [
            (gateway.avoided_until > now, gateway.session.num_requests, index)
            for index, gateway in enumerate(self._gateways)
            if gateway.session is not None
        ]
        return self._gateways[min(live)[-1]] if live else None

    def _refusal(self) -> KvbatonError | None:
        """Why no gateway will ever have us; None if one may."""
        errors = [gateway.error for gateway in self._gateways]
        if any(error is None or error.is_retryable for error in errors):
            return None
        return copy(errors[0])

    def _nobody(self, waited_s: float) -> str:
        errors = [gateway.error for gateway in self._gateways if gateway.error is not None]
        why = f": {errors[0].message}" if errors else ""
        return f"no welcome from {self._names} within {waited_s:g} s{why}"

    # ---- requests -------------------------------------------------------------------------------

    def _place(self, held: _Held) -> None:
        held.stop_waiting()
        now = asyncio.get_running_loop().time()
        gateway = self._best()
        if gateway is None or gateway.session is None:
            self._wait(held, now)
            return
        try:
            raw = held.request.encoded(now)
        except KvbatonError as error:
            held.request.end(error)
            self._drop(held)
            return
        held.session = gateway.session
        held.session.start(held.request.id, raw, partial(self._on_event, held, gateway))

    def _wait(self, held: _Held, now: float) -> None:
        """For a gateway, or until `retry` if that is set."""
        held.request.lost(now)
        patience_s = self._resume_s if self._was_welcome else self._connect_timeout_s
        until = held.request.give_up_at(patience_s)
        held.limit = asyncio.get_running_loop().call_at(until, self._give_up, held, patience_s)

    def _give_up(self, held: _Held, patience_s: float) -> None:
        held.request.give_up(asyncio.get_running_loop().time(), self._nobody(patience_s))
        self._drop(held)

    def _drop(self, held: _Held) -> None:
        held.stop_waiting()
        self._held.pop(held.request.id, None)

    def _on_event(self, held: _Held, gateway: Gateway, event: Event) -> None:
        """What a request hears from the gateway that has it."""
        loop = asyncio.get_running_loop()
        if held.request.take(event, loop.time()):
            if held.request.is_over:
                self._drop(held)
                if isinstance(event, Prompt | Tokens) and held.session is not None:
                    held.session.cancel(held.request.id)  # they made no sense
            return
        held.session = None
        if isinstance(event, UnavailableError):
            gateway.avoided_until = loop.time() + (event.retry_after_s or _AVOID_S)
        if held.request.num_failures == 1:
            self._place(held)
        else:
            self._wait(held, loop.time())
            pause_s = backoff_s(held.request.num_failures - 2)
            held.retry = loop.call_later(pause_s, self._place, held)

    def _on_change(self) -> None:
        """There is a gateway more, or less."""
        self._changed.set()
        self._was_welcome = self._was_welcome or self._best() is not None
        refusal = self._refusal()
        for held in list(self._held.values()):
            if held.session is not None or held.retry is not None:
                continue
            if refusal is not None:
                held.request.end(copy(refusal))
                self._drop(held)
            elif self._best() is not None:
                self._place(held)
