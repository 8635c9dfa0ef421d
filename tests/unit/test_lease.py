"""A decode worker's spare blocks by value: how many to ask for, how many to give back."""

from __future__ import annotations

import pytest

from common.worker.lease import BlockLease


def lease_of(num_blocks: int) -> BlockLease:
    lease = BlockLease()
    lease.add(list(range(num_blocks)))
    return lease


def test_spare_blocks_are_taken_in_the_order_they_came() -> None:
    lease = lease_of(2)
    assert [lease.take(), lease.take(), lease.take()] == [0, 1, None]
    assert len(lease) == 0


@pytest.mark.parametrize(
    ("num_spare", "num_running", "num_wanted"),
    [(0, 0, 0), (0, 1, 2), (0, 8, 2), (0, 40, 10), (1, 1, 1), (2, 8, 0), (3, 40, 7), (50, 40, 0)],
)
def test_a_quarter_of_what_runs_and_at_least_two_are_wanted(
    num_spare: int, num_running: int, num_wanted: int
) -> None:
    assert lease_of(num_spare).num_wanted(num_running) == num_wanted


def test_nothing_is_asked_for_while_an_answer_is_due_or_would_be_none() -> None:
    lease = BlockLease()
    lease.asking = True
    assert lease.num_wanted(8) == 0
    lease.asking, lease.starved = False, True
    assert lease.num_wanted(8) == 0


def test_new_blocks_end_starvation_and_none_do_not() -> None:
    lease = BlockLease()
    lease.starved = True
    lease.add([])
    assert lease.starved
    lease.add([3])
    assert not lease.starved


@pytest.mark.parametrize(
    ("num_spare", "num_running", "num_kept"), [(6, 0, 0), (6, 1, 4), (3, 1, 3), (9, 12, 6)]
)
def test_what_exceeds_the_need_is_surplus(num_spare: int, num_running: int, num_kept: int) -> None:
    lease = lease_of(num_spare)
    surplus = lease.surplus(num_running)
    assert len(surplus) == num_spare - num_kept
    assert len(lease) == num_kept
    left = [lease.take() for _ in range(num_kept)]
    assert sorted([*surplus, *(block for block in left if block is not None)]) == list(
        range(num_spare)
    )


@pytest.mark.parametrize("num_running", range(70))
def test_what_is_wanted_is_never_surplus_at_once(num_running: int) -> None:
    lease = BlockLease()
    lease.add(list(range(lease.num_wanted(num_running))))
    assert lease.surplus(num_running) == []


def test_a_cleared_lease_is_as_new() -> None:
    lease = lease_of(3)
    lease.asking = lease.starved = True
    lease.clear()
    assert (len(lease), lease.asking, lease.starved) == (0, False, False)
