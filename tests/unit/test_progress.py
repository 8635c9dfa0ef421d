"""What a worker tells of a sequence, in times before the message."""

from __future__ import annotations

import msgspec

from common.messages import MAX_CHUNKS, WorkReport
from common.worker.progress import Progress


def test_times_are_counted_back_from_the_message() -> None:
    progress = Progress(joined_at=10.5)
    progress.step(11.0, 11.25, 64, 100)
    progress.step(11.5, 12.0, 36, 36)
    report = progress.report(12.5, arrived_at=10.0, num_moved=3, block_bytes=1000)
    assert (report.arrived_ms, report.joined_ms, report.suspended_ms) == (2500, 2000, 0)
    assert [(c.started_ms, c.ended_ms, c.num_tokens) for c in report.chunks] == [
        (1500, 1250, 64),
        (1000, 500, 36),
    ]
    assert [chunk.num_batched_tokens for chunk in report.chunks] == [100, 36]


def test_blocks_that_came_after_prefill_was_done_are_late() -> None:
    progress = Progress(joined_at=1.0, num_blocks_before=2, num_early_blocks=5)
    report = progress.report(2.0, arrived_at=0.0, num_moved=8, block_bytes=1000)
    assert (report.num_early_bytes, report.num_late_bytes) == (5000, 1000)


def test_of_many_steps_neighbours_become_one_and_nothing_is_lost() -> None:
    progress = Progress(joined_at=1.0)
    num_steps = 1000
    for number in range(num_steps):
        progress.step(1.0 + number, 1.5 + number, 7, 9)
    report = progress.report(2000.0, arrived_at=0.0, num_moved=0, block_bytes=1000)
    chunks = report.chunks
    assert MAX_CHUNKS // 2 <= len(chunks) <= MAX_CHUNKS
    assert sum(chunk.num_steps for chunk in chunks) == num_steps
    assert sum(chunk.num_tokens for chunk in chunks) == 7 * num_steps
    assert sum(chunk.num_batched_tokens for chunk in chunks) == 9 * num_steps
    assert chunks[0].started_ms == 1999_000
    assert chunks[-1].ended_ms == (2000 - (1.5 + num_steps - 1)) * 1000
    starts = [chunk.started_ms for chunk in chunks]
    assert starts == sorted(starts, reverse=True)
    packed = msgspec.msgpack.encode(report)
    assert msgspec.msgpack.decode(packed, type=WorkReport) == report
