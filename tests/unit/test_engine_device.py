"""The engine whose KV is not the arena itself, with the CPU as its device, against the one that
computes in the arena."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine.config import ModelError
from common.engine.cuda.engine import DeviceEngine
from common.engine.cuda.layers import CompiledLayers, make_device_layers
from common.engine.cuda.residency import PoolFullError
from common.engine.layers import TorchLayers
from common.engine.loading import load_engine
from common.engine.runner import TorchEngine
from common.engine.sampler import NumericalError
from common.engine.work import Sampled, Work
from common.kv.hashing import KEY_BYTES
from kvbaton.sampling import SamplingParams
from tests.unit.engine_models import GREEDY, NUM_BLOCKS, build, make_engine, random_tokens, whole
from tests.unit.neighbours_world import HostSharing


def make_device_engine(folder: Path, num_blocks: int = 0, **options: Any) -> DeviceEngine:
    """With `num_blocks` in its pool, or as many as its arena has."""
    engine = DeviceEngine(folder, device="cpu", **options)
    block_bytes = engine.info.layout.block_bytes
    engine._device_kv_bytes = num_blocks * block_bytes
    engine.attach(memoryview(bytearray(NUM_BLOCKS * block_bytes)))
    return engine


@pytest.mark.parametrize("family", ["llama", "mistral", "llama_odd"])
def test_it_computes_what_the_engine_in_the_arena_computes(family: str, tmp_path: Path) -> None:
    build(family, tmp_path)
    plain, device = make_engine(tmp_path), make_device_engine(tmp_path)
    assert device.info.layout == plain.info.layout
    assert device.info.fingerprint == plain.info.fingerprint
    rng = random.Random(1)
    prompts = [random_tokens(rng, length) for length in (1, 16, 40, 70)]
    params = SamplingParams(temperature=0.7, seed=5, logprobs=2, prompt_logprobs=1)

    def run(engine: TorchEngine) -> list[object]:
        seen: list[object] = []
        texts = [list(prompt) for prompt in prompts]
        starts = [0] * len(texts)
        for _ in range(6):
            works = [
                Work(
                    text, 1, start, len(text) - start, range(9 * index, 9 * index + 9),
                    params if index == 2 else GREEDY,
                    prompt_logprobs=1 if index == 3 and not start else None,
                )
                for index, (text, start) in enumerate(zip(texts, starts, strict=True))
            ]  # fmt: skip
            for index, sampled in enumerate(engine.step_sync(works)):
                assert sampled is not None
                starts[index] = len(texts[index])
                texts[index].append(sampled.token_id)
                seen.append(sampled.token_id)
        return seen

    assert run(device) == run(plain)
    plain.close()
    device.close()


def test_one_goes_on_from_what_the_other_has_on_the_same_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path)
    monkeypatch.setattr("common.engine.cuda.memory.default_folder", lambda: tmp_path / "pools")
    monkeypatch.setattr(DeviceEngine, "_make_sharing", lambda _: HostSharing)
    alone = make_device_engine(tmp_path)
    block_bytes, size = alone.info.layout.block_bytes, alone.info.layout.block_size
    arena = memoryview(bytearray(NUM_BLOCKS * block_bytes))
    prefill, decode = (DeviceEngine(tmp_path, device="cpu") for _ in range(2))
    prefill.attach(arena)
    decode.attach(arena)
    text = random_tokens(random.Random(2), 3 * size)
    named = {slot: bytes([slot]) * KEY_BYTES for slot in (1, 2, 3)}
    assert prefill._follower is not None
    assert decode._follower is not None

    (first,) = prefill.step_sync([whole(text, [1, 2, 3])])
    prefill._follower.save_sync(named)
    arena[:] = b"\xff" * len(arena)  # NaN: none of it is read
    assert decode._follower.fetch_sync(named) == (3, 3)
    assert first is not None
    after = [*text, first.token_id]
    (second,) = decode.step_sync([whole(after, [1, 2, 3, 4], len(text))])

    assert alone.step_sync([whole(text, [1, 2, 3])]) == [first]
    assert alone.step_sync([whole(after, [1, 2, 3, 4], len(text))]) == [second]
    for engine in (alone, prefill, decode):
        engine.close()


def test_an_engine_that_is_attached_anew_lets_go_of_its_first_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path)
    pools = tmp_path / "pools"
    monkeypatch.setattr("common.engine.cuda.memory.default_folder", lambda: pools)
    monkeypatch.setattr(DeviceEngine, "_make_sharing", lambda _: HostSharing)
    engine = DeviceEngine(tmp_path, device="cpu")
    for _ in range(2):  # a worker's self test, and then its stores
        engine.attach(memoryview(bytearray(engine.info.layout.block_bytes)))
        assert len(list(pools.iterdir())) == 1
    engine.close()
    assert list(pools.iterdir()) == []


def test_a_step_that_does_not_fit_the_pool_is_run_in_parts(tmp_path: Path) -> None:
    build("llama", tmp_path)
    roomy, tight = make_device_engine(tmp_path), make_device_engine(tmp_path, 3)
    texts = [[5 + index] * 20 for index in range(4)]

    def run(engine: DeviceEngine, start: int) -> list[Sampled | None]:
        slots = [[2 * index, 2 * index + 1] for index in range(4)]
        works = [
            whole([*text, *[9] * (start > 0)], table, start)
            for text, table in zip(texts, slots, strict=True)
        ]
        return engine.step_sync(works)

    for start in (0, 20):
        assert run(tight, start) == run(roomy, start)
    with pytest.raises(PoolFullError, match="--device-kv-bytes"):
        tight.step_sync([whole([5] * 60, range(20, 24))])
    roomy.close()
    tight.close()


def test_an_engine_goes_on_after_a_step_that_failed(tmp_path: Path) -> None:
    build("llama", tmp_path)
    engine = make_device_engine(tmp_path, 4)
    for _ in range(5):
        engine._cache.blocks.fill_(float("nan"))  # type: ignore[union-attr]
        engine.device_memory.forget([1, 2])  # type: ignore[union-attr]
        engine.model._norm.fill_(float("nan"))
        with pytest.raises(NumericalError, match="not finite"):
            engine.step_sync([whole(range(1, 20), [1, 2])])
    engine.model._norm.fill_(1.0)
    assert engine.step_sync([whole(range(1, 20), [1, 2])]) != [None]
    engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "device 'cuda': torch finds no GPU"),
        ({"device": "cpu", "batch_invariant": True}, "batch_invariant is not supported on CUDA"),
        ({"device": "cpu", "kv_cache_dtype": "int8"}, "kv_cache_dtype on CUDA can only be auto"),
        ({"device": "cpu", "attention": "native"}, "attention 'native' is not for CUDA"),
    ],
)
def test_settings_that_a_device_cannot_serve_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    build("llama", tmp_path)
    with pytest.raises(ModelError, match=message):
        DeviceEngine(tmp_path, **options)


def test_a_pool_of_no_block_is_refused(tmp_path: Path) -> None:
    build("llama", tmp_path)
    engine = DeviceEngine(tmp_path, device="cpu", device_kv_bytes=5)
    with pytest.raises(ModelError, match="device_kv_bytes must be at least a block"):
        engine.attach(memoryview(bytearray(engine.info.layout.block_bytes)))
    engine.close()


def test_without_a_gpu_auto_is_the_cpu(tmp_path: Path) -> None:
    build("llama", tmp_path)
    engine = load_engine(tmp_path)
    assert type(engine) is TorchEngine
    assert engine.device_memory is None
    engine.close()
    with pytest.raises(ModelError, match="torch finds no GPU"):
        load_engine(tmp_path, device="cuda")


def test_layers_are_fused_on_a_gpu_alone() -> None:
    assert type(make_device_layers(1e-5, torch.device("cpu"))) is TorchLayers


@pytest.mark.long
@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler does not quote its own path")
@pytest.mark.filterwarnings("ignore")
def test_fused_layers_round_a_little_less() -> None:
    torch.manual_seed(0)
    plain, fused = TorchLayers(1e-5, fixed_order=False), CompiledLayers(1e-5)
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(64).bfloat16()
    close: dict[str, Any] = {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(fused.rms_norm(x, weight), plain.rms_norm(x, weight), **close)
    torch.testing.assert_close(fused.swiglu(x), plain.swiglu(x), **close)
    qkv = torch.randn(5, 8, 16).bfloat16()
    cos, sin, norm = torch.randn(5, 16), torch.randn(5, 16), torch.randn(6, 16)
    other = qkv.clone()
    for layers, rows in ((plain, qkv), (fused, other)):
        layers.turn(rows[:, :6], norm.bfloat16(), cos.bfloat16(), sin.bfloat16())
    torch.testing.assert_close(other, qkv, **close)
