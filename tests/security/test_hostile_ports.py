"""Strangers at every port of real processes, while a client is served."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from common.engine.mock import mock_output
from tests.cluster.proc import listening_ports, num_fds, rss_bytes
from tests.cluster.processes import Cluster, running
from tests.security.conftest import WORKER
from tests.security.insiders import ROLES, curve_of, insider_messages, say
from tests.security.wire_bytes import bad_frames, greeting, half_handshakes, http, messages, send

PROMPT, NUM_TOKENS = [7] * 40, 60
NUM_SESSIONS, NUM_HTTP, NUM_FLOOD, NUM_HELD = 40, 150, 150, 40
NUM_BY_INSIDERS = 250  # with each key, at each port that takes it
AT_ONCE = 16
SETTLE_S = 20.0
MAX_GROWTH = 1.5  # of a process's memory


@pytest.fixture(scope="module")
def ports(cluster: Cluster) -> dict[str, int]:
    return zmq_ports(cluster)


def zmq_ports(cluster: Cluster) -> dict[str, int]:
    """Every ZeroMQ port, by the union that is spoken there and the process."""
    found = {"client gateway.1": cluster.client_port}
    for name in ("kvstore.1", "prefill.1", "decode.1"):
        union = "to_store" if name == "kvstore.1" else "to_worker"
        for number, port in enumerate(sorted(listening_ports(cluster.processes[name].pid))):
            found[f"{union} {name} {number}"] = port
    return found


def each_of(cluster: Cluster, measure: Callable[[int], int]) -> dict[str, int]:
    return {name: measure(process.pid) for name, process in cluster.processes.items()}


class Canary:
    """A client that asks again and again, and must get its own tokens each time."""

    def __init__(self, cluster: Cluster) -> None:
        self.num_served = 0
        self.wrong: list[object] = []
        self._cluster = cluster
        self._stop = threading.Event()
        self.token_came = threading.Condition()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        expected = mock_output(PROMPT, NUM_TOKENS)
        try:
            with self._cluster.client() as client:
                while not self._stop.is_set():
                    stream = client.generate(
                        token_ids=PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True
                    )
                    got = [token.token_id for token in stream]
                    if got != expected:
                        self.wrong.append(got)
                    self.num_served += 1
        except Exception as error:
            self.wrong.append(error)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.wrong == []
        assert self.num_served > 0


@contextmanager
def unharmed(cluster: Cluster) -> Iterator[None]:
    """Meanwhile the canary is served; afterwards every process lives, has said nothing of a defect,
    and is as large as it was."""
    fds, rss = each_of(cluster, num_fds), each_of(cluster, rss_bytes)
    canary = Canary(cluster)
    try:
        yield
    finally:
        canary.end()
    assert [name for name, each in cluster.processes.items() if each.poll() is not None] == []
    for path in cluster.folder.glob("*.log"):
        bad = [line for line in path.read_text().splitlines() if not is_fine(line)]
        assert bad == [], path.name
    for name, now in each_of(cluster, rss_bytes).items():
        assert now < MAX_GROWTH * rss[name], name
    deadline = time.monotonic() + SETTLE_S
    while any(now > fds[name] + 4 for name, now in each_of(cluster, num_fds).items()):
        assert time.monotonic() < deadline, (fds, each_of(cluster, num_fds))
        time.sleep(0.05)


def is_fine(line: str) -> bool:
    try:
        return json.loads(line)["level"] in ("debug", "info", "warning")
    except ValueError:
        return False


async def send_all(inputs: list[tuple[int, bytes]], *, greets: bool = False) -> None:
    """A few at a time."""
    waiting = iter(inputs)

    async def some() -> None:
        for port, raw in waiting:
            await send(port, raw, greets=greets)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))


def test_half_handshakes_end_and_harm_nobody(cluster: Cluster, ports: dict[str, int]) -> None:
    inputs = [(port, raw) for port in ports.values() for raw in half_handshakes()]
    with unharmed(cluster):
        asyncio.run(send_all(inputs))
    assert len(inputs) > 500


def test_hostile_frames_harm_nobody(tmp_path: Path) -> None:
    """After a handshake that is in order, so without keys: with them strangers get no further."""
    rng = Random(1)
    with running(tmp_path, worker=WORKER, secure=False) as cluster:
        inputs = [
            (port, raw)
            for name, port in zmq_ports(cluster).items()
            for raw in [
                *bad_frames(),
                *(messages(rng, name.partition(" ")[0]) for _ in range(NUM_SESSIONS)),
            ]
        ]
        with unharmed(cluster):
            asyncio.run(send_all(inputs, greets=True))


def test_who_has_a_key_and_abuses_it_harms_nobody(cluster: Cluster, ports: dict[str, int]) -> None:
    assert cluster.keys is not None
    rng, attacks = Random(3), []
    for name, port in ports.items():
        union, process, *_ = name.split()
        for role in ROLES[union]:
            curve = curve_of(cluster.keys, role, process.partition(".")[0])
            attacks.append((port, curve, insider_messages(rng, union, role, NUM_BY_INSIDERS)))

    async def main() -> None:
        await asyncio.gather(*(say(*each) for each in attacks))

    with unharmed(cluster):
        asyncio.run(main())


def test_hostile_http_harms_nobody(cluster: Cluster, ports: dict[str, int]) -> None:
    rng = Random(2)
    zmtp = list(half_handshakes())[-12:]
    inputs = [(cluster.http_port, raw) for raw in zmtp + [http(rng) for _ in range(NUM_HTTP)]]
    with unharmed(cluster):
        asyncio.run(send_all(inputs))


def test_floods_and_connections_that_trickle_harm_nobody(
    cluster: Cluster, ports: dict[str, int]
) -> None:
    every_port = [*ports.values(), cluster.http_port]

    async def main() -> None:
        held = [
            await asyncio.open_connection("127.0.0.1", port)
            for port in every_port
            for _ in range(NUM_HELD)
        ]
        for index, byte in enumerate(greeting()):
            for _, writer in held:
                writer.write(bytes([byte]))
            port = every_port[index % len(every_port)]
            await send_all([(port, b"")] * (NUM_FLOOD // 16))
        for _, writer in held:
            writer.close()

    with unharmed(cluster):
        asyncio.run(main())
