"""Products of packed weights by their definition."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from common.engine.loading import load_engine
from common.engine.model import Matrix
from common.engine.native.library import compile_library, load_library
from common.engine.native.packed import Packed, pack
from scripts.make_model import make_model
from tests.unit.native_kernels import CPU_FLAGS

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=["all", "sixteen"])
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """As they are compiled here, and as for an x86 processor with 16 registers of 256 bits."""
    if request.param == "sixteen":
        if "avx512f" not in CPU_FLAGS:
            pytest.skip("this processor has no others")
        return compile_library("g++", flags=("-mno-avx512f",))
    library = load_library(threaded=False)
    assert library is not None
    return library


def packed(matrix: Matrix, library: ctypes.CDLL | None = None) -> Packed:
    library = library or load_library(threaded=False)
    assert library is not None
    (product,) = pack(library, [matrix])
    return product


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (32, 64), (33, 65), (100, 78), (257, 12)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_follow_their_definition(
    shape: tuple[int, int], dtype: torch.dtype, with_bias: bool, kernels: ctypes.CDLL
) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]
    bias = torch.randn(2 * shape[0], generator=generator).to(dtype) if with_bias else None
    product = packed(Matrix(parts, dtype, bias), kernels)
    for rows in (1, 2, 3, 4, 6, 7, 11, 12, 13, 40, 100):
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        expected = x.double() @ torch.cat(parts).double().T
        if bias is not None:
            expected += bias.double()
        tolerance = 2**-7 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            product(x).double(), expected, rtol=tolerance, atol=shape[1] ** 0.5 * tolerance
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it(
    dtype: torch.dtype, kernels: ctypes.CDLL
) -> None:
    product = packed(Matrix([torch.randn(100, 78).to(dtype)], dtype), kernels)
    x = torch.randn(200, 78).to(dtype)
    whole = product(x)
    for first, last in ((0, 1), (3, 8), (5, 9), (11, 13), (17, 150), (199, 200)):
        assert torch.equal(product(x[first:last].contiguous()), whole[first:last])


def test_a_matrix_may_begin_at_any_number_of_its_file() -> None:
    numbers = torch.randn(1 + 64 * 32).bfloat16()
    parts = [numbers[begin:][: 64 * 32].view(64, 32) for begin in (0, 1)]
    x = torch.randn(3, 32).bfloat16()
    for part in parts:
        expected = packed(Matrix([part.clone()], torch.bfloat16))(x)
        assert torch.equal(packed(Matrix([part], torch.bfloat16))(x), expected)


def test_what_was_packed_is_let_go(tmp_path: Path) -> None:
    """Only the embedding is used where it lies: of two mappings of the file one is left."""
    engine = load_engine(make_model(tmp_path, dtype="bfloat16"), device="cpu")
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert sum(str(tmp_path) in line for line in mapped) == 1
    engine.close()


def test_packed_weights_may_have_huge_pages() -> None:
    """Linux gives them to private memory; to shared memory, by default, never."""
    product = packed(Matrix([torch.randn(64, 64)], torch.float32))
    address = product.product.weights
    for line in Path("/proc/self/maps").read_text().splitlines():
        (begin, end), permissions = line.split()[0].split("-"), line.split()[1]
        if int(begin, 16) <= address < int(end, 16):
            assert permissions == "rw-p"
            return
    pytest.fail("its memory is not mapped")
