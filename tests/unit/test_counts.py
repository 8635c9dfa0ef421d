"""What workers count, and how it travels."""

from __future__ import annotations

import msgspec
import pytest

from common.messages import Distribution, Heartbeat, ToStore, WorkerCounts, decoder
from common.metrics import STEP_TOKEN_BUCKETS
from kvbaton.codec import encode
from kvbaton.errors import ProtocolError


def test_a_value_falls_into_the_first_bucket_that_is_not_below_it() -> None:
    values = Distribution()
    for value in (1, 2, 3, 9):
        values.add(value, (2, 4))
    assert values == Distribution(counts=[2, 1, 1], total=15.0)


def test_steps_and_transfers_add_up() -> None:
    counts = WorkerCounts()
    counts.step(16, 0.25)
    counts.step(17, 0.5)
    counts.transfer(4096, 0.002)
    assert (counts.num_steps, counts.step_s, counts.step_tokens.total) == (2, 0.75, 33.0)
    assert counts.step_tokens.counts[STEP_TOKEN_BUCKETS.index(16)] == 1
    assert (sum(counts.transfer_bytes.counts), counts.transfer_bytes.total) == (1, 4096.0)
    assert counts.transfer_s.total == 0.002


def test_counts_travel_with_a_heartbeat() -> None:
    counts = WorkerCounts(num_preemptions=3)
    counts.step(5, 0.1)
    sent = memoryview(encode(Heartbeat(counts=counts)))
    heard = decoder(ToStore).decode(sent)
    assert isinstance(heard, Heartbeat)
    assert heard.counts == counts


@pytest.mark.parametrize(
    "counts", [{"num_steps": -1}, {"step_s": -0.5}, {"step_tokens": {"counts": [0] * 33}}]
)
def test_impossible_counts_are_refused(counts: dict[str, object]) -> None:
    message = msgspec.to_builtins(Heartbeat()) | {"counts": counts}
    with pytest.raises(ProtocolError):
        decoder(ToStore).decode(memoryview(msgspec.msgpack.encode(message)))
