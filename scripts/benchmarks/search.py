"""The highest rate that a server sustains, by bisection. Pure: what a rate does is asked for.

A search yields the rates that it wants to be tried, one after the other, is sent whether each met
the targets, and returns what it found. So several can go on in turn.
"""

from __future__ import annotations

import math
from collections.abc import Generator

Search = Generator[float, bool, float]

_STEP = 1.6  # to the next rate, until one meets the targets and one does not
_LOWEST, _HIGHEST = 1 / 40, 1000.0  # times the start: nothing is looked for beyond


def find_rate(start: float, precision: float) -> Search:
    """A rate that met the targets when the one `1 + precision` times as high did not.

    Geometric bisection from `start`. 0 if none does. One load says yes or no, with luck: what was
    found is to be confirmed.
    """
    lowest, highest = _LOWEST * start, _HIGHEST * start
    low = high = start
    if (yield start):
        while (yield (high := low * _STEP)):
            low = high
            if low > highest:
                return low
    else:
        while not (yield (low := high / _STEP)):
            high = low
            if low < lowest:
                return 0.0
    while high / low > 1 + precision:
        middle = math.sqrt(low * high)
        if (yield middle):
            low = middle
        else:
            high = middle
    return low


def confirm(found: float, precision: float) -> Search:
    """The first of `found` and the rates below it, `1 + precision` apart, that meets the targets in
    a run of its own. 0 if none does."""
    rate, lowest = found, _LOWEST * found
    while rate > lowest:
        if (yield rate):
            return rate
        rate /= 1 + precision
    return 0.0
