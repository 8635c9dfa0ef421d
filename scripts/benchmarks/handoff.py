"""What a handoff costs, by prompt length: from the first token at the gateway to decode's claim.

Two clusters stand side by side, one whose workers map the store's arena (shm) and one whose blocks
travel as frames (zmq); their rounds alternate, and every prompt is new. With shm the line should
not rise: block numbers change hands. With zmq blocks travel while prefill runs, so what is left is
the end of the prompt: at least its last chunk, which cannot leave before it is computed. A second
turn goes on from the first, and only what decode does not hold moves to it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from common.kv.layout import KvLayout
from common.worker.config import WorkerConfig
from kvbaton import Client
from kvbaton.protocol import Timings
from scripts.benchmarks.measure import collect, spread
from scripts.benchmarks.report import Report
from scripts.make_model import make_model
from tests.cluster.processes import running

_LENGTHS = (128, 512, 1024, 2048, 4096, 8192)
_VOCAB = 2048
_CONTEXT = 16384
_MOVERS = ("shm", "zmq")
_NUM_TOKENS = 4
_TURN_TOKENS = 64  # that a second turn adds
_CHUNK = WorkerConfig.max_num_batched_tokens
_LAYOUT = KvLayout(num_layers=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--rounds", type=int, default=9, help="of each length (default: 9)")
    parser.add_argument("--lengths", type=int, nargs="+", default=_LENGTHS, metavar="N")


class _Cluster:
    """A cluster of one mover, asked by one client."""

    def __init__(self, mover: str, client: Client, log: Path) -> None:
        self._mover = mover
        self._client = client
        self._log = log.open(encoding="utf-8")

    def two_turns(self, prompt: list[int], added: list[int]) -> dict[str, float]:
        """Figures of a new prompt, and of one that goes on from it."""
        outputs, times = self._ask(prompt)
        first = self._claimed()
        self._ask([*prompt, *outputs, *added])
        second = self._claimed()
        figures = {
            "handoff_ms": times.handed_over_ms - times.first_token_ms,
            "prefill_ms": times.first_token_ms - times.placed_ms,
            "late_share": first["num_moved_late"] / first["num_blocks"],
            "second_blocks": second["num_blocks"],
            "second_moved": second["num_moved"],
        }
        name = f"{self._mover}_{len(prompt)}"
        return {f"{name}_{figure}": value for figure, value in figures.items()}

    def _ask(self, prompt: list[int]) -> tuple[list[int], Timings]:
        stream = self._client.generate(token_ids=prompt, max_tokens=_NUM_TOKENS)
        outputs = [token.token_id for token in stream]
        assert stream.timings is not None
        return outputs, stream.timings

    def _claimed(self) -> dict[str, Any]:
        """What decode has logged of the last handoff."""
        events = [json.loads(line) for line in self._log if line.startswith("{")]
        (claimed,) = (event for event in events if event["event"] == "handoff_claimed")
        return dict(claimed)

    def close(self) -> None:
        self._log.close()


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    with tempfile.TemporaryDirectory(prefix="kvbaton-bench-") as name, ExitStack() as stack:
        model = make_model(
            Path(name) / "model",
            layers=_LAYOUT.num_layers, hidden=256, heads=4, kv_heads=_LAYOUT.num_kv_heads,
            vocab=_VOCAB, context=_CONTEXT, dtype=_LAYOUT.dtype, eos=None,
        )  # fmt: skip
        clusters = []
        for mover in _MOVERS:
            folder = Path(name) / mover
            folder.mkdir()
            cluster = stack.enter_context(
                running(
                    folder,
                    worker={"model": model, "mover": mover},
                    gateway={"model": model},
                    store={"kv_bytes": "256M"},
                )
            )
            client = stack.enter_context(cluster.client())
            clusters.append(_Cluster(mover, client, folder / "decode.1.log"))
            stack.callback(clusters[-1].close)
        return _measure(options, clusters)


def _measure(options: argparse.Namespace, clusters: list[_Cluster]) -> Report:
    rng = random.Random()  # noqa: S311 - prompts

    def tokens(count: int) -> list[int]:
        return [rng.randrange(5, _VOCAB) for _ in range(count)]

    def ask(length: int, cluster: _Cluster) -> dict[str, float]:
        return cluster.two_turns(tokens(length), tokens(_TURN_TOKENS))

    pairs = [(length, cluster) for length in options.lengths for cluster in clusters]
    found = collect([partial(ask, *pair) for pair in pairs], options.rounds)
    report = Report(
        "handoff", {"model": "4 layers of 256, bf16", "rounds": options.rounds, "chunk": _CHUNK}
    )
    report.figures = {name: spread(values) for name, values in found.items()}
    _show_first(report, options.lengths)
    _show_second(report, options.lengths)
    return report


def _show_first(report: Report, lengths: list[int]) -> None:
    rows = []
    for length in lengths:
        figure = {name: report.figures[f"{name}_{length}_handoff_ms"] for name in _MOVERS}
        late = report.figures[f"zmq_{length}_late_share"]
        prefill = report.figures[f"shm_{length}_prefill_ms"]
        last_chunk = (length - 1) % _CHUNK + 1
        rows.append(
            (
                str(length),
                *(figure[name].text(digits=2) for name in _MOVERS),
                f"{late.median * 100:.1f}",
                f"{last_chunk / length * 100:.1f}",
                f"{prefill.median:.0f}",
            )
        )
    columns = ("prompt", "shm, ms", "zmq, ms", "late, %", "chunk, %", "prefill, ms")
    report.table("First token to claim: median (p10 to p90)", columns, rows)
    report.note(
        "late: share of the prompt's KV that moved to decode after prefill had sealed (zmq). "
        f"chunk: share of the last chunk of at most {_CHUNK} tokens."
    )


def _show_second(report: Report, lengths: list[int]) -> None:
    rows = []
    for length in lengths:
        blocks = report.figures[f"zmq_{length}_second_blocks"]
        moved = report.figures[f"zmq_{length}_second_moved"]
        mib = _LAYOUT.block_bytes / 2**20
        rows.append(
            (
                str(length),
                f"{blocks.median:.0f}",
                moved.text(digits=0),
                f"{blocks.median * mib:.2f}",
                f"{moved.median * mib:.2f}",
            )
        )
    columns = ("first prompt", "blocks", "moved", "MiB", "moved, MiB")
    title = f"Second turn, {_NUM_TOKENS} + {_TURN_TOKENS} tokens longer (zmq): moved to decode"
    report.table(title, columns, rows)
