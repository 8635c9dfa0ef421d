"""The loads that one server is put under: some at once, at rates, and at its goodput."""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scripts.benchmarks.arrivals import mix_of
from scripts.benchmarks.attainment import Targets
from scripts.benchmarks.load_generator import LoadSpec
from scripts.benchmarks.loads import Load, run_load
from scripts.benchmarks.measure import core_list
from scripts.benchmarks.progress import say
from scripts.benchmarks.queueing import rate_kept_up
from scripts.benchmarks.search import Search, confirm, find_rate
from scripts.benchmarks.servers import Server

_WARM_UP = 8  # requests, two at a time: compilers, caches, estimates
_BEFORE_FIRST_RATE = 0.6  # of what prefill alone could take: where the search begins


@dataclass(frozen=True)
class Plan:
    """What is measured of every server alike. Counts are of requests.

    `ttft` is in seconds or, ending in x, a multiple of the unloaded one. `seed` fixes when requests
    come, so that all servers get the same load.
    """

    mix: str
    vocab: int
    closed: list[int]
    bursts: list[int]
    rates: list[float]
    is_goodput: bool
    ttft: str
    tpot_s: float
    share: float
    num_requests: int
    num_closed: int
    precision: float
    generator_cores: list[int] | None
    seed: int = 0

    def targets(self, unloaded_ttft_s: float) -> Targets:
        """In seconds."""
        times = self.ttft.removesuffix("x")
        seconds = float(times) * (unloaded_ttft_s if self.ttft.endswith("x") else 1)
        return Targets(seconds, self.tpot_s, self.share)


@dataclass
class Trial:
    """What one server did. `goodput` is requests a second, None if it was not looked for.

    `is_whole`: all was measured.
    """

    loads: list[Load] = field(default_factory=list)
    targets: Targets | None = None
    unloaded_ttft_s: float = 0.0
    goodput: float | None = None
    is_whole: bool = False

    @property
    def kept_up(self) -> float | None:
        """The goodput, less what a line that grew until the load's end may have feigned."""
        if not self.goodput or self.targets is None:
            return self.goodput
        num_in_time = self.loads[-1].spec.count * self.targets.share
        return rate_kept_up(self.goodput, num_in_time, self.targets.ttft_s)

    def figures(self) -> dict[str, Any]:
        """All there is to write down."""
        targets = self.targets
        return {
            "targets": None if targets is None else str(targets),
            "unloaded_ttft_s": self.unloaded_ttft_s,
            "goodput": self.goodput,
            "kept_up": self.kept_up,
            "is_whole": self.is_whole,
            "loads": [load.figures(targets) for load in self.loads],
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Loads and targets."""
    add_open_options(parser)
    add = parser.add_argument
    add(
        "--closed",
        type=int,
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="this many clients, each asking again when it has its answer (default: 1 8)",
    )
    add(
        "--burst",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="N requests at the same moment; shows decode steps of N",
    )
    add("--closed-requests", type=int, default=24, metavar="N", help="of each other load")


def add_open_options(parser: argparse.ArgumentParser) -> None:
    """Loads at rates, targets, and the search for the goodput."""
    add = parser.add_argument
    add("--mix", default="512/64", help="PROMPT/OUTPUT[/SHARED] tokens, or trace (default: 512/64)")
    add("--rate", type=float, nargs="+", default=[], metavar="R", help="R requests a second")
    add("--ttft", default="2", metavar="S", help="target in s, or such as 3x: times the unloaded")
    add("--tpot", type=float, default=0.04, metavar="S", help="target in s (default: 0.04)")
    add("--attain", type=float, default=0.9, metavar="SHARE", help="to meet both (default: 0.9)")
    add("--requests", type=int, default=100, metavar="N", help="of each open load (default: 100)")
    add("--goodput", action="store_true", help="find the highest rate within both targets")
    add("--precision", type=float, default=0.08, help="of the goodput (default: 0.08)")
    add("--load-cores", metavar="CORES", help="of the load generator (default: any)")


def make_plan(options: argparse.Namespace, vocab: int) -> Plan:
    """What the options say. Raises ValueError for a mix that is none."""
    mix_of(options.mix)
    return Plan(
        mix=options.mix,
        vocab=vocab,
        closed=options.closed,
        bursts=options.burst,
        rates=options.rate,
        is_goodput=options.goodput,
        ttft=options.ttft,
        tpot_s=options.tpot,
        share=options.attain,
        num_requests=options.requests,
        num_closed=options.closed_requests,
        precision=options.precision,
        generator_cores=core_list(options.load_cores),
        seed=random.SystemRandom().randrange(1 << 30),
    )


class Trials:
    """Puts a server through a plan. `trial` has what it did so far."""

    def __init__(
        self, name: str, plan: Plan, served: Server, targets: Targets | None = None
    ) -> None:
        """`name`: what to call it while it runs. `targets`: instead of those that follow from this
        server's own unloaded latency."""
        self.trial = Trial()
        self._name = name
        self._plan = plan
        self._server = served
        self._fixed = targets
        self._is_met_alone = False

    def run(self, start: float | None = None) -> None:
        """All of it. `start`: where to look for the goodput first."""
        plan, trial = self._plan, self.trial
        self.begin()
        for clients in plan.bursts:
            count = -(-max(plan.num_closed, clients) // clients) * clients
            self._keep(
                self._load(f"burst of {clients}", clients=clients, count=count, is_burst=True)
            )
        for rate in plan.rates:
            self.open(rate, plan.seed)
        if plan.is_goodput:
            for _ in self.find_goodput(start, plan.seed):
                pass
        trial.is_whole = True

    def begin(self) -> None:
        """Warm up, some at once, and what follows from the one alone."""
        plan, trial = self._plan, self.trial
        self._load("warm up", clients=2, count=_WARM_UP)
        for clients in plan.closed:
            title = "alone" if clients == 1 else f"{clients} at once"
            self._keep(self._load(title, clients=clients, count=max(plan.num_closed, clients)))
        alone = next((load for load in trial.loads if load.spec.clients == 1), None)
        if alone is None:
            alone = self._load("alone", clients=1, count=_WARM_UP)
        trial.unloaded_ttft_s = alone.percentiles("ttft_s")[0]
        trial.targets = self._fixed or plan.targets(trial.unloaded_ttft_s)
        self._is_met_alone = alone.meets(trial.targets)

    def open(self, rate: float, seed: int) -> Load:
        """So many requests a second; `seed` fixes when they come."""
        return self._keep(self._open(rate, seed))

    @property
    def _targets(self) -> Targets:
        assert self.trial.targets is not None, "begin first"
        return self.trial.targets

    def find_goodput(self, start: float | None, seed: int) -> Generator[None, None, None]:
        """By bisection, then met once more by arrivals of another pattern; a load at each step."""
        plan, trial = self._plan, self.trial
        if not self._is_met_alone:
            trial.goodput = 0.0  # what is missed alone is missed at any rate
            return
        first = start or _BEFORE_FIRST_RATE / trial.unloaded_ttft_s
        found = yield from self._search(find_rate(first, plan.precision), itertools.repeat(seed))
        others = itertools.count(seed + 1)
        trial.goodput = yield from self._search(confirm(found, plan.precision), others, ", again")

    def _search(
        self, search: Search, seeds: Iterator[int], title: str = ""
    ) -> Generator[None, None, float]:
        """Try what it asks for. `seeds` have no end. `title`: what to add to those of the loads."""
        targets = self._targets
        try:
            rate = next(search)
            while True:
                load = self._open(rate, next(seeds), targets)
                self._keep(replace(load, title=load.title + title))
                yield
                rate = search.send(load.meets(targets))
        except StopIteration as ended:
            return float(ended.value)

    def _keep(self, load: Load) -> Load:
        self.trial.loads.append(load)
        return load

    def _open(self, rate: float, seed: int, ends_early_at: Targets | None = None) -> Load:
        return self._load(
            f"{rate:.3g} a second",
            rate=rate,
            seed=seed,
            count=self._plan.num_requests,
            targets=ends_early_at,
        )

    def _load(self, title: str, **given: Any) -> Load:
        server, plan = self._server, self._plan
        fields: dict[str, Any] = {"model": server.model}
        if server.is_kvbaton and (targets := self.trial.targets) is not None:
            fields["ttft_target_ms"] = targets.ttft_s * 1000
            fields["tpot_target_ms"] = targets.tpot_s * 1000
        spec = LoadSpec(
            **{"seed": plan.seed, **given},
            url=server.url,
            first_url=server.first_url,
            mix=plan.mix,
            vocab=plan.vocab,
            fields=fields,
        )
        server.clear()
        begun = time.perf_counter()
        load = run_load(title, spec, server, plan.generator_cores)
        took_s = time.perf_counter() - begun
        say(f"{self._name}: {load.line(self.trial.targets)}; took {took_s:.0f} s")
        return load


def last_of(tried: Sequence[Trial]) -> Trial | None:
    """The last that is whole, if there is one; else the last."""
    whole = [trial for trial in tried if trial.is_whole] or tried
    return whole[-1] if whole else None


def rates_and_attainment(trials: Iterable[Trial]) -> list[tuple[float, float]]:
    """Of every whole open load: its rate, and the share that met the targets, in order."""
    points = [
        (load.spec.rate, load.attainment(trial.targets))
        for trial in trials
        if trial.targets is not None
        for load in trial.loads
        if load.spec.rate and not load.is_lost
    ]
    return sorted(points)


def pooled(trials: Iterable[Trial], title: str, name: str) -> list[float]:
    """All requests' values of one time, of the loads of that title."""
    return [
        float(getattr(outcome, name))
        for trial in trials
        for load in trial.loads
        if load.title == title
        for outcome in load.finished
    ]
