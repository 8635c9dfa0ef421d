"""The kernels' way for processors that multiply bfloat16, on those that do not: emulated."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import pytest
import torch

from common.engine.model import Matrix
from common.engine.native import library
from common.engine.native.packed import pack
from common.engine.quantization import dequantised
from tests.unit.engine_models import build, logits_of, make_engine, part, random_tokens, whole
from tests.unit.native_kernels import CPU_FLAGS, emulated

pytestmark = pytest.mark.skipif(
    not {"avx512f", "avx512vl", "avx512bw"} <= set(CPU_FLAGS),
    reason="this processor has no AVX-512",
)


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated("emulated_bfloat16.h")


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (33, 65), (100, 78)])
def test_products_follow_their_definition(
    shape: tuple[int, int], int8: bool, kernels: ctypes.CDLL
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).bfloat16()
    bias = torch.randn(shape[0], generator=generator).bfloat16()
    quantization = "int8" if int8 else "none"
    (product,) = pack(kernels, [Matrix([weight], torch.bfloat16, bias)], quantization)
    kept = dequantised(weight.float()) if int8 else weight
    for rows in (1, 2, 3, 11, 12, 13, 40):
        x = torch.randn(rows, shape[1], generator=generator).bfloat16()
        expected = x.double() @ kept.double().T + bias.double()
        torch.testing.assert_close(product(x).double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("family", ["llama_odd", "qwen3"])
def test_steps_agree_with_torch(
    family: str, kernels: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many queries at once, as panels, then one: both ways of attention, of which both give what
    the kernels without bfloat16 products give, but for its rounding."""
    build(family, tmp_path, torch.bfloat16)
    tokens = random_tokens(random.Random(1), 131)
    works = [part(tokens, range(9), 0, 130)], [whole(tokens, range(9), 130)]
    found = {}
    for name in ("torch", "native", "emulated"):
        if name == "emulated":
            monkeypatch.setattr(library, "load_library", lambda threaded: kernels)
        engine = make_engine(tmp_path, attention="torch" if name == "torch" else "native")
        engine.step_sync(works[0])
        found[name] = logits_of(engine, works[1])
        engine.close()
    torch.testing.assert_close(found["emulated"], found["torch"], atol=0.1, rtol=0)
    if "avx512_bf16" not in CPU_FLAGS:
        assert not torch.equal(found["emulated"], found["native"])
