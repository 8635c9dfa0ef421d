"""What the benchmarks measure is what they say; how fast it is, no test says."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from common.engine.linear import Linear
from common.worker.mover import MESSAGE_BYTES
from scripts.benchmarks.hosts import Done, residue_s
from scripts.benchmarks.limits import by_shape, limit_parts, limits_of, weight_bytes
from scripts.benchmarks.measure import alternate, collect
from scripts.benchmarks.startup import Start, add_memory, read_marks
from scripts.benchmarks.store_handoffs import PureStore, Shape, handoff
from scripts.benchmarks.store_lookups import CachedPrompt


def test_rounds_alternate_and_the_first_is_not_kept() -> None:
    order: list[str] = []

    def part(name: str) -> dict[str, float]:
        order.append(name)
        return {name: len(order)}

    found = collect([lambda: part("a"), lambda: part("b")], 2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"b": [3, 6], "a": [4, 5]}


def test_alternated_parts_are_timed_by_name() -> None:
    seconds = alternate({"one": int, "other": str}, 3)
    assert sorted(seconds) == ["one", "other"]
    assert all(len(times) == 3 and min(times) >= 0 for times in seconds.values())


@pytest.mark.parametrize("shape", [Shape(512, 128), Shape(512, 512), Shape(96, 64)])
def test_a_handoff_has_as_many_messages_as_it_says(shape: Shape) -> None:
    store = PureStore(256, shape)
    num_messages = 0
    steps = handoff(shape, store.ids)
    step = next(steps, None)
    while step is not None:
        answer = store.handle(step.sender, step.message)
        assert isinstance(answer, step.awaits or type(None))
        num_messages += 1 + (answer is not None)
        try:
            step = steps.send(answer)
        except StopIteration:
            step = None
    assert num_messages == shape.num_messages


def test_handoffs_leave_their_blocks_as_cache_and_evict_when_it_is_full() -> None:
    store = PureStore(100, Shape(512, 128))
    store.run(10)
    store.ledger.check()
    counts = store.ledger.pool.counts()
    assert counts["cached"] + counts["free"] == 100
    assert store.ledger.pool.num_indexed == 330
    assert store.ledger.pool.num_evicted >= 230
    assert not store.ledger.handoffs


def test_looking_a_cached_prompt_up_finds_all_of_it_and_changes_nothing() -> None:
    prompt = CachedPrompt(256)
    assert len(prompt.keys) == 16
    before = prompt.pool.counts()
    for part in prompt.parts().values():
        part()
    assert prompt.pool.counts() == before
    assert len(prompt.pool.lookup(prompt.keys)) == 16
    prompt.ledger.check()


def test_limits_are_those_of_the_fastest_way() -> None:
    linears = [Linear(torch.ones(32, 64)), Linear(torch.ones(32, 64)), Linear(torch.ones(64, 32))]
    assert {shape: len(same) for shape, same in by_shape(linears).items()} == {
        "64 x 32": 2, "32 x 64": 1,
    }  # fmt: skip
    parts = limit_parts(linears)
    seconds = {name: [3.0, 2.0, 4.0] for name in parts} | {"another part": [1e-9]}
    seconds["read: dot"] = [1.0, 1.0, 9.0]
    seconds["multiply: 32 x 64"] = [1e-6, 1e-6, 1e-6]
    limits = limits_of(seconds, linears)
    assert (limits.read_by, limits.multiplied_by) == ("dot", "32 x 64")
    assert limits.bytes_per_s == pytest.approx(256 * 2**20)
    assert limits.operations_per_s == pytest.approx(2 * 512 * 32 * 64 * 1e6)
    assert limits.least_s(512 * 2**20, 1.0) == pytest.approx(2.0)
    assert limits.least_s(0.0, 2 * 512 * 32 * 64 * 3e6) == pytest.approx(3.0)
    assert weight_bytes(linears) == 3 * 32 * 64 * 4


def test_a_start_is_cut_into_the_phases_that_workers_log() -> None:
    events = ("torch imported", "weights packed num_layers=2", "model loaded", "self test passed")
    lines = [f"12:00:00 decode.1   {event}\n" for event in (*events, "worker ready x=1")]
    lines += ["waiting: x\n", "12:00:00 kvstore.1  store ready\n", "ready after 7 s\n"]
    start = Start(began_s={"decode": 0.5})
    clock = itertools.count(1)
    read_marks(lines, start, lambda: next(clock))
    assert start.ready_s == 6
    assert list(start.marks) == ["decode"]
    phases = start.phases("decode")
    assert list(phases) == ["launch", "imports", "read and pack", "tokenizer", "self test", "join"]
    assert list(phases.values()) == [0.5, 0.5, 1, 1, 1, 1]
    with pytest.raises(RuntimeError, match="no key"):
        read_marks(["decode.1: no key\n"], Start(), lambda: 0)


def test_memory_of_a_role_is_that_of_its_processes() -> None:
    text = Path("/proc/self/smaps_rollup").read_text()
    one, two = Start(), Start()
    add_memory(one, "keeper", text)
    for _ in range(2):
        add_memory(two, "keeper", text)
    assert 0 < one.memory["keeper"]["private"] <= one.memory["keeper"]["proportional"]
    assert one.memory["keeper"]["proportional"] <= one.memory["keeper"]["resident"]
    assert two.memory["keeper"] == {kind: 2 * size for kind, size in one.memory["keeper"].items()}


def test_the_residue_is_what_the_links_have_not_carried_when_prefill_ends() -> None:
    chunks = [Done(number + 1.0, 10 * MESSAGE_BYTES) for number in range(3)]
    # Both links keep up: the last chunk is left, and behind its last message the second link.
    assert residue_s(chunks, 100 * MESSAGE_BYTES, MESSAGE_BYTES) == pytest.approx(0.11)
    assert residue_s(chunks, 100 * MESSAGE_BYTES, 10 * MESSAGE_BYTES) == pytest.approx(0.2)
    # They take 2 s for what is computed in 1 s: 6 s and one message after the first chunk.
    found = residue_s(chunks, 5 * MESSAGE_BYTES, MESSAGE_BYTES)
    assert found == pytest.approx(1.0 + 6.0 + 0.2 - 3.0)
    assert residue_s([], 1.0, 1) == 0.0
