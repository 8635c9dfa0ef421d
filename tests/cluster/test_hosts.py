"""A cluster of several hosts, made of namespaces: the same tokens as on one, also while one is cut
off."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from common.net.zmq_transport import LOST_HOST_MS
from kvbaton import AsyncClient
from kvbaton.ask import audit
from kvbaton.explanation import Explanation
from kvbaton.operations import MemberStatus
from tests.cluster.chaos import held
from tests.cluster.chaos_load import Answer, Clients, Output, Request, catalogue
from tests.cluster.hosts import Network, why_none
from tests.cluster.processes import running
from tests.cluster.spread import ADMIN_KEY, SpreadCluster

HEARTBEAT_S, LOST_AFTER_S = 0.2, 1.0
NUM_CALLERS = 8
SETTLE_S = 60.0
POLL_S = 0.05
WORKER: dict[str, Any] = {"batch_invariant": "true", "max_num_seqs": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "gateway": {},
    "kvstore": {"kv_bytes": "64M", "heartbeat_s": HEARTBEAT_S, "lost_after_s": LOST_AFTER_S},
    "prefill": WORKER,
    "decode": WORKER,
}
LONG_PROMPT = [7, *range(100, 400)]  # decode computes short ones itself
Expected = dict[int, Output]
Harm = Callable[[SpreadCluster], Coroutine[Any, Any, None]]


def requests() -> list[Request]:
    """Some of the catalogue's, with answers so long that each worker always has some."""
    return [
        replace(each, options=each.options | {"max_tokens": 4 * each.options["max_tokens"]})
        for each in catalogue()[:12]
    ]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if reason := why_none():
        pytest.skip(f"no hosts of namespaces here: {reason}")
    with Network() as network:
        yield network


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What the requests give on one host."""
    shape: dict[str, Any] = {"mode": "colocated", "num_prefill": 0}
    with running(tmp_path_factory.mktemp("one"), worker=WORKER, **shape) as cluster:
        endpoint = f"tcp://127.0.0.1:{cluster.client_port}"
        return asyncio.run(_each_once(endpoint, cluster.base_url))


async def _each_once(endpoint: str, base_url: str) -> Expected:
    clients = Clients([endpoint], [base_url])
    try:
        answers = await asyncio.gather(
            *(clients.answer(each, f"{each.number}") for each in requests())
        )
    finally:
        await clients.close()
    assert [answer.lost for answer in answers if answer.lost] == []
    return {answer.request.number: answer.output for answer in answers}


async def _under_load(cluster: SpreadCluster, harm: Harm) -> list[Answer]:
    """What was answered while this happened."""
    clients, is_over = Clients([cluster.endpoint], [cluster.base_url]), asyncio.Event()
    answers: list[Answer] = []

    async def call(rng: random.Random, key: str) -> None:
        while not is_over.is_set():
            key += "+"
            answers.append(await clients.answer(rng.choice(requests()), key))

    async def befall() -> None:
        await asyncio.sleep(0.5)
        await harm(cluster)
        await asyncio.sleep(0.5)
        is_over.set()

    try:
        async with asyncio.TaskGroup() as group:
            for caller in range(NUM_CALLERS):
                group.create_task(call(random.Random(caller), f"{caller}"))
            group.create_task(befall())
    finally:
        await clients.close()
    return answers


def events(cluster: SpreadCluster, process: str, event: str, **fields: Any) -> int:
    """How often a process has logged this."""
    lines = (cluster.folder / f"{process}.log").read_text().splitlines()
    found = (json.loads(line) for line in lines if line.endswith("}"))
    return sum({"event": event, **fields}.items() <= each.items() for each in found)


async def until(cluster: SpreadCluster, has_happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETTLE_S
    while not has_happened():
        assert time.monotonic() < deadline, cluster.logs()
        await asyncio.sleep(POLL_S)


async def cut_off(cluster: SpreadCluster, name: str, seconds: float = 1.0) -> None:
    """Pull the cable of a host until it is missed, and for so long after that; plug it in again,
    and wait until it is found."""
    host = cluster.hosts[name]
    if name.startswith("kvstore"):
        witness, lost, found = "gateway.1", {"event": "store_lost"}, {"event": "store_joined"}
    else:
        witness = "kvstore.1"
        lost, found = ({"event": f"member_{each}", "name": name} for each in ("lost", "joined"))
    num_lost, num_found = (events(cluster, witness, **each) for each in (lost, found))
    host.cut()
    assert host.is_cut()
    await until(cluster, lambda: events(cluster, witness, **lost) > num_lost)
    await asyncio.sleep(seconds)
    assert events(cluster, witness, **found) == num_found
    host.mend()
    assert not host.is_cut()
    await until(cluster, lambda: events(cluster, witness, **found) > num_found)


def check(answers: list[Answer], expected: Expected) -> None:
    """No request is lost, and none differs."""
    assert [answer.lost for answer in answers if answer.lost] == []
    assert len(answers) >= NUM_CALLERS
    for answer in answers:
        assert answer.output == expected[answer.request.number], answer.request


def check_books(cluster: SpreadCluster) -> None:
    """Nothing is held for anybody."""
    deadline = time.monotonic() + SETTLE_S
    while wrong := held(cluster.at_desk(lambda: audit(cluster.endpoint, ADMIN_KEY))):
        assert time.monotonic() < deadline, wrong
        time.sleep(POLL_S)


def explained(cluster: SpreadCluster, count: int) -> list[Explanation]:
    """So many requests at once that are new to the cluster."""

    async def ask(client: AsyncClient, number: int) -> Explanation:
        stream = client.generate(token_ids=[number, *LONG_PROMPT], max_tokens=60, explain=True)
        done = await stream.finish()
        assert done.explanation is not None
        return done.explanation

    async def ask_all() -> list[Explanation]:
        async with AsyncClient(cluster.endpoint) as client:
            return await asyncio.gather(*(ask(client, 500 + number) for number in range(count)))

    return cluster.at_desk(lambda: asyncio.run(ask_all()))


@pytest.mark.timeout(180)
def test_six_hosts_answer_as_one_does_also_while_one_is_cut_off(
    tmp_path: Path, network: Network, expected: Expected
) -> None:
    with SpreadCluster(tmp_path, network) as cluster:
        cluster.start_all(SETTINGS)
        found = cluster.at_desk(lambda: asyncio.run(_each_once(cluster.endpoint, cluster.base_url)))
        assert found == expected
        # No two see the same memory, and so blocks move.
        members = cluster.status().members
        assert sorted(each.name for each in members) == sorted({*cluster.hosts} - {"kvstore.1"})
        assert len({each.host_id for each in members}) == len(members) == 5
        for told in explained(cluster, 4):
            assert [each.worker for each in told.moved] == [told.decode_worker]
            assert told.moved[0].num_early_bytes + told.moved[0].num_late_bytes > 0
        harm = partial(cut_off, name="decode.1")
        answers = cluster.at_desk(partial(asyncio.run, _under_load(cluster, harm)))
        check(answers, expected)
        assert max(answer.num_attempts for answer in answers) > 1
        check_books(cluster)
        cluster.wait_ready(4)
    assert list(cluster.hosts["kvstore.1"].shm.iterdir()) == []


@pytest.mark.long
@pytest.mark.timeout(300)
def test_any_host_may_be_cut_off_on_ipv6(
    tmp_path: Path, network: Network, expected: Expected
) -> None:
    with SpreadCluster(tmp_path, network, ipv6=True) as cluster:
        cluster.start_all(SETTINGS)
        assert all(each.endpoint.startswith("tcp://[fd77::") for each in workers(cluster).values())
        for name in ("prefill.2", "kvstore.1", "gateway.1"):
            harm = partial(cut_off, name=name)
            check(cluster.at_desk(partial(asyncio.run, _under_load(cluster, harm))), expected)
            cluster.wait_ready(4)
        check_books(cluster)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_host_that_was_away_for_long_is_called_again_all_the_while(
    tmp_path: Path, network: Network, expected: Expected
) -> None:
    """TCP would try less and less often; both ends give the connection up, and make another."""

    async def long_cut(cluster: SpreadCluster) -> None:
        assert events(cluster, "decode.2", "store_lost") == 0
        await cut_off(cluster, "decode.2", seconds=LOST_HOST_MS / 1000 + 3)
        assert events(cluster, "decode.2", "store_lost") == 1

    with SpreadCluster(tmp_path, network) as cluster:
        cluster.start_all(SETTINGS)
        check(cluster.at_desk(partial(asyncio.run, _under_load(cluster, long_cut))), expected)
        cluster.wait_ready(4)
        check_books(cluster)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_worker_comes_back_at_another_address_of_another_host(
    tmp_path: Path, network: Network, expected: Expected
) -> None:
    async def move(cluster: SpreadCluster) -> None:
        former = cluster.address("decode.1")
        cluster.kill("decode.1")
        cluster.hosts["decode.1"].move(201)
        cluster.start("decode", 1, **WORKER)
        at = f"tcp://{cluster.address('decode.1')}:"
        assert not at.startswith(f"tcp://{former}:")
        wanted = {"event": "worker_joined", "name": "decode.1"}
        await until(cluster, lambda: events(cluster, "gateway.1", **wanted) == 2)

    with SpreadCluster(tmp_path, network) as cluster:
        cluster.start_all(SETTINGS)
        check(cluster.at_desk(partial(asyncio.run, _under_load(cluster, move))), expected)
        cluster.wait_ready(4)
        assert workers(cluster)["decode.1"].endpoint.startswith("tcp://10.77.0.201:")
        served = {told.decode_worker for told in explained(cluster, 8)}
        assert served == {"decode.1", "decode.2"}


@pytest.mark.long
@pytest.mark.timeout(300)
def test_those_on_the_stores_host_share_its_memory_and_others_do_not(
    tmp_path: Path, network: Network, expected: Expected
) -> None:
    shared = {"prefill.1": "kvstore.1", "decode.1": "kvstore.1"}
    with SpreadCluster(tmp_path, network, shared=shared) as cluster:
        cluster.start_all(SETTINGS)
        found = cluster.at_desk(lambda: asyncio.run(_each_once(cluster.endpoint, cluster.base_url)))
        assert found == expected
        hosts = {name: each.host_id for name, each in workers(cluster).items()}
        assert hosts["prefill.1"] == hosts["decode.1"]
        assert len(set(hosts.values())) == 3
        told = explained(cluster, 12)
        assert {each.decode_worker for each in told} == {"decode.1", "decode.2"}
        for each in told:
            moved_to = [moved.worker for moved in each.moved]
            assert moved_to == ([] if each.decode_worker == "decode.1" else ["decode.2"])
        check_books(cluster)


def workers(cluster: SpreadCluster) -> dict[str, MemberStatus]:
    return {each.name: each for each in cluster.status().members if each.role != "gateway"}
