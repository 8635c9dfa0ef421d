"""The element-wise layers: native ones against torch's, and both against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.engine.attention import make_layers
from common.engine.config import RopeConfig
from common.engine.kv_cache import TORCH_DTYPES, KvCache, dequantised_rows, quantised_rows
from common.engine.layers import Layers, Placement
from common.engine.native.layers import NativeLayers
from common.engine.rotary import rotary_tables
from common.kv.layout import KvLayout

EPS = 1e-5
DTYPES = ["float32", "bfloat16"]
ROPE = RopeConfig(10000.0, "default", 1.0, 1.0, 1.0, 512)


def layers(name: str) -> Layers:
    made = make_layers(name, EPS, fixed_order=True)
    assert isinstance(made, NativeLayers) == (name == "native")
    return made


def random_rows(dtype: str, *shape: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(TORCH_DTYPES[dtype])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within rounding: a few units in the last place of bfloat16, or of float32."""
    tolerance = 2**-6 if actual.dtype is torch.bfloat16 else 2e-6
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("width", [1, 7, 8, 12, 64, 78, 576])
def test_rms_norm_follows_its_definition(name: str, dtype: str, width: int) -> None:
    x, weight = random_rows(dtype, 5, width), random_rows(dtype, width)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert_close(layers(name).rms_norm(x, weight), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("inner", [1, 7, 100, 704])
def test_swiglu_follows_its_definition(name: str, dtype: str, inner: int) -> None:
    gate_up = random_rows(dtype, 5, 2 * inner, scale=6.0)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(layers(name).swiglu(gate_up.clone()), gate * gate.sigmoid() * up)


def test_swiglu_of_very_large_gates_is_finite() -> None:
    gates = [-1e30, -200.0, -90.0, 0.0, 90.0, 1e30]
    result = layers("native").swiglu(torch.tensor([gates + [1.0] * 6]))
    expected = [0.0, 0.0, 0.0, 0.0, 90.0, 1e30]
    torch.testing.assert_close(result, torch.tensor([expected]), atol=1e-5, rtol=1e-6)
    assert layers("native").swiglu(torch.tensor([[float("nan"), 1.0]])).isnan().all()


def placed(
    name: str,
    dtype: str,
    head_dim: int,
    normed: bool,
    *,
    kv_dtype: str | None = None,
    values: dict[int, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """qkv after place(), and the KV blocks, for 5 rows of which the last 2 are padding.

    `values` are all the numbers of some rows' values.
    """
    layout = KvLayout(
        num_layers=2, num_kv_heads=2, head_dim=head_dim, block_size=4, dtype=kv_dtype or dtype
    )
    cache = KvCache(layout, memoryview(bytearray(4 * layout.block_bytes)))
    qkv = random_rows(dtype, 5, 6 + 2 * 2, head_dim)
    for row, value in (values or {}).items():
        qkv[row, 8:] = value
    norm = random_rows(dtype, 8, head_dim) if normed else None
    cos, sin = rotary_tables(ROPE, head_dim, 400, TORCH_DTYPES[dtype])
    positions = torch.tensor([0, 7, 390, 0, 0])
    slots, offsets = torch.tensor([3, 0, 3]), torch.tensor([1, 3, 2])
    placement = Placement(3, cos[positions], sin[positions], slots, offsets)
    layers(name).place(qkv, norm, placement, cache, 1)
    return qkv, cache.blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 12, 64])
@pytest.mark.parametrize("normed", [False, True])
def test_both_kinds_place_alike(dtype: str, head_dim: int, normed: bool) -> None:
    native, torchs = (placed(name, dtype, head_dim, normed) for name in ("native", "torch"))
    assert_close(native[0][:3], torchs[0][:3])
    assert_close(native[1], torchs[1])
    assert torch.equal(native[1] != 0, torchs[1] != 0)
    # what was stored is what the step attends with, to the bit
    keys_values = native[0][:3, 6:].view(3, 2, 2, head_dim)
    stored = native[1][[3, 0, 3], 1, :, :, [1, 3, 2]]
    assert torch.equal(stored, keys_values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 12, 64])
@pytest.mark.parametrize("name", ["native", "torch"])
def test_both_kinds_round_to_int8_alike(name: str, head_dim: int, dtype: str) -> None:
    """A row of zeros and one with NaN among them."""
    broken = {1: 0.0, 2: float("nan")}
    qkv, blocks = placed(name, dtype, head_dim, normed=False, kv_dtype="int8", values=broken)
    stored = blocks[[3, 0, 3], 1, :, :, [1, 3, 2]]
    expected = quantised_rows(qkv[:3, 6:].view(3, 2, 2, head_dim))
    assert torch.equal(stored[..., :head_dim], expected[..., :head_dim])
    scales = [rows[..., head_dim:].contiguous().view(torch.float32) for rows in (stored, expected)]
    torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
    assert dequantised_rows(stored[2, 1]).isnan().all()
    assert (dequantised_rows(stored[1, 1]) == 0).all()


def test_the_rotation_turns_by_the_position() -> None:
    """Pairs (x[i], x[i + half]) turn by position * theta ** (-2 i / head_dim)."""
    qkv, _ = placed("native", "float32", 12, normed=False)
    before = random_rows("float32", 5, 10, 12).double()
    angles = 390 * 10000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    first, second = before[2, :8].chunk(2, dim=-1)
    expected = torch.cat(
        (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ),
        dim=-1,
    )
    torch.testing.assert_close(qkv[2, :8].double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(qkv[2, 8:].double(), before[2, 8:])
