"""Predictions are compared with what happened; targets come from three places."""

from __future__ import annotations

import pytest

from common.metrics import REGISTRY
from kvbaton.sampling import SamplingParams
from services.gateway.access.api_keys import ApiKeys, Entry
from services.gateway.backend import NO_TARGETS, GenerationRequest, Targets
from services.gateway.routing import predictions
from services.gateway.routing.chooser import Routing
from services.gateway.routing.decision import Decision, Option
from services.gateway.routing.stream import RequestStream


def value(name: str) -> float:
    return REGISTRY.get_sample_value(f"kvbaton_{name}") or 0.0


def finished(**fields: float) -> RequestStream:
    """Placed 0.5 s after it came; the first token was expected 0.2 s later, each other 10 ms."""
    stream = RequestStream(GenerationRequest("r", [5, 6], SamplingParams()), received_at=100.0)
    option = Option("p", "d", 500.0, 50.0, 50.0, 100.0, 10.0, 0, meets_targets=True)
    stream.placement = Decision(option, "", 1)
    stream.tokens = [1] * 11
    stream.timeline.num_attempts = int(fields.get("num_attempts", 1))
    stream.timeline.first_token_at = 100.9
    stream.timeline.finished_at = 101.0
    return stream


def test_the_error_of_each_prediction_is_counted_as_a_ratio() -> None:
    names = ("ttft_over_predicted", "tpot_over_predicted")
    before = [value(f"{name}_sum") for name in names]
    predictions.check(finished())
    ratios = [value(f"{name}_sum") - old for name, old in zip(names, before, strict=True)]
    assert ratios == pytest.approx([2.0, 1.0])


def test_what_was_placed_twice_or_never_tells_nothing() -> None:
    before = value("ttft_over_predicted_count")
    predictions.check(finished(num_attempts=2))
    unplaced = finished()
    unplaced.placement = None
    predictions.check(unplaced)
    assert value("ttft_over_predicted_count") == before


def test_targets_are_the_requests_or_the_keys_or_the_servers() -> None:
    entry = Entry(name="a", tenant="t", sha256="0" * 64, ttft_target_ms=500)
    [(_, caller)] = ApiKeys([entry], 0.0)._callers
    assert caller.targets == Targets(ttft_ms=500)
    routing = Routing(targets=Targets(1000, 50))

    def targets(own: Targets) -> Targets:
        request = GenerationRequest("r", [5], SamplingParams(), targets=own.or_else(caller.targets))
        return routing.targets_of(request)

    assert targets(NO_TARGETS) == Targets(500, 50)
    assert targets(Targets(ttft_ms=20, tpot_ms=5)) == Targets(20, 5)
