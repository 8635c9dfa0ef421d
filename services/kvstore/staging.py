"""The blocks that the disk has in hand: those it is writing, and those it is loading into. Pure.

Also those that workers of a dead store may be reading. They all have an owner like others, so that
the ledger's counts close while a disk is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.kvstore.blocks import BlockName, BlockPool

WRITER = "disk"
_WINDOW_SHARE = 8  # what is to be evicted soon: one block in so many
_LEAST_WINDOW, _MOST_WINDOW = 64, 256


class Staging:
    """Takes blocks from the pool for the disk, and gives them back.

    The `window` coldest of the cached blocks are those that are expected to be evicted soon.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.window = min(max(_LEAST_WINDOW, pool.num_blocks // _WINDOW_SHARE), _MOST_WINDOW)
        self.writing: dict[int, None] = {}  # pinned
        self.held: list[int] = []  # pinned, for a prompt the rest of which is being loaded
        self.former: list[int] = []  # pinned, the last used first: the store restarted (formers.py)
        self._pool = pool
        self._num_loading = 0

    @property
    def pinned(self) -> list[int]:
        """The blocks that nobody's handoff is the reader of, once for each reason."""
        return [*self.writing, *self.held, *self.former]

    @property
    def is_busy(self) -> bool:
        """Whether the disk, or a worker of the store before, is reading or writing memory."""
        return bool(self.writing or self._num_loading or self.former)

    @property
    def is_due(self) -> bool:
        """Whether memory is so full that cached blocks will be evicted soon."""
        return self._pool.num_free < self.window

    def take_cold(
        self, most: int, is_stored: Callable[[bytes], bool]
    ) -> list[tuple[int, BlockName]]:
        """Pin up to `most` of the blocks that are to be evicted soon and are not on the disk."""
        taken: list[tuple[int, BlockName]] = []
        for block_id in self._pool.coldest(self.window):
            name = self._pool[block_id].name
            assert name is not None
            if len(taken) < most and not is_stored(name.key):
                taken.append((block_id, name))
        blocks = [block_id for block_id, _ in taken]
        self._pool.pin(blocks)
        self.writing.update(dict.fromkeys(blocks))
        return taken

    def written(self, blocks: Sequence[int]) -> None:
        """The disk reads these no more: they are the first to be evicted."""
        for block_id in blocks:
            del self.writing[block_id]
        self._pool.unpin(blocks, cold=True)

    def hold(self, blocks: Sequence[int]) -> None:
        """Keep blocks in memory that were found or loaded for a prompt, until `let_go`."""
        self._pool.pin(blocks)
        self.held += blocks

    def let_go(self) -> None:
        """The prompt has them, or does without."""
        held, self.held = self.held, []
        self._pool.unpin(held)

    def let_former_go(self) -> None:
        """Nobody reads for a former store any more."""
        former, self.former = self.former, []
        self._pool.unpin(former)

    def take_free(self, count: int) -> list[int]:
        """Blocks to load into; the caller has checked that there is room."""
        self._num_loading += count
        return self._pool.grant(count, WRITER)

    def loaded(self, blocks: Sequence[int], names: Sequence[BlockName | None]) -> list[int]:
        """What came from the disk is cache from now on; what did not come (None) is free. Returns
        the former."""
        self._num_loading -= len(blocks)
        final = []
        for block_id, name in zip(blocks, names, strict=True):
            if name is None:
                self._pool.free([block_id])
            else:
                self._pool.commit(block_id, name)
                final.append(block_id)
        self._pool.unpin(final)
        return final
