"""Workers that compute in a device's memory: the same cluster, under the same load and faults."""

from __future__ import annotations

import asyncio

import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from common.engine.work import Engine
from common.worker.config import WorkerConfig
from common.worker.device_mover import DeviceMover
from services.decode.worker import DecodeRole
from tests.sim import scenario
from tests.sim.cluster import Shape, SimCluster, output_of, simulate
from tests.sim.device import DeviceMockEngine, MockDevice
from tests.sim.test_cluster_in_memory import serve_at_random
from tests.sim.world import World

BLOCK = MOCK_LAYOUT.block_size
SHAPES = {
    "shm": {},
    "zmq": {"mover": "zmq"},
    "mixed": {"num_decode": 2, "movers": ("zmq", "auto"), "hosts": ("host", "host", "elsewhere")},
    "colocated": {"num_prefill": 0, "mode": "colocated"},
    "short_of_blocks": {"num_blocks": 48, "worker": {"max_num_seqs": 8}},
}


def shape_of(name: str, num_blocks: int = 0, neighbours: list[MockDevice] | None = None) -> Shape:
    """`num_blocks` in each worker's pool, or as many as its arena has. With `neighbours`, which is
    empty, all are on one GPU."""

    def engine(config: WorkerConfig) -> Engine:
        step_s, token_s = config.mock_step_ms / 1000, config.mock_token_ms / 1000
        return DeviceMockEngine(step_s, token_s, num_blocks, neighbours)

    return Shape(engine=engine, **SHAPES[name])  # type: ignore[arg-type]


def devices(cluster: SimCluster) -> list[DeviceMockEngine]:
    engines = [worker._engine for worker in cluster.workers]
    assert all(isinstance(engine, DeviceMockEngine) for engine in engines)
    return engines  # type: ignore[return-value]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_blocks", [0, 40])
def test_tokens_are_right_and_nothing_stays_unsaved(name: str, num_blocks: int) -> None:
    async def main() -> None:
        async with SimCluster(World(1), shape_of(name, num_blocks)) as cluster:
            await serve_at_random(cluster, 25)
            await cluster.settle()
            for engine in devices(cluster):
                assert engine.device is not None
                assert engine.device.residency.unsaved() == []

    simulate(main())


@pytest.mark.parametrize("name", SHAPES)
def test_on_one_gpu_blocks_come_from_the_other_workers_memory(name: str) -> None:
    async def main() -> None:
        gpu: list[MockDevice] = []
        async with SimCluster(World(1), shape_of(name, 24, gpu)) as cluster:
            await serve_at_random(cluster, 25)
            await cluster.settle()
            num_told = sum(worker.counts().num_neighbour_blocks for worker in cluster.workers)
            assert num_told == sum(device.num_from_neighbours for device in gpu)
            assert (num_told > 0) is (name != "colocated" or len(cluster.workers) > 1)

    simulate(main())


def test_a_conversation_goes_on_from_blocks_that_another_worker_wrote() -> None:
    async def main() -> None:
        async with SimCluster(World(1), shape_of("shm")) as cluster:
            prompt = [7] * (6 * BLOCK + 5)
            first = await output_of(cluster.submit(prompt, 40))
            assert first == mock_output(prompt, 40)
            turn = [*prompt, *first, 9, 9]
            stream = cluster.submit(turn, 3)
            assert await output_of(stream) == mock_output(turn, 3)
            assert stream.num_cached_tokens >= 8 * BLOCK
            (decode,) = cluster.of_role(DecodeRole)
            (mover,) = (store.mover for store in decode.stores)
            assert isinstance(mover, DeviceMover)
            assert mover.num_bytes_moved > 6 * MOCK_LAYOUT.block_bytes

    simulate(main())


def test_a_worker_that_leaves_hands_on_what_only_its_device_had() -> None:
    async def main() -> None:
        shape = shape_of("shm")
        shape.num_decode = 2
        async with SimCluster(World(3), shape) as cluster:
            prompts = [[number] * (2 * BLOCK + 3) for number in range(5, 11)]
            streams = [cluster.submit(prompt, 60) for prompt in prompts]
            outputs = [asyncio.ensure_future(output_of(stream)) for stream in streams]
            await asyncio.sleep(0.15)
            leaving = cluster.of_role(DecodeRole)[0]
            assert any(sequence.num_outputs for sequence in leaving.role.sequences())
            assert await cluster.drain(leaving)
            expected = [mock_output(prompt, 60) for prompt in prompts]
            assert await asyncio.gather(*outputs) == expected
            await cluster.settle()

    simulate(main())


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("mode", scenario.MODES)
@pytest.mark.parametrize("seed", range(3))
def test_under_faults(seed: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with_faults(seed, mode, None, monkeypatch)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("mode", scenario.MODES)
def test_on_one_gpu_under_faults(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[MockDevice] = []
    for seed in range(3):
        gpu: list[MockDevice] = []
        run_with_faults(seed, mode, gpu, monkeypatch)
        devices += gpu
    assert sum(device.num_from_neighbours for device in devices) > 0


def run_with_faults(
    seed: int, mode: str, gpu: list[MockDevice] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = scenario.draw(seed, mode)
    plan.shape.engine = shape_of("shm", neighbours=gpu).engine
    with monkeypatch.context() as drawn:
        drawn.setattr(scenario, "draw", lambda *_: plan)
        report = scenario.run_seed(seed, mode)
    assert report.broken == [], report.line()
