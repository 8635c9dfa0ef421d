"""int8 weights, and activations: how they are rounded, their products, and the engine that computes
with them."""

from __future__ import annotations

import ctypes
import platform
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config import settings_of
from common.engine.linear import LINEARS
from common.engine.model import Matrix
from common.engine.native import library
from common.engine.native.packed import Packed, pack
from common.engine.quantization import QUANTIZATIONS, dequantised, quantise
from common.engine.runner import TorchEngine
from common.worker.config import WorkerConfig
from common.worker.main import make_engine as make_worker_engine
from tests.unit.engine_models import (
    build,
    logits_of,
    make_engine,
    random_tokens,
    reference_logits,
    sequence_kv,
    whole,
)
from tests.unit.native_kernels import CPU_FLAGS, emulated
from tests.unit.test_engine_invariance import same_bits_in_any_company

DTYPES = [torch.float32, torch.bfloat16]
ROWS = (*range(1, 14), 40, 97)
INT8 = ["int8", "w8a8_int8"]


def random_matrix(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(
    weight: Tensor,
    bias: Tensor | None = None,
    quantization: str = "int8",
    kernels: ctypes.CDLL | None = None,
) -> Packed:
    kernels = kernels or library.load_library(threaded=False)
    assert kernels is not None
    (product,) = pack(kernels, [Matrix([weight], weight.dtype, bias)], quantization)
    return product


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_channel_is_rounded_to_steps_of_its_own_scale(dtype: torch.dtype) -> None:
    magnitudes = torch.tensor([1e-30, 1e-3, 1.0, 1e4])
    weight = (random_matrix(0, 4, 65) * magnitudes[:, None]).to(dtype)
    steps, scales = quantise(weight)
    assert steps.dtype is torch.int8
    assert steps.abs().amax(dim=1).tolist() == [127] * 4
    error = (steps * scales[:, None] - weight.float()).abs().amax(dim=1)
    assert (error <= scales * 0.5001).all()
    assert (error > scales * 0.3).all()
    # the largest of each channel stays as it was; what int8 holds already is not rounded again
    largest = weight.abs().amax(dim=1)
    assert torch.equal(dequantised(weight).abs().amax(dim=1), largest)
    assert torch.equal(quantise(steps * scales[:, None])[0], steps)


def test_empty_and_broken_channels_stay_so() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0], [1.0, -0.5]])
    outputs = dequantised(weight).sum(dim=1)
    assert outputs[0] == 0
    assert outputs[1:3].isnan().all()
    assert outputs[3].isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (64, 96), (100, 78), (257, 130)])
def test_products_follow_their_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = random_matrix(1, *shape).to(dtype), random_matrix(2, shape[0]).to(dtype)
    x = random_matrix(3, max(ROWS), shape[1]).to(dtype)
    steps, scales = quantise(weight)
    expected = x.double() @ (steps.double() * scales.double()[:, None]).T + bias.double()
    product = packed(weight, bias)
    tolerance = 2**-7 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(product(x).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (64, 96), (100, 78), (257, 130)])
def test_products_of_rounded_rows_are_exact_but_for_their_scales(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, bias = random_matrix(1, *shape).to(dtype), random_matrix(2, shape[0]).to(dtype)
    x = random_matrix(3, max(ROWS), shape[1]).to(dtype)
    (steps, scales), (x_steps, x_scales) = quantise(weight), quantise(x)
    sums = x_steps.double() @ steps.double().T
    expected = sums * x_scales.double()[:, None] * scales.double() + bias.double()
    product = packed(weight, bias, "w8a8_int8")
    tolerance = 2**-8 if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(product(x).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module", params=["here", "emulated"])
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL | None:
    """As they are compiled here, and as for a processor with an instruction for fours of int8."""
    if request.param == "here":
        return None
    if "avx2" not in CPU_FLAGS:
        pytest.skip("the emulation is in AVX2 or AVX-512")
    return emulated("emulated_int8.h")


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_not_cut_off(sign: int, kernels: ctypes.CDLL | None) -> None:
    """With the excess of unsigned weights they are too large for an int, and wrap twice."""
    length = 70_000
    weight, x = torch.ones(33, length), torch.full((13, length), float(sign))
    y = packed(weight, None, "w8a8_int8", kernels)(x)
    assert y.sub(sign * length).abs().max() < 1e-6 * length


def test_a_row_that_is_not_finite_shows_it_and_spoils_no_other(kernels: ctypes.CDLL | None) -> None:
    x = random_matrix(6, 5, 40)
    x[1, 7], x[3, 0] = float("nan"), float("-inf")
    y = packed(random_matrix(7, 20, 40), None, "w8a8_int8", kernels)(x)
    assert not y[[1, 3]].isfinite().any()
    assert y[[0, 2, 4]].isfinite().all()


def test_sums_are_the_same_whatever_multiplies_int8(kernels: ctypes.CDLL | None) -> None:
    """Of the kernels as they are here and the emulated instruction."""
    for shape in [(1, 1), (33, 7), (100, 78)]:
        weight, x = random_matrix(8, *shape), random_matrix(9, max(ROWS), shape[1])
        expected = packed(weight, None, "w8a8_int8")(x)
        product = packed(weight, None, "w8a8_int8", kernels)
        for rows in ROWS:
            assert torch.equal(product(x[:rows]), expected[:rows])


@pytest.mark.parametrize("quantization", INT8)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_has_the_same_bits_among_any_others(
    dtype: torch.dtype, quantization: str
) -> None:
    """However many rows there are: with int8 weights alone few take int8 as it is, for more a panel
    is widened first."""
    weight, bias = random_matrix(4, 100, 78).to(dtype), random_matrix(10, 100).to(dtype)
    product = packed(weight, bias, quantization)
    x = random_matrix(5, max(ROWS), 78).to(dtype)
    alone = torch.cat([product(row[None]) for row in x])
    for rows in ROWS:
        assert torch.equal(product(x[-rows:].contiguous()), alone[-rows:])


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are x86's")
@pytest.mark.parametrize(
    "flags",
    [("-mno-avx512bf16",), ("-mno-avx512vnni",), ("-march=x86-64-v3",), ("-march=x86-64",)],
)
def test_products_of_lesser_processors_agree(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = library.compile_library("g++", flags=flags)
    monkeypatch.setattr(library, "load_library", lambda threaded: compiled)
    for dtype in DTYPES:
        test_products_follow_their_definition((100, 78), dtype)
        test_products_of_rounded_rows_are_exact_but_for_their_scales((100, 78), dtype)
        for quantization in INT8:
            test_a_row_of_a_product_has_the_same_bits_among_any_others(dtype, quantization)


@pytest.mark.parametrize("attention", ["native", "torch"])
@pytest.mark.parametrize("family", ["llama_odd", "llama_llama3_biased", "qwen3"])
def test_logits_are_those_of_the_rounded_weights(
    family: str, attention: str, tmp_path: Path
) -> None:
    """Every matrix is rounded, a tied head too; embedding and norms are not."""
    model: Any = build(family, tmp_path)
    engine = make_engine(tmp_path, attention=attention, quantization="int8")
    tokens = random_tokens(random.Random(family), 50)
    logits = logits_of(engine, [whole(tokens, range(4))])[0]
    plain = reference_logits(model, tokens)[-1]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name:
                parameter.copy_(dequantised(parameter))
        model.lm_head.weight = torch.nn.Parameter(dequantised(model.lm_head.weight))
        rounded = reference_logits(model, tokens)[-1]
    torch.testing.assert_close(logits, rounded, atol=2e-4, rtol=0)
    assert 1e-3 < (logits - plain).abs().max() < 0.5
    engine.close()


@pytest.mark.parametrize("attention", ["native", "torch"])
@pytest.mark.parametrize("family", ["llama_odd", "qwen3"])
def test_logits_are_those_of_rounded_activations(
    family: str, attention: str, tmp_path: Path
) -> None:
    """What each product takes is rounded. A number between two steps may fall to either, so some
    distance is left, but far less than rounding makes."""
    model: Any = build(family, tmp_path)
    tokens = random_tokens(random.Random(family), 50)
    plain = reference_logits(model, tokens)[-1]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(dequantised(module.weight))
                module.register_forward_pre_hook(
                    lambda _, inputs: dequantised(inputs[0].flatten(0, -2)).view(inputs[0].shape)
                )
        rounded = reference_logits(model, tokens)[-1]
    engine = make_engine(tmp_path, attention=attention, quantization="w8a8_int8")
    logits = logits_of(engine, [whole(tokens, range(4))])[0]
    engine.close()
    made = float((rounded - plain).abs().max())
    assert made > 1e-3
    assert (logits - rounded).abs().max() < made / 5


@pytest.mark.parametrize("quantization", INT8)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_depend_on_the_request_alone(dtype: str, quantization: str, tmp_path: Path) -> None:
    build("llama_odd", tmp_path, getattr(torch, dtype))
    engine = make_engine(tmp_path, batch_invariant=True, quantization=quantization)
    assert same_bits_in_any_company(engine, random.Random(dtype), (1, 7, 32))
    engine.close()


@pytest.mark.parametrize("quantization", INT8)
def test_bits_do_not_depend_on_the_number_of_threads(quantization: str, tmp_path: Path) -> None:
    build("llama", tmp_path, torch.bfloat16)
    tokens = random_tokens(random.Random(6), 100)
    results = []
    for threads in (1, 2):
        engine = make_engine(tmp_path, threads=threads, quantization=quantization)
        logits = logits_of(engine, [whole(tokens, range(7))])
        results.append((logits, sequence_kv(engine, range(7), 100)))
        engine.close()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_every_kind_can_be_set_and_computed_in_torch() -> None:
    setting = settings_of(WorkerConfig)["quantization"]
    assert tuple(setting.field.metadata["choices"]) == tuple(LINEARS) == QUANTIZATIONS


async def test_the_setting_of_a_worker_reaches_its_engine(tmp_path: Path) -> None:
    """Workers share no KV unless they compute alike."""
    build("llama", tmp_path)
    prints = {}
    for quantization in QUANTIZATIONS:
        settings = WorkerConfig(model=str(tmp_path), quantization=quantization)
        engine = await make_worker_engine(settings)
        assert isinstance(engine, TorchEngine)
        prints[quantization] = engine.info.fingerprint
        engine.close()
    assert len(set(prints.values())) == len(QUANTIZATIONS)
    same = make_engine(tmp_path, attention="torch", quantization="int8")
    assert same.info.fingerprint == prints["int8"]
    same.close()
