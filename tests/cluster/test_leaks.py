"""Mixed load, cancels, disconnects and kills for a long time: no process is left with more than it
had. KVBATON_LEAK_TEST_S says for how long (600)."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx
import pytest
import zmq

from kvbaton import AsyncClient
from kvbaton.codec import encode
from kvbaton.errors import KvbatonError
from kvbaton.keys import client_curve
from kvbaton.protocol import PROTOCOL_VERSION, Generate, Hello
from kvbaton.sampling import SamplingParams
from kvbaton.sockets import EventSocket
from tests.cluster.chaos_faults import COUNTS, DEEDS, POLL_S, Chaotic
from tests.cluster.chaos_load import Answer, Clients, catalogue
from tests.cluster.proc import num_fds, num_threads, rss_bytes
from tests.cluster.processes import Cluster, metrics

DURATION_S = float(os.environ.get("KVBATON_LEAK_TEST_S", "600"))
ROUND_S, SETTLE_S = 8.0, 40.0
NUM_CALLERS, NUM_UNRULY = 6, 4
WORKER = {"batch_invariant": "true", "max_num_seqs": 16}
# The first of each role lives all along, but for the store, which is killed once.
FAULTS = [
    "kill kvstore.1",
    *["kill prefill.2", "kill decode.2", "kill gateway.2", "pause decode.1"] * 999,
]
MOST_MORE_FDS = 4
MOST_MORE_TASKS = 2  # a heartbeat may be under way
MOST_MORE_THREADS = (os.cpu_count() or 1) + 4  # asyncio's pool grows to so many, when it needs them
MOST_MORE_BYTES = 16 << 20  # of private memory; 10 minutes serve thousands of requests
ORDER = sorted(
    (f"{role}.{number}" for role, count in COUNTS.items() for number in range(1, count + 1)),
    key=lambda name: ("gateway", "decode", "prefill", "kvstore").index(name.partition(".")[0]),
)


@dataclass
class Size:
    """Of a process, when nothing runs."""

    fds: int
    threads: int
    num_bytes: int


def size_of(pid: int) -> Size:
    return Size(num_fds(pid), num_threads(pid), rss_bytes(pid))


# ---- clients who do not wait for the end --------------------------------------------------------


async def cancel(chaotic: Chaotic, rng: Random) -> None:
    async with AsyncClient(chaotic.endpoints) as client:
        stream = client.generate(token_ids=prompt(rng), max_tokens=200, ignore_eos=True)
        num_wanted = rng.randrange(20)
        async for token in stream:
            if token.index >= num_wanted:
                break
        stream.cancel()


async def hang_up(chaotic: Chaotic, rng: Random) -> None:
    body = {"prompt": prompt(rng), "max_tokens": 200, "stream": True, "ignore_eos": True}
    url = f"{rng.choice(chaotic.base_urls)}/v1/completions"
    async with httpx.AsyncClient(timeout=30) as http, http.stream("POST", url, json=body) as answer:
        async for _ in answer.aiter_lines():
            if rng.random() < 0.1:
                break


async def vanish(chaotic: Chaotic, rng: Random) -> None:
    """As a msgpack client that is killed: no word of it."""
    curve = client_curve(None)
    assert curve is not None
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = EventSocket(context, zmq.DEALER, lambda _frames: None, linger_ms=0)
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)
    with context, closing(dealer):
        dealer.secure(curve)
        dealer.connect(rng.choice(chaotic.endpoints))
        dealer.send([encode(Hello(protocol_version=PROTOCOL_VERSION))])
        dealer.send([encode(Generate(id=1, token_ids=prompt(rng), sampling=sampling))])
        await asyncio.sleep(rng.uniform(0, 1))


def prompt(rng: Random) -> list[int]:
    return [rng.randrange(5, 2000) for _ in range(rng.randrange(5, 200))]


# ---- load, faults, quiet ------------------------------------------------------------------------


async def load(chaotic: Chaotic, clients: Clients, number: int, fault: str) -> list[Answer]:
    """A round of all that, with one fault in the middle. Returns what those got who waited."""
    ends_at = time.monotonic() + ROUND_S
    answers: list[Answer] = []
    requests = catalogue()

    async def call(rng: Random, key: str) -> None:
        for count in itertools.count():
            if time.monotonic() > ends_at:
                return
            answers.append(await clients.answer(rng.choice(requests), f"{key}-{count}"))

    async def misbehave(rng: Random) -> None:
        while time.monotonic() < ends_at:
            try:
                await rng.choice([cancel, hang_up, vanish])(chaotic, rng)
            except (KvbatonError, httpx.HTTPError):  # of a gateway that was killed
                await asyncio.sleep(POLL_S)

    async def strike() -> None:
        await asyncio.sleep(ROUND_S / 3)
        deed, name = fault.split()
        await DEEDS[deed](chaotic, name)

    async with asyncio.TaskGroup() as group:
        for caller in range(NUM_CALLERS):
            group.create_task(call(Random(f"{number}/{caller}"), f"{number}-{caller}"))
        for caller in range(NUM_UNRULY):
            group.create_task(misbehave(Random(f"{number}/unruly/{caller}")))
        group.create_task(strike())
    await chaotic.ready()
    return answers


async def until(wrong: Callable[[], object]) -> object:
    """Wait until nothing is wrong. Returns what still is, when it has taken too long."""
    deadline = time.monotonic() + SETTLE_S
    while (what := await asyncio.to_thread(wrong)) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)
    return what


def busy(chaotic: Chaotic) -> dict[str, float]:
    """What gateways say is still somebody's."""
    found = {}
    for base_url in chaotic.base_urls:
        stats = metrics(httpx.get(f"{base_url}/metrics").text)
        for name in ("handoffs", "requests_running", "kv_blocks_granted", "kv_blocks_committed"):
            if count := stats[f"kvbaton_gateway_{name}"]:
                found[f"{base_url} {name}"] = count
    return found


def grown(chaotic: Chaotic, sizes: dict[int, Size]) -> Iterator[str]:
    """Who has more than when it was young."""
    for name, process in chaotic.cluster.processes.items():
        now, before = size_of(process.pid), sizes.get(process.pid)
        if before is None:
            continue
        if now.fds > before.fds + MOST_MORE_FDS:
            yield f"{name}: {before.fds} descriptors, now {now.fds}"
        if now.threads > before.threads + MOST_MORE_THREADS:
            yield f"{name}: {before.threads} threads, now {now.threads}"
        if now.num_bytes > before.num_bytes + MOST_MORE_BYTES:
            yield f"{name}: {before.num_bytes} bytes, now {now.num_bytes}"


async def num_tasks_at_the_end(cluster: Cluster) -> dict[str, int]:
    """End every process in order. Returns how many tasks each had when it was told to end."""
    found = {}
    for name in ORDER:
        assert await asyncio.to_thread(cluster.terminate, name) == 0, cluster.logs()
        lines = (cluster.folder / f"{name}.log").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        (found[name],) = (each["num_tasks"] for each in entries if each["event"] == "draining")
    return found


@pytest.mark.long
@pytest.mark.timeout(DURATION_S + 300)
async def test_whatever_clients_do_and_processes_suffer_nothing_is_left(tmp_path: Path) -> None:
    sizes: dict[int, Size] = {}
    lost: list[str] = []
    num_answers = 0
    with Cluster(tmp_path) as cluster:
        chaotic = Chaotic(cluster, WORKER, {})
        chaotic.start_all()
        await chaotic.ready()
        ends_at = time.monotonic() + DURATION_S
        clients = Clients(chaotic.endpoints, chaotic.base_urls)
        try:
            for number, fault in enumerate(FAULTS):
                answers = await load(chaotic, clients, number, fault)
                num_answers += len(answers)
                lost += [each.lost for each in answers if each.lost]
                assert not await until(lambda: busy(chaotic)), f"after {fault}"
                for process in cluster.processes.values():
                    sizes.setdefault(process.pid, size_of(process.pid))
                if time.monotonic() > ends_at:
                    break
            assert not await until(lambda: list(grown(chaotic, sizes)))
            for name, process in cluster.processes.items():
                print(name, sizes[process.pid], size_of(process.pid))  # noqa: T201
        finally:
            await clients.close()
        assert lost == []
        assert num_answers >= NUM_CALLERS * (number + 1)
        old = await num_tasks_at_the_end(cluster)
        chaotic.start_all()
        await chaotic.ready()
        fresh = await num_tasks_at_the_end(cluster)
        print("tasks:", old, "of fresh processes:", fresh)  # noqa: T201
        assert [name for name in ORDER if old[name] > fresh[name] + MOST_MORE_TASKS] == []
