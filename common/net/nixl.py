"""Memory that another process reads and writes by itself, and the agent that does so: NIXL.

NIXL (github.com/ai-dynamo/nixl) is a layer over UCX, which takes the best way that both ends have:
RDMA, shared memory, TCP. Nothing of it is loaded where no setting asks for it. Its traffic is
neither encrypted nor authorised (docs/security.md); what moves has its digest, as ever.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from common.config import StartError
from kvbaton.errors import ConnectionLostError, OverloadedError, UnavailableError

PIECE_BYTES = 1024 * 1024  # or one block if that is more: what one message moves
TRANSFER_S = 10.0  # what takes longer has failed
IN_DOUBT_S = 60.0  # until memory is used again whose transfer may not have ended

_PACKAGES = ("nixl_cu12", "nixl_cu13")  # the CUDA that they can use, and need not find
_LEAST_WAIT_S, _MOST_WAIT_S = 5e-5, 1e-3


class Agent(Protocol):
    """One end of transfers. All but `busy` may block, and may be called from any thread."""

    def register(self, memory: memoryview) -> int:
        """Make memory known, for good; returns its address. Raises UnavailableError."""

    def metadata(self) -> bytes:
        """What opens all registered memory to who has it."""

    def meet(self, metadata: bytes) -> str:
        """The name of the agent that this is of. Raises UnavailableError."""

    def forget(self, name: str) -> None:
        """Have nothing more to do with an agent."""

    def read(self, here: int, name: str, there: int, num_bytes: int) -> None:
        """Copy from another agent's memory. Raises UnavailableError."""

    def write(self, here: int, name: str, there: int, num_bytes: int) -> None:
        """Copy to another agent's memory. Raises UnavailableError."""

    def busy(self) -> AbstractContextManager[None]:
        """While in it, what others' transfers need done at this end is done."""

    def close(self) -> None:
        """End what is under way."""


class Piece(NamedTuple):
    """A part of registered memory. `offset` counts from the beginning of that."""

    offset: int
    address: int
    memory: memoryview

    def blocks(self, num_blocks: int, block_bytes: int) -> list[memoryview]:
        """Its first blocks, which lie one after another."""
        starts = range(0, num_blocks * block_bytes, block_bytes)
        return [self.memory[start : start + block_bytes] for start in starts]


class Pieces:
    """Registered memory, in pieces for one message each."""

    def __init__(self, agent: Agent, most_bytes: int, block_bytes: int) -> None:
        self.agent = agent
        self.piece_bytes = max(1, PIECE_BYTES // block_bytes) * block_bytes
        num_pieces = most_bytes // self.piece_bytes
        self.num_bytes = max(mmap.PAGESIZE, num_pieces * self.piece_bytes)
        memory = memoryview(mmap.mmap(-1, self.num_bytes))
        self.address = agent.register(memory)
        self._free = [
            Piece(at, self.address + at, memory[at : at + self.piece_bytes])
            for at in range(0, num_pieces * self.piece_bytes, self.piece_bytes)
        ]

    @contextmanager
    def lent(self) -> Iterator[Piece]:
        """One of them. Raises OverloadedError if all are in use. One that is left with an error
        that leaves open if its transfer has ended is lent again after a while only."""
        if not self._free:
            raise OverloadedError("all memory for transfers is in use")
        piece = self._free.pop()
        try:
            yield piece
        except (UnavailableError, ConnectionLostError, asyncio.CancelledError):
            asyncio.get_running_loop().call_later(IN_DOUBT_S, self._free.append, piece)
            raise
        except BaseException:
            self._free.append(piece)
            raise
        self._free.append(piece)


def load_agent(name: str, devices: str) -> Agent:
    """An agent that uses these network devices, comma-separated. Raises StartError."""
    os.environ["UCX_NET_DEVICES"] = devices  # read when UCX is loaded
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    library = _library()
    try:
        return NixlAgent(library, name)
    except Exception as error:  # of types of its own
        raise StartError(f"NIXL cannot start on --nixl-devices {devices}: {error!r}") from error


def _library() -> ModuleType:
    reasons = []
    for package in _PACKAGES:
        try:
            return importlib.import_module(package)
        except ImportError as error:
            reasons.append(str(error))
    raise StartError(
        f"NIXL is not installed ({'; '.join(reasons)}): in kvbaton's folder run "
        ".venv/bin/python -m pip install --editable '.[nixl]', "
        "or use --mover auto on workers and no --nixl-devices on stores"
    )


class NixlAgent:
    """The library's agent, with the UCX backend.

    Without its thread of progress, which takes a whole core whether or not there is any: transfers
    that begin here are looked at until they have ended, and those that others begin while `busy`.
    """

    def __init__(self, library: Any, name: str) -> None:
        config = library.nixl_agent_config(
            enable_prog_thread=False,
            backends=["UCX"],
            sync_mode=library.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        self._agent = library.nixl_agent(name, config)
        self._is_closed = False
        self._num_busy = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="nixl", daemon=True)
        self._thread.start()

    def register(self, memory: memoryview) -> int:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with _told("register memory"):
            self._agent.register_memory([(address, len(memory), 0, "")], "DRAM")
        return address

    def metadata(self) -> bytes:
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def meet(self, metadata: bytes) -> str:
        with _told("know an agent by its metadata"):
            name: str | bytes = self._agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else name

    def forget(self, name: str) -> None:
        with suppress(UnavailableError), _told("forget an agent"):
            self._agent.remove_remote_agent(name)

    def read(self, here: int, name: str, there: int, num_bytes: int) -> None:
        self._copy("READ", here, name, there, num_bytes)

    def write(self, here: int, name: str, there: int, num_bytes: int) -> None:
        self._copy("WRITE", here, name, there, num_bytes)

    @contextmanager
    def busy(self) -> Iterator[None]:
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()  # Python must not end while it is in the library

    def _copy(self, verb: str, here: int, name: str, there: int, num_bytes: int) -> None:
        agent = self._agent
        with _told(f"{verb} {num_bytes} bytes"):
            local, remote = (
                agent.get_xfer_descs([(address, num_bytes, 0)], "DRAM") for address in (here, there)
            )
            handle = agent.initialize_xfer(verb, local, remote, name)
            try:
                self._finish(handle)
            finally:
                agent.release_xfer_handle(handle)

    def _finish(self, handle: Any) -> None:
        state, wait_s = self._agent.transfer(handle), _LEAST_WAIT_S
        ends_at = time.monotonic() + TRANSFER_S
        while state == "PROC":
            if self._is_closed or time.monotonic() > ends_at:
                raise UnavailableError(f"a transfer has not ended within {TRANSFER_S} s")
            time.sleep(wait_s)  # the library tells nobody when it is done
            wait_s = min(2 * wait_s, _MOST_WAIT_S)
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise UnavailableError(f"a transfer has failed: {state}")

    def _count(self, change: int) -> None:
        with self._changed:
            self._num_busy += change
            self._changed.notify()

    def _serve(self) -> None:
        """To ask for notifications, of which there are none, makes progress."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._num_busy or self._is_closed)
                if self._is_closed:
                    return
            with suppress(UnavailableError), _told("make progress"):
                self._agent.get_new_notifs()
            time.sleep(4 * _LEAST_WAIT_S)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """The library's errors have types of its own."""
    try:
        yield
    except UnavailableError:
        raise
    except Exception as error:
        raise UnavailableError(f"NIXL cannot {what}: {error!r}") from error
