"""What a KV store can do on one core: handoffs and lookups per second, bytes per second by mover.

The store has one core, what loads it the other. Prompts of handoffs are new and the cache is full,
so every block is granted by eviction; decode fills one block of its own. The store process gets
over ZeroMQ the very messages that its pure core gets without. Of the prompts that are looked up
every block is cached. Blocks that move are those of the 135M model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

from common.kv.layout import KvLayout
from common.log import configure_logging
from scripts.benchmarks import store_bytes
from scripts.benchmarks.bare_pair import BarePair
from scripts.benchmarks.measure import Spread, alternate, collect, pin, seconds_of, spread, timed
from scripts.benchmarks.report import Report
from scripts.benchmarks.store_bytes import LAYOUT, MovedPrompt
from scripts.benchmarks.store_handoffs import BLOCK_SIZE, LiveHandoffs, PureStore, Shape
from scripts.benchmarks.store_lookups import CachedPrompt
from scripts.benchmarks.store_members import live_store

_NUM_BLOCKS = 4096
_SMALL = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=16, block_size=BLOCK_SIZE, dtype="bfloat16"
)
_LOOKUPS = {  # how often in a round, and what it is
    "lookup": (200, "looked up in the index"),
    "admit": (20, "opened, admitted and ended by the ledger"),
    "decode": (20, "the gateway's message decoded"),
    "hash": (10, "hashed, by the gateway"),
}
_WAYS = {
    "push": "zmq, push",
    "pull": "zmq, pull",
    "bare_push": "bare, push",
    "bare_pull": "bare, pull",
    "memcpy": "memcpy",
    "digest": "digests",
    "shm": "shm, read",
}
_MOVES = ("push", "pull")
_SHARES = ("store", "load")  # of their cores
_COLUMNS = {
    "of_bare": "of bare",
    "of_memcpy": "of memcpy",
    "of_parts": "of parts",
    "store": "store",
    "load": "worker",
}

Figures = dict[str, float]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--rounds", type=int, default=9, help="of each figure (default: 9)")
    parser.add_argument("--handoffs", type=int, default=500, help="a round (default: 500)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of one (default: 512)")
    parser.add_argument("--chunk", type=int, default=128, help="tokens a commit (default: 128)")
    parser.add_argument("--concurrency", type=int, default=16, help="at once (default: 16)")
    parser.add_argument("--lookup", type=int, default=8192, help="tokens looked up (default: 8192)")
    parser.add_argument("--moved", type=int, default=256, help="blocks moved (default: 256)")


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    configure_logging("warning", "bench")
    cores = sorted(os.sched_getaffinity(0))
    report = Report("store", {"rounds": options.rounds, "concurrency": options.concurrency})
    try:
        pin(cores[-1])
        _add_handoffs(report, options, cores[0])
        _add_lookups(report, options)
        _add_bytes(report, options, cores[0])
    finally:
        os.sched_setaffinity(0, cores)
    return report


# ---- handoffs ----------------------------------------------------------------------------------


def _add_handoffs(report: Report, options: argparse.Namespace, core: int) -> None:
    shape = Shape(options.prompt, options.chunk)
    count = options.handoffs
    pure = PureStore(_NUM_BLOCKS, shape)
    with live_store([core], _SMALL, _NUM_BLOCKS, "shm") as store:
        live = LiveHandoffs(store.members, shape)

        def run_pure() -> Figures:
            return {"pure": count / seconds_of(partial(pure.run, count))}

        def run_live() -> Figures:
            usage = store.use(live.run(count, options.concurrency))
            return {"zmq": count / usage.seconds, "store": usage.store, "load": usage.load}

        found = collect([run_pure, run_live], options.rounds)
    figures = {name: spread(values) for name, values in found.items()}
    report.figures["handoffs"] = {**figures, "messages_each": shape.num_messages}
    rows = []
    for name, text in (("pure", "broker and ledger alone"), ("zmq", "store process, ZeroMQ")):
        messages = spread(value * shape.num_messages for value in found[name])
        rows.append((text, figures[name].text(digits=0), messages.text(digits=0)))
    title = f"Handoffs of {shape.num_tokens} tokens: median (p10 to p90)"
    report.table(title, ("", "handoffs/s", "messages/s"), rows)
    report.note(
        f"A handoff has {shape.num_messages} messages, both ways together. Over ZeroMQ the store "
        f"used {figures['store'].text(100, 0)} % of its core, what loads it "
        f"{figures['load'].text(100, 0)} %."
    )


# ---- lookups -----------------------------------------------------------------------------------


def _add_lookups(report: Report, options: argparse.Namespace) -> None:
    prompt = CachedPrompt(options.lookup)
    parts = {name: partial(_repeat, name, part) for name, part in prompt.parts().items()}
    rows = []
    found = alternate(parts, options.rounds)
    for name, (times, text) in _LOOKUPS.items():
        rate = spread(times / seconds for seconds in found[name])
        each = spread(seconds / times for seconds in found[name])
        report.figures[f"{name}_per_s"] = rate
        rows.append((text, rate.text(digits=0), each.text(1e6, 0)))
    title = f"Prompts of {options.lookup} tokens, {len(prompt.keys)} keys"
    report.table(title, ("", "prompts/s", "us each"), rows)


def _repeat(name: str, part: Callable[[], object]) -> None:
    for _ in range(_LOOKUPS[name][0]):
        part()


# ---- bytes -------------------------------------------------------------------------------------


def _add_bytes(report: Report, options: argparse.Namespace, core: int) -> None:
    num_blocks = options.moved
    with (
        BarePair(core, num_blocks) as pair,
        live_store([core], LAYOUT, 4 * num_blocks, "zmq") as store,
    ):
        prompt = MovedPrompt(store.members, num_blocks)
        store.run(prompt.join())
        private = store_bytes.random_blocks(4 * num_blocks)

        def move() -> Figures:
            store.run(prompt.fill())
            push = store.use(prompt.push())
            store.run(prompt.claim())
            pull = store.use(prompt.pull())
            named = {"push": push, "pull": pull}.items()
            shares = {f"{name}_{of}": getattr(u, of) for name, u in named for of in _SHARES}
            return {"push": push.seconds, "pull": pull.seconds, **shares}

        ways: dict[str, Callable[[], object]] = {
            "bare_push": pair.push,
            "bare_pull": pair.pull,
            "memcpy": lambda: store_bytes.copy(prompt.arena, private, prompt.blocks),
            "digest": lambda: store_bytes.digest(prompt.arena, prompt.blocks),
            "shm": lambda: store_bytes.read(prompt.arena, prompt.blocks),
        }
        parts: list[Callable[[], Figures]] = [move]
        parts += [partial(timed, *way) for way in ways.items()]
        found = collect(parts, options.rounds)
    _show_bytes(report, found, num_blocks * LAYOUT.block_bytes)


def _show_bytes(report: Report, found: dict[str, list[float]], num_bytes: int) -> None:
    rows = []
    for name, text in _WAYS.items():
        figures = {"bytes_per_s": spread(num_bytes / seconds for seconds in found[name])}
        cells = [text, figures["bytes_per_s"].text(1e-9, 2)]
        if name in _MOVES:
            figures |= {limit: _share(found, name, parts) for limit, parts in _limits(name).items()}
            figures |= {of: spread(found[f"{name}_{of}"]) for of in _SHARES}
            cells += [f"{figure.median:.0%}" for of, figure in figures.items() if of in _COLUMNS]
        rows.append((*cells, *[""] * (2 + len(_COLUMNS) - len(cells))))
        report.figures[name] = figures
    title = f"{num_bytes / 1e6:.0f} MB in blocks of {LAYOUT.block_bytes} bytes"
    report.table(title, ("", "GB/s", *_COLUMNS.values()), rows)
    report.note(
        "bare: the same frames between two bare sockets; parts: these, digests and memcpy one "
        "after the other; store, worker: used of their cores. With shm nothing moves."
    )


def _limits(name: str) -> dict[str, tuple[str, ...]]:
    """What a move could reach at best: the ways that it has to go."""
    bare = f"bare_{name}"
    return {"of_bare": (bare,), "of_memcpy": ("memcpy",), "of_parts": (bare, "digest", "memcpy")}


def _share(found: dict[str, list[float]], name: str, parts: tuple[str, ...]) -> Spread:
    """Each round's time of the parts over its time of the move."""
    best = zip(*(found[part] for part in parts), strict=True)
    return spread(sum(limit) / ours for limit, ours in zip(best, found[name], strict=True))
