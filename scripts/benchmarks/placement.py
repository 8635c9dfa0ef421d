"""Times to the first token on the Mooncake conversation trace by placement policy: 8 prefill and 8
decode workers on virtual time.

Figures depend on the trace and the latency fit alone, not on this machine.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from scripts.benchmarks.latency import LONGEST_MEASURED, NAME
from scripts.benchmarks.placement_sim import BASELINES, OURS, Cluster, Policy, Simulation
from scripts.benchmarks.placement_workers import Job
from scripts.benchmarks.report import Report
from scripts.benchmarks.trace import arrivals

_LOCAL = 1024  # tokens

_VARIANTS = (
    replace(BASELINES[2], name="cache-aware, with the store", fetches=True),
    replace(
        BASELINES[2],
        name="cache-aware, with the store and our order",
        fetches=True,
        is_ordered=True,
    ),
    replace(OURS, name="ours, in order of arrival", is_ordered=False),
    replace(
        OURS,
        name=f"ours, decode computes up to {_LOCAL} tokens",
        max_local_tokens=_LOCAL,
        tpot_target_s=0.2,
    ),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--requests", type=int, default=12_031, metavar="N", help="of the trace")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X", help="times the trace's")
    parser.add_argument(
        "--gbit", type=float, default=100.0, metavar="X", help="of each host's link"
    )
    parser.add_argument("--only", action="store_true", help="the four policies, no variants")


def run(options: argparse.Namespace) -> Report:
    """Replay."""
    cluster = Cluster(bytes_per_s=options.gbit / 8 * 1e9)
    trace = arrivals()[: options.requests]
    report = Report(
        "placement",
        {
            "trace": "Mooncake conversation",
            "requests": len(trace),
            "speed": options.speed,
            "link Gbit/s": options.gbit,
        },
    )
    columns = ("policy", "mean TTFT s", "p50", "p90", "cached", "mean TPOT ms", "p99", "by decode")
    policies = {"side by side": (*BASELINES, OURS), "what makes the difference": _VARIANTS}
    for title, group in list(policies.items())[: 1 if options.only else None]:
        rows = []
        for policy in group:
            figures = replay(cluster, policy, options.requests, options.speed)
            report.figures[policy.name] = figures
            rows.append((policy.name, *_row(figures)))
        report.table(title, columns, rows)
    longer = sum(each.num_tokens > LONGEST_MEASURED for each in trace) / len(trace)
    report.note(
        f"Steps take what {NAME} says, with KV of the size of Llama-2-70B's: measured for prompts "
        f"of up to {LONGEST_MEASURED:,} tokens, extrapolated for the {longer:.0%} that are longer "
        f"(up to {max(each.num_tokens for each in trace):,})."
    )
    return report


def replay(cluster: Cluster, policy: Policy, num_requests: int, speed: float) -> dict[str, float]:
    """The figures of one policy."""
    trace = arrivals()[:num_requests]
    jobs = Simulation(cluster, policy).run(trace, speed)
    ttft = sorted(job.first_token_at - job.at for job in jobs)
    tpot = sorted(_tpot_s(job) for job in jobs if job.arrival.num_outputs > 1)
    placed = [job for job in jobs if job.predicted_s]
    errors = sorted(
        abs(job.first_token_at - job.placed_at - job.predicted_s)
        / (job.first_token_at - job.placed_at)
        for job in placed
    )
    return {
        "mean_ttft_s": sum(ttft) / len(ttft),
        "p50_ttft_s": ttft[len(ttft) // 2],
        "p90_ttft_s": ttft[len(ttft) * 9 // 10],
        "cached": sum(j.num_cached for j in jobs) / sum(j.arrival.num_tokens for j in jobs),
        "mean_tpot_s": sum(tpot) / len(tpot),
        "p99_tpot_s": tpot[len(tpot) * 99 // 100],
        "by_decode": sum(job.is_local for job in jobs) / len(jobs),
        "p50_prediction_error": errors[len(errors) // 2] if errors else 0.0,
        "p90_prediction_error": errors[len(errors) * 9 // 10] if errors else 0.0,
    }


def _tpot_s(job: Job) -> float:
    return (job.finished_at - job.first_token_at) / (job.arrival.num_outputs - 1)


def _row(figures: dict[str, float]) -> tuple[str, ...]:
    return (
        f"{figures['mean_ttft_s']:.2f}",
        f"{figures['p50_ttft_s']:.2f}",
        f"{figures['p90_ttft_s']:.2f}",
        f"{figures['cached']:.1%}",
        f"{figures['mean_tpot_s'] * 1000:.1f}",
        f"{figures['p99_tpot_s'] * 1000:.1f}",
        f"{figures['by_decode']:.1%}",
    )
