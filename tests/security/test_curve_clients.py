"""The client library with keys: what a wire shows, and what is wrong, in words."""

from __future__ import annotations

import asyncio
import traceback
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import msgspec
import pytest

from kvbaton.client import AsyncClient
from kvbaton.errors import ConnectionLostError, ForbiddenError
from kvbaton.keys import MAX_FILE_BYTES, ClientKey, KeyFileError, client_curve, read_key_file
from scripts.cluster.keys import make_keys
from tests.net.gateways import running_face
from tests.security.curves import keys_of
from tests.unit.gateway_fakes import FakeBackend, says

PROMPT = "the prompt that nobody else may read"
ANSWER = "and what is answered to it, likewise"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("security") / "keys"
    assert make_keys(folder)
    return folder


class Tap:
    """A TCP proxy that keeps all that passes, in both directions."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._pumps: list[asyncio.Task[None]] = []
        self.seen: defaultdict[str, bytes] = defaultdict(bytes)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        async with server:
            yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*self._pumps)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._pumps += [
            asyncio.create_task(self._pump("up", reader, far_writer)),
            asyncio.create_task(self._pump("down", far_reader, writer)),
        ]

    async def _pump(
        self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with closing(writer):
            while data := await reader.read(65536):
                self.seen[way] += data
                writer.write(data)


@pytest.mark.parametrize("secure", [True, False])
async def test_a_capture_shows_prompts_and_answers_only_without_keys(
    folder: Path, secure: bool
) -> None:
    keys = keys_of(folder, "gateway") if secure else None
    backend = FakeBackend(lambda _request: says(ANSWER))
    async with running_face(backend, keys=keys) as face:
        tap = Tap(int(face.endpoint.rpartition(":")[2]))
        async with tap.running() as endpoint:
            client = AsyncClient(endpoint, keys=folder if secure else "")
            tokens = [token.text async for token in client.generate(PROMPT)]
            await client.close()
    assert "".join(tokens) == ANSWER
    assert len(tap.seen["up"]) > len(PROMPT)
    assert len(tap.seen["down"]) > len(ANSWER)
    is_shown = PROMPT.encode() in tap.seen["up"]
    assert is_shown is not secure
    assert any(text.encode() in tap.seen["down"] for text in tokens if len(text) > 2) is not secure


async def test_a_client_is_told_what_is_wrong_with_its_keys(folder: Path, tmp_path: Path) -> None:
    async def reason(endpoint: str, keys: Path | str) -> str:
        client = AsyncClient(endpoint, keys=keys, connect_timeout_s=0.5)
        with pytest.raises((ForbiddenError, ConnectionLostError)) as caught:
            await client.connect()
        await client.close()
        return str(caught.value)

    make_keys(tmp_path / "other")
    ours, others = (
        read_key_file(each / "client.key", ClientKey) for each in (folder, tmp_path / "other")
    )
    unknown = tmp_path / "client.key"
    unknown.touch(0o600)
    known_gateway = msgspec.structs.replace(others, server_key=ours.server_key)
    unknown.write_bytes(msgspec.json.encode(known_gateway))
    do_not_agree = "failed (both must use keys of one cluster, or none)"
    async with running_face(FakeBackend(), keys=keys_of(folder, "gateway")) as face:
        assert "does not know this client's key" in await reason(face.endpoint, unknown)
        assert do_not_agree in await reason(face.endpoint, tmp_path / "other")
        assert do_not_agree in await reason(face.endpoint, "")
    async with running_face(FakeBackend()) as face:
        assert do_not_agree in await reason(face.endpoint, folder)


def test_keys_are_found_by_the_environment_and_only_if_nothing_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = client_curve(folder / "client.key")
    assert expected is not None
    monkeypatch.setenv("KVBATON_KEYS", str(folder))
    assert client_curve(None) == client_curve(folder) == expected
    assert client_curve("") is None
    assert client_curve(None, "admin") == client_curve(folder / "admin.key") != expected
    monkeypatch.delenv("KVBATON_KEYS")
    assert client_curve(None) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o777])
def test_a_key_file_that_is_open_to_others_is_refused_with_its_name_and_mode(
    tmp_path: Path, mode: int
) -> None:
    make_keys(tmp_path / "keys")
    file = tmp_path / "keys" / "client.key"
    file.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"client\.key is open to others \(mode {mode:04o}\)"):
        AsyncClient(keys=tmp_path / "keys")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"secret_key": "very secret"}'])
def test_what_is_no_key_file_is_refused_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "client.key"
    file.touch(0o600)
    file.write_bytes(content)
    with pytest.raises(KeyFileError, match="is no key file of this kind") as caught:
        client_curve(file)
    assert "very secret" not in "".join(traceback.format_exception(caught.value))
    file.write_bytes(bytes(MAX_FILE_BYTES + 1))
    with pytest.raises(KeyFileError, match="more than"):
        client_curve(file)
    with pytest.raises(KeyFileError, match="cannot be read: No such file"):
        client_curve(tmp_path / "missing.key")
