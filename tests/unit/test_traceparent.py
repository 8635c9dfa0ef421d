"""Which trace contexts are taken up: W3C Trace Context, section 3.2."""

from __future__ import annotations

import pytest

from kvbaton.traceparent import read_traceparent, trace_id

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
VALID = f"00-{TRACE}-00f067aa0ba902b7-01"


def test_a_valid_one_is_passed_on_as_it_is() -> None:
    assert read_traceparent(VALID) == VALID
    assert trace_id(VALID) == TRACE


def test_of_a_later_version_the_part_that_is_known_is_taken() -> None:
    assert read_traceparent(f"cc{VALID[2:]}-what-comes") == f"cc{VALID[2:]}"
    assert read_traceparent(f"cc{VALID[2:]}") == f"cc{VALID[2:]}"


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "00",
        VALID.upper(),
        VALID[:-1],
        f"{VALID}-more",
        f"{VALID}0",
        f"cc{VALID[2:]}0",
        f"ff{VALID[2:]}",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f" {VALID}",
        VALID.replace("-", "_"),
        f"cc{VALID[2:]}-{'x' * 1000}",
    ],
)
def test_another_is_none(given: str | None) -> None:
    assert read_traceparent(given) == ""


def test_none_has_no_trace() -> None:
    assert trace_id("") == ""
