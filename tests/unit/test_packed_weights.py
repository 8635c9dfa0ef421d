"""Products of packed weights by their definition, and the file in which workers share them."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest
import torch

from common.engine.model import Matrix
from common.engine.native import shared_file
from common.engine.native.library import load_library
from common.engine.native.packed import Packed, pack
from common.engine.native.shared_file import shared_bytes

DTYPES = [torch.float32, torch.bfloat16]


def packed(matrix: Matrix) -> Packed:
    library = load_library(threaded=False)
    assert library is not None
    (product,) = pack(library, [matrix], filled)
    return product


def filled(num_bytes: int, fill: shared_file.Fill) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes)
    fill(memory)
    return memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (32, 64), (33, 65), (100, 78), (257, 12)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_follow_their_definition(
    shape: tuple[int, int], dtype: torch.dtype, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]
    bias = torch.randn(2 * shape[0], generator=generator).to(dtype) if with_bias else None
    product = packed(Matrix(parts, dtype, bias))
    for rows in (1, 2, 3, 5, 11, 12, 13, 40, 100):
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        expected = x.double() @ torch.cat(parts).double().T
        if bias is not None:
            expected += bias.double()
        tolerance = 2**-7 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            product(x).double(), expected, rtol=tolerance, atol=shape[1] ** 0.5 * tolerance
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    product = packed(Matrix([torch.randn(100, 78).to(dtype)], dtype))
    x = torch.randn(200, 78).to(dtype)
    whole = product(x)
    for first, last in ((0, 1), (3, 8), (11, 13), (17, 150), (199, 200)):
        assert torch.equal(product(x[first:last].contiguous()), whole[first:last])


def digits(memory: mmap.mmap) -> None:
    memory.write(b"0123456789")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shared_file, "_WORTH_BYTES", 0)
    return tmp_path / "kvbaton"


def test_bytes_are_made_once_and_mapped_by_all(folder: Path) -> None:
    made: list[int] = []

    def fill(memory: mmap.mmap) -> None:
        made.append(threading.get_ident())
        memory[:] = b"x" * len(memory)

    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(shared_bytes("key", 9000, fill)[:]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"x" * 9000] * 4
    assert len(made) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["key.lock", "key.packed"]


def test_what_a_mapping_is_made_to_hold_is_its_own(folder: Path) -> None:
    first = shared_bytes("key", 10, digits)
    first[0:1] = b"x"
    second = shared_bytes("key", 10, lambda memory: pytest.fail("made again"))
    assert second[:] == b"0123456789"


def test_a_file_that_was_not_finished_is_not_used(folder: Path) -> None:
    def fail(memory: mmap.mmap) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared_bytes("key", 10, fail)
    assert [path.name for path in folder.iterdir()] == ["key.lock"]
    (folder / "key.packed").write_bytes(b"short")
    assert shared_bytes("key", 10, digits)[:] == (b"0123456789")


def test_without_a_folder_bytes_are_private(folder: Path) -> None:
    folder.write_text("no folder")
    assert shared_bytes("key", 10, digits)[:] == (b"0123456789")


def test_what_was_used_longest_ago_goes_first(folder: Path) -> None:
    for number in range(6):
        shared_bytes(f"key{number}", 10, lambda memory: None)
        os.utime(folder / f"key{number}.packed", (number, number))
    shared_bytes("key6", 10, lambda memory: None)
    kept = sorted(path.stem for path in folder.glob("*.packed"))
    assert kept == ["key3", "key4", "key5", "key6"]
