"""What `pip install kvbaton` brings: the client, light enough for any program, and nothing else."""

from __future__ import annotations

import email
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOREIGN = ["torch", "numpy", "structlog", "uvloop", "starlette", "common", "services", "scripts"]

IMPORT_WITH_NOTHING_ELSE = f"""
import sys
for name in {FOREIGN}:
    sys.modules[name] = None  # importing it raises ImportError
import asyncio
from kvbaton import AsyncClient, Client
from kvbaton.errors import ConnectionLostError
client = Client("tcp://127.0.0.1:1", connect_timeout_s=0.01)
try:
    next(client.generate("x"))
except ConnectionLostError:
    print("no gateway")
client.close()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_client_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packaged = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "kvbaton").rglob("*.py")}
    assert packaged == sources | {"kvbaton/py.typed"}


def test_the_wheel_needs_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">=")[0] for line in required} == {"pyzmq", "msgpack", "msgspec"}
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_client_works_where_nothing_else_is_installed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_WITH_NOTHING_ELSE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "no gateway\n", "")


def test_messages_bring_no_sockets_with_them() -> None:
    script = "import sys, kvbaton.protocol, kvbaton.errors; print('zmq' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.long
def test_the_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Fetches the three packages from the package index."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True, cwd=tmp_path)
    done = subprocess.run(
        [python, "-c", IMPORT_WITH_NOTHING_ELSE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "no gateway\n"
