"""Client from plain threads, and both clients under uvloop; the face has a thread of its own."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvloop

from kvbaton import AsyncClient, Client, sync_client
from kvbaton.errors import (
    CancelledRequestError,
    ConnectionLostError,
    InvalidRequestError,
    UnprocessableError,
)
from services.gateway.backend import TokenEvent
from tests.net.gateways import PATIENCE_S, running_face
from tests.unit.gateway_fakes import FakeBackend, says

ROOT = Path(__file__).parents[2]
TEXT = "hello, wörld"


class FaceThread:
    """A face that says TEXT, or for an id 7 alone one token and nothing more."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(),))
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    async def _main(self) -> None:
        self.backend = FakeBackend(
            lambda request: [TokenEvent(0, 5)] if request.prompt == [7] else says(TEXT)
        )
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with running_face(self.backend) as face:
            self.endpoint = face.endpoint
            self._ready.set()
            await self._stop.wait()

    def wait_cancelled(self, index: int = 0) -> None:
        """Return when the index-th request has been cancelled."""
        event = self.backend.streams[index].cancelled
        asyncio.run_coroutine_threadsafe(event.wait(), self._loop).result(PATIENCE_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


@pytest.fixture
def face() -> Iterator[FaceThread]:
    thread = FaceThread()
    yield thread
    thread.close()


def num_threads() -> int:
    return sum(thread.name == "kvbaton-client" for thread in threading.enumerate())


def test_the_example_of_the_module_runs(
    face: FaceThread, capsys: pytest.CaptureFixture[str]
) -> None:
    example = (sync_client.__doc__ or "").partition("\n\n")[2]
    assert "tcp://127.0.0.1:5555" in example
    exec(example.replace("tcp://127.0.0.1:5555", face.endpoint), {})
    assert capsys.readouterr().out == TEXT


def test_a_generation_gives_tokens_and_then_how_it_ended(face: FaceThread) -> None:
    with Client(face.endpoint) as client:
        stream = client.generate("def f(", max_tokens=32)
        text = "".join(token.text for token in stream)
    assert text == stream.text == TEXT
    assert stream.finish_reason == "length"
    assert stream.usage is not None
    assert stream.timings is not None
    assert list(stream) == []
    assert num_threads() == 0


def test_several_threads_share_a_client(face: FaceThread) -> None:
    def read(_: int) -> str:
        return "".join(token.text for token in client.generate("x"))

    with Client(face.endpoint) as client, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(40))) == [TEXT] * 40


def test_one_thread_may_read_several_generations_in_turn(face: FaceThread) -> None:
    with Client(face.endpoint) as client:
        streams = [client.generate("x") for _ in range(5)]
        rounds = list(zip(*streams, strict=True))
    assert "".join(tokens[0].text for tokens in rounds) == TEXT


def test_errors_are_raised_where_the_tokens_are_read(face: FaceThread) -> None:
    with Client(face.endpoint) as client:
        with pytest.raises(InvalidRequestError, match="temperature"):
            next(client.generate("x", temperature=-1))
        with pytest.raises(UnprocessableError):
            client.generate("x", seed=2**70)
        with pytest.raises(TypeError, match="no option top"):
            client.generate("x", top=1)  # type: ignore[call-arg]
        assert client.connect().model == "demo"


def test_leaving_the_loop_early_cancels_the_request(face: FaceThread) -> None:
    with Client(face.endpoint) as client:
        for _ in client.generate(token_ids=[7]):
            break
        gc.collect()
        face.wait_cancelled()


def test_cancel_works_from_another_thread(face: FaceThread) -> None:
    with Client(face.endpoint) as client:
        stream = client.generate(token_ids=[7])
        next(stream)
        threading.Thread(target=stream.cancel).start()
        with pytest.raises(CancelledRequestError):
            next(stream)
        face.wait_cancelled()


def test_closing_wakes_the_threads_that_read(face: FaceThread) -> None:
    client = Client(face.endpoint)
    stream = client.generate(token_ids=[7])
    next(stream)
    threading.Thread(target=client.close).start()
    with pytest.raises(ConnectionLostError, match="the client was closed"):
        next(stream)
    client.close()
    for call in (client.connect, lambda: client.generate("x")):
        with pytest.raises(ConnectionLostError, match="the client was closed"):
            call()
    assert num_threads() == 0


def test_a_client_that_is_dropped_closes_itself(face: FaceThread) -> None:
    client = Client(face.endpoint)
    stream = client.generate(token_ids=[7])
    next(stream)
    del client
    gc.collect()
    assert num_threads() == 1  # the generation still needs it
    del stream
    gc.collect()
    assert num_threads() == 0
    face.wait_cancelled()


def test_a_gateway_that_is_not_there_is_reported() -> None:
    client = Client("tcp://127.0.0.1:1", connect_timeout_s=0.05)
    with pytest.raises(ConnectionLostError, match="no welcome from"), client:
        pass
    assert num_threads() == 0


UNTIDY = """
from kvbaton import Client
client = Client({endpoint!r})
stream = client.generate(token_ids=[7])
print(next(stream).token_id)
{ending}
"""


@pytest.mark.parametrize(
    ("ending", "status"), [("", 0), ("raise SystemExit(3)", 3), ("client.close()", 0)]
)
def test_a_program_that_ends_without_closing_ends_cleanly(
    face: FaceThread, ending: str, status: int
) -> None:
    script = UNTIDY.format(endpoint=face.endpoint, ending=ending)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "5\n", "")
    face.wait_cancelled()


def test_the_async_client_runs_under_uvloop(face: FaceThread) -> None:
    async def main() -> list[str]:
        async with AsyncClient(face.endpoint) as client:
            streams = [client.generate("x") for _ in range(5)]
            for stream in streams:
                async for _ in stream:
                    pass
            async for _ in client.generate(token_ids=[7]):
                break
            return [stream.text for stream in streams]

    assert uvloop.run(main()) == [TEXT] * 5
    face.wait_cancelled(5)


def test_the_sync_client_serves_a_program_that_has_a_loop_too(face: FaceThread) -> None:
    async def main() -> str:
        with Client(face.endpoint) as client:
            stream = client.generate("x")
            return await asyncio.to_thread(lambda: "".join(token.text for token in stream))

    assert uvloop.run(main()) == TEXT
