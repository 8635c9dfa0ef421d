"""How far off placement's predictions were: for each finished request, what happened over what was
expected when it was placed. 1 is exact, 2 took twice as long."""

from __future__ import annotations

from prometheus_client import Histogram

from common.metrics import REGISTRY
from services.gateway.routing.stream import RequestStream

_RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)

_TTFT = Histogram(
    "kvbaton_ttft_over_predicted",
    "Time from placement to the first token, over what was predicted",
    buckets=_RATIOS,
    registry=REGISTRY,
)
_TPOT = Histogram(
    "kvbaton_tpot_over_predicted",
    "Time per later token, over what was predicted",
    buckets=_RATIOS,
    registry=REGISTRY,
)


def check(stream: RequestStream) -> None:
    """A request has finished. One that was placed twice tells nothing."""
    timeline, decision = stream.timeline, stream.placement
    if decision is None or timeline.num_attempts != 1 or stream.request.resumed:
        return
    expected = decision.chosen
    ttft_ms = (timeline.first_token_at - timeline.received_at) * 1000 - expected.line_ms
    if expected.ttft_ms > expected.line_ms:
        _TTFT.observe(ttft_ms / (expected.ttft_ms - expected.line_ms))
    num_later = len(stream.tokens) - 1
    if num_later and expected.tpot_ms:
        tpot_ms = (timeline.finished_at - timeline.first_token_at) * 1000 / num_later
        _TPOT.observe(tpot_ms / expected.tpot_ms)
