"""What a handoff costs, by prompt length: from the first token at the gateway to decode's claim.

Two clusters stand side by side, one whose workers map the store's arena (shm) and one whose blocks
travel as frames (zmq); their rounds alternate, and every prompt is new. With shm the line should
not rise: block numbers change hands. With zmq blocks travel while prefill runs, so what is left is
the end of the prompt.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from kvbaton import Client
from scripts.benchmarks.measure import spread
from scripts.benchmarks.report import Report
from scripts.make_model import make_model
from tests.cluster.processes import running

_LENGTHS = (128, 512, 1024, 2048, 4096, 8192)
_VOCAB = 2048
_CONTEXT = 16384
_MOVERS = ("shm", "zmq")
_NUM_TOKENS = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--rounds", type=int, default=9, help="of each length (default: 9)")
    parser.add_argument("--lengths", type=int, nargs="+", default=_LENGTHS, metavar="N")


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    with tempfile.TemporaryDirectory(prefix="kvbaton-bench-") as name:
        folder = Path(name)
        model = make_model(
            folder / "model",
            layers=4, hidden=256, heads=4, kv_heads=2, vocab=_VOCAB, context=_CONTEXT,
            dtype="bfloat16", eos=None,
        )  # fmt: skip
        logs = [folder / mover for mover in _MOVERS]
        for log in logs:
            log.mkdir()
        with (
            running(logs[0], worker={"model": model, "mover": "shm"}, gateway={"model": model},
                    store={"kv_bytes": "256M"}) as shared,
            running(logs[1], worker={"model": model, "mover": "zmq"}, gateway={"model": model},
                    store={"kv_bytes": "256M"}) as moved,
            shared.client() as shared_client,
            moved.client() as moved_client,
        ):  # fmt: skip
            return _measure(options, {"shm": shared_client, "zmq": moved_client})


def _measure(options: argparse.Namespace, clients: dict[str, Client]) -> Report:
    rng = random.Random()  # noqa: S311 - prompts
    handoffs: dict[tuple[str, int], list[float]] = {}
    prefills: dict[tuple[str, int], list[float]] = {}
    for number in range(options.rounds + 1):
        for length in options.lengths:
            prompt = [rng.randrange(5, _VOCAB) for _ in range(length)]
            for mover in _MOVERS if number % 2 else _MOVERS[::-1]:
                stream = clients[mover].generate(token_ids=prompt, max_tokens=_NUM_TOKENS)
                list(stream)
                assert stream.timings is not None
                if number:  # the first round warms up
                    times = stream.timings
                    key = (mover, length)
                    handoffs.setdefault(key, []).append(times.handed_over_ms - times.first_token_ms)
                    prefills.setdefault(key, []).append(times.first_token_ms - times.placed_ms)
    report = Report("handoff", {"model": "4 layers of 256, bf16", "rounds": options.rounds})
    rows = []
    for length in options.lengths:
        row = [str(length)]
        for mover in _MOVERS:
            taken = spread(handoffs[mover, length])
            report.figures[f"{mover}_{length}_ms"] = taken
            row.append(taken.text(digits=2))
        row.append(spread(prefills["shm", length]).text())
        rows.append(tuple(row))
    columns = ("prompt tokens", "shm, ms", "zmq, ms", "prefill (shm), ms")
    report.table("first token to claim: median (p10 to p90)", columns, rows)
    return report
