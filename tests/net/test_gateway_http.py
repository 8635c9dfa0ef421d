"""The HTTP face: its plain routes, its errors, disconnects, shared ports and its end."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import socket
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs
from uvicorn.protocols.http.flow_control import FlowControl

from common.seams import LiveClock
from common.service import Tasks
from kvbaton.errors import UnavailableError
from services.gateway.http.face import HttpFace
from tests.unit.gateway_fakes import (
    FakeBackend,
    FakeRng,
    demo_model,
    running_face,
    says,
)

ASK = {"model": "demo", "prompt": "hello"}


def client_of(face: HttpFace) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}", timeout=20)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_health_ping_version_and_ready() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, client_of(face) as client:
        for path in ("/health", "/ping", "/ready"):
            response = await client.get(path)
            assert (response.status_code, response.content) == (200, b"")
        assert (await client.get("/version")).json() == {"version": "0.1.0"}
        backend.ready = False
        assert (await client.get("/health")).status_code == 200
        response = await client.get("/ready")
        assert response.status_code == 503
        assert error_of(response)["code"] == 503
        assert "server" not in response.headers
        assert "GMT" in response.headers["date"]


async def test_requests_are_counted() -> None:
    def number(text: str, name: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[-1]) if lines else 0.0

    names = {
        'kvbaton_http_requests_total{route="/v1/completions",status="200"}': 1,
        'kvbaton_http_requests_total{route="/v1/completions",status="400"}': 1,
        'kvbaton_http_requests_total{route="unknown",status="404"}': 1,
        "kvbaton_gateway_fake_requests": 1,
    }
    backend = FakeBackend(lambda _request: says("one two"))
    async with running_face(backend) as face, client_of(face) as client:
        before = (await client.get("/metrics")).text
        await client.post("/v1/completions", json=ASK)
        await client.post("/v1/completions", json={})
        await client.get("/nowhere")
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    grown = {name: number(response.text, name) - number(before, name) for name in names}
    assert grown == names


@pytest.mark.parametrize(
    ("given", "echoed"), [("abc-1 ok", True), ("x" * 129, False), ("\xe9", False), ("", False)]
)
async def test_request_ids_are_echoed_when_they_are_sane(given: str, echoed: bool) -> None:
    backend = FakeBackend(lambda _request: says("x"))
    async with running_face(backend) as face, client_of(face) as client:
        headers = {b"X-Request-Id": given.encode("latin-1")}
        response = await client.post("/v1/completions", json=ASK, headers=headers)
    request_id = response.headers["x-request-id"]
    assert (request_id == given) is echoed
    assert response.json()["id"] == "cmpl-" + request_id
    assert backend.requests[0].request_id == request_id


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "NotFoundError"),
        ("GET", "/v1/completions/", 404, "NotFoundError"),
        ("GET", "/v1/models/other", 404, "NotFoundError"),
        ("GET", "/v1/completions", 405, "MethodNotAllowed"),
        ("POST", "/health", 405, "MethodNotAllowed"),
        ("DELETE", "/v1/models", 405, "MethodNotAllowed"),
        ("POST", "/v1/embeddings", 501, "NotImplemented"),
        ("POST", "/start_profile", 501, "NotImplemented"),
        ("POST", "/stop_profile", 501, "NotImplemented"),
    ],
)
async def test_what_is_not_there_has_the_shape_of_errors(
    method: str, path: str, status: int, kind: str
) -> None:
    async with running_face(FakeBackend()) as face, client_of(face) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    error = error_of(response)
    assert (error["code"], error["type"]) == (status, kind)
    assert ("allow" in response.headers) is (status == 405)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [5] * 2048}, "prompt", "2048 tokens.*context of 2048 tokens"),
        ({"prompt": [2048]}, "prompt", "token id 2048, the model's are 0 to 2047"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"stop_token_ids": [2048]}, "stop_token_ids", "token id 2048"),
        ({"stop": [""]}, "stop", "1 to 1024 characters"),
        ({"stream_options": {}}, "stream_options", "stream"),
        ({"n": 129}, "n", "at most 128"),
        ({"temperature": 101}, "temperature", "at most 100"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"suffix": "x"}, "suffix", "not supported yet"),
        ({"allowed_token_ids": [2048]}, "allowed_token_ids", "token id 2048"),
        ({"logit_bias": {"2048": 1}}, "logit_bias", "token id 2048"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "at most 100"),
        ({"bad_words": [" "]}, "bad_words", "1 to 1024 characters"),
        ({"bad_words": ["x"] * 129}, "bad_words", "at most 128"),
        ({"n": 2, "best_of": 1}, "best_of", "at least n"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or at least 1"),
        ({"priority": 2**31}, "priority", "at most 2147483647"),
        ({"session_id": "x" * 257}, "session_id", "1 to 256"),
        ({"request_id": "a\nb"}, "request_id", "1 to 128"),
        ({"cache_salt": ""}, "cache_salt", "1 to 256"),
        ({"extra_key": "x" * 257}, "cache_salt", "1 to 256"),
    ],
)
async def test_wrong_values_are_refused_by_field(
    values: dict[str, Any], field: str, words: str
) -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, client_of(face) as client:
        response = await client.post("/v1/completions", json={**ASK, **values})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["type"]) == (field, "BadRequestError")
    assert re.search(words, error["message"])
    assert backend.requests == []


async def test_unknown_fields_are_ignored_and_named_in_one_line() -> None:
    backend = FakeBackend(lambda _request: says("x"))
    async with running_face(backend) as face, client_of(face) as client:
        with capture_logs() as logs:
            body = {**ASK, "colour": {"a": ["secret"]}, "shape": 1, "user": "ann", "top_k": 1}
            response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200
    lines = [line for line in logs if line["event"] == "unknown_fields_ignored"]
    assert [(line["fields"], line["num_fields"]) for line in lines] == [(["colour", "shape"], 2)]
    assert "secret" not in str(logs)


async def test_an_unexpected_failure_is_an_internal_error_and_logged() -> None:
    backend = FakeBackend(lambda _request: [ZeroDivisionError("oops")])
    async with running_face(backend) as face, client_of(face) as client:
        with capture_logs() as logs:
            response = await client.post("/v1/completions", json=ASK)
    assert response.status_code == 500
    assert error_of(response)["message"] == "internal error"
    assert [line["event"] for line in logs] == ["http_request_failed"]
    assert backend.streams[0].num_cancels == 1


async def test_an_unexpected_failure_in_a_stream_leaves_it_unfinished() -> None:
    backend = FakeBackend(lambda _request: [*says("one two")[:1], ZeroDivisionError("oops")])
    async with running_face(backend) as face, client_of(face) as client:
        with capture_logs(), pytest.raises(httpx.RemoteProtocolError):
            await client.post("/v1/completions", json={**ASK, "stream": True})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_client_that_leaves_cancels_its_request(
    stream: bool, n: int, has_begun: bool
) -> None:
    backend = FakeBackend()
    async with running_face(backend) as face:
        reader, writer = await asyncio.open_connection("127.0.0.1", face.port)
        body = json.dumps({**ASK, "stream": stream, "n": n}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        await backend.submitted()
        if has_begun:
            backend.streams[0].feed(says("one two")[:1])
            await backend.submitted(n)  # the others come once the prompt is computed
            for fake in backend.streams[1:]:
                fake.feed(says("one two")[:1])
            if stream:
                await reader.readuntil(b'"one"')
        writer.close()
        async with asyncio.timeout(5):
            for fake in backend.streams:
                await fake.cancelled.wait()


@pytest.mark.parametrize("has_begun", [False, True])
async def test_close_ends_open_streams_with_an_error(has_begun: bool) -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, client_of(face) as client:
        ask = asyncio.create_task(client.post("/v1/completions", json={**ASK, "stream": True}))
        await backend.submitted()
        if has_begun:
            backend.streams[0].feed(says("one two")[:1])
            await asyncio.sleep(0)
        async with asyncio.timeout(1):
            await face.close()
        response = await ask
    if response.status_code == 200:
        *_, error, done = response.text.strip().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
        assert done == "data: [DONE]"
    else:
        assert response.status_code == 503
    assert backend.streams[0].num_cancels >= 1


async def test_close_does_not_wait_for_a_client_that_does_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_full = asyncio.Event()
    pause_writing = FlowControl.pause_writing

    def on_full(flow: FlowControl) -> None:
        pause_writing(flow)
        is_full.set()

    monkeypatch.setattr(FlowControl, "pause_writing", on_full)
    backend = FakeBackend()
    async with running_face(backend) as face:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", face.port))
            body = json.dumps({**ASK, "stream": True}).encode()
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
            await backend.submitted()
            backend.streams[0].feed(says("word " * 10_000)[:-1])
            async with asyncio.timeout(10):
                await is_full.wait()
            async with asyncio.timeout(1):
                await face.close()
    assert backend.streams[0].num_cancels >= 1


async def test_close_and_nothing_else_frees_the_port() -> None:
    async with running_face(FakeBackend()) as face:
        port = face.port
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        await face.close()
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", port))


async def test_two_gateways_share_a_port() -> None:
    backends = [FakeBackend(lambda _request: says("x")) for _ in range(2)]
    tasks = Tasks(lambda error: pytest.fail(str(error)))
    faces: list[HttpFace] = []
    for backend in backends:
        port = faces[0].port if faces else 0
        face = HttpFace(
            backend, demo_model(), clock=LiveClock(), rng=FakeRng(), tasks=tasks, port=port
        )
        await face.start()
        faces.append(face)
    for _ in range(200):
        async with client_of(faces[0]) as client:
            assert (await client.post("/v1/completions", json=ASK)).status_code == 200
        if all(backend.requests for backend in backends):
            break
    assert all(backend.requests for backend in backends)
    for face in faces:
        await face.close()
    await tasks.close()


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        tasks = Tasks(lambda _error: None)
        face = HttpFace(
            FakeBackend(), demo_model(), clock=LiveClock(), rng=FakeRng(), tasks=tasks, port=port
        )
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            await face.start()
        await face.close()


async def test_an_idle_face_does_not_wake_up() -> None:
    def num_waits() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    async with running_face(FakeBackend()) as face, client_of(face) as client:
        await client.get("/health")
        before = num_waits()
        await asyncio.sleep(0.5)
        assert num_waits() - before <= 3


async def test_no_worker_means_unavailable() -> None:
    backend = FakeBackend(lambda _request: [UnavailableError("no decode worker")])
    async with running_face(backend) as face, client_of(face) as client:
        response = await client.post("/v1/completions", json=ASK)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert error_of(response)["type"] == "ServiceUnavailableError"
