"""Real processes with keys: each port asks for one, and each key does what is its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from common.engine.mock import mock_output
from kvbaton.ask import audit
from kvbaton.errors import ForbiddenError
from tests.cluster.proc import listening_ports
from tests.cluster.processes import Cluster
from tests.security.curves import ADMIN_KEY, keys_of, outcome, stranger, with_keys, without_keys
from tests.security.wire_bytes import greeting

MECHANISM = slice(12, 32)  # of a greeting


def keys(cluster: Cluster) -> Path:
    assert cluster.keys is not None
    return cluster.keys


def zeromq_ports(cluster: Cluster) -> dict[int, str]:
    """Each port and the role of who listens there."""
    return {
        port: name.partition(".")[0]
        for name, process in cluster.processes.items()
        for port in listening_ports(process.pid)
        if port != cluster.http_port
    }


async def mechanism(port: int) -> bytes:
    """How one has to show there who one is."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(10):
            writer.write(greeting(b"CURVE"))
            return (await reader.readexactly(64))[MECHANISM].rstrip(b"\0")
    finally:
        writer.close()


async def test_every_port_asks_for_a_key_and_refuses_all_but_known_ones(cluster: Cluster) -> None:
    ports = zeromq_ports(cluster)
    assert sorted(ports.values()) == ["decode", "gateway", "kvstore", "kvstore", "prefill"]
    for port, role in ports.items():
        endpoint = f"tcp://127.0.0.1:{port}"
        known = keys_of(keys(cluster), "gateway")
        assert await mechanism(port) == b"CURVE"
        wrong = with_keys(stranger(known.public.roles[role]))
        assert await outcome(endpoint, wrong) == "FAILED_AUTH"
        assert await outcome(endpoint, without_keys) != "SUCCEEDED"
        assert await outcome(endpoint, with_keys(known.connecting(role))) == "SUCCEEDED"


def test_clients_generate_and_operators_ask(cluster: Cluster) -> None:
    prompt, num_tokens = [7] * 40, 20
    with cluster.client() as client:
        tokens = client.generate(token_ids=prompt, max_tokens=num_tokens, temperature=0)
        assert [token.token_id for token in tokens] == mock_output(prompt, num_tokens)
    endpoint = f"tcp://127.0.0.1:{cluster.client_port}"
    before = num_refused(cluster)  # other tests use this cluster too
    assert audit(endpoint, ADMIN_KEY, keys(cluster)).closes
    with pytest.raises(ForbiddenError, match="client has no right to send audit here"):
        audit(endpoint, ADMIN_KEY, keys(cluster) / "client.key")
    here, store = (
        'kvbaton_refused_total{what="message"}',
        'kvbaton_store_messages_refused_total{store="0"}',
    )
    after = num_refused(cluster)
    assert (after[here], after[store]) == (before.get(here, 0) + 1, before[store])


def num_refused(cluster: Cluster) -> dict[str, float]:
    """What each process has refused."""
    metrics = httpx.get(f"{cluster.base_url}/metrics").text
    lines = (line.rpartition(" ") for line in metrics.splitlines())
    return {name: float(value) for name, _, value in lines if "refused_total{" in name}
