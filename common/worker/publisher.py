"""Tells the store which blocks have become final, after their bytes have got there."""

from __future__ import annotations

import asyncio

from common.messages import Commit
from common.service import Tasks
from common.worker.endings import Endings
from common.worker.sequence import Sequence
from common.worker.store_link import StoreLink
from kvbaton.errors import KvbatonError


class Publisher:
    """Commits in order, each sequence by itself; pushes run beside the next step's arithmetic."""

    def __init__(self, tasks: Tasks, endings: Endings) -> None:
        self._tasks = tasks
        self._endings = endings
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
                pieces = sequence.pieces(commit.first_index, commit.blocks, commit.keys)
                await store.mover.push(commit.handoff_id, commit.epoch, pieces)
                store.link.send(commit)
        except KvbatonError as error:
            # Never committed, so these blocks are still ours, and the sequence cannot go on: the
            # keys of its later blocks build on theirs.
            sequence.num_committed = min(sequence.num_committed, commit.first_index)
            self._endings.drop(
                sequence, "unavailable", f"blocks could not be sent: {error.message}"
            )
        finally:
            if self._last.get(sequence) is asyncio.current_task():
                del self._last[sequence]
            self._endings.release(sequence)
