"""What ``/metrics`` exposes, in a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import version
from typing import cast, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.engine.messages import FinishReason, Ready, WorkerStats
from quire.serve.errors import ApiError
from quire.serve.log_writer import LogWriter

# The _created series only double the exposition; promtool takes them for gauges without a unit.
disable_created_metrics()  # type: ignore[no-untyped-call]

_OPENMETRICS = "application/openmetrics-text"
_FIRST_TOKEN_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0),
)
# A small model on a fast chip is at 2 ms per token.
_INTER_TOKEN_BUCKETS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
_E2E_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
_REJECTIONS = ("queue_full", "loading", "restarting", "draining")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class WorkerCollector(Collector):
    """Series that mirror the worker, all read from one snapshot so that they agree.

    The worker's own totals start at zero with every process; ``lost`` adds them to a base, so
    the exported counters never go backwards.
    """

    def __init__(self) -> None:
        self.stats: WorkerStats | None = None
        self.in_flight: Callable[[], int] = lambda: 0
        self._info: Ready | None = None
        self._last_step: float | None = None  # monotonic
        self._base = dict.fromkeys(_WORKER_COUNTERS, 0)

    def ready(self, info: Ready) -> None:
        self._info = info

    def mark_step(self, now: float) -> None:
        self._last_step = now

    def lost(self) -> None:
        self._base = {name: self._total(name, self.stats) for name in self._base}
        self.stats = None
        self._info = None

    def collect(self) -> Iterator[Metric]:
        stats, info = self.stats, self._info
        yield _gauge("model_ready", "1 while the worker takes requests.", info is not None)
        if info is not None:
            model = GaugeMetricFamily(
                "quire_model_info",
                "What is being served; always 1.",
                labels=("architecture", "device", "dtype"),
            )
            model.add_metric((info.architecture, info.device, info.dtype), 1)
            yield model
            yield _gauge(
                "model_max_tokens", "Prompt + output tokens of one request.", info.max_model_len
            )
        yield _gauge(
            "requests_running",
            "Requests in the worker's batch.",
            stats.requests_running if stats else 0,
        )
        yield _gauge(
            "requests_waiting",
            "Requests queued in the worker.",
            stats.requests_waiting if stats else 0,
        )
        yield _gauge(
            "last_step_age_seconds",
            "Time since the worker's last step while requests are in flight, else 0.",
            time.monotonic() - self._last_step if self._last_step and self.in_flight() else 0,
        )
        blocks = {"used": 0, "cached": 0, "free": 0}
        memory = {"active": 0, "cache": 0, "peak": 0, "weights": 0, "kv_cache": 0, "states": 0}
        if info:
            blocks["free"] = info.num_blocks
            memory |= {
                "weights": info.weight_bytes,
                "kv_cache": info.kv_cache_bytes,
                "states": info.state_bytes,
            }
            if (limits := info.limits) is not None:
                memory |= {
                    "activations": limits.activations,
                    "limit": limits.limit,
                    "cache_limit": limits.cache,
                    "wired_limit": limits.wired,
                }
        if stats:
            blocks = {
                "used": stats.blocks_used,
                "cached": stats.blocks_cached,
                "free": stats.blocks_free,
            }
            memory |= {
                "active": stats.memory_active,
                "cache": stats.memory_cache,
                "peak": stats.memory_peak,
            }
        yield _labelled_gauge("kv_blocks", "KV blocks by state.", "state", blocks)
        slots = {"used": 0, "cached": 0, "free": info.num_state_slots if info else 0}
        if stats and stats.states:
            slots = {
                "used": stats.states.used,
                "cached": stats.states.cached,
                "free": stats.states.free,
            }
        yield _labelled_gauge(
            "state_slots", "Slots for states of recurrent layers, by state.", "state", slots
        )
        yield _labelled_gauge("memory_bytes", "Device memory by kind.", "kind", memory)
        for name, (_, help) in _WORKER_COUNTERS.items():
            yield CounterMetricFamily(f"quire_{name}", help, value=self._total(name, stats))

    def _total(self, name: str, stats: WorkerStats | None) -> int:
        read, _ = _WORKER_COUNTERS[name]
        return self._base[name] + (read(stats) if stats else 0)


_WORKER_COUNTERS: dict[str, tuple[Callable[[WorkerStats], int], str]] = {
    "steps": (lambda stats: stats.steps, "Steps the engine has run."),
    "preemptions": (
        lambda stats: stats.preemptions,
        "Requests put back into the queue because the KV blocks ran out.",
    ),
    "memory_faults": (
        lambda stats: stats.memory_faults,
        "Steps that the device had no memory for; they were tried again or ended their requests.",
    ),
    "evictions": (lambda stats: stats.evictions, "Cached KV blocks given to a new owner."),
    "prefix_cache_query_tokens": (
        lambda stats: stats.prefix_queries,
        "Prompt tokens looked up in the prefix cache.",
    ),
    "prefix_cache_hit_tokens": (
        lambda stats: stats.prefix_hits,
        "Prompt tokens found in the prefix cache.",
    ),
    "prefix_cache_page_hit_tokens": (
        lambda stats: stats.states.prefix_pages if stats.states else stats.prefix_hits,
        "Prompt tokens whose pages were found, whether or not a recurrent layer's state was.",
    ),
}


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"quire_{name}", help, value=float(value))


def _labelled_gauge(name: str, help: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"quire_{name}", help, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


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
    """Every series of the server. Label children are made here, not on the way of a token."""

    def __init__(self, log: LogWriter | None = None) -> None:
        self.registry = CollectorRegistry()
        self.worker = WorkerCollector()
        self.registry.register(self.worker)
        if log is not None:
            self.registry.register(LogCollector(log))
        ProcessCollector(registry=self.registry)
        build = self._gauge("build_info", "The running version; always 1.", "version")
        build.labels(version("quire")).set(1)

        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "From submission to the first token.",
            _FIRST_TOKEN_BUCKETS,
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Between one token of a request and the next.",
            _INTER_TOKEN_BUCKETS,
        )
        self.e2e_latency = self._histogram(
            "e2e_latency_seconds", "From submission to the end of the request.", _E2E_BUCKETS
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of started requests.")
        self.prompt_tokens_cached = self._counter(
            "prompt_tokens_cached", "Prompt tokens whose KV came from the prefix cache."
        )
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated.")
        self.worker_restarts = self._counter("worker_restarts", "Times the worker was replaced.")

        requests = self._counter("requests", "Finished requests.", "finish_reason")
        self.requests: dict[FinishReason, Counter] = {
            reason: requests.labels(reason) for reason in get_args(FinishReason)
        }
        rejections = self._counter("admission_rejections", "Requests turned away.", "reason")
        self.admission_rejections = {reason: rejections.labels(reason) for reason in _REJECTIONS}
        self.http_requests = self._counter(
            "http_requests", "HTTP responses.", "route", "method", "code"
        )

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics if ``accept`` lists it, else text."""
        offered = {item.split(";")[0].strip().lower() for item in accept.split(",")}
        if _OPENMETRICS in offered:
            body = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
            return body, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def refused_unread(self, error: ApiError, client: str) -> None:
        """Count an answer that was given before there was a request; ``client`` is no label."""
        self.http_requests.labels("unmatched", "OTHER", str(error.status)).inc()

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"quire_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"quire_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"quire_{name}", help, buckets=buckets, registry=self.registry)


class HTTPMetricsMiddleware:
    """Counts responses by route template, method and status code.

    Only templates and known methods become labels: whoever can send a request must not be able
    to make new series.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._http_requests = metrics.http_requests

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
            self._http_requests.labels(route, method, code).inc()
