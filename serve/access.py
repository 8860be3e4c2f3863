"""Who may ask: API keys with their limits, and web pages of other origins.

Plain ASGI middleware. Everything needs a key that is not listed as open, so that a new route is
closed until somebody opens it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.serve import request_record
from quire.serve.api_keys import Keyring, KeyUse
from quire.serve.errors import ApiError, response_to

# Monitors, and the page, whose own requests need a key like any other's.
OPEN_PATHS: Final = frozenset({"/", "/health", "/ready"})
OPEN_PREFIX: Final = "/page/"
ADMIN_PATHS: Final = frozenset({"/v1/models/load", "/v1/models/unload"})
_HOW: Final = "Send it as Authorization: Bearer KEY, or as x-api-key."


class AccessControl:
    """Answers 401 without a valid key, 403 without an admin's where one is needed, 429 over limits.

    ``keyring`` None: everybody may use the models, and nobody may load or unload them.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring | None) -> None:
        self._app = app
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        try:
            use = None if _is_open(path) else self._identify(scope)
            if use is not None and scope["method"] == "POST":
                _admit(use)
        except ApiError as error:
            await response_to(scope, error)(scope, receive, send)
            return
        if use is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        use.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            use.running -= 1

    def _identify(self, scope: Scope) -> KeyUse | None:
        is_admin_path = scope["path"] in ADMIN_PATHS
        if self._keyring is None:
            if is_admin_path:
                message = "This needs an admin key, and this server has none: see --admin-key."
                raise ApiError(403, message, code="admin_key_needed")
            return None
        presented = _presented(Headers(scope=scope))
        use = None if presented is None else self._keyring.identify(presented)
        if use is None:
            missing = "An API key is needed." if presented is None else "This API key is not valid."
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, f"{missing} {_HOW}", code="invalid_api_key", headers=headers)
        if (record := request_record.current()) is not None:
            record.api_key = use.key
        if is_admin_path and not use.key.admin:
            raise ApiError(403, "This needs an admin key.", code="admin_key_needed")
        return use


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


def _presented(headers: Headers) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key") or None


def _admit(use: KeyUse) -> None:
    limit = use.key.concurrency
    if limit is not None and use.running >= limit:
        raise ApiError(
            429,
            f"The key {use.key.name} already has {limit} requests running.",
            code="concurrency_limit",
            headers={"Retry-After": "1"},
        )
    if use.bucket is not None and (wait := use.bucket.take()):
        raise ApiError(
            429,
            f"The key {use.key.name} is over its {use.key.requests_per_minute:g} requests a "
            "minute.",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(math.ceil(wait))},
        )


class ForeignOrigins:
    """Answers 403 to what a web page of another origin wants changed or computed.

    Pages can send some requests without asking first. Programs other than browsers send no Origin,
    and those with a scheme of their own, such as desktop applications, are no web pages.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = Headers(scope=scope)
            origin = headers.get("origin", "").lower()
            if not self._is_known(origin, headers.get("host", "").lower()):
                error = ApiError(
                    403,
                    f"Pages of {origin[:200]!r} may not use this server. To let them, start it "
                    "with --allowed-origins and the origin.",
                    code="origin_not_allowed",
                    headers={"Connection": "close"},
                )
                await response_to(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_known(self, origin: str, host: str) -> bool:
        scheme, _, rest = origin.partition("://")
        if not origin or origin in self._origins or "*" in self._origins:
            return True
        if origin == "null":
            return False
        return scheme not in ("http", "https") or rest == host
