"""Handoffs through a store: one after the other through its pure core, many at once through a real
process. Both carry the very same messages; every prompt is new."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Generator, Iterator, Mapping
from typing import NamedTuple

from common.messages import (
    Claim,
    Commit,
    Fill,
    Granted,
    HandoffOpened,
    Lease,
    Leased,
    Message,
    OpenHandoff,
    Release,
    Seal,
    Sealed,
)
from scripts.benchmarks.store_members import StoreMembers
from services.kvstore.blocks import BlockPool
from services.kvstore.broker import Broker
from services.kvstore.ledger import Ledger

BLOCK_SIZE = 16
_KEY_BYTES = 32
ROLE_IDS = {"gateway": "a" * 32, "prefill": "b" * 32, "decode": "c" * 32}


class Step(NamedTuple):
    """A message of a member; `awaits` is the type of what the store says to it, if anything."""

    sender: str
    message: Message
    awaits: type[Message] | None = None


class Shape(NamedTuple):
    """A prompt and the chunks it is computed in, in tokens."""

    num_tokens: int = 512
    chunk: int = 128

    @property
    def num_messages(self) -> int:
        """Of a handoff, both ways."""
        return 12 + -(-self.num_tokens // self.chunk)


Handoff = Generator[Step, Message | None, None]


def handoff(shape: Shape, ids: Mapping[str, str]) -> Handoff:
    """The steps of a handoff; what each awaits is sent in. Decode fills one block of its own."""
    num_blocks = shape.num_tokens // BLOCK_SIZE
    keys = random_keys(num_blocks + 1)
    opened = yield Step("gateway", open_message(keys[:-1], shape.num_tokens, ids), HandoffOpened)
    assert isinstance(opened, HandoffOpened)
    handoff_id, epoch = opened.handoff_id, opened.epoch
    granted = yield Step("prefill", Fill(handoff_id=handoff_id, epoch=epoch), Granted)
    assert isinstance(granted, Granted)
    for first in range(0, num_blocks, shape.chunk // BLOCK_SIZE):
        blocks = granted.blocks[first : first + shape.chunk // BLOCK_SIZE]
        yield Step("prefill", _commit(opened, first, blocks))
    yield Step("prefill", Seal(handoff_id=handoff_id, epoch=epoch, first_token=1), Sealed)
    yield Step("decode", Claim(handoff_id=handoff_id, epoch=epoch), Granted)
    leased = yield Step("decode", Lease(num_blocks=1), Leased)
    assert isinstance(leased, Leased)
    yield Step("decode", _commit(opened, num_blocks, leased.blocks, keys[-1:]))
    yield Step("decode", Release(handoff_id=handoff_id, epoch=epoch))


def random_keys(count: int) -> list[bytes]:
    """Keys of a prompt that nobody has seen."""
    raw = secrets.token_bytes(count * _KEY_BYTES)
    return [raw[i : i + _KEY_BYTES] for i in range(0, len(raw), _KEY_BYTES)]


def open_message(keys: list[bytes], num_tokens: int, ids: Mapping[str, str]) -> OpenHandoff:
    """What a gateway asks for a prompt."""
    return OpenHandoff(
        request_id=secrets.token_hex(16),
        prefill_id=ids["prefill"],
        decode_id=ids["decode"],
        tenant=b"tenant",
        root_key=b"root",
        keys=keys,
        num_tokens=num_tokens,
    )


def _commit(
    opened: HandoffOpened, first: int, blocks: list[int], keys: list[bytes] | None = None
) -> Commit:
    return Commit(
        handoff_id=opened.handoff_id,
        epoch=opened.epoch,
        first_index=first,
        blocks=blocks,
        keys=keys or [],
    )


class PureStore:
    """A broker and its ledger, fed with messages as the store's shell does."""

    def __init__(self, num_blocks: int, shape: Shape) -> None:
        numbers = itertools.count(1)
        self.ledger = Ledger(
            BlockPool(num_blocks), BLOCK_SIZE, lambda: f"{next(numbers):032x}", growth_blocks=1
        )
        roles = {member_id: role for role, member_id in ROLE_IDS.items()}
        self._told: list[Message] = []
        self._broker = Broker(self.ledger, self._send, roles.get, lambda _: False)
        self._shape = shape
        self.ids = ROLE_IDS

    def _send(self, _member_id: str, message: Message) -> None:
        self._told.append(message)

    def handle(self, sender: str, message: Message) -> Message | None:
        """Carry out a member's message; returns what is said to it."""
        broker, member_id = self._broker, self.ids[sender]
        by_gateway = sender == "gateway"
        answer = (broker.from_gateway if by_gateway else broker.from_worker)(member_id, message)
        broker.admit()
        if self._told:
            answer = self._told.pop()
        return answer

    def run(self, count: int) -> None:
        """So many handoffs."""
        for _ in range(count):
            steps = handoff(self._shape, self.ids)
            answer: Message | None = None
            with contextlib.suppress(StopIteration):
                while True:
                    step = steps.send(answer)
                    answer = self.handle(step.sender, step.message)


class LiveHandoffs:
    """Handoffs of the members of a store process."""

    def __init__(self, members: StoreMembers, shape: Shape) -> None:
        self._links = members.links
        self._ids = members.ids
        self._shape = shape
        self._sealed: dict[str, asyncio.Future[Message]] = {}
        members.pushed = self._told

    def _told(self, message: Message) -> None:
        assert isinstance(message, Sealed)
        self._sealed.pop(message.handoff_id).set_result(message)

    async def run(self, count: int, concurrency: int) -> None:
        """So many handoffs, `concurrency` at once."""
        numbers = iter(range(count))
        await asyncio.gather(*(self._one_by_one(numbers) for _ in range(concurrency)))

    async def _one_by_one(self, numbers: Iterator[int]) -> None:
        for _ in numbers:
            steps = handoff(self._shape, self._ids)
            answer: Message | None = None
            with contextlib.suppress(StopIteration):
                while True:
                    answer = await self._carry_out(steps.send(answer))

    async def _carry_out(self, step: Step) -> Message | None:
        link = self._links[step.sender]
        if isinstance(step.message, Seal):
            sealed: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            self._sealed[step.message.handoff_id] = sealed
            link.send(step.message)
            return await sealed
        if step.awaits is None:
            link.send(step.message)
            return None
        return await link.call(step.message, timeout_s=None)
