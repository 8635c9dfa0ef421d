"""Runs what many tests ask for, one process a core, while they look at the results in turn."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import structlog

Result = TypeVar("Result")

_PATIENCE_S = 100.0  # for one result; a test may take 120


def silence() -> None:
    """Services that meet faults, or are broken on purpose, complain at length; reports say what
    matters."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@contextmanager
def farmed(
    work: Callable[..., Result], jobs: Iterable[tuple[object, ...]]
) -> Iterator[Callable[..., Result]]:
    """Yields a function that waits for `work(*job)`, of a job that is one of `jobs`.

    Each runs in one of a few fresh processes, in the order of `jobs`. What `work` raises is raised.
    """
    num_cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(num_cores, initializer=silence) as pool:
        running = {job: pool.apply_async(work, job) for job in jobs}

        def result(*job: object) -> Result:
            return running.pop(job).get(_PATIENCE_S)

        yield result
        pool.terminate()
        pool.join()


def asked_for(request: object, fixture: str, *names: str) -> list[tuple[object, ...]]:
    """The parameters called `names` of each test that is about to run and uses `fixture`."""
    items = request.session.items  # type: ignore[attr-defined]
    return [
        tuple(item.callspec.params[name] for name in names)
        for item in items
        if fixture in item.fixturenames and hasattr(item, "callspec")
    ]
