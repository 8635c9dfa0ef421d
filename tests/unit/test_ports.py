"""Ports: every cluster of a host has its own, known from its HTTP port alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.cluster.ports import (
    MAX_GATEWAYS,
    MAX_STORES,
    NUM_PLACES,
    ClusterError,
    client_port,
    cluster_ports,
    metrics_port,
    store_ports,
)

FIRST_EPHEMERAL = 32768
http_ports = st.integers(1, 65535)


def derived(http_port: int) -> list[int]:
    """Every port that follows from an HTTP port."""
    stores = [store_ports(http_port, instance) for instance in range(1, MAX_STORES + 1)]
    clients = [client_port(http_port, instance) for instance in range(1, MAX_GATEWAYS + 1)]
    return clients + [port for store in stores for port in (store.control, store.data)]


def test_the_default_ports_are_those_of_the_documentation() -> None:
    assert [client_port(8000, 1), client_port(8000, 2)] == [5555, 5556]
    assert [store_ports(8000, 1).control, store_ports(8000, 1).data] == [5570, 5571]
    assert store_ports(8000, 2).control == 5572
    assert client_port(8001, 1) == 5595


@given(http_ports)
def test_no_port_is_given_twice_or_lies_in_the_ephemeral_range(http_port: int) -> None:
    ports = derived(http_port)
    assert len(set(ports)) == MAX_GATEWAYS + 2 * MAX_STORES
    assert all(1024 <= port < FIRST_EPHEMERAL for port in ports)


@given(http_ports, st.integers(1, NUM_PLACES - 1))
def test_clusters_with_near_http_ports_do_not_clash(http_port: int, distance: int) -> None:
    neighbour = http_port + distance
    if neighbour <= 65535:
        assert not set(derived(http_port)) & set(derived(neighbour))


@given(http_ports, st.integers(1, MAX_GATEWAYS), st.integers(1, MAX_STORES))
def test_a_cluster_names_each_of_its_ports_once(http_port: int, gateways: int, stores: int) -> None:
    used = {client_port(http_port, instance + 1) for instance in range(gateways)}
    for instance in range(1, stores + 1):
        used |= {store_ports(http_port, instance).control, store_ports(http_port, instance).data}
    if http_port in used:
        with pytest.raises(ClusterError, match="choose another HTTP port"):
            cluster_ports(http_port, gateways, stores)
    else:
        assert set(cluster_ports(http_port, gateways, stores)) == used | {http_port}


def test_an_http_port_among_its_own_ports_is_refused() -> None:
    assert cluster_ports(8062, 1, 6)[8062] == "HTTP"
    with pytest.raises(ClusterError, match=r"8062 is also the port for control of kvstore.7"):
        cluster_ports(8062, 1, 7)


@pytest.mark.parametrize("http_port", [0, -1, 65536])
def test_an_http_port_out_of_range_is_refused(http_port: int) -> None:
    with pytest.raises(ClusterError, match="KVBATON_HTTP_PORT must be from 1 to 65535"):
        client_port(http_port, 1)


def test_more_processes_than_a_host_has_places_for_are_refused() -> None:
    with pytest.raises(ClusterError, match=r"gateway.1 to gateway.15, got number 16"):
        client_port(8000, 16)
    with pytest.raises(ClusterError, match=r"kvstore.1 to kvstore.12, got number 13"):
        store_ports(8000, 13)


def test_ports_with_metrics_are_given_once_above_their_base() -> None:
    counts = {"gateway": 20, "kvstore": 20, "prefill": 100, "decode": 100}
    ports = [
        metrics_port(9100, role, number)
        for role, count in counts.items()
        for number in range(1, count + 1)
    ]
    assert ports == list(range(9100, 9340))
    with pytest.raises(ClusterError, match=r"to prefill\.1 to prefill\.100, got number 101"):
        metrics_port(9100, "prefill", 101)
    with pytest.raises(ClusterError, match="KVBATON_METRICS_BASE must be from 1 to 65295, got 0"):
        metrics_port(0, "prefill", 1)
