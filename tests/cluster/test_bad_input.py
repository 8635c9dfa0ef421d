"""Bad requests and bad models are refused in words, and disturb nothing else in the cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from common.engine.mock import mock_output
from kvbaton.errors import KvbatonError
from tests.cluster.processes import ROOT, running

MOCK = {"engine": "mock", "mock_step_ms": 2}
BAD_BODIES: list[tuple[bytes, int, str]] = [
    (b'{"prompt":', 400, "not valid JSON"),
    (b"[1]", 400, "expected `object`"),
    (b'{"prompt":""}', 400, "prompt is empty"),
    (b'{"prompt":"x","temperature":NaN}', 400, "JSON"),
    (b'{"prompt":"x","temperature":-1}', 400, "temperature must be at least 0"),
    (b'{"prompt":"x","model":"other"}', 404, "no model 'other'"),
    (b'{"prompt":[99999]}', 400, "token id 99999"),
    (b'{"prompt":[' + b"5," * 40000 + b"5]}", 400, "context of 32768"),
    (b'{"prompt":"' + b"x" * (9 << 20) + b'"}', 413, "limit"),
]


def test_bad_requests_disturb_no_stream(tmp_path: Path) -> None:
    with running(tmp_path, worker=MOCK) as cluster, cluster.client() as client:
        stream = client.generate(token_ids=[5, 6, 7], max_tokens=300, temperature=0)
        first = next(iter(stream))
        with httpx.Client(base_url=cluster.base_url) as http:
            for body, status, words in BAD_BODIES:
                headers = {"content-type": "application/json"}
                answer = http.post("/v1/completions", content=body, headers=headers)
                assert answer.status_code == status, answer.text
                assert words in answer.json()["error"]["message"]
        for options in ({"temperature": float("nan")}, {"max_tokens": 0}, {"model": "other"}):
            with pytest.raises(KvbatonError):
                list(client.generate("x", **options))
        tokens = [first.token_id, *(token.token_id for token in stream)]
        assert tokens == mock_output([5, 6, 7], 300)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_model_that_cannot_be_served_ends_the_worker_with_its_reason(
    tmp_path: Path, damage: str
) -> None:
    for path in (ROOT / "models/demo").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        os.truncate(weights, 3_000_000)
    command = [sys.executable, "-m", "services.decode", "--insecure", "--model", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == os.EX_CONFIG
    assert str(tmp_path) in ended.stderr
    assert "Traceback" not in ended.stderr
