"""Spans of requests, as OpenTelemetry's own exporter gets them."""

from __future__ import annotations

import itertools
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from common.config import StartError
from kvbaton.traceparent import read_traceparent, trace_id
from services.gateway.observe.explain import explain
from services.gateway.observe.tracing import OtelSpans, load_spans
from services.gateway.routing.stream import RequestStream
from tests.unit.explanations import at, served

NOW = 1_700_000_000.0
GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Collected:
    """Spans that would have been sent."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.spans = OtelSpans(provider, "demo")

    def of(self, stream: RequestStream) -> None:
        """The whole life of a request."""
        self.spans.begin(stream, NOW)
        self.spans.end(stream, explain(stream, at(101), NOW + 0.101))

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._exporter.get_finished_spans())


def test_a_request_is_a_span_with_one_for_each_stage() -> None:
    collected = Collected()
    collected.of(served())
    *stages, request = collected
    assert request.name == "text_completion demo"
    assert request.kind is SpanKind.SERVER
    assert request.parent is None
    assert (request.start_time, request.end_time) == (NOW * 1e9, (NOW + 0.101) * 1e9)
    assert [span.name for span in stages] == [
        "tokenize", "queue", "store", "decode_place", "blocks", "prefill_queue", "prefill",
        "handoff", "join", "decode",
    ]  # fmt: skip
    assert {span.parent.span_id for span in stages} == {request.context.span_id}
    for before, after in itertools.pairwise(stages):
        assert before.end_time == after.start_time
    assert stages[6].attributes == {"kvbaton.worker": "prefill.1", "kvbaton.attempt": 1}


def test_its_attributes_have_the_names_that_the_conventions_give() -> None:
    collected = Collected()
    collected.of(served())
    *_, request = collected
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "kvbaton",
        "gen_ai.request.model": "demo",
        "gen_ai.response.id": "request-1",
        "gen_ai.usage.input_tokens": 128,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.time_to_first_chunk": 0.061,
        "kvbaton.decode_worker": "decode.1",
    }
    assert {name: request.attributes[name] for name in expected} == expected
    assert request.status.status_code is StatusCode.UNSET


def test_it_is_a_part_of_the_trace_it_came_with_and_passes_itself_on() -> None:
    collected = Collected()
    stream = served()
    stream.timeline.traceparent = GIVEN
    collected.of(stream)
    *_, request = collected
    assert f"{request.context.trace_id:032x}" == trace_id(GIVEN)
    assert f"{request.parent.span_id:016x}" == "00f067aa0ba902b7"
    passed_on = stream.timeline.traceparent
    assert read_traceparent(passed_on) == passed_on
    assert passed_on == f"00-{trace_id(GIVEN)}-{request.context.span_id:016x}-01"


def test_what_its_caller_does_not_record_is_not_recorded_and_still_passed_on() -> None:
    collected = Collected()
    stream = served()
    stream.timeline.traceparent = GIVEN[:-1] + "0"
    collected.of(stream)
    assert list(collected) == []
    assert trace_id(stream.timeline.traceparent) == trace_id(GIVEN)


def test_a_request_without_a_trace_begins_one() -> None:
    collected = Collected()
    stream = served()
    collected.of(stream)
    *_, request = collected
    assert trace_id(stream.timeline.traceparent) == f"{request.context.trace_id:032x}"


@pytest.mark.parametrize(("outcome", "is_error"), [("unavailable", True), ("", False)])
def test_an_error_is_one_and_a_client_that_left_is_none(outcome: str, is_error: bool) -> None:
    collected = Collected()
    stream = served()
    stream.timeline.finish_reason, stream.timeline.error = "", outcome
    collected.of(stream)
    *_, request = collected
    assert (request.status.status_code is StatusCode.ERROR) == is_error
    assert request.attributes.get("error.type") == (outcome or None)
    assert "gen_ai.response.finish_reasons" not in request.attributes


def test_without_somewhere_to_send_them_there_are_none() -> None:
    assert load_spans("", {}, service="gateway.1", model="demo") is None


def test_without_opentelemetry_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StartError, match=r"pip install '\.\[otel\]'"):
        load_spans("http://127.0.0.1:4318", {}, service="gateway.1", model="demo")


@pytest.mark.parametrize(
    ("setting", "environ"),
    [
        ("http://127.0.0.1:9", {}),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}),
    ],
)
async def test_a_collector_that_is_away_does_not_hold_the_end_up(
    setting: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    spans = load_spans(setting, environ, service="gateway.1", model="demo")
    assert spans is not None
    await spans.close()


async def test_spans_reach_a_collector() -> None:
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        spans = load_spans(endpoint, {}, service="gateway.7", model="demo")
        assert spans is not None
        stream = served()
        spans.begin(stream, NOW)
        spans.end(stream, explain(stream, at(101), NOW + 0.101))
        await spans.close()
        server.shutdown()
        serving.join()
    ((path, message),) = received
    assert path == "/v1/traces"
    (resource,) = message.resource_spans
    names = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (names["service.name"], names["service.instance.id"]) == ("kvbaton", "gateway.7")
    (scope,) = resource.scope_spans
    assert {span.name for span in scope.spans} >= {"text_completion demo", "prefill", "handoff"}
