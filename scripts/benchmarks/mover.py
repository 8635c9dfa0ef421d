"""How fast KV blocks move between a worker and a KV store: encrypted, by several connections,
compressed, and by NIXL where that is installed.

A real store process and a worker's mover, with all cores of the machine: encrypting takes threads
of its own at both ends. Blocks are those of the 135M model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec

from common.kv.planes import compress, decompress
from common.log import configure_logging
from scripts.benchmarks import store_bytes
from scripts.benchmarks.measure import alternate, collect, spread, timed
from scripts.benchmarks.report import Report
from scripts.benchmarks.store_bytes import LAYOUT, MovedPrompt
from scripts.benchmarks.store_members import live_store


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--rounds", type=int, default=9, help="of each figure (default: 9)")
    parser.add_argument("--moved", type=int, default=256, help="blocks moved (default: 256)")
    parser.add_argument(
        "--connections",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        help="to the store (default: 1 2 4)",
    )


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    configure_logging("warning", "bench")
    num_blocks = options.moved
    report = Report("mover", {"rounds": options.rounds, "blocks": num_blocks})
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        parts = [
            _way(stack, num_blocks, count, secure=secure)
            for secure in (False, True)
            for count in options.connections
        ]
        parts.append(_way(stack, num_blocks, 1, secure=True, compression="lossless"))
        if find_spec("nixl_cu12"):
            parts.append(_way(stack, num_blocks, 1, secure=True, nixl_devices="lo"))
        source, target = (store_bytes.random_blocks(num_blocks) for _ in range(2))
        copy = partial(store_bytes.copy, source, target, range(num_blocks))
        found = collect([*parts, partial(timed, "memcpy", copy)], options.rounds)
    rates = {
        name: spread(num_blocks * LAYOUT.block_bytes / seconds for seconds in values)
        for name, values in found.items()
    }
    report.figures["bytes_per_s"] = rates
    rows = [(name, rate.text(1e-9, 3)) for name, rate in rates.items()]
    report.note(f"alone, one core: {_codec(source)}")
    report.table(f"{num_blocks} blocks of {LAYOUT.block_bytes} bytes", ("", "GB/s"), rows)
    return report


def _way(
    stack: ExitStack,
    num_blocks: int,
    num_connections: int,
    *,
    secure: bool,
    compression: str = "off",
    nixl_devices: str = "",
) -> Callable[[], dict[str, float]]:
    """Moves a prompt to a store of its own and from there, and tells how long each took."""
    store = stack.enter_context(
        live_store(
            None,
            LAYOUT,
            4 * num_blocks,
            "zmq",
            secure=secure,
            io_threads=num_connections,
            nixl_devices=nixl_devices,
        )
    )
    prompt = MovedPrompt(store.members, num_blocks, num_connections, compression, nixl_devices)
    store.run(prompt.join())
    name = f"{'CURVE' if secure else 'plain'}, {num_connections} connections"
    if compression != "off":
        name += ", compressed"
    if nixl_devices:
        name = "NIXL"

    def move() -> dict[str, float]:
        store.run(prompt.fill())
        push = store.use(prompt.push())
        store.run(prompt.claim())
        pull = store.use(prompt.pull())
        return {f"push, {name}": push.seconds, f"pull, {name}": pull.seconds}

    return move


def _codec(memory: memoryview) -> str:
    """What compression does by itself."""
    block = store_bytes.block_of(memory, 0)
    frame = compress(block)
    figures = {
        "compress": lambda: compress(block),
        "decompress": lambda: decompress(frame, LAYOUT.block_bytes),
    }
    rates = {
        name: spread(len(block) / seconds for seconds in values).text(1e-9, 2)
        for name, values in alternate(figures, 9).items()
    }
    told = ", ".join(f"{name} {rate} GB/s" for name, rate in rates.items())
    return f"{told}; {len(frame) / len(block):.1%} are left"
