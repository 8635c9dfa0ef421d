"""The limits of sampling parameters, each at its edge."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvbaton.errors import InvalidRequestError
from kvbaton.protocol import Generate
from kvbaton.request import RequestOptions
from kvbaton.sampling import MAX_STOP_TOKEN_IDS, SamplingParams, check_sampling

# field, values at the edges that are allowed, values just beyond
LIMITS: list[tuple[str, list[Any], list[Any]]] = [
    ("max_tokens", [None, 1, 2**31 - 1], [0, -1, 2**31]),
    ("temperature", [0.0, 100.0], [-0.001, 100.5]),
    ("top_p", [1e-9, 1.0], [0.0, -0.5, 1.001]),
    ("top_k", [-1, 0, 2**31 - 1], [-2, 2**31]),
    ("min_p", [0.0, 1.0], [-0.001, 1.001]),
    ("presence_penalty", [-2.0, 2.0], [-2.001, 2.001]),
    ("frequency_penalty", [-2.0, 2.0], [-2.001, 2.001]),
    ("repetition_penalty", [1e-9, 100.0], [0.0, -1.0, 100.5]),
    ("seed", [None, -(2**63), 2**64 - 1], [-(2**63) - 1, 2**64]),
    ("min_tokens", [0, 2**31 - 1], [-1, 2**31]),
    ("logprobs", [None, 0, 20], [-1, 21]),
]
ALLOWED = [(field, value) for field, allowed, _ in LIMITS for value in allowed]
REFUSED = [(field, value) for field, _, refused in LIMITS for value in refused]


@pytest.mark.parametrize(("field", "value"), ALLOWED)
def test_a_value_at_the_edge_is_allowed(field: str, value: Any) -> None:
    check_sampling(SamplingParams(**{field: value}))


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_a_value_beyond_the_edge_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field} must be .* got {value}$") as caught:
        check_sampling(SamplingParams(**{field: value}))
    assert caught.value.field == field


FLOAT_FIELDS = [
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", FLOAT_FIELDS)
def test_a_value_that_is_no_number_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        check_sampling(SamplingParams(**{field: value}))  # type: ignore[arg-type]


def test_stop_token_ids_are_counted() -> None:
    check_sampling(SamplingParams(stop_token_ids=[1] * MAX_STOP_TOKEN_IDS))
    with pytest.raises(InvalidRequestError, match="at most 64 ids, got 65"):
        check_sampling(SamplingParams(stop_token_ids=[1] * (MAX_STOP_TOKEN_IDS + 1)))


def test_min_tokens_must_not_exceed_max_tokens() -> None:
    check_sampling(SamplingParams(min_tokens=5, max_tokens=5))
    check_sampling(SamplingParams(min_tokens=5))
    with pytest.raises(InvalidRequestError, match="min_tokens must not exceed max_tokens"):
        check_sampling(SamplingParams(min_tokens=6, max_tokens=5))


def test_the_client_takes_as_options_exactly_what_a_request_can_say() -> None:
    of_request = {*Generate.__struct_fields__, "deadline_s"}
    of_request -= {"id", "text", "sampling", "deadline_ms", "resumable", "resume"}
    of_sampling = {*SamplingParams.__struct_fields__} - {"grammar"}  # made of structured_outputs
    assert set(RequestOptions.__annotations__) == of_request | of_sampling
