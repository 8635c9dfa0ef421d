"""A process with a pool of its own, for test_neighbours.py; it lives until it is killed."""

from __future__ import annotations

import sys
from pathlib import Path

from common.engine.cuda import memory
from tests.unit.neighbours_world import HostSharing, name_of, workers


def main() -> None:
    """Fill and save one block, say so, and wait."""
    memory.default_folder = lambda: Path(sys.argv[1])  # type: ignore[attr-defined]
    with workers(1, worker_0=HostSharing()) as (worker,):
        worker.write(1, 10.0)
        worker.follower.save_sync({1: name_of(1)})
        sys.stdout.write("saved\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
