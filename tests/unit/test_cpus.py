"""Cores by their names, and a process kept on them."""

from __future__ import annotations

import os

import pytest

from common.config import StartError
from common.cpus import parse_cpus, run_on


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), (" 1 , 1-2", {1, 2})]
)
def test_cores_are_listed_as_linux_does(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["x", "1-", "3-1", "1,,2", "-1", "99999"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(StartError, match="--cpus"):
        parse_cpus(text)


def test_a_process_is_kept_on_its_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        run_on("")
        assert os.sched_getaffinity(0) == before
        run_on(str(min(before)))
        assert os.sched_getaffinity(0) == {min(before)}
        with pytest.raises(StartError, match="core 4095 is not one that this process may use"):
            run_on("4095")
    finally:
        os.sched_setaffinity(0, before)
