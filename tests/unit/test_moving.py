"""When blocks are compressed on their way."""

from __future__ import annotations

import pytest

from common.messages import WorkerCounts
from common.worker.moving import Moving, Way


def way(plain_bytes_per_s: float = 0.0, coded_bytes_per_s: float = 0.0) -> Way:
    """As measured until second 0."""
    made = Way()
    for rate, found in ((made.plain, plain_bytes_per_s), (made.coded, coded_bytes_per_s)):
        if found:
            rate.begin(-1e6 / found)
            rate.end(1_000_000, 0.0)
    return made


@pytest.mark.parametrize(
    ("known", "is_slow"),
    [
        (way(), False),  # nothing is known: blocks go as they are
        (way(coded_bytes_per_s=1e8), False),
        (way(1e8), True),  # it is tried
        (way(2e9), False),  # but not where there is nothing to gain
        (way(1e8, 1.3e8), True),
        (way(1e8, 1.02e8), False),
        (way(3e8, 1.6e8), False),
    ],
)
def test_blocks_are_compressed_where_they_come_sooner(known: Way, is_slow: bool) -> None:
    moving = Moving(WorkerCounts(), compression="auto")
    assert moving.encoding(known, 0.0) == ("planes" if is_slow else "")
    for compression, encoding in (("off", ""), ("lossless", "planes"), ("int8", "int8")):
        moving.compression = compression
        assert moving.encoding(known, 0.0) == encoding


def test_what_was_slower_is_tried_again_after_a_while() -> None:
    known = way(3e8, 1.6e8)
    for second in range(61):
        known.plain.begin(second - 1 / 300)
        known.plain.end(1_000_000, float(second))
        assert known.is_slow(float(second)) == (second >= 30)
