"""A store's arena and the journal beside it: made anew, or taken over from a store that died.

Both go by the name and the address of the store, so that the next one finds them. A store on any
free port is another each time: nobody would find it, and it has no journal. Nothing is taken over
from another boot or another container, where process numbers mean other processes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import structlog

from common.kv.arena import ARENA_PREFIX, JOURNAL_SUFFIX, NoRoomError
from common.service import Seams
from services.kvstore.config import StoreConfig
from services.kvstore.journal import Header, JournalError
from services.kvstore.journal_file import Journal, Left, journal_bytes, read_header

log = structlog.get_logger()


class StoreMemory:
    """Owns the two files. `left_secret` is what the dead store made block keys with."""

    def __init__(self, config: StoreConfig, seams: Seams, instance_id: str) -> None:
        is_found_again = not ("*" in config.bind or config.bind.endswith(":0"))
        parts = (seams.host_id, config.name, config.bind) if is_found_again else (instance_id,)
        name = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
        self.path = str(Path(config.arena_dir) / f"{ARENA_PREFIX}{name}")
        self.left_secret: bytes | None = None
        self._journal_path = self.path + JOURNAL_SUFFIX if is_found_again else ""
        self._folder, self._num_bytes = config.arena_dir, config.kv_bytes
        self._is_kept = config.keep_arena and is_found_again
        self._disk = seams.disk
        self._arena: memoryview | None = None
        self._left: memoryview | None = None  # a journal that was not looked at yet

    @property
    def arena(self) -> memoryview:
        """The blocks; another one may take its place in `serve`."""
        assert self._arena is not None
        return self._arena

    def open(self) -> None:
        """Take over what is there, or reserve an arena. Raises ArenaError."""
        for path in self._disk.sweep_arenas(self._folder, keep_journaled=True):
            log.info("stale_arena_removed", path=path)
        self._arena = self._disk.open_arena(self.path, self._num_bytes)
        if self._arena is not None and self._journal_path:
            try:
                self._left = self._disk.open_arena(self._journal_path) or memoryview(b"")
                self.left_secret = read_header(self._left).secret
                return
            except JournalError as error:
                log.warning("arena_not_taken_over", path=self.path, reason=str(error))
        self._renew()

    def serve(
        self, model: bytes, num_blocks: int, secret: bytes
    ) -> tuple[Journal | None, Left | None]:
        """Blocks of this model are to come. Returns their journal, and what a dead store left of
        it, if that is what it served. Raises ArenaError."""
        header = Header(num_blocks, model, secret)
        memory, self._left = self._left, None
        if memory is not None:
            try:
                return self._take_over(memory, header)
            except JournalError as error:
                log.warning("arena_not_taken_over", path=self.path, reason=str(error))
                self._renew()  # workers of the dead store may be writing into the former one
        if not self._journal_path:
            return None, None
        self._disk.remove_arena(self._journal_path)  # of what was served before
        memory = self._disk.create_arena(self._journal_path, journal_bytes(num_blocks))
        journal = Journal(memory, num_blocks)
        journal.begin(header)
        return journal, None

    def _take_over(self, memory: memoryview, header: Header) -> tuple[Journal, Left]:
        if read_header(memory) != header:
            raise JournalError("it is of another model, layout or secret")
        journal = Journal(memory, header.num_blocks)
        left = journal.take_over()
        log.info("arena_taken_over", num_workers=len(left.workers), **left.recovered.counts())
        return journal, left

    def _renew(self) -> None:
        """A new arena in the place of the former. The journal goes first: it is of that one."""
        if self._journal_path:
            self._disk.remove_arena(self._journal_path)
        self._arena = None
        try:
            self._arena = self._disk.create_arena(self.path, self._num_bytes)
        except NoRoomError:
            swept = self._disk.sweep_arenas(self._folder)
            log.info("stale_arenas_removed", reason="their room is needed", paths=swept)
            if not swept:
                raise
            self._arena = self._disk.create_arena(self.path, self._num_bytes)

    def close(self) -> None:
        """An orderly end leaves nothing behind, unless the next start is to find it."""
        if self._arena is not None and not self._is_kept:
            if self._journal_path:
                self._disk.remove_arena(self._journal_path)
            self._disk.remove_arena(self.path)
        self._arena = self._left = None
