"""OpenTelemetry spans of requests: one each, with one for every stage, by the GenAI conventions.

The stages are known when a request has ended; until then only the request's own span is there, so
that what it passes on names it. Nothing of OpenTelemetry is imported unless spans are asked for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from common.config import StartError
from kvbaton.explanation import Explanation, Stage
from services.gateway.routing.stream import RequestStream

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span
    from opentelemetry.util.types import Attributes

_OPERATION = "text_completion"  # what is served, whatever the client calls it: tokens after tokens
_ASKS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_FINISHED = ("stop", "length")
_CLOSE_S = 1.0


def load_spans(
    otlp_endpoint: str, environ: Mapping[str, str], *, service: str, model: str
) -> OtelSpans | None:
    """Spans sent by OTLP over HTTP, if the setting or the usual variables name somewhere to send
    them. Raises StartError if they cannot be made."""
    if not otlp_endpoint and not any(environ.get(name) for name in _ASKS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartError("--otlp-endpoint needs OpenTelemetry: pip install '.[otel]'") from error
    resource = Resource.create({"service.name": "kvbaton", "service.instance.id": service})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    # None: the exporter reads the variables.
    exporter = OTLPSpanExporter(endpoint=_traces_url(otlp_endpoint) if otlp_endpoint else None)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OtelSpans(provider, model)


def _traces_url(endpoint: str) -> str:
    """As the variable for all signals has it: a collector's address, without its paths."""
    path = "/v1/traces"
    return endpoint if endpoint.endswith(path) else endpoint.rstrip("/") + path


class OtelSpans:
    """Implements watch.Spans. Exporting runs on a thread of its own, and drops what is too much."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("kvbaton")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model
        self._spans: dict[RequestStream, tuple[Span, Context]] = {}  # of requests in flight

    def begin(self, stream: RequestStream, unix_now: float) -> None:
        """Whether it is recorded is for whoever began the trace to say."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        given = {"traceparent": stream.timeline.traceparent} if stream.timeline.traceparent else {}
        span = self._tracer.start_span(
            f"{_OPERATION} {self._model}",
            context=self._propagator.extract(given),
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(unix_now),
        )
        context = set_span_in_context(span)
        passed_on: dict[str, str] = {}
        self._propagator.inject(passed_on, context)
        stream.timeline.traceparent = passed_on.get("traceparent", stream.timeline.traceparent)
        self._spans[stream] = span, context

    def end(self, stream: RequestStream, explanation: Explanation) -> None:
        """Its stages become spans."""
        from opentelemetry.trace import StatusCode

        span, context = self._spans.pop(stream)
        if span.is_recording():
            span.set_attributes(_attributes(explanation, self._model) or {})
            if explanation.outcome not in (*_FINISHED, "cancelled"):
                span.set_status(StatusCode.ERROR, explanation.outcome)
            for stage in explanation.stages:
                self._stage(stage, explanation.received_at, context)
        span.end(_nanoseconds(explanation.received_at + explanation.total_ms / 1000))

    def _stage(self, stage: Stage, received_at: float, context: Context) -> None:
        self._tracer.start_span(
            stage.name,
            context=context,
            attributes={"kvbaton.worker": stage.worker, "kvbaton.attempt": stage.attempt},
            start_time=_nanoseconds(received_at + stage.start_ms / 1000),
        ).end(_nanoseconds(received_at + stage.end_ms / 1000))

    async def close(self) -> None:
        """Send what is left. A collector that does not answer is not waited for."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, _CLOSE_S)


def _nanoseconds(unix_s: float) -> int:
    return int(unix_s * 1e9)


def _attributes(explanation: Explanation, model: str) -> Attributes:
    """By the semantic conventions; what they have no name for is ours."""
    attributes: dict[str, str | int | float | list[str]] = {
        "gen_ai.operation.name": _OPERATION,
        "gen_ai.provider.name": "kvbaton",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": explanation.id,
        "gen_ai.usage.input_tokens": explanation.num_prompt_tokens,
        "gen_ai.usage.output_tokens": explanation.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": explanation.num_cached_tokens,
        "kvbaton.prefill_worker": explanation.prefill_worker,
        "kvbaton.decode_worker": explanation.decode_worker,
        "kvbaton.num_attempts": explanation.num_attempts,
        "kvbaton.verdict": explanation.verdict.text,
    }
    if explanation.outcome in _FINISHED:
        attributes["gen_ai.response.finish_reasons"] = [explanation.outcome]
    elif explanation.outcome != "cancelled":
        attributes["error.type"] = explanation.outcome
    if explanation.ttft_ms is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = explanation.ttft_ms / 1000
    return attributes
