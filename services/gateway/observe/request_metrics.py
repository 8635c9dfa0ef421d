"""What the requests of one gateway took, whichever face they came through."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec
from prometheus_client import Counter, Gauge, Histogram

from common.metrics import (
    INTER_TOKEN_BUCKETS_S,
    LATENCY_BUCKETS_S,
    REGISTRY,
    SMALL_COUNT_BUCKETS,
    TOKEN_BUCKETS,
)
from services.gateway.backend import GenerationRequest, Targets
from services.gateway.routing.stream import RequestStream

_NUM_RECENT = 512  # requests that percentiles are of


def _histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
    return Histogram(f"kvbaton_{name}", what, buckets=buckets, registry=REGISTRY)


def _seconds(name: str, what: str) -> Histogram:
    return _histogram(f"{name}_seconds", what, LATENCY_BUCKETS_S)


def _counter(name: str, what: str, labels: Sequence[str] = ()) -> Counter:
    return Counter(f"kvbaton_{name}", what, labels, registry=REGISTRY)


_WAITING = Gauge(
    "kvbaton_requests_waiting", "Requests taken and not yet at their workers", registry=REGISTRY
)
_FIRST_TOKEN = _seconds("time_to_first_token", "From a request's arrival to its first token")
_BETWEEN_TOKENS = _histogram(
    "inter_token_latency_seconds", "Between one token and the next", INTER_TOKEN_BUCKETS_S
)
_PER_TOKEN = _histogram(
    "time_per_output_token_seconds", "Mean of a request after its first token",
    INTER_TOKEN_BUCKETS_S,
)  # fmt: skip
_END_TO_END = _seconds("request_latency", "From a request's arrival to its last token")
_QUEUE = _seconds("request_queue", "From a request's arrival until its workers had it")
_PREFILL = _seconds("request_prefill", "From then to its first token")
_DECODE = _seconds("request_decode", "From its first token to its last")
_INFERENCE = _seconds("request_inference", "From when its workers had it to its last token")
_PROMPT = _histogram("request_prompt_tokens", "Prompt tokens of a request", TOKEN_BUCKETS)
_OUTPUT = _histogram("request_output_tokens", "Output tokens of a request", TOKEN_BUCKETS)
_MAX_TOKENS = _histogram("request_max_tokens", "What requests set max_tokens to", TOKEN_BUCKETS)
_N = _histogram("request_n", "What requests set n to", SMALL_COUNT_BUCKETS)
_PROMPT_TOKENS = _counter("prompt_tokens", "Prompt tokens of requests that were placed")
_CACHED_TOKENS = _counter("prompt_tokens_cached", "Of those, found in the cache")
_LOADED_TOKENS = _counter("prompt_tokens_loaded", "Of those, loaded from a store's disk")
_OUTPUT_TOKENS = _counter("output_tokens", "Tokens made for requests")
_ENDS = _counter("request_ends", "Requests by how they ended", ["finish_reason"])
_TARGETS = _counter("request_targets", "Targets, and whether they were met", ["target", "met"])
for reason in ("stop", "length", "abort", "error"):
    _ENDS.labels(reason)
for target in ("ttft", "tpot"):
    for met in ("true", "false"):
        _TARGETS.labels(target, met)


class Percentiles(msgspec.Struct, frozen=True):
    """Of the last requests, in milliseconds. `target` is the latest one that a request had, and
    `met` the share of those with a target that met it; None where there was none."""

    p50: float
    p90: float
    p99: float
    target: float | None
    met: float | None


class _Recent(msgspec.Struct, frozen=True):
    """What a request took and what it wanted, in milliseconds; 0 for none."""

    ttft: float
    tpot: float
    ttft_target: float
    tpot_target: float


class RequestMetrics:
    """Told by the dispatcher what happens to each request."""

    def __init__(self, targets_of: Callable[[GenerationRequest], Targets]) -> None:
        """`targets_of`: what a request asks for, or the server's own where it does not."""
        self._targets_of = targets_of
        self.num_running = 0  # at their workers
        self.num_waiting = 0  # not there yet
        self.num_ended = 0
        self.num_tokens = 0
        self._recent: deque[_Recent] = deque(maxlen=_NUM_RECENT)

    def taken(self, stream: RequestStream) -> None:
        """A request has come. Of several choices the first speaks for all."""
        _WAITING.inc()
        self.num_waiting += 1
        request = stream.request
        if request.choice == 0:
            _N.observe(request.n)
            if request.sampling.max_tokens is not None:
                _MAX_TOKENS.observe(request.sampling.max_tokens)

    def placed(self, stream: RequestStream, num_loaded_tokens: int, now: float) -> None:
        """Its workers have it, for the first time or again. So many of its tokens that were found
        in the cache came from a store's disk."""
        if not stream.timeline.placed_at:
            stream.timeline.placed_at = now
            _WAITING.dec()
            self.num_waiting -= 1
            self.num_running += 1
            if stream.request.choice == 0:
                _PROMPT_TOKENS.inc(len(stream.request.prompt))
                _CACHED_TOKENS.inc(stream.num_cached_tokens)
                _LOADED_TOKENS.inc(min(num_loaded_tokens, stream.num_cached_tokens))

    def tokens(self, came: Sequence[tuple[RequestStream, int]], now: float) -> None:
        """So many tokens of each of these requests have come into their order just now."""
        num_came = sum(num_tokens for _, num_tokens in came)
        _OUTPUT_TOKENS.inc(num_came)
        self.num_tokens += num_came
        for stream, num_tokens in came:
            for _ in range(num_tokens):
                if stream.last_token_at:
                    _BETWEEN_TOKENS.observe(now - stream.last_token_at)
                elif not stream.request.resumed:
                    _FIRST_TOKEN.observe(now - stream.timeline.received_at)
                stream.last_token_at = now

    def ended(self, stream: RequestStream, outcome: str) -> None:
        """The request is over: `outcome` is finished, cancelled, or the code of an error."""
        timeline = stream.timeline
        self.num_ended += 1
        if timeline.placed_at:
            self.num_running -= 1
        else:
            self.num_waiting -= 1
            _WAITING.dec()
        is_error = outcome not in ("finished", "cancelled")
        reason = "error" if is_error else timeline.finish_reason or "abort"
        _ENDS.labels(reason).inc()
        if reason not in ("stop", "length") or not stream.last_token_at:
            return
        num_tokens = len(stream.tokens) - len(stream.request.resumed)
        first_at, last_at = timeline.first_token_at, stream.last_token_at
        placed_at = min(timeline.placed_at or first_at, first_at)
        _END_TO_END.observe(last_at - timeline.received_at)
        _QUEUE.observe(placed_at - timeline.received_at)
        _PREFILL.observe(first_at - placed_at)
        _DECODE.observe(last_at - first_at)
        _INFERENCE.observe(last_at - placed_at)
        _PROMPT.observe(len(stream.request.prompt))
        _OUTPUT.observe(num_tokens)
        tpot_s = (last_at - first_at) / (num_tokens - 1) if num_tokens > 1 else 0.0
        if tpot_s:
            _PER_TOKEN.observe(tpot_s)
        if not stream.request.resumed:
            self._remember(stream.request, first_at - timeline.received_at, tpot_s)

    def _remember(self, request: GenerationRequest, ttft_s: float, tpot_s: float) -> None:
        targets = self._targets_of(request)
        recent = _Recent(ttft_s * 1000, tpot_s * 1000, targets.ttft_ms, targets.tpot_ms)
        self._recent.append(recent)
        for name, value, target in (
            ("ttft", recent.ttft, recent.ttft_target),
            ("tpot", recent.tpot, recent.tpot_target),
        ):
            if value and target:
                _TARGETS.labels(name, str(value <= target).lower()).inc()

    def ttft(self) -> Percentiles | None:
        """Time to first token of the last requests."""
        return _percentiles(self._recent, lambda each: (each.ttft, each.ttft_target))

    def tpot(self) -> Percentiles | None:
        """Time per output token of the last requests that had more than one."""
        return _percentiles(self._recent, lambda each: (each.tpot, each.tpot_target))


def _percentiles(
    recent: deque[_Recent], of: Callable[[_Recent], tuple[float, float]]
) -> Percentiles | None:
    pairs = [pair for each in recent if (pair := of(each))[0]]
    if not pairs:
        return None
    values = sorted(value for value, _ in pairs)
    aims = [(value <= target, target) for value, target in pairs if target]

    def at(share: float) -> float:
        return values[min(int(share * len(values)), len(values) - 1)]

    met = sum(is_met for is_met, _ in aims) / len(aims) if aims else None
    return Percentiles(at(0.5), at(0.9), at(0.99), aims[-1][1] if aims else None, met)
