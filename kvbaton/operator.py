"""An operator's connection to a gateway: questions and commands, one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

from kvbaton.codec import encode
from kvbaton.errors import ConnectionLostError, KvbatonError, ProtocolError
from kvbaton.gateways import Gateways
from kvbaton.keys import ADMIN, client_curve
from kvbaton.operations import Drain, Drained, LogLevelSet, SetLogLevel, Standing, Status
from kvbaton.protocol import (
    PING_INTERVAL_S,
    AdminAnswer,
    AdminQuestion,
    Audit,
    Audited,
    Told,
    Why,
)
from kvbaton.session import Event

A = TypeVar("A", bound=AdminAnswer)

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 15.0


class Operator:
    """Used with `async with`. `admin_key` is the gateway's own; `keys` is admin.key or the folder
    that it is in, as for a client. Every method raises KvbatonError if there is no answer."""

    def __init__(self, endpoint: str, admin_key: str, keys: Path | str | None = None) -> None:
        self._endpoint = endpoint
        self._key = admin_key
        self._keys = keys
        self._num_asked = 0
        self._gateways: Gateways | None = None

    async def __aenter__(self) -> Self:
        self._gateways = Gateways(
            self._endpoint,
            curve=client_curve(self._keys, ADMIN),
            connect_timeout_s=CONNECT_TIMEOUT_S,
            ping_interval_s=PING_INTERVAL_S,
            resume_s=0,
        )
        try:
            await self._gateways.connect()
        except BaseException:
            self._gateways.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._gateways is not None
        self._gateways.close()

    async def audit(self) -> Audited:
        """Whether the books of every KV store close."""
        return await self._ask(lambda each: Audit(id=each, admin_key=self._key), Audited)

    async def why(
        self, *, block: int | None = None, store: int | None = None, name: str | None = None
    ) -> Told:
        """What happened to a block (`store` is needed where there are several), or to a request or
        handoff by any id that was seen of it."""
        return await self._ask(
            lambda each: Why(id=each, admin_key=self._key, block=block, store=store, name=name),
            Told,
        )

    async def status(self) -> Standing:
        """Who is there, and how much there is to do."""
        return await self._ask(lambda each: Status(id=each, admin_key=self._key), Standing)

    async def drain(self, member: str, *, force: bool, timeout_s: float) -> Drained:
        """Have a worker hand on what it has; returns when it holds nothing any more."""
        return await self._ask(
            lambda each: Drain(id=each, admin_key=self._key, member=member, force=force),
            Drained,
            timeout_s,
        )

    async def set_log_level(self, member: str, level: str) -> LogLevelSet:
        """Change what a member logs, or all."""
        return await self._ask(
            lambda each: SetLogLevel(id=each, admin_key=self._key, member=member, level=level),
            LogLevelSet,
        )

    async def _ask(
        self,
        question: Callable[[int], AdminQuestion],
        kind: type[A],
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> A:
        assert self._gateways is not None
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

        def sink(event: Event) -> None:
            if not answer.done():
                answer.set_result(event)

        self._num_asked += 1
        self._gateways.ask(self._num_asked, encode(question(self._num_asked)), sink)
        try:
            async with asyncio.timeout(timeout_s):
                event = await answer
        except TimeoutError as error:
            raise ConnectionLostError(
                f"no answer from {self._endpoint} within {timeout_s:g} s"
            ) from error
        if isinstance(event, KvbatonError):
            raise event
        if not isinstance(event, kind):
            raise ProtocolError("the gateway answered what was not asked")
        return event
