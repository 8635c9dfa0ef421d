"""Hostile inputs by the million: decoders and servers within this process, by seed."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import os
import sys
import time
from random import Random

import structlog

from tests.cluster.proc import rss_bytes
from tests.security.hostile import hostile
from tests.security.samples import UNIONS
from tests.security.targets import FaceTarget, ServerTarget, decode

BATCH = 10_000
HANG_S = 60.0
MAX_GROWTH_BYTES = 64 << 20
_CANARY_EVERY = 100
_TOLD_EVERY_S = 10.0


def hostile_run(count: int, first_seed: int) -> int:
    """Send so many inputs, a seed for each batch of them. Returns the exit status."""
    started_at = told_at = time.monotonic()
    num_done, seed, rss, now = 0, first_seed, 0, 0
    while num_done < count:
        # A hang ends the process, and the traceback shows where it was.
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            asyncio.run(_batch(seed))
        except BaseException:
            print(f"seed {seed} did harm: scripts/hostile --inputs {BATCH} --first-seed {seed}")
            raise
        num_done, seed = num_done + BATCH, seed + 1
        now = rss_bytes(os.getpid())
        rss = rss or now
        if now - rss > MAX_GROWTH_BYTES:
            print(f"memory grew from {rss} to {now} bytes by seed {seed}")
            return 1
        if time.monotonic() - told_at > _TOLD_EVERY_S:
            told_at = time.monotonic()
            print(_state(num_done, told_at - started_at, now), flush=True)
    faulthandler.cancel_dump_traceback_later()
    print(f"no harm: {_state(num_done, time.monotonic() - started_at, now)}")
    return 0


def _state(num_done: int, elapsed_s: float, rss: int) -> str:
    speed = num_done / elapsed_s
    return f"{num_done} inputs in {elapsed_s:.0f} s ({speed:.0f}/s), {rss >> 20} MiB"


async def _batch(seed: int) -> None:
    rng = Random(seed)  # noqa: S311 - a seed makes a run again
    unions = list(UNIONS)
    for _ in range(BATCH // 2):
        union = rng.choice(unions)
        decode(union, hostile(rng, union))
    server, face = ServerTarget(), FaceTarget()
    for number in range(BATCH // 4):
        server.attack(rng)
        await face.attack(rng)
        if number % _CANARY_EVERY == 0:
            server.canary()
            await face.canary()
    await face.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/hostile", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    return hostile_run(options.inputs, options.first_seed)


if __name__ == "__main__":
    sys.exit(main())
