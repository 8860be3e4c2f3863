"""Spans of requests: names of the semantic conventions, the client's trace, and where they go."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from fake_backend import MODEL, FakeBackend, Script, Server, one_model_app, served_model, serving
from fake_worker import ERROR
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode
from test_serve_command import model, serve, until  # noqa: F401

from quire.serve import tracing
from quire.serve.settings import SettingsError
from quire.serve.tracing import Tracing, make_tracing

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
TRACEPARENT = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01"}
BODY = {"model": MODEL, "prompt": "ab", "max_tokens": 3, "temperature": 0.5, "seed": 7}


@contextmanager
def traced(backend: FakeBackend) -> Iterator[tuple[Server, InMemorySpanExporter]]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serving(one_model_app(backend, served_model(), tracing=Tracing(provider))) as server:
        yield server, exporter


def spans_of(exporter: InMemorySpanExporter, count: int) -> tuple[ReadableSpan, ...]:
    until(lambda: len(exporter.get_finished_spans()) == count)
    return exporter.get_finished_spans()


def test_a_request_continues_the_trace_of_its_client() -> None:
    with traced(FakeBackend([Script([[65], [66]])])) as (server, exporter):
        headers = {**TRACEPARENT, "tracestate": "vendor=1", "X-Request-Id": "mine"}
        assert server.request("POST", "/v1/completions", BODY, headers).status == 200
        assert server.request("POST", "/v1/completions", BODY).status == 200
        first, second = spans_of(exporter, 2)
    assert first.parent is not None
    assert (first.context.trace_id, first.parent.span_id) == (TRACE, PARENT)
    assert first.context.trace_state.get("vendor") == "1"
    assert second.parent is None
    assert (first.name, first.kind) == (f"text_completion {MODEL}", SpanKind.SERVER)
    assert first.attributes is not None
    assert first.attributes["quire.request.id"] == "mine"
    assert first.attributes["http.response.status_code"] == 200
    assert "error.type" not in first.attributes
    assert first.start_time is not None
    assert first.end_time is not None
    assert first.start_time < first.end_time


def test_a_trace_that_is_not_sampled_stays_so() -> None:
    with traced(FakeBackend()) as (server, exporter):
        headers = {"traceparent": TRACEPARENT["traceparent"][:-1] + "0"}
        assert server.request("POST", "/v1/completions", BODY, headers).status == 200
        assert server.request("POST", "/v1/completions", BODY, {"traceparent": "x"}).status == 200
        (other,) = spans_of(exporter, 1)
    assert other.parent is None


def test_a_refused_request_says_why() -> None:
    with traced(FakeBackend()) as (server, exporter):
        server.request("POST", "/v1/completions", {**BODY, "model": "none"})
        server.request("POST", "/v1/completions", {**BODY, "temperature": "hot"})
        unknown, bad = spans_of(exporter, 2)
    assert unknown.attributes is not None
    assert bad.attributes is not None
    assert unknown.name == "text_completion"
    assert unknown.attributes["error.type"] == "model_not_found"
    assert bad.attributes["error.type"] == "400"
    assert {span.status.status_code for span in (unknown, bad)} == {StatusCode.UNSET}


def test_only_requests_of_a_model_have_spans() -> None:
    with traced(FakeBackend()) as (server, exporter):
        for path in ("/health", "/metrics", "/v1/models", "/v1/completions"):
            server.request("GET", path)
        server.request("POST", "/tokenize", {"model": MODEL, "prompt": "x"})
        server.request("POST", "/v1/completions", BODY)
        (span,) = spans_of(exporter, 1)
    assert span.name.startswith("text_completion")


class Collector(HTTPServer):
    """Takes spans by OTLP over HTTP, as a collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []

    @property
    def resources(self) -> list:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [resource for request in requests for resource in request.resource_spans]

    @property
    def spans(self) -> list:
        scopes = [scope for resource in self.resources for scope in resource.scope_spans]
        return [span for scope in scopes for span in scope.spans]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        assert self.path == "/v1/traces"
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            yield collector, f"http://127.0.0.1:{collector.server_port}/v1/traces"
        finally:
            collector.shutdown()
            thread.join()


def test_spans_reach_a_collector_before_the_server_ends(model, tmp_path) -> None:  # noqa: F811
    with collecting() as (collector, url):
        with serve(model, tmp_path, "ok", "--otlp-traces-endpoint", url) as server:
            options = {"max_tokens": 3, "temperature": 0.5, "seed": 7}
            for prompt in ([65, 66, 67, 68], [ERROR]):
                with server.complete(prompt, **options) as response:
                    response.read()
            server.process.terminate()
            assert server.process.wait() == 0
        done, failed = collector.spans
        (name,) = (
            a.value.string_value
            for a in collector.resources[0].resource.attributes
            if a.key == "service.name"
        )
    assert name == "quire"
    attributes = {a.key: a.value for a in done.attributes}
    assert done.name == "text_completion bytes"
    for key, value in {
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
    }.items():
        assert attributes[key].int_value == value, key
    assert attributes["gen_ai.request.temperature"].double_value == 0.5
    assert attributes["gen_ai.response.time_to_first_chunk"].double_value > 0
    reasons = attributes["gen_ai.response.finish_reasons"].array_value.values
    assert [reason.string_value for reason in reasons] == ["length"]
    assert failed.status.code == 2
    assert {a.key for a in failed.attributes} >= {"error.type"}
    known = {v for k, v in vars(gen_ai_attributes).items() if k.startswith("GEN_AI")}
    assert {key for key in attributes if key.startswith("gen_ai.")} <= known


def test_a_dead_collector_keeps_nobody_waiting(model, tmp_path) -> None:  # noqa: F811
    url = "http://127.0.0.1:1/v1/traces"
    with serve(model, tmp_path, "ok", "--otlp-traces-endpoint", url) as server:
        with server.complete([65], max_tokens=3) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 3
        server.process.terminate()
        assert server.process.wait() == 0


def test_every_name_is_in_the_conventions() -> None:
    source = Path(tracing.__file__).read_text()
    known = {v for k, v in vars(gen_ai_attributes).items() if k.startswith("GEN_AI")}
    assert set(re.findall(r'"(gen_ai\.[a-z_.]+)"', source)) <= known


@pytest.mark.parametrize("name", ["opentelemetry.sdk.trace", "opentelemetry.exporter"])
def test_without_the_packages(name: str, monkeypatch, caplog) -> None:
    for module in list(sys.modules):
        if module.startswith(name):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SettingsError, match=r"pip install '\.\[otel\]'"):
        make_tracing("http://localhost:4318/v1/traces", {})
    assert make_tracing(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}) is None
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set, but" in caplog.text


def test_nothing_is_imported_unless_it_is_asked_for() -> None:
    code = (
        "import sys; from quire.serve import serve_command, app, tracing;"
        "assert tracing.make_tracing(None, {}) is None;"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
