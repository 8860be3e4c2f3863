"""The page's static files, and what a browser may do with them.

The files are read once at the start. Each has an entity tag, so a browser asks every time and
downloads again only after an upgrade.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Handler = Callable[[Request], Awaitable[Response]]

# Nothing from elsewhere, nothing inline, no markup from strings: what a model says is text.
CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_MEDIA_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}

_INDEX: Final = "index.html"


def routes(index: Handler) -> list[Route]:
    """GET and HEAD of / and of each file below /page/.

    ``index`` answers / to clients that do not ask for HTML, such as curl.
    """
    contents = {
        entry.name: entry.read_bytes()
        for entry in files("quire.serve.page").iterdir()
        if entry.name.rpartition(".")[2] in _MEDIA_TYPES
    }
    page = _static(_INDEX, contents.pop(_INDEX))

    async def root(request: Request) -> Response:
        wants_html = "text/html" in request.headers.get("accept", "").lower()
        response = await (page if wants_html else index)(request)
        response.headers["Vary"] = "Accept"
        return response

    assets = [
        Route(f"/page/{name}", _static(name, content), methods=["GET"])
        for name, content in sorted(contents.items())
    ]
    return [Route("/", root, methods=["GET"]), *assets]


def _static(name: str, content: bytes) -> Handler:
    """Answers with one file, or 304 to a client that has it already."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag, "Content-Type": _MEDIA_TYPES[name.rpartition(".")[2]]}

    async def serve(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if tag in (item.strip().removeprefix("W/") for item in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return serve
