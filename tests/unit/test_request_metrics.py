"""What a gateway counts of its requests, whichever face they came through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common.messages import OutputToken
from common.metrics import REGISTRY
from kvbaton.sampling import SamplingParams
from services.gateway.backend import GenerationRequest, Targets
from services.gateway.observe.request_metrics import RequestMetrics
from services.gateway.routing.stream import RequestStream


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"kvbaton_{name}", labels) or 0.0


@pytest.fixture
def added() -> Callable[..., float]:
    """What a sample has grown by since the test began."""
    before = {
        (sample.name, tuple(sample.labels.items())): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
    }

    def grown(name: str, **labels: str) -> float:
        key = f"kvbaton_{name}", tuple(labels.items())
        return round(value(name, **labels) - before.get(key, 0.0), 9)  # sums of many lose a little

    return grown


def new_metrics() -> RequestMetrics:
    return RequestMetrics(lambda request: request.targets)


def stream(received_at: float = 10.0, **values: Any) -> RequestStream:
    sampling = SamplingParams(max_tokens=8)
    request = GenerationRequest(request_id="r", prompt=[1] * 32, sampling=sampling, **values)
    return RequestStream(request, received_at)


def token(metrics: RequestMetrics, each: RequestStream, now: float, reason: str = "") -> None:
    """As the dispatcher hears it."""
    index = len(each.tokens)
    each.deliver(OutputToken(handoff_id="h", index=index, token_id=7, finish_reason=reason or None))
    each.timeline.first_token_at = each.timeline.first_token_at or now
    metrics.tokens([(each, 1)], now)


def serve(
    metrics: RequestMetrics, times: tuple[float, ...] = (10.5, 10.75, 11.0), **values: Any
) -> RequestStream:
    """A request that comes at 10.0, is placed at 10.25, and gets its tokens at these times."""
    each = stream(**values)
    metrics.taken(each)
    metrics.placed(each, 0, 10.25)
    for at in times:
        token(metrics, each, at, "length" if at == times[-1] else "")
    metrics.ended(each, "finished")
    return each


def test_a_requests_time_is_divided_where_it_was_placed_and_at_its_first_token(
    added: Callable[..., float],
) -> None:
    serve(new_metrics())
    sums = {
        "time_to_first_token": 0.5, "inter_token_latency": 0.5, "time_per_output_token": 0.25,
        "request_latency": 1.0, "request_queue": 0.25, "request_prefill": 0.25,
        "request_decode": 0.5, "request_inference": 0.75,
    }  # fmt: skip
    for name, expected in sums.items():
        assert added(f"{name}_seconds_sum") == expected, name
    assert added("inter_token_latency_seconds_count") == 2
    assert added("request_prompt_tokens_sum") == 32
    assert added("request_output_tokens_sum") == added("output_tokens_total") == 3
    assert added("request_max_tokens_sum") == 8
    assert added("request_ends_total", finish_reason="length") == 1


def test_a_prompt_counts_once_however_many_choices_it_has(added: Callable[..., float]) -> None:
    metrics = new_metrics()
    for choice in range(3):
        serve(metrics, choice=choice, n=3)
    assert added("prompt_tokens_total") == 32
    assert (added("request_n_count"), added("request_n_sum")) == (1, 3)


def test_cached_tokens_are_those_of_the_first_placing(added: Callable[..., float]) -> None:
    metrics, each = new_metrics(), stream()
    metrics.taken(each)
    each.opened(16)
    metrics.placed(each, 16, 10.25)
    metrics.placed(each, 32, 12.0)
    assert added("prompt_tokens_cached_total") == added("prompt_tokens_loaded_total") == 16
    metrics.ended(each, "cancelled")


def test_what_waits_runs_and_has_ended_is_told_apart(added: Callable[..., float]) -> None:
    metrics, placed, waiting = new_metrics(), stream(), stream()
    metrics.taken(placed)
    metrics.taken(waiting)
    metrics.placed(placed, 0, 10.25)
    assert (metrics.num_running, metrics.num_waiting, metrics.num_ended) == (1, 1, 0)
    assert added("requests_waiting") == 1
    metrics.ended(placed, "cancelled")
    metrics.ended(waiting, "unavailable")
    assert (metrics.num_running, metrics.num_waiting, metrics.num_ended) == (0, 0, 2)
    assert added("requests_waiting") == 0
    assert added("request_ends_total", finish_reason="abort") == 1
    assert added("request_ends_total", finish_reason="error") == 1
    assert metrics.ttft() is None


def test_a_stop_string_is_an_end_and_no_abort(added: Callable[..., float]) -> None:
    """The one who looks for it cancels the rest."""
    metrics, each = new_metrics(), stream()
    metrics.taken(each)
    metrics.placed(each, 0, 10.25)
    token(metrics, each, 10.5)
    each.timeline.finish_reason = "stop"
    metrics.ended(each, "cancelled")
    assert added("request_ends_total", finish_reason="stop") == 1
    assert added("request_ends_total", finish_reason="abort") == 0


def test_a_resumed_request_has_no_first_token_here(added: Callable[..., float]) -> None:
    metrics = new_metrics()
    serve(metrics, resumed=(5, 6))
    assert added("time_to_first_token_seconds_count") == 0
    assert added("request_output_tokens_sum") == 3
    assert metrics.ttft() is None


def test_percentiles_are_compared_with_the_targets_that_requests_had(
    added: Callable[..., float],
) -> None:
    metrics = new_metrics()
    for late_s in (0.5, 1.0, 2.0):
        times = (10.0 + late_s, 10.5 + late_s)
        serve(metrics, times, targets=Targets(ttft_ms=1500.0))
    serve(metrics, (18.0,))
    ttft, tpot = metrics.ttft(), metrics.tpot()
    assert ttft is not None
    assert tpot is not None
    assert (ttft.p50, ttft.p90, ttft.p99) == (2000.0, 8000.0, 8000.0)
    assert (ttft.target, ttft.met) == (1500.0, 2 / 3)
    assert (tpot.p50, tpot.p99, tpot.target, tpot.met) == (500.0, 500.0, None, None)
    assert added("request_targets_total", target="ttft", met="true") == 2
    assert added("request_targets_total", target="ttft", met="false") == 1
