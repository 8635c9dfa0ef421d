"""Real processes with keys, which several files attack: they take seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.processes import Cluster, running
from tests.security.curves import ADMIN_KEY

WORKER = {"engine": "mock", "mock_step_ms": 1, "mock_token_ms": 0, "mover": "zmq"}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One of each role, with the mock engine; operators use ADMIN_KEY."""
    folder = tmp_path_factory.mktemp("cluster")
    key_file = folder / "admin-key"
    key_file.touch(0o600)
    key_file.write_text(ADMIN_KEY)
    with running(folder, worker=WORKER, gateway={"admin_key_file": key_file}) as cluster:
        yield cluster
