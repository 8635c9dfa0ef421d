"""What a benchmark keeps and tells: of whole rounds, and of those that were ended early."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import alternate, compare, engines, targets, trials
from scripts.benchmarks.attainment import Outcome, Targets
from scripts.benchmarks.clusters import busy_of
from scripts.benchmarks.load_generator import End, LoadSpec
from scripts.benchmarks.loads import Load, Used
from scripts.benchmarks.report import Report, report_of
from scripts.benchmarks.servers import Busy, Server
from scripts.benchmarks.trial_tables import add_goodputs, add_short_loads


def _rounds(done: list[int], ends_after: int) -> Generator[None, None, None]:
    try:
        for number in range(3):
            if number == ends_after:
                raise SystemExit(1)
            done.append(number)
            yield
    finally:
        done.append(-1)


@pytest.mark.parametrize(("ends_after", "is_whole"), [(3, True), (2, False), (0, False)])
def test_each_round_is_written_as_it_ends(tmp_path: Path, ends_after: int, is_whole: bool) -> None:
    path, done = tmp_path / "found.json", list[int]()
    seen: list[object] = []

    def report() -> Report:
        seen.append(json.loads(path.read_text())["figures"]["done"] if path.exists() else None)
        found = Report("a case", {})
        found.figures["done"] = list(done)
        return found

    found = report_of(_rounds(done, ends_after), report, path)
    assert found.is_whole is is_whole
    assert found.figures["done"] == [*range(ends_after), -1]
    assert seen == [None, [0], [0, 1], [0, 1, 2]][: ends_after + 1]
    assert [each.name for each in tmp_path.iterdir()] == ["found.json"] * (ends_after > 0)


def _options(*given: str, case: Any = compare) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    case.add_options(parser)
    return parser.parse_args(["--model", str(engines.DEMO), *given])


def _fake_load(ends_at: int) -> Callable[..., Load]:
    """run_load on a server that gives its first token after as many seconds as loads have run."""
    count = 0

    def run(title: str, spec: LoadSpec, server: Server, cores: list[int] | None) -> Load:
        nonlocal count
        count += 1
        if count == ends_at:
            raise KeyboardInterrupt
        outcome = Outcome(0, ttft_s=count, tpot_s=0.01, e2e_s=9.0, num_tokens=4)
        return Load(title, spec, [outcome] * spec.count, seconds=2.0)

    return run


def test_what_was_compared_before_it_was_ended_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server("http://nowhere", "demo")
    monkeypatch.setattr(targets, "server", lambda *_: nullcontext(server))
    # In its turn a target has a warm up, then a load alone. The fourth turn is ended in the latter.
    monkeypatch.setattr(trials, "run_load", _fake_load(ends_at=8))
    path = tmp_path / "found.json"
    options = _options("one", "other", "--closed", "1", "--closed-requests", "3")
    options.json = path
    report = compare.run(options)
    assert not report.is_whole
    figures = json.loads(path.read_text())["figures"]  # of the round that has ended
    assert [len(figures[name]["rounds"]) for name in ("one", "other")] == [1, 1]
    assert [len(report.figures[name]["rounds"]) for name in ("one", "other")] == [2, 2]
    assert report.settings["rounds"] == 1
    # 4 s beside 2 s in the first round; in the second, in turn, one had not been asked.
    assert report.figures["other"]["alone, ttft_s, ratio"].count == 1
    assert report.figures["other"]["alone, ttft_s, ratio"].median == pytest.approx(2.0)
    report.show()
    shown = capsys.readouterr()
    assert "one, last round" in shown.out
    lines = shown.err.splitlines()
    assert len(lines) == 7
    assert lines[1].startswith("one, round 1 of 3: alone: 3 of 3, 1.50 a second, TTFT 2000 ms")
    assert lines[4].startswith("other, round 2 of 3: warm up")


def test_servers_alternate_under_the_same_arrivals(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[str] = []
    loads: list[tuple[str, str, int]] = []

    @contextmanager
    def server(name: str, _setting: object) -> Iterator[Server]:
        running.append(name)
        yield Server(name, "demo")
        running.remove(name)

    def run_load(title: str, spec: LoadSpec, server: Server, _cores: object) -> Load:
        if spec.rate:
            assert running == ["one", "other"]
        loads.append((server.url, title, spec.seed))
        late = server.url == "other" and spec.rate == 2
        outcome = Outcome(0, ttft_s=9.0 if late else 0.1, tpot_s=0.01)
        return Load(title, spec, [outcome] * spec.count, seconds=2.0)

    monkeypatch.setattr(targets, "server", server)
    monkeypatch.setattr(trials, "run_load", run_load)
    report = alternate.run(
        _options("one", "other", "--rate", "1", "2", "--rounds", "2", case=alternate)
    )
    assert running == []
    seed = loads[0][2]
    rates = [("1 a second", 0), ("2 a second", 0), ("1 a second", 1), ("2 a second", 1)]
    turns = [("one", "other")] * 2 + [("other", "one")] * 2  # none is always the first
    assert loads[4:] == [
        (name, title, seed + more)
        for (title, more), names in zip(rates, turns, strict=True)
        for name in names
    ]
    within = {
        name: [each["attainment"] for each in loads] for name, loads in report.figures.items()
    }
    assert within == {
        "one, 1 a second": [1, 1],
        "other, 1 a second": [1, 1],
        "one, 2 a second": [1, 1],
        "other, 2 a second": [0, 0],
    }
    report.show()


def test_searches_for_the_goodput_go_on_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[str, float | None, int]] = []
    most = {"one": 2.0, "other": 1.0, "never": 0.0}

    def run_load(title: str, spec: LoadSpec, server: Server, _cores: object) -> Load:
        loads.append((server.url, spec.rate, spec.seed))
        late = not most[server.url] or (spec.rate or 0) > most[server.url]
        outcome = Outcome(0, ttft_s=9.0 if late else 0.1, tpot_s=0.01)
        return Load(title, spec, [outcome] * spec.count, seconds=2.0)

    monkeypatch.setattr(targets, "server", lambda name, _: nullcontext(Server(name, "demo")))
    monkeypatch.setattr(trials, "run_load", run_load)
    given = ("--goodput", "--precision", "0.1", "--rounds", "2")
    report = alternate.run(_options("one", "other", "never", *given, case=alternate))
    for name in ("one", "other"):
        assert len(found := report.figures[name]["goodputs"]) == 2
        assert all(most[name] / 1.1 <= each <= most[name] for each in found)
    assert report.figures["never"]["goodputs"] == [0.0, 0.0]  # missed alone, so never asked
    searched = [(name, rate, seed) for name, rate, seed in loads if rate]
    seed = searched[0][2]
    assert [name for name, *_ in searched[:6]] == ["one", "other"] * 3
    second = next(number for number, each in enumerate(searched) if each[2] == seed + 1000)
    assert [name for name, *_ in searched[second : second + 6]] == ["other", "one"] * 3
    assert {each for *_, each in searched[:second]} == {seed, seed + 1}
    report.show()


def test_a_report_of_nothing_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "server", lambda *_: nullcontext(Server("", "")))
    monkeypatch.setattr(trials, "run_load", _fake_load(ends_at=1))
    report = compare.run(_options("one", "other", "--goodput"))
    assert (report.is_whole, report.settings["rounds"]) == (False, 0)
    report.show()


def test_no_ratio_is_told_to_a_server_without_goodput() -> None:
    report = Report("a case", {})
    goodputs = {"one": [0.8, 0.6], "two": [0.0, 0.3], "three": [0.0, 0.0]}
    add_goodputs(report, goodputs, precision=0.1)
    assert report.figures["two"]["first_over_this"].median == pytest.approx(2.0)
    assert report.figures["two"]["first_over_this"].count == 1
    assert report.figures["three"]["goodput"].median == 0
    assert "first_over_this" not in report.figures["three"]
    report.show()


def test_loads_too_short_to_tell_a_line_from_goodput_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = Report("a case", {})
    for goodput, count in ((2.45, 20), (2.45, 400), (0.1, 20), (0.0, 20), (None, 20)):
        loads = [Load("", LoadSpec(url="", mix="512/64", vocab=9, count=count))]
        trial = trials.Trial(loads, Targets(14, 0.12, 0.9), goodput=goodput)
        add_short_loads(report, f"{goodput} of {count}", trial, precision=0.1)
    report.show()
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("a line can grow") == 1
    assert "2.45 of 20: 20 requests come within 8 s" in told
    assert "keep up only 0.843 requests/s" in told


def test_what_a_load_used_is_told_apart() -> None:
    busy = iter([Busy(5.0, 4.0), Busy(15.0, 13.5)])
    idle = Busy(1.0, 0.5)
    server = Server("", "", busy=lambda: {"decode.1": next(busy), "prefill.1": idle})
    load = Load("alone", LoadSpec(url="", mix="1/1", vocab=9, count=1), seconds=10.0)
    before = Used(server)
    before.add_since(load, server, End(10.0, 0.5, is_lost=False))
    assert load.overheads == {"decode.1": pytest.approx(0.05), "prefill.1": None}
    assert load.generator_share == pytest.approx(0.05, abs=0.04)
    assert load.others_share is None
    assert load.control_share is None
    load.outcomes = [Outcome(0, num_tokens=500)]
    load.server_shares = {"gateway.1": 0.01, "kvstore.1": 0.02, "decode.1": 0.9}
    assert load.control_share == pytest.approx(0.06)  # at twice as many tokens a second


def test_a_workers_metrics_are_read() -> None:
    labels = '{role="decode",worker="decode.1"}'
    lines = [
        "# TYPE kvbaton_worker_busy_seconds counter",
        f"kvbaton_worker_busy_seconds_total{labels} 1.5",
        f"kvbaton_worker_step_seconds_total{labels} 1.4",
        f"kvbaton_worker_arithmetic_seconds_total{labels} 1.25",
    ]
    assert busy_of("\n".join(lines)) == Busy(1.5, 1.25)
