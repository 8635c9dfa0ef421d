"""NIXL as the simulated cluster has it: agents that reach each other's registered memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvbaton.errors import UnavailableError

_FIRST_ADDRESS = 1 << 40


class SimNixl:
    """All agents of one world. `moved` hears of each transfer: "read" or "write", and what moved,
    which it may change; while `is_broken` there are none."""

    def __init__(self) -> None:
        self.agents: dict[str, SimAgent] = {}
        self.moved: Callable[[str, memoryview], None] = lambda _verb, _data: None
        self.is_broken = False
        self._next_address = _FIRST_ADDRESS

    def agent(self, name: str, _devices: str) -> SimAgent:
        self.agents[name] = made = SimAgent(self, name)
        return made

    def address(self, num_bytes: int) -> int:
        """Of new memory; no two touch."""
        address = self._next_address
        self._next_address += 2 * num_bytes
        return address


class SimAgent:
    """See common.net.nixl.Agent."""

    def __init__(self, world: SimNixl, name: str) -> None:
        self.name = name
        self.known: set[str] = set()
        self.is_closed = False
        self._world = world
        self._memory: list[tuple[int, memoryview]] = []
        self._num_busy = 0

    def register(self, memory: memoryview) -> int:
        address = self._world.address(len(memory))
        self._memory.append((address, memory))
        return address

    def metadata(self) -> bytes:
        return self.name.encode()

    def meet(self, metadata: bytes) -> str:
        name = metadata.decode(errors="replace")
        if name not in self._world.agents:
            raise UnavailableError("this is no metadata")
        self.known.add(name)
        return name

    def forget(self, name: str) -> None:
        self.known.remove(name)

    def read(self, here: int, name: str, there: int, num_bytes: int) -> None:
        self._copy("read", self._other(name).at(there, num_bytes), self.at(here, num_bytes))

    def write(self, here: int, name: str, there: int, num_bytes: int) -> None:
        self._copy("write", self.at(here, num_bytes), self._other(name).at(there, num_bytes))

    @contextmanager
    def busy(self) -> Iterator[None]:
        self._num_busy += 1
        yield
        self._num_busy -= 1

    def close(self) -> None:
        self.is_closed = True

    def at(self, address: int, num_bytes: int) -> memoryview:
        for first, memory in self._memory:
            if first <= address and address + num_bytes <= first + len(memory):
                return memory[address - first : address - first + num_bytes]
        raise UnavailableError(f"no memory of {self.name} is registered there")

    def _other(self, name: str) -> SimAgent:
        assert name in self.known
        other = self._world.agents[name]
        if self._world.is_broken or other.is_closed or not other._num_busy:
            raise UnavailableError(f"{name} cannot be reached")
        return other

    def _copy(self, verb: str, source: memoryview, target: memoryview) -> None:
        target[:] = source
        self._world.moved(verb, target)
