"""What moving KV between hosts costs, by length of prompt and speed of the link.

Gateway, KV store, prefill and decode are each on a host of their own, made of namespaces, with
CURVE and links of the rates given. Residue: what of the transfer to decode is left when prefill has
ended; computed from when each chunk was done, the bytes of its KV, and the link. Break-even: a
prompt whose KV is in the store is asked for again when a prefill worker on yet another host must
fetch it; against that stands the time that computing it took. The model is small and its KV large,
so that both are of one order. A link that the processors cannot fill is as fast as they are.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.kv.layout import KvLayout
from common.worker.mover import MESSAGE_BYTES
from kvbaton import Client
from kvbaton.explanation import Explanation
from scripts.benchmarks.measure import spread
from scripts.benchmarks.report import Report
from scripts.make_model import make_model
from tests.cluster.hosts import Network, why_none
from tests.cluster.spread import SpreadCluster

_LENGTHS = (64, 128, 256, 512, 1024, 2048)
_RATES = {"100mbit": 1e8, "500mbit": 5e8, "1gbit": 1e9, "10gbit": 1e10}  # bits a second
_USUAL_RATES = ("1gbit", "10gbit")
_VOCAB = 2048
_LAYOUT = KvLayout(num_layers=4, num_kv_heads=16, head_dim=128, block_size=16, dtype="bfloat16")
_HIDDEN = 128
_TOKEN_BYTES = _LAYOUT.block_bytes // _LAYOUT.block_size


class Done(NamedTuple):
    """When a part of a prompt was computed, and how many bytes of KV it has."""

    at_s: float
    num_bytes: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--rounds", type=int, default=3, help="of each length (default: 3)")
    parser.add_argument("--lengths", type=int, nargs="+", default=_LENGTHS, metavar="N")
    parser.add_argument("--rates", nargs="+", choices=_RATES, default=_USUAL_RATES)


def residue_s(chunks: Iterable[Done], bytes_per_s: float, part_bytes: int) -> float:
    """What is left of the transfer when the last chunk is computed: each goes to the store and from
    there to decode, over two links of this speed. A part is sent on when all of it is there."""
    sent_at = here_at = computed_at = 0.0
    for computed_at, num_bytes in chunks:
        for start in range(0, num_bytes, part_bytes):
            takes_s = min(part_bytes, num_bytes - start) / bytes_per_s
            sent_at = max(sent_at, computed_at) + takes_s
            here_at = max(here_at, sent_at) + takes_s
    return here_at - computed_at


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    if reason := why_none():
        raise SystemExit(f"scripts/bench hosts: {reason}")
    report = Report(
        "hosts",
        {
            "model": f"{_LAYOUT.num_layers} layers of {_HIDDEN}, bf16",
            "KiB a token": _TOKEN_BYTES // 1024,
            "rounds": options.rounds,
        },
    )
    with tempfile.TemporaryDirectory(prefix="kvbaton-bench-") as name:
        model = make_model(
            Path(name) / "model",
            layers=_LAYOUT.num_layers, hidden=_HIDDEN, heads=_LAYOUT.num_kv_heads,
            kv_heads=_LAYOUT.num_kv_heads, head_dim=_LAYOUT.head_dim, vocab=_VOCAB,
            context=2 * max(options.lengths), dtype=_LAYOUT.dtype, eos=None,
        )  # fmt: skip
        for rate in options.rates:
            folder = Path(name) / rate
            folder.mkdir()
            with Network() as network, SpreadCluster(folder, network) as cluster:
                for host in cluster.hosts.values():
                    host.limit(rate)
                _measure(options, report, rate, _Load(cluster, model, options))
            _show(report, rate, options.lengths)
    report.note(
        "residue beside what the links allow: streamed, when what comes is sent on at once; in "
        "turn, when a chunk is sent to the store and then fetched from there; sent: how much of "
        "the KV went to decode at all, late: of that, after prefill. fetch: the KV of a "
        "prompt that is in the store, beside bytes over rate and what the gateway predicted; "
        "moved: how much of it was really fetched. even: the rate at which fetching takes as long "
        "as computing took. All without headers."
    )
    return report


class _Load:
    """The cluster's processes as they are needed, and the prompts that it is asked."""

    def __init__(self, cluster: SpreadCluster, model: Path, options: argparse.Namespace) -> None:
        self._cluster = cluster
        self._worker: dict[str, Any] = {"model": model}
        rng = random.Random()  # noqa: S311 - prompts
        self._rounds = [  # one more, which is not told of
            [[rng.randrange(5, _VOCAB) for _ in range(length)] for length in options.lengths]
            for _ in range(options.rounds + 1)
        ]
        num_tokens = sum(options.lengths) * (options.rounds + 2)
        cluster.start("kvstore", kv_bytes=num_tokens * _TOKEN_BYTES)
        cluster.start("gateway", model=model, max_local_tokens=0)
        cluster.start("decode", **self._worker)
        self.prefill(1)

    def prefill(self, number: int) -> None:
        """Have this prefill worker, and no other."""
        if number > 1:
            assert self._cluster.terminate(f"prefill.{number - 1}") == 0
            self._cluster.wait_ready(1)
        self._cluster.start("prefill", number, **self._worker)
        self._cluster.wait_ready(2)

    def ask_each(self) -> dict[int, list[Explanation]]:
        """How it went, by length: every prompt once, those of one length spread over the time."""

        def ask_all() -> dict[int, list[Explanation]]:
            told: dict[int, list[Explanation]] = {}
            with Client(self._cluster.endpoint) as client:
                for prompt in itertools.chain(*self._rounds):
                    stream = client.generate(token_ids=prompt, max_tokens=2, explain=True)
                    done = stream.finish()
                    assert done.explanation is not None
                    told.setdefault(len(prompt), []).append(done.explanation)
            return {length: each[1:] for length, each in told.items()}

        return self._cluster.at_desk(ask_all)


def _measure(options: argparse.Namespace, report: Report, rate: str, load: _Load) -> None:
    computed = load.ask_each()
    load.prefill(2)
    fetched = load.ask_each()
    for length in options.lengths:
        pairs = zip(computed[length], fetched[length], strict=True)
        found = [_figures(*pair, bytes_per_s=_RATES[rate] / 8) for pair in pairs]
        for name in found[0]:
            figure = f"{rate}_{length}_{name}"
            report.figures[figure] = spread(each[name] for each in found)


def _figures(first: Explanation, again: Explanation, bytes_per_s: float) -> dict[str, float]:
    """Of a prompt that was computed, and then asked for at a worker that has nothing of it."""
    chunks = [Done(each.end_ms / 1000, each.num_tokens * _TOKEN_BYTES) for each in first.chunks]
    num_late = sum(each.num_late_bytes for each in first.moved)
    num_sent = num_late + sum(each.num_early_bytes for each in first.moved)
    num_fetched = sum(
        each.num_early_bytes + each.num_late_bytes
        for each in again.moved
        if each.worker == again.prefill_worker
    )
    num_bytes = first.num_prompt_tokens * _TOKEN_BYTES
    prefill_ms = _took_ms(first, "prefill")
    most_bytes = max(each.num_bytes for each in chunks)
    return {
        "kv_mib": num_bytes / 2**20,
        "prefill_ms": prefill_ms,
        "residue_ms": _took_ms(first, "handoff"),
        "residue_streamed_ms": residue_s(chunks, bytes_per_s, MESSAGE_BYTES) * 1000,
        "residue_in_turn_ms": residue_s(chunks, bytes_per_s, most_bytes) * 1000,
        "sent_share": num_sent / num_bytes,
        "late_share": num_late / max(1, num_sent),
        "fetch_ms": _took_ms(again, "blocks"),
        "fetch_computed_ms": num_bytes / bytes_per_s * 1000,
        "fetch_predicted_ms": again.placements[-1].chosen.transfer_ms,
        "fetched_share": num_fetched / num_bytes,
        "again_prefill_ms": _took_ms(again, "prefill"),
        "break_even_gbit_per_s": num_bytes * 8 / prefill_ms / 1e6,
    }


def _took_ms(told: Explanation, stage: str) -> float:
    return sum(each.end_ms - each.start_ms for each in told.stages if each.name == stage)


_RESIDUE = {
    "MiB": ("kv_mib", 0),
    "prefill": ("prefill_ms", 0),
    "streamed": ("residue_streamed_ms", 1),
    "in turn": ("residue_in_turn_ms", 1),
    "residue": ("residue_ms", 1),
    "sent": ("sent_share", 2),
    "late": ("late_share", 2),
}
_FETCH = {
    "prefill": ("prefill_ms", 0),
    "computed": ("fetch_computed_ms", 1),
    "fetch": ("fetch_ms", 1),
    "predicted": ("fetch_predicted_ms", 1),
    "moved": ("fetched_share", 2),
    "even, Gb/s": ("break_even_gbit_per_s", 2),
}


def _show(report: Report, rate: str, lengths: Sequence[int]) -> None:
    def median(length: int, name: str) -> float:
        return float(report.figures[f"{rate}_{length}_{name}"].median)

    for title, columns in (("Left when prefill ends", _RESIDUE), ("Fetching it", _FETCH)):
        rows = [
            (str(length), *(f"{median(length, n):.{digits}f}" for n, digits in columns.values()))
            for length in lengths
        ]
        report.table(f"{title}, {rate} between all hosts, ms (medians)", ("prompt", *columns), rows)
    for kind, name in (("computed", "fetch_computed_ms"), ("measured", "fetch_ms")):
        sooner = [n for n in lengths if median(n, name) < median(n, "prefill_ms")]
        report.note(f"{rate}: fetching is sooner than computing, {kind}: {sooner or 'never'}")
