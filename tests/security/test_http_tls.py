"""HTTPS with a certificate made here, and the files that are refused."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from common.config import StartError
from services.gateway.http.access import HttpAccess, load_access, tls_context
from tests.security.http_keys import ASK, FakeClock
from tests.unit.gateway_fakes import FakeBackend, running_face, says

OPENSSL = shutil.which("openssl")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    if OPENSSL is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
    name = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(
        [OPENSSL, "req", "-x509", *curve, *name, *files], check=True, capture_output=True
    )
    key.chmod(0o600)
    return cert, key


async def test_a_client_that_trusts_the_certificate_is_served(pair: tuple[Path, Path]) -> None:
    backend = FakeBackend(lambda _request: says("one two"))
    trust = ssl.create_default_context(cafile=str(pair[0]))
    access = HttpAccess(tls=tls_context(*pair))
    async with running_face(backend, access=access) as face:
        url = f"https://127.0.0.1:{face.port}"
        async with httpx.AsyncClient(base_url=url, verify=trust) as client:
            response = await client.post("/v1/completions", json={**ASK, "stream": True})
        assert response.status_code == 200
        assert response.text.endswith("data: [DONE]\n\n")
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ConnectError):  # it does not trust the certificate
                await client.get(url + "/health")
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(f"http://127.0.0.1:{face.port}/health")


async def test_old_versions_of_tls_are_refused(pair: tuple[Path, Path]) -> None:
    assert tls_context(*pair).minimum_version == ssl.TLSVersion.TLSv1_2
    async with running_face(FakeBackend(), access=HttpAccess(tls=tls_context(*pair))) as face:
        for version, is_served in (("-tls1_1", False), ("-tls1_2", True)):
            client = await asyncio.create_subprocess_exec(
                str(OPENSSL), "s_client", version, "-cipher", "ALL:@SECLEVEL=0",
                "-connect", f"127.0.0.1:{face.port}",
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            output, _ = await client.communicate()
            assert (b"BEGIN CERTIFICATE" in output) is is_served


def test_a_key_that_is_open_to_others_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = pair
    loose = tmp_path / "key.pem"
    shutil.copy(key, loose)
    loose.chmod(0o644)
    with pytest.raises(StartError, match=r"--tls-key .* open to others \(mode 644\)"):
        tls_context(cert, loose)


def test_files_that_are_no_pair_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = pair
    other = tmp_path / "other.pem"
    other.write_text("nonsense")
    other.chmod(0o600)
    with pytest.raises(StartError, match="--tls-cert"):
        tls_context(cert, other)
    with pytest.raises(StartError, match="--tls-cert"):
        tls_context(other, key)
    with pytest.raises(StartError, match=r"none\.pem"):
        tls_context(cert, tmp_path / "none.pem")


def test_an_encrypted_key_is_refused_without_asking(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    assert OPENSSL is not None
    locked = tmp_path / "locked.pem"
    command = ["ec", "-in", str(pair[1]), "-out", str(locked), "-aes128", "-passout", "pass:word"]
    subprocess.run([OPENSSL, *command], check=True, capture_output=True)
    locked.chmod(0o600)
    with pytest.raises(StartError, match="the key is encrypted"):
        tls_context(pair[0], locked)


def test_certificate_and_key_go_together() -> None:
    for given in ({"tls_cert": "a", "tls_key": ""}, {"tls_cert": "", "tls_key": "a"}):
        with pytest.raises(StartError, match="go together"):
            load_access(host="::1", api_keys="", open_http=False, clock=FakeClock(), **given)
