"""Who has the admin key may ask and command; audit and why are put to every KV store here."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import msgspec
import structlog

from common.config import StartError
from common.messages import AskAudit, AskWhy, Audited, CacheDropped, DropCache, Told
from common.seams import Clock
from kvbaton import protocol
from kvbaton.admin import StoreAudit, StoreHistory
from kvbaton.errors import ForbiddenError, InvalidRequestError, KvbatonError, UnavailableError
from kvbaton.keys import OTHERS, read_with_mode
from services.gateway.access.asking import ask
from services.gateway.access.operator import Operator
from services.gateway.routing.peers import Store

log = structlog.get_logger()

MIN_KEY_CHARS = 16
_LOG_INTERVAL_S = 10.0
_ANSWER_PREFIXES = ("chatcmpl-", "cmpl-")  # of the ids in answers of the OpenAI API

HOW_TO_MAKE_A_KEY = "(umask 077; head -c 32 /dev/urandom | base64 > FILE)"


def load_admin_key(path: str) -> str:
    """The key in a file that nobody else may read. Raises StartError, which says what to do."""
    try:
        mode, raw = read_with_mode(Path(path), -1)
        key = raw.decode().strip()
    except (OSError, ValueError) as error:
        raise StartError(
            f"--admin-key-file {path} cannot be read ({error}): make one with {HOW_TO_MAKE_A_KEY}"
        ) from error
    if mode & OTHERS:
        raise StartError(f"--admin-key-file {path} can be read by others: chmod 600 it")
    if len(key) < MIN_KEY_CHARS:
        raise StartError(
            f"--admin-key-file {path} must hold at least {MIN_KEY_CHARS} characters: make one with "
            f"{HOW_TO_MAKE_A_KEY}"
        )
    return key


class Admin:
    """Answers operators. Without a `key` it refuses all. Without an `operator` it knows no workers
    and has no name."""

    def __init__(
        self, key: str, stores: Sequence[Store], clock: Clock, operator: Operator | None = None
    ) -> None:
        self._key = key
        self._stores = stores
        self._operator = operator or Operator(stores, {})
        self._clock = clock
        self._num_refused = 0  # since the log said so last
        self._log_again_at = 0.0

    async def answer(
        self, message: protocol.AdminQuestion
    ) -> AsyncGenerator[protocol.AdminAnswer, None]:
        """The one answer. Raises the KvbatonError the question ends with."""
        self._check(message.admin_key)
        if isinstance(message, protocol.Why):
            yield await self._why(message)
        elif isinstance(message, protocol.Audit):
            yield await self._audit(message)
        else:
            yield await self._operator.answer(message)

    def _check(self, key: str) -> None:
        if not self._key:
            raise ForbiddenError(
                "this gateway has no admin key: start it with --admin-key-file FILE, made with "
                f"{HOW_TO_MAKE_A_KEY}",
                field="admin_key",
            )
        if hmac.compare_digest(key.encode(), self._key.encode()):
            return
        self._num_refused += 1
        now = self._clock.now()
        if now >= self._log_again_at:
            log.warning("admin_key_refused", num_refused=self._num_refused)
            self._num_refused, self._log_again_at = 0, now + _LOG_INTERVAL_S
        raise ForbiddenError("this is not the gateway's admin key", field="admin_key")

    async def _audit(self, message: protocol.Audit) -> protocol.Audited:
        stores = await asyncio.gather(*(self._audit_store(store) for store in self._stores))
        closes = all(store.closes for store in stores)
        return protocol.Audited(id=message.id, closes=closes, stores=stores)

    async def _audit_store(self, store: Store) -> StoreAudit:
        try:
            audit = (await ask(store, AskAudit(), Audited)).audit
        except KvbatonError as error:
            audit = StoreAudit(problem=error.message)
        return msgspec.structs.replace(audit, store=store.index, endpoint=store.link.endpoint)

    async def _why(self, message: protocol.Why) -> protocol.Told:
        stores = self._stores_of(message)
        name = message.name or ""
        inner = [name.removeprefix(each) for each in _ANSWER_PREFIXES if name.startswith(each)]
        question = AskWhy(block=message.block, names=[name, *inner])
        histories = await asyncio.gather(*(_history(store, question) for store in stores))
        return protocol.Told(id=message.id, stores=histories)

    def _stores_of(self, message: protocol.Why) -> Sequence[Store]:
        """Whom to ask. Raises InvalidRequestError unless that is clear."""
        if (message.block is None) == (not message.name):
            raise InvalidRequestError("exactly one of block and name is given", field="block")
        num_stores = len(self._stores)
        if message.store is not None:
            if not 0 <= message.store < num_stores:
                raise InvalidRequestError(
                    f"store must be below {num_stores}, got {message.store}", field="store"
                )
            return [self._stores[message.store]]
        if message.block is not None and num_stores > 1:
            raise InvalidRequestError(
                f"there are {num_stores} KV stores, each with a block {message.block}: name the "
                "store too",
                field="store",
            )
        return self._stores


async def _history(store: Store, question: AskWhy) -> StoreHistory:
    try:
        history = (await ask(store, msgspec.structs.replace(question), Told)).history
    except KvbatonError as error:
        history = StoreHistory(problem=error.message)
    return msgspec.structs.replace(history, store=store.index, endpoint=store.link.endpoint)


async def drop_cache(stores: Sequence[Store]) -> int:
    """Nobody shall find what these stores have cached by now. Returns how many blocks that were.
    Raises UnavailableError for a store that does not answer: what it has may still be found."""
    try:
        answers = await asyncio.gather(*(ask(store, DropCache(), CacheDropped) for store in stores))
    except KvbatonError as error:
        raise UnavailableError(f"a KV store may still have its cache: {error.message}") from error
    return sum(answer.num_blocks for answer in answers)
