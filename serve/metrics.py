"""What ``/metrics`` exposes, in a registry of its own."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Iterator
from importlib.metadata import version
from typing import Final, cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.serve import request_record
from quire.serve.errors import CLIENT_CLOSED_REQUEST, ApiError
from quire.serve.log_writer import LogWriter
from quire.serve.model_metrics import ModelFamilies, ModelMetrics
from quire.serve.process_memory import resident_bytes
from quire.serve.request_record import RequestRecord
from quire.serve.vllm_metrics import WithVllmNames
from quire.serve.worker_mirror import WorkerCollector

# The _created series only double the exposition; promtool takes them for gauges without a unit.
disable_created_metrics()  # type: ignore[no-untyped-call]

_OPENMETRICS = "application/openmetrics-text"
# Why a request was refused, by its error's code or its status.
_REFUSALS: Final = {
    "context_length_exceeded": "too_long",
    "rate_limit_exceeded": "rate_limit",
    "concurrency_limit": "concurrency",
    "413": "body_too_large",
}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class LogCollector(Collector):
    """What the log itself cannot tell."""

    def __init__(self, log: LogWriter) -> None:
        self._log = log

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "quire_log_lines_dropped",
            "Lines of the log that could not be written.",
            value=self._log.dropped,
        )


class Metrics:
    """Every series of the server; those of a model are in :meth:`for_model`."""

    def __init__(self, log: LogWriter | None = None, *, vllm_names: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._exported = WithVllmNames(self.registry) if vllm_names else self.registry
        self._workers = WorkerCollector()
        self.registry.register(self._workers)
        if log is not None:
            self.registry.register(LogCollector(log))
        ProcessCollector(registry=self.registry)
        memory = Gauge(
            "quire_front_end_memory_bytes",
            "What the system charges for the front end.",
            registry=self.registry,
        )
        memory.set_function(lambda: resident_bytes(os.getpid()))
        build = Gauge(
            "quire_build_info",
            "The running version; always 1.",
            ("version",),
            registry=self.registry,
        )
        build.labels(version("quire")).set(1)
        self._families = ModelFamilies(self.registry)
        self._models: dict[str, ModelMetrics] = {}
        self.http_requests = Counter(
            "quire_http_requests",
            "HTTP responses.",
            ("route", "method", "code"),
            registry=self.registry,
        )
        self.client_disconnects = Counter(
            "quire_client_disconnects",
            "Clients that left before their answer's end.",
            registry=self.registry,
        )

    def for_model(self, name: str) -> ModelMetrics:
        """The series of one model, the same ones whenever it is loaded again."""
        if name not in self._models:
            self._models[name] = ModelMetrics(name, self._families)
            self._workers.workers[name] = self._models[name].worker
        return self._models[name]

    def ended(self, record: RequestRecord | None, status: str) -> None:
        """Count what its answer alone does not tell of a request."""
        code = record.error_code if record is not None else ""
        if (reason := _REFUSALS.get(code) or _REFUSALS.get(status)) is not None:
            self._families.rejections.labels(record.model if record else "", reason).inc()
        left = record is not None and "abort" in record.finish_reasons
        if left or status == str(CLIENT_CLOSED_REQUEST):
            self.client_disconnects.inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics if ``accept`` lists it, else text."""
        offered = {item.split(";")[0].strip().lower() for item in accept.split(",")}
        if _OPENMETRICS in offered:
            body = openmetrics.generate_latest(self._exported)  # type: ignore[no-untyped-call]
            return body, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self._exported), CONTENT_TYPE_PLAIN_0_0_4

    def refused_unread(self, error: ApiError, client: str) -> None:
        """Count an answer that was given before there was a request; ``client`` is no label."""
        self.http_requests.labels("unmatched", "OTHER", str(error.status)).inc()


class HTTPMetricsMiddleware:
    """Counts responses by route template, method and status code.

    Only templates and known methods become labels: whoever can send a request must not be able
    to make new series.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        code = "500"  # what the server sends if the application raises before it answers

        def send_and_note(message: Message) -> Awaitable[None]:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
            return send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            # Starlette's router leaves the route it matched in the scope.
            route = cast(str, getattr(scope.get("route"), "path", "unmatched"))
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            self._metrics.http_requests.labels(route, method, code).inc()
            self._metrics.ended(request_record.current(), code)
