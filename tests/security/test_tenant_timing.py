"""Whether the time to a first token tells one tenant what another has asked before.

On virtual time it must not, to the last bit; on real processes, not by the best possible guess.
"""

from __future__ import annotations

import asyncio
import string
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import pytest

from kvbaton import Client
from scripts.cluster.keys import add_client
from tests.cluster.processes import Cluster
from tests.sim.cluster import Shape, SimCluster, output_of, simulate
from tests.sim.world import World

PROMPT, OTHER = [7] * 200, [8] * 200
WORKER = {"mock_token_ms": 1.0}
SHAPES = {
    "disaggregated": Shape(worker=WORKER),
    "zmq": Shape(mover="zmq", worker=WORKER),
    "colocated": Shape(num_prefill=0, mode="colocated", worker=WORKER),
    "two stores": Shape(num_stores=2, worker=WORKER),
    "disk": Shape(num_blocks=40, disk_bytes=1 << 20, worker=WORKER),
}


async def seconds_to_first_token(cluster: SimCluster, prompt: list[int], tenant: str) -> float:
    loop = asyncio.get_running_loop()
    asked_at = loop.time()
    stream = cluster.submit(prompt, 1, tenant=tenant)
    await output_of(stream)
    return loop.time() - asked_at


def probe(shape: Shape, seed: int, victim: str, prompt: list[int]) -> float:
    """How long `prompt` takes the tenant "spy", after the victim has asked for PROMPT."""

    async def main() -> float:
        async with SimCluster(World(seed), shape) as cluster:
            await seconds_to_first_token(cluster, PROMPT, victim)
            await asyncio.sleep(1)  # its last blocks become cache
            return await seconds_to_first_token(cluster, prompt, "spy")

    return simulate(main())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_what_another_tenant_has_asked_changes_no_time(name: str, seed: int) -> None:
    shape = SHAPES[name]
    missed = probe(shape, seed, "victim", OTHER)
    assert probe(shape, seed, "victim", PROMPT) == missed
    # The same guess within one tenant is right: the probe sees what there is to see.
    assert probe(shape, seed, "spy", PROMPT) < missed / 2


# ---- real processes ------------------------------------------------------------------------------

NUM_PAIRS, NUM_CONTROL_PAIRS = 500, 100
PROMPT_CHARS = 160

Seen = dict[bool, list[tuple[float, int]]]  # seconds and cached tokens, of known and new prompts


@contextmanager
def clients_of(folder: Path, *tenants: str) -> Iterator[list[Client]]:
    """A client of each tenant, at a cluster with the demo model."""
    with Cluster(folder) as cluster:
        assert cluster.keys is not None
        keys = [add_client(cluster.keys, tenant, tenant) for tenant in tenants]
        cluster.start("kvstore", kv_bytes="64M")
        cluster.start("prefill")
        cluster.start("decode")
        cluster.start("gateway")
        cluster.wait_ready(2)
        with ExitStack() as stack:
            endpoint = f"tcp://127.0.0.1:{cluster.client_port}"
            yield [stack.enter_context(Client(endpoint, keys=key)) for key in keys]


def ask(client: Client, text: str) -> tuple[float, int]:
    """Seconds to the first token, and how many of the prompt's were cached."""
    asked_at = time.perf_counter()
    stream = client.generate(text, max_tokens=1)
    next(stream, None)
    took_s = time.perf_counter() - asked_at
    list(stream)
    assert stream.usage is not None
    return took_s, stream.usage.num_cached_tokens


def probe_pairs(rng: Random, victim: Client, spy: Client, seen: Seen, num_pairs: int) -> Seen:
    """Add what the spy sees of prompts that the victim has just asked (True) and of new ones
    (False), in any order."""
    for _ in range(num_pairs):
        known, new = ("".join(rng.choices(string.ascii_letters, k=PROMPT_CHARS)) for _ in "12")
        ask(victim, known)
        for is_known in rng.sample([True, False], 2):
            seen[is_known].append(ask(spy, known if is_known else new))
    return seen


def auc(seen: Seen) -> float:
    """How often a known prompt's time is the shorter one: 0.5 tells nothing, 1 tells all."""
    known, new = ([took_s for took_s, _ in seen[each]] for each in (True, False))
    wins = sum((left < right) + (left == right) / 2 for left in known for right in new)
    return wins / (len(known) * len(new))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_clock_does_not_tell_tenants_of_each_other(tmp_path: Path) -> None:
    rng = Random(1)
    with clients_of(tmp_path, "victim", "spy") as (victim, spy):
        control = probe_pairs(rng, spy, spy, {True: [], False: []}, NUM_CONTROL_PAIRS)
        seen = probe_pairs(rng, victim, spy, {True: [], False: []}, NUM_PAIRS)
        if abs(auc(seen) - 0.5) >= 0.05:  # 1 of 160 runs, if times are alike: look more closely
            probe_pairs(rng, victim, spy, seen, 2 * NUM_PAIRS)
    assert all(num_cached for _, num_cached in control[True])
    assert not any(num_cached for _, num_cached in control[False])
    assert not any(num_cached for pairs in seen.values() for _, num_cached in pairs)
    assert auc(control) > 0.9
    assert abs(auc(seen) - 0.5) < 0.05
