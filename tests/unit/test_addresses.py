"""Where a process says that it is reached: as bound, or as it is told to say."""

from __future__ import annotations

import pytest

from common.config import StartError
from common.net.addresses import advertised, check_told, reachable

BOUND = "tcp://0.0.0.0:4321"


@pytest.mark.parametrize(
    ("advertise", "endpoint"),
    [
        ("", BOUND),
        ("10.0.0.5", "tcp://10.0.0.5:4321"),
        ("decode-7.cluster_a.example", "tcp://decode-7.cluster_a.example:4321"),
        ("fd00::5", "tcp://[fd00::5]:4321"),
        ("[fd00::5]", "tcp://[fd00::5]:4321"),
        ("fe80::5%eth0", "tcp://[fe80::5%eth0]:4321"),
        ("tcp://192.0.2.1:9", "tcp://192.0.2.1:9"),
        ("tcp://[2001:db8::1]:9", "tcp://[2001:db8::1]:9"),
    ],
)
def test_a_host_goes_with_the_port_that_is_bound(advertise: str, endpoint: str) -> None:
    assert advertised(BOUND, advertise) == endpoint


@pytest.mark.parametrize(
    "advertise", ["10.0.0.5:80", "a b", "tcp://host", "tcp://:80", "ipc:///x", "*", "[::1]:80"]
)
def test_what_is_no_host_is_refused(advertise: str) -> None:
    with pytest.raises(StartError, match=r"--advertise must be a host or tcp://HOST:PORT, got"):
        advertised(BOUND, advertise)


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://*:1"])
def test_nobody_is_told_of_every_address(endpoint: str) -> None:
    with pytest.raises(StartError, match="--advertise HOST must say which one"):
        check_told(endpoint)
    assert check_told("tcp://[::1]:1") == "tcp://[::1]:1"
    assert reachable(endpoint, "tcp://[fd00::1]:5570") == "tcp://[fd00::1]:1"
    assert reachable(endpoint, "tcp://store-1:5570") == "tcp://store-1:1"


def test_an_address_that_was_told_is_used_as_it_is() -> None:
    assert reachable("tcp://10.0.0.1:2", "tcp://store-1:5570") == "tcp://10.0.0.1:2"
    assert reachable("sim://data-0", "sim://store-0") == "sim://data-0"
