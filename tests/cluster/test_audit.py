"""`python -m kvbaton audit` and `why` against real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.processes import ROOT, Cluster, metrics, running

KEY = "only the operators of this cluster know it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def key_file(folder: Path) -> Path:
    path = folder / "key"
    path.touch(mode=0o600)
    path.write_text(KEY + "\n")
    return path


@pytest.fixture(scope="module")
def cluster(folder: Path, key_file: Path) -> Iterator[Cluster]:
    gateway = {"admin_key_file": key_file}
    with running(folder, num_stores=2, worker={"engine": "mock"}, gateway=gateway) as cluster:
        yield cluster


def kvbaton(cluster: Cluster, key_file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    endpoint = f"tcp://127.0.0.1:{cluster.client_port}"
    flags = ["--gateway", endpoint, "--admin-key-file", str(key_file)]
    command = [sys.executable, "-m", "kvbaton", arguments[0], *flags, *arguments[1:]]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def complete(cluster: Cluster, prompt: str) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 40, "ignore_eos": True}
    return httpx.post(f"{cluster.base_url}/v1/completions", json=body, timeout=60)


def test_the_audit_closes_and_counts_what_was_served(cluster: Cluster, key_file: Path) -> None:
    for number in range(6):
        assert complete(cluster, f"{number} " + "def f(x): return x\n" * 8).status_code == 200
    done = kvbaton(cluster, key_file, "audit")
    assert done.returncode == 0, done
    assert done.stdout.endswith("The audit closes.\n")
    answer = json.loads(kvbaton(cluster, key_file, "audit", "--json").stdout)
    assert answer["closes"]
    assert [store["store"] for store in answer["stores"]] == [0, 1]
    for store in answer["stores"]:
        assert sum(store["blocks"].values()) == store["num_blocks"]
        says = {member["name"]: member["answer"] for member in store["members"]}
        assert says == {"prefill.1": "agrees", "decode.1": "agrees"}
        assert store["warnings"] == store["discrepancies"] == []
    assert sum(store["blocks"]["cached"] for store in answer["stores"]) > 0


def test_the_audit_closes_while_requests_run(cluster: Cluster, key_file: Path) -> None:
    with cluster.client() as client:
        streams = [
            client.generate(f"{n} def g(y):\n" * 12, max_tokens=1500, ignore_eos=True)
            for n in range(8)
        ]
        for stream in streams:
            next(stream)
        for _ in range(3):
            done = kvbaton(cluster, key_file, "audit", "--json")
            assert done.returncode == 0, done
        assert sum(bool(store["oldest_handoffs"]) for store in json.loads(done.stdout)["stores"])
        for stream in streams:
            stream.cancel()


def test_why_tells_the_story_of_an_answer_by_its_id(cluster: Cluster, key_file: Path) -> None:
    response = complete(cluster, "class Story:\n" * 10)
    shown = kvbaton(cluster, key_file, "why", response.json()["id"])
    assert shown.returncode == 0, shown
    story = [
        "handoff opened",
        "handoff admitted",
        "handoff filled",
        "blocks committed",
        "handoff sealed",
        "handoff claimed",
        "handoff released",
    ]
    places = [shown.stdout.index(event) for event in story]
    assert places == sorted(places)
    by_header = kvbaton(cluster, key_file, "why", response.headers["x-request-id"], "--json")
    (store,) = [each for each in json.loads(by_header.stdout)["stores"] if each["events"]]
    filled = next(each for each in store["events"] if each["event"] == "handoff_filled")
    assert filled["member"] == "prefill.1"
    block, _stamp = filled["blocks"][0]
    of_block = kvbaton(cluster, key_file, "why", f"{store['store']}:{block}")
    assert of_block.returncode == 0
    assert response.headers["x-request-id"] in of_block.stdout
    assert "now: cached" in of_block.stdout


def test_why_finds_a_request_of_the_msgpack_client(cluster: Cluster, key_file: Path) -> None:
    with cluster.client() as client:
        stream = client.generate("import os\n", max_tokens=4)
        list(stream)
    assert kvbaton(cluster, key_file, "why", stream.request_id).returncode == 0


def test_what_cannot_be_asked_ends_with_status_2_and_a_remedy(
    cluster: Cluster, key_file: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("not the key of this cluster")
    refused = kvbaton(cluster, wrong, "audit")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "this is not the gateway's admin key" in refused.stderr
    assert str(wrong) in refused.stderr
    missing = kvbaton(cluster, tmp_path / "missing", "audit")
    assert missing.returncode == 2
    assert "--admin-key-file FILE or KVBATON_ADMIN_KEY_FILE" in missing.stderr
    unclear = kvbaton(cluster, key_file, "why", "3")
    assert unclear.returncode == 2
    assert "there are 2 KV stores" in unclear.stderr
    unknown = kvbaton(cluster, key_file, "why", "never-heard-of")
    assert unknown.returncode == 1


def test_the_metrics_show_each_stores_blocks(cluster: Cluster) -> None:
    text = httpx.get(f"{cluster.base_url}/metrics").text
    for store in (0, 1):
        assert f'kvbaton_kv_blocks{{state="free",store="{store}"}}' in text
        assert f'kvbaton_kv_handoffs{{state="claimed",store="{store}"}}' in text
        assert f'kvbaton_store_blocks_evicted_total{{store="{store}"}}' in text
    assert metrics(text)["kvbaton_gateway_kv_blocks_quarantined"] == 0
