"""Pools of other processes on the same device: what one of them holds is copied from there, and
not from the arena.

Each process keeps a file in a folder that all of its user's share: how its pool is mapped, and the
name of what each block holds (residency.py keeps the names). Nobody is asked and nothing is locked:
a block is copied, and then its name is read again. The owner takes a name away, and counts that,
before it tells the device to write over the block, so a name that was not taken away when the copy
is done says that the copy is whole: a sequence lock. All else comes from the arena, which has every
block that has a name.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog
from torch import Tensor

from common.engine.cuda.copies import Copier, DevicePool
from common.engine.cuda.ipc import SharingError
from common.engine.cuda.notices import Notice, OwnNotice, read_notice
from common.engine.cuda.residency import NAME_WORDS, Copies, IntArray, NameArray, words_of
from common.locks import is_locked

log = structlog.get_logger()

BoolArray = np.ndarray[tuple[int], np.dtype[np.bool_]]


class Sharing(Protocol):
    """How a pool is mapped by another process. `device` names the device, to all alike."""

    device: str

    def export(self, memory: Tensor) -> bytes:
        """What `open` takes. Raises SharingError."""

    def open(self, handle: bytes, num_bytes: int) -> Tensor:
        """That memory, [num_bytes] in uint8. Raises SharingError."""

    def close(self, memory: Tensor) -> None:
        """Nothing reads what `open` gave any more."""


@dataclass(frozen=True, slots=True)
class _Neighbour:
    """Another process's pool. Its owner has `file` locked while it lives."""

    file: int
    names: NameArray
    memory: Tensor
    pool: DevicePool

    def find(self, wanted: NameArray) -> tuple[IntArray, IntArray, NameArray]:
        """Which of the names [NAME_WORDS, count] are here, in which blocks, and these blocks' names
        [NAME_ROWS, found]."""
        words = self.names[0]
        hits = np.flatnonzero(np.isin(words, wanted[0][wanted[0] != 0]))
        block_of = dict(zip(words[hits].tolist(), hits.tolist(), strict=True))
        found = [
            (place, block_of[word])
            for place, word in enumerate(wanted[0].tolist())
            if word in block_of
        ]
        places, blocks = np.array(found, dtype=np.int64).reshape(-1, 2).T
        counts = self.names[NAME_WORDS:, blocks]  # first: whatever is taken away later is seen
        names = np.concatenate((self.names[:NAME_WORDS, blocks], counts))
        is_here = np.all(names[:NAME_WORDS] == wanted[:, places], axis=0)
        return places[is_here], blocks[is_here], names[:, is_here]

    def still_has(self, blocks: IntArray, names: NameArray) -> BoolArray:
        """Which of these blocks have held what has these names since they were found."""
        is_here: BoolArray = np.all(self.names[:, blocks] == names, axis=0)
        return is_here


class Neighbours:
    """Our pool as others find it, and theirs as they come and go."""

    def __init__(
        self, folder: Path, pool: DevicePool, sharing: Sharing, copying: threading.Lock
    ) -> None:
        """`copying` is held by whoever copies. Raises SharingError or OSError where our pool cannot
        be shared."""
        self._folder = folder
        self._layout = pool.layout
        self._sharing = sharing
        self._copying = copying
        self._met: dict[str, _Neighbour | None] = {}  # None: of no use here
        self._is_closed = False
        notice = Notice(
            device=sharing.device,
            layout=pool.layout,
            num_blocks=pool.num_blocks,
            handle=sharing.export(pool.memory),
        )
        self._own = OwnNotice(folder, notice)

    @property
    def names(self) -> NameArray:
        """Of the blocks of our pool."""
        return self._own.names

    def copy(self, copies: Copies, named: Mapping[int, bytes], copier: Copier) -> IntArray:
        """Copy what others have; the places in `copies` that are done. `copying` is held."""
        wanted = np.zeros((NAME_WORDS, len(copies.slots)), dtype=np.uint64)
        for place, slot in enumerate(copies.slots.tolist()):
            wanted[:, place] = words_of(named.get(slot, b""))
        is_done = np.zeros(len(copies.slots), dtype=np.bool_)
        for neighbour in self._look_round() if wanted.any() else ():
            missing = np.flatnonzero(~is_done)
            here, blocks, names = neighbour.find(wanted[:, missing])
            here = missing[here]
            copier.copy_across(neighbour.pool.blocks, blocks, copies.blocks[here])
            is_done[here] = neighbour.still_has(blocks, names)
        return np.flatnonzero(is_done)

    def close(self) -> None:
        """Others copy from our pool no more, nor we from theirs."""
        self._own.close()
        with self._copying:
            self._is_closed = True
            for neighbour in filter(None, self._met.values()):
                self._sharing.close(neighbour.memory)

    def _look_round(self) -> Iterator[_Neighbour]:
        try:
            found = {entry.name for entry in self._folder.iterdir() if entry.name[0] != "."}
        except OSError as error:
            log.warning("neighbours_unseen", reason=str(error), using="the arena")
            return
        for name in [name for name in self._met if name not in found and not self._met[name]]:
            del self._met[name]
        for name in sorted(found - {self._own.path.name}):
            if name not in self._met:
                self._met[name] = self._meet(name)
            neighbour = self._met[name]
            if neighbour is not None:
                yield neighbour

    def _meet(self, name: str) -> _Neighbour | None:
        """None where its pool is of no use here, or it has just gone."""
        with ExitStack() as undone:
            try:
                file = os.open(self._folder / name, os.O_RDWR | os.O_NOFOLLOW)
                undone.callback(os.close, file)
                if not is_locked(file):  # its owner is dead, and nobody has seen that yet
                    (self._folder / name).unlink(missing_ok=True)
                    return None
                notice, names = read_notice(file)
                if (notice.device, notice.layout) != (self._sharing.device, self._layout):
                    return None
                num_bytes = notice.num_blocks * self._layout.block_bytes
                memory = self._sharing.open(notice.handle, num_bytes)
                undone.callback(self._sharing.close, memory)
                neighbour = _Neighbour(file, names, memory, DevicePool(self._layout, memory))
                watch = threading.Thread(target=self._watch, args=(name, neighbour), daemon=True)
                watch.start()
            except (SharingError, OSError, ValueError, RuntimeError) as error:
                log.warning("neighbour_unusable", pool=name, reason=str(error), using="the arena")
                return None
            undone.pop_all()
        log.info("neighbour_found", pool=name, num_blocks=neighbour.pool.num_blocks)
        return neighbour

    def _watch(self, name: str, neighbour: _Neighbour) -> None:
        """Let go of its pool as soon as its owner is gone, however that ended: until then the
        device's memory is not free for its successor."""
        fcntl.flock(neighbour.file, fcntl.LOCK_SH)
        with self._copying:
            if not self._is_closed:
                self._sharing.close(neighbour.memory)
                del self._met[name]
            (self._folder / name).unlink(missing_ok=True)
        os.close(neighbour.file)
