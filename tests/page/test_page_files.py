"""The page's files: what browsers may do with them, how they are cached, what they contain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from quire.serve.routes import page

HTML = {"Accept": "text/html,application/xhtml+xml"}
FILES = sorted(
    entry.name
    for entry in files("quire.serve.page").iterdir()
    if entry.name.endswith((".js", ".css", ".svg"))
)


async def index(request: Request) -> Response:
    return JSONResponse({"name": "quire"})


@pytest.fixture(scope="module")
def client() -> Iterator[object]:
    from starlette.testclient import TestClient

    with TestClient(Starlette(routes=page.routes(index))) as client:
        yield client


def test_browsers_get_the_page_and_programs_the_index(client):
    shown = client.get("/", headers=HTML)
    assert shown.headers["content-type"] == "text/html; charset=utf-8"
    listed = client.get("/", headers={"Accept": "*/*"})
    assert listed.json() == {"name": "quire"}
    assert shown.headers["vary"] == listed.headers["vary"] == "Accept"


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_the_policy_allows_this_server_only(client, path):
    headers = client.get(path, headers=HTML).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_a_browser_downloads_a_file_once(client, path):
    first = client.get(path, headers=HTML)
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get(path, headers={**HTML, "If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get(path, headers={**HTML, "If-None-Match": '"x"'}).content == first.content
    head = client.head(path, headers=HTML)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)


@pytest.mark.parametrize("path", ["/", "/page/app.js"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_files_are_only_read(client, method, path):
    assert client.request(method, path).status_code == 405


@pytest.mark.parametrize(
    "path", ["/page/", "/page/nope.js", "/page/__init__.py", "/page/../app.py", "/page/%2e%2e/x"]
)
def test_there_is_nothing_else(client, path):
    assert client.get(path, headers=HTML).status_code == 404


@pytest.mark.parametrize("name", ["index.html", *FILES])
def test_no_file_reaches_elsewhere_or_makes_markup_from_text(name):
    text = files("quire.serve.page").joinpath(name).read_text()
    addresses = set(re.findall(r"https?://[\w.]+", text))
    assert addresses <= {"http://www.w3.org"}  # the namespace of SVG
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert forbidden not in text
    assert not re.search(r"\son\w+=|style=|javascript:", text)


def test_every_import_is_a_file_of_the_page():
    for name in FILES:
        text = files("quire.serve.page").joinpath(name).read_text()
        assert set(re.findall(r'from "\./([\w.]+)"', text)) <= set(FILES)
