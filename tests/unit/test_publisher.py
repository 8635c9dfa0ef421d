"""What is pushed is committed part by part and in order, and nothing from a failed part on."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from common.messages import Commit
from common.service import Tasks
from common.worker.publisher import Publisher
from kvbaton.errors import ConnectionLostError

PART_BLOCKS = 4


def _fail(error: BaseException) -> None:
    raise error


class World:
    """A sequence whose chunk of ten blocks is published, and what comes of it."""

    moves = True

    def __init__(self) -> None:
        self.pushes: dict[int, asyncio.Future[None]] = {}  # by the first block
        self.committed: list[Commit] = []
        self.dropped: list[str] = []
        self.num_uses = 0
        self.num_committed = 20
        self.publisher = Publisher(Tasks(_fail), self, PART_BLOCKS)  # type: ignore[arg-type]
        store: Any = SimpleNamespace(commits=lambda _: [self._chunk()], mover=self, link=self)
        sequence: Any = self
        self.publisher.publish(store, sequence)

    def _chunk(self) -> Commit:
        blocks = list(range(100, 110))
        keys = [bytes([block]) * 16 for block in blocks]
        return Commit(handoff_id="h", epoch=3, first_index=10, blocks=blocks, keys=keys)

    def pieces(self, first: int, blocks: list[int], keys: list[bytes]) -> list[int]:
        assert [key[0] for key in keys] == blocks
        assert first + 90 == blocks[0]
        return blocks

    async def push(self, _handoff_id: str, _epoch: int, pieces: list[int]) -> None:
        self.pushes[pieces[0]] = asyncio.get_running_loop().create_future()
        await self.pushes[pieces[0]]

    def send(self, commit: Commit) -> None:
        self.committed.append(commit)

    def drop(self, _sequence: object, code: str, _reason: str) -> None:
        self.dropped.append(code)

    def hold(self, _sequence: object) -> None:
        self.num_uses += 1

    def release(self, _sequence: object) -> None:
        self.num_uses -= 1

    def firsts(self) -> list[int]:
        return [commit.first_index for commit in self.committed]


@pytest.fixture
async def world() -> World:
    world = World()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert list(world.pushes) == [100, 104, 108]
    return world


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_each_part_is_committed_once_it_and_those_before_it_are_there(world: World) -> None:
    world.pushes[104].set_result(None)
    await settle()
    assert world.firsts() == []
    world.pushes[100].set_result(None)
    await settle()
    assert world.firsts() == [10, 14]
    assert world.num_uses == 1
    world.pushes[108].set_result(None)
    await settle()
    assert world.firsts() == [10, 14, 18]
    assert [block for commit in world.committed for block in commit.blocks] == [*range(100, 110)]
    assert {(commit.handoff_id, commit.epoch) for commit in world.committed} == {("h", 3)}
    assert (world.num_uses, world.num_committed, world.dropped) == (0, 20, [])


async def test_from_a_failed_part_on_nothing_is_committed(world: World) -> None:
    world.pushes[100].set_result(None)
    world.pushes[104].set_exception(ConnectionLostError("cut"))
    await settle()
    assert world.num_uses == 1  # one push still reads the blocks
    world.pushes[108].set_result(None)
    await settle()
    assert world.firsts() == [10]
    assert (world.num_uses, world.num_committed, world.dropped) == (0, 14, ["unavailable"])
