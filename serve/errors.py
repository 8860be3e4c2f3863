"""Errors as clients see them: one envelope, ``{"error": {message, type, param, code}}``.

Every failure reaches the client through :data:`exception_handlers`, or as one event when a stream
has already begun. This file gives errors of the backend their statuses; other modules raise
:class:`ApiError` with their own.

    400 invalid_request_error   a field is wrong, unknown or not supported; ``param`` names it
    401 invalid_request_error   the API key is missing or unknown
    403 invalid_request_error   the key, the Host header or the Origin may not do this
    404 invalid_request_error   unknown path, model (code ``model_not_found``) or stored answer
    409 invalid_request_error   the model is in use, or always loaded, and cannot be unloaded
    408, 413, 415               the body is too slow, too large or not JSON
    408, 414, 431               so is the URL or the head: serve/http_protocol.py
    429 rate_limit_error        the queue is full, or the key's limit reached; Retry-After
    500 server_error            the generation failed
    503 server_error            the model is loading, restarting or draining; Retry-After
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from quire.serve.backend import BackendError, QueueFull, Unavailable
from quire.serve.request_record import note_error

# Never reaches a client: the connection is gone. The number is what access logs commonly show.
CLIENT_CLOSED_REQUEST = 499


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    error: ErrorDetail


class ApiError(Exception):
    """A failure with everything its response needs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def envelope(self) -> ErrorEnvelope:
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        else:
            kind = "invalid_request_error"
        return ErrorEnvelope(ErrorDetail(self.message, kind, self.param, self.code))

    @property
    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.envelope),
            self.status,
            headers=self.headers,
            media_type="application/json",
        )


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_after: int) -> ApiError:
    headers = {"Retry-After": str(max(retry_after, 1))}
    return ApiError(503, message, code="unavailable", headers=headers)


def from_backend(error: BackendError) -> ApiError:
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(max(error.retry_after, 1))}
        return ApiError(429, error.message, code="queue_full", headers=headers)
    if isinstance(error, Unavailable):
        return unavailable(error.message, error.retry_after)
    return ApiError(500, error.message, code="generation_failed")


INTERNAL_ERROR = ApiError(500, "The server failed to answer this request; its log says why.")


def _from_http(request: Request, error: HTTPException) -> ApiError:
    path = request.scope["path"]
    if error.status_code == 404:
        message = f"Unknown path {path}; GET / lists what this server offers."
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.method} is not allowed on {path}; use {allowed}."
    else:
        message = error.detail
    return ApiError(error.status_code, message, headers=error.headers)


# Anthropic's names of errors, by status.
_MESSAGE_ERRORS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def message_error(error: ApiError) -> dict[str, Any]:
    """The error in the shape of Anthropic's API."""
    kind = _MESSAGE_ERRORS.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def response_to(scope: Scope, error: ApiError) -> Response:
    """In the shape of the API that the path belongs to; the request's record tells of it."""
    note_error(error.message, error.code)
    if not scope["path"].startswith("/v1/messages"):
        return error.response
    request_id = f"req_{uuid.uuid4().hex[:24]}"
    return Response(
        msgspec.json.encode(message_error(error) | {"request_id": request_id}),
        error.status,
        headers={**(error.headers or {}), "request-id": request_id},
        media_type="application/json",
    )


async def _on_api_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ApiError)
    return response_to(request.scope, exc)


async def _on_backend_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, BackendError)
    return response_to(request.scope, from_backend(exc))


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return response_to(request.scope, _from_http(request, exc))


async def _on_disconnect(request: Request, exc: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


exception_handlers: Mapping[Any, Any] = {
    ApiError: _on_api_error,
    BackendError: _on_backend_error,
    HTTPException: _on_http_exception,
    ClientDisconnect: _on_disconnect,
}
