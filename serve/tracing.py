"""A span of OpenTelemetry for each request of a model, if somebody wants them.

Names are those of the semantic conventions for generative AI and for HTTP servers. The packages are
an extra (`quire[otel]`) and are imported only where spans are exported. A client's traceparent
header makes the span a part of its trace.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers
from starlette.types import Scope

from quire.serve.request_record import RequestRecord
from quire.serve.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

logger = logging.getLogger("quire.serve")

_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
}
# With which every SDK of OpenTelemetry is told where to send spans.
_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_MISSING: Final = "spans need OpenTelemetry's packages: pip install '.[otel]' in Quire's folder"


class Tracing:
    """Spans go to ``provider``; they are made once a request has ended."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("quire.serve", version("quire"))
        self._extract = TraceContextTextMapPropagator().extract
        self._kind = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)

    def ended(self, scope: Scope, record: RequestRecord, status: int) -> None:
        """A span from the request's begin until now; only requests of a model have one."""
        operation = _OPERATIONS.get(scope["path"])
        if operation is None or scope["method"] != "POST":
            return
        headers = Headers(scope=scope)
        carrier = {key: headers[key] for key in ("traceparent", "tracestate") if key in headers}
        now = time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {record.model}".rstrip(),
            context=self._extract(carrier),
            kind=self._kind,
            attributes=dict(_attributes(operation, scope, record, status)),
            start_time=now - int(1e9 * (time.monotonic() - record.started)),
        )
        if status >= 500 or "error" in record.finish_reasons:
            span.set_status(self._failed)
        span.end(now)

    def close(self) -> None:
        """Send what waits to be sent, which may take seconds."""
        self._provider.shutdown()


def _attributes(
    operation: str, scope: Scope, record: RequestRecord, status: int
) -> Iterator[tuple[str, AttributeValue]]:
    yield "gen_ai.operation.name", operation
    yield "gen_ai.provider.name", "quire"
    yield "http.request.method", "POST"
    yield "url.path", scope["path"]
    yield "http.response.status_code", status
    yield "quire.request.id", record.id
    if (address := scope.get("server")) is not None:
        yield "server.address", address[0]
        yield "server.port", address[1]
    if record.model:
        yield "gen_ai.request.model", record.model
    if (asked := record.first_sequence) is not None and operation != "embeddings":
        yield "gen_ai.request.max_tokens", asked.max_tokens
        yield "gen_ai.request.temperature", asked.sampling.temperature
        yield "gen_ai.request.top_p", asked.sampling.top_p
        yield "gen_ai.request.top_k", asked.sampling.top_k
        yield "gen_ai.request.presence_penalty", asked.sampling.presence_penalty
        yield "gen_ai.request.frequency_penalty", asked.sampling.frequency_penalty
        if asked.sampling.seed is not None:
            yield "gen_ai.request.seed", asked.sampling.seed
    if record.sequences:
        yield "gen_ai.response.model", record.model
        yield "gen_ai.request.choice.count", record.sequences
        yield "gen_ai.response.finish_reasons", list(record.finish_reasons)
        yield "gen_ai.usage.input_tokens", record.tokens.prompt
        yield "gen_ai.usage.cache_read.input_tokens", record.tokens.cached
        yield "gen_ai.usage.output_tokens", record.tokens.generated
    if record.first_token_seconds is not None:
        yield "gen_ai.response.time_to_first_chunk", record.first_token_seconds
    if record.queue_seconds is not None:
        yield "quire.queue_time", record.queue_seconds
    if status >= 400 or record.error:
        yield "error.type", record.error_code or str(status)


def make_tracing(endpoint: str | None, environ: Mapping[str, str]) -> Tracing | None:
    """Spans sent by OTLP over HTTP; None where neither ``endpoint`` nor a variable asks for them.

    OTEL_ variables say the rest: headers, the service's name, the share of traces that is kept.

    Raises:
        SettingsError: ``endpoint`` is given and the packages are not installed.
    """
    if endpoint is None and not any(environ.get(name) for name in _VARIABLES):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        if endpoint is not None:
            raise SettingsError(f"--otlp-traces-endpoint: {_MISSING}") from None
        logger.warning("%s is set, but %s", next(filter(environ.get, _VARIABLES)), _MISSING)
        return None
    name = environ.get("OTEL_SERVICE_NAME", "quire")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)
