"""Tells the store which blocks have become final, after their bytes have got there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from common.messages import Commit
from common.service import Tasks
from common.worker.endings import Endings
from common.worker.sequence import Sequence
from common.worker.store_link import StoreLink
from kvbaton.errors import KvbatonError


class Publisher:
    """Commits in order, each sequence by itself; pushes run beside the next step's arithmetic.

    What is pushed is committed in parts of `part_blocks`, each as soon as it and those before it
    are there: who fetches them need not wait for the rest of a long chunk.
    """

    def __init__(self, tasks: Tasks, endings: Endings, part_blocks: int) -> None:
        self._tasks = tasks
        self._endings = endings
        self._part_blocks = part_blocks
        self._last: dict[Sequence, asyncio.Task[None]] = {}

    def publish(self, store: StoreLink, sequence: Sequence) -> None:
        """Commit what the last step made final. Where nothing moves that is a message, no more."""
        commits = store.commits(sequence)
        if not store.mover.moves:
            for commit in commits:
                store.link.send(commit)
        elif commits:
            self._endings.hold(sequence)
            push = self._push(self._last.get(sequence), store, sequence, commits)
            self._last[sequence] = self._tasks.spawn(push, "publish")

    async def settle(self, sequence: Sequence) -> None:
        """Wait until what was published is in the store, or has failed to get there."""
        last = self._last.get(sequence)
        if last is not None:
            await asyncio.wait({last})

    async def _push(
        self,
        before: asyncio.Task[None] | None,
        store: StoreLink,
        sequence: Sequence,
        commits: list[Commit],
    ) -> None:
        try:
            if before is not None:
                await asyncio.wait({before})
            for commit in commits:
                if sequence.num_committed < commit.first_index:
                    break  # an earlier one failed
                await self._push_parts(store, sequence, list(self._parts(commit)))
        except KvbatonError as error:
            self._endings.drop(
                sequence, "unavailable", f"blocks could not be sent: {error.message}"
            )
        finally:
            if self._last.get(sequence) is asyncio.current_task():
                del self._last[sequence]
            self._endings.release(sequence)

    async def _push_parts(self, store: StoreLink, sequence: Sequence, parts: list[Commit]) -> None:
        """All pushes have ended when this does. Raises KvbatonError if one has failed: then neither
        it nor those after it are committed, so their blocks are still ours, and the sequence cannot
        go on: the keys of its later blocks build on theirs."""
        there: set[int] = set()
        num_committed = 0

        async def push(number: int, part: Commit) -> None:
            nonlocal num_committed
            pieces = sequence.pieces(part.first_index, part.blocks, part.keys)
            await store.mover.push(part.handoff_id, part.epoch, pieces)
            there.add(number)
            while num_committed in there:
                store.link.send(parts[num_committed])
                num_committed += 1

        pushes = (push(number, part) for number, part in enumerate(parts))
        results = await asyncio.gather(*pushes, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                first_index = parts[num_committed].first_index
                sequence.num_committed = min(sequence.num_committed, first_index)
                raise result

    def _parts(self, commit: Commit) -> Iterator[Commit]:
        for start in range(0, len(commit.blocks), self._part_blocks):
            end = start + self._part_blocks
            yield Commit(
                handoff_id=commit.handoff_id,
                epoch=commit.epoch,
                first_index=commit.first_index + start,
                blocks=commit.blocks[start:end],
                keys=commit.keys[start:end],
            )
