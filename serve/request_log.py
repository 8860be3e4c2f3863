"""One line of the log for each request that ran or was refused, and the id it goes by.

A client's own X-Request-Id comes back to it and stands in the log; without one the server makes
one. What was asked and answered is not logged, unless prompts are asked for.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.serve import request_record
from quire.serve.errors import CLIENT_CLOSED_REQUEST, INTERNAL_ERROR, ApiError, response_to
from quire.serve.request_record import RequestRecord
from quire.serve.token_bucket import TokenBucket
from quire.serve.tracing import Tracing

logger = logging.getLogger("quire.requests")

_USABLE_ID: Final = re.compile(r"[!-~]{1,128}")
_REFUSALS_PER_SECOND: Final = 5.0
_REFUSALS_AT_ONCE: Final = 50
_PROBES: Final = ("/health", "/ready")  # asked every few seconds, and their answer is a state


class RequestLog:
    """The outermost middleware: makes the record, and the answer where the application fails.

    Other requests than those that ran a model or were refused, such as a monitor's, are logged at
    debug level only.
    """

    def __init__(
        self, app: ASGIApp, *, prompts: bool = False, tracing: Tracing | None = None
    ) -> None:
        self._app = app
        self._prompts = prompts
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        usable = _USABLE_ID.fullmatch(given)
        record = RequestRecord(
            id=given if usable else f"req_{uuid.uuid4().hex[:24]}", client=_client(scope)
        )
        request_record.begin(record)
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            logger.exception("request %s failed", record.id)
            record.error = type(error).__name__
            if not status:
                await response_to(scope, INTERNAL_ERROR)(scope, receive, send_and_note)
        finally:
            for ended in record.at_end:
                ended()
            status = status or CLIENT_CLOSED_REQUEST
            if self._tracing is not None:
                self._tracing.ended(scope, record, status)
            self._log(scope, record, status)

    def _log(self, scope: Scope, record: RequestRecord, status: int) -> None:
        if scope["path"] in _PROBES:
            level = logging.DEBUG
        elif status >= 500 or "error" in record.finish_reasons:
            level = logging.WARNING
        elif record.sequences or status >= 400:
            level = logging.INFO
        else:
            level = logging.DEBUG
        if not logger.isEnabledFor(level):
            return
        fields = _fields(scope, record, status)
        if self._prompts and record.body:
            fields["body"] = record.body.decode(errors="replace")
        logger.log(level, "%s", _line(fields), extra={"fields": fields})


class RefusalLog:
    """Lines for what never became a request, such as malformed HTTP: some a second, then counts."""

    def __init__(self) -> None:
        self._bucket = TokenBucket(_REFUSALS_PER_SECOND, _REFUSALS_AT_ONCE)
        self._left_out = 0

    def refused(self, error: ApiError, client: str) -> None:
        if self._bucket.take():
            self._left_out += 1
            return
        fields: dict[str, Any] = {"status": error.status, "client": client, "error": error.message}
        if self._left_out:
            fields["left_out"] = self._left_out
            self._left_out = 0
        line = " ".join(f"{name}={_word(value)}" for name, value in fields.items())
        logger.info("refused %s", line, extra={"fields": fields})


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "unknown"


def _fields(scope: Scope, record: RequestRecord, status: int) -> dict[str, Any]:
    """In the order in which they are shown; those that mean nothing here are left out."""
    total = time.monotonic() - record.started
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "id": record.id,
        "client": record.client,
        "key": record.api_key.name if record.api_key else "",
        "model": record.model,
    }
    if record.sequences:
        fields |= {
            "prompt_tokens": record.tokens.prompt,
            "cached_tokens": record.tokens.cached,
            "generated_tokens": record.tokens.generated,
            "queue_seconds": _rounded(record.queue_seconds),
            "first_token_seconds": _rounded(record.first_token_seconds),
            "tokens_per_second": _rounded(record.tokens.generated / total, 1) if total else None,
            "finish_reason": ",".join(record.finish_reasons),
        }
    fields |= {"seconds": _rounded(total), "error": record.error}
    return {name: value for name, value in fields.items() if value not in ("", None)}


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def _line(fields: dict[str, Any]) -> str:
    head = f"{fields['method']} {_word(fields['path'])} {fields['status']}"
    rest = [f"{name}={_word(fields[name])}" for name in list(fields)[3:]]
    return " ".join([head, *rest])


def _word(value: object) -> str:
    """Text that cannot be taken for several fields."""
    text = str(value)
    return text if re.fullmatch(r"[!#-<>-~]+", text) else repr(text)
