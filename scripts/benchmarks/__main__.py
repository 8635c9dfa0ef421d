"""Measures one thing on this machine, prints tables and, with --json FILE, writes the figures.

Every figure is a median over alternated rounds, with the 10th and the 90th percentile: machines
are noisy, and one run says little.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from pathlib import Path

# A case is a module of this package with add_options(parser) and run(options) -> Report.
CASES = {
    "alternate": "servers of ours that all run, one under load at a time: for noisy machines",
    "colocated": "how to use all cores of a small machine",
    "compare": "several servers under the same load, vLLM and llama.cpp among them; goodput",
    "engine": "decode steps and prefill against what memory and arithmetic allow",
    "eviction": "which cached blocks to keep: hit rates of a trace, alone and amid a flood",
    "gateway": "what the gateway itself costs, beside a bare server; idle streams",
    "handoff": "from the first token to decode's claim, by prompt length",
    "hosts": "KV between hosts at 1 and 10 Gb/s: residue, break-even, beside what is computed",
    "invariance": "what batch-invariant mode costs, and what happens without it",
    "kernel": "each matrix product of a model, and attention, beside one core's limits",
    "mover": "bytes a second between a worker and a KV store, by encryption and connections",
    "overload": "goodput at more load than can be served, beside its peak",
    "placement": "first tokens of a trace by placement policy, on virtual time",
    "quantization": "what int8 weights, activations and KV change: time, logits and loss",
    "serve": "one server under load: latency, attainment, goodput and its queueing bound",
    "startup": "from scripts/serve to the first answer, by phase, and what each process then holds",
    "store": "handoffs, lookups and bytes a second of a KV store on one core",
}


def main() -> None:
    """Run the case that the command line names."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        epilog="\n".join(f"  {name:12} {text}" for name, text in CASES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see scripts/bench CASE --help")
    given = parser.parse_args()
    case = importlib.import_module(f"scripts.benchmarks.{given.case}")
    parser = argparse.ArgumentParser(
        prog=f"scripts/bench {given.case}",
        description=case.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    case.add_options(parser)
    options = parser.parse_args(given.options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what was started, as Ctrl-C does
    report = case.run(options)
    report.show()
    if options.json is not None:
        report.write(options.json)
    if not report.is_whole:
        sys.exit("ended early: this is what was measured until then")


if __name__ == "__main__":
    main()
