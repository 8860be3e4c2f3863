"""Who may ask: keys over HTTP, their limits, and pages of other origins."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import sys
import urllib.request

import pytest
from fake_backend import MODEL, FakeBackend, Script, one_model_app, served_model, serving
from fake_worker import STALL
from starlette.routing import Route
from test_serve_command import SCRIPT, Server, model, run_to_end, serve, until  # noqa: F401

from quire.serve.api_keys import ApiKey, Keyring, hash_key

KEY, ADMIN = "sk-user", "sk-admin"
OPEN = {"/", "/health", "/ready"}


def keyring(**options: object) -> Keyring:
    return Keyring(
        {
            "user": ApiKey(sha256=hash_key(KEY), name="user", **options),
            "admin": ApiKey(sha256=hash_key(ADMIN), name="admin", admin=True),
        }
    )


def app(backend: FakeBackend | None = None, **options: object):
    return one_model_app(backend or FakeBackend(), served_model(), **options)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


BODY = {"model": MODEL, "prompt": "ab", "max_tokens": 1}


def test_every_route_needs_a_key_unless_it_is_open():
    guarded = app(keyring=keyring())
    routes = [route for route in guarded.routes if isinstance(route, Route)]
    assert len(routes) > 12
    with serving(guarded) as server:
        for route in routes:
            path = route.path.replace("{id:path}", "x").replace("{id}", "x")
            for method in route.methods:
                status = server.request(method, path, {} if method == "POST" else None).status
                is_open = path in OPEN or path.startswith("/page/")
                assert (status != 401) is is_open, (method, path, status)
        assert server.request("GET", "/nowhere").status == 401
        assert MODEL not in server.request("GET", "/").body.decode()


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "//metrics", "/health/../metrics"])
def test_what_a_request_without_a_key_is_told(path):
    with serving(app(keyring=keyring())) as server:
        reply = server.request("GET", path)
        assert reply.status == 401
        assert reply.error["code"] == "invalid_api_key"
        assert "Authorization: Bearer" in reply.error["message"]
        assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (bearer(KEY), 200),
        ({"Authorization": f"bearer {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
        (bearer(KEY + "x"), 401),
        (bearer(KEY[:-1]), 401),
        (bearer(""), 401),
        ({"Authorization": KEY}, 401),
        ({"Authorization": f"Basic {KEY}"}, 401),
    ],
)
def test_which_keys_are_taken(headers, status):
    with serving(app(keyring=keyring())) as server:
        assert server.request("POST", "/v1/completions", BODY, headers).status == status


def test_anthropics_path_answers_in_its_own_shape():
    with serving(app(keyring=keyring())) as server:
        reply = server.request("POST", "/v1/messages", {})
        assert (reply.status, reply.json["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("path", ["/v1/models/load", "/v1/models/unload"])
def test_models_are_loaded_by_admins_only(path):
    with serving(app(keyring=keyring())) as server:
        assert server.request("POST", path, {"model": MODEL}).status == 401
        reply = server.request("POST", path, {"model": MODEL}, bearer(KEY))
        assert (reply.status, reply.error["code"]) == (403, "admin_key_needed")
        assert server.request("POST", path, {"model": MODEL}, bearer(ADMIN)).status != 403
    with serving(app()) as server:
        reply = server.request("POST", path, {"model": MODEL})
        assert (reply.status, reply.error["code"]) == (403, "admin_key_needed")


def test_a_key_has_its_requests_a_minute():
    with serving(app(keyring=keyring(requests_per_minute=3))) as server:
        replies = [server.request("POST", "/v1/completions", BODY, bearer(KEY)) for _ in range(4)]
        assert [reply.status for reply in replies] == [200, 200, 200, 429]
        assert replies[-1].error["code"] == "rate_limit_exceeded"
        assert 1 <= int(replies[-1].headers["retry-after"]) <= 20
        assert server.request("POST", "/v1/completions", BODY, bearer(ADMIN)).status == 200
        assert server.request("GET", "/v1/models", headers=bearer(KEY)).status == 200


def test_a_key_has_its_requests_at_a_time():
    script = Script([[0], "hold", [0]])
    backend = FakeBackend([script])
    with serving(app(backend, keyring=keyring(concurrency=1))) as server:
        body = json.dumps({**BODY, "max_tokens": 2, "stream": True}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with server.connect(head.encode() + body) as first:
            assert b"200 OK" in first.recv(1000)
            reply = server.request("POST", "/v1/completions", BODY, bearer(KEY))
            assert (reply.status, reply.error["code"]) == (429, "concurrency_limit")
            script.released = True
            while b"[DONE]" not in first.recv(1000):
                pass
        until(lambda: server.request("POST", "/v1/completions", BODY, bearer(KEY)).status == 200)


def test_a_key_has_its_share_of_the_queue_and_a_cache_of_its_own(model, tmp_path):  # noqa: F811
    keys = tmp_path / "keys.toml"
    keys.write_text(
        "".join(
            f'[{name}]\nsha256 = "{hash_key(name)}"\nqueue_share = 0.5\n' for name in ("a", "b")
        )
    )
    flags = ("--api-key-file", str(keys), "--max-num-seqs", "2", "--max-queue", "2")
    body = {"model": "bytes", "prompt": [STALL, 1], "max_tokens": 9, "stream": True}

    def ask(server: Server, key: str, **fields: object):
        return server.request("POST", "/v1/completions", {**body, **fields}, **bearer(key))

    with serve(model, tmp_path, "ok", *flags) as server, ask(server, "a") as first:
        first.readline()
        with ask(server, "a") as second:
            second.readline()
            with ask(server, "a") as third:
                assert third.status == 429
                assert "its share" in json.load(third)["error"]["message"]
            with ask(server, "b") as other:
                assert other.status == 200
            with ask(server, "b", prompt=[[1], [2], [3]]) as many:
                assert many.status == 400
                assert json.load(many)["error"]["param"] == "prompt"
        until(lambda: "key=a" in server.log.read_text())


def test_another_address_than_this_machines_needs_keys(model):  # noqa: F811
    result = run_to_end(model, "ok", "--host", "0.0.0.0", "--port", "0")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "--host 0.0.0.0" in line
    assert "--api-key-file" in line


# ---- web pages

PAGE = {"Origin": "https://evil.example"}


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost:3000", 403),
        ("https://chat.example", 200),
        ("tauri://localhost", 200),
        ("own", 200),
        (None, 200),
    ],
)
def test_which_origins_may_ask(origin, status):
    with serving(app(allowed_origins=("https://chat.example",))) as server:
        own = f"http://{server.host}:{server.port}"
        headers = {} if origin is None else {"Origin": own if origin == "own" else origin}
        reply = server.request("POST", "/v1/completions", BODY, headers)
        assert reply.status == status
        if status == 403:
            assert reply.error["code"] == "origin_not_allowed"
            assert "--allowed-origins" in reply.error["message"]
            assert "access-control-allow-origin" not in reply.headers


def test_a_listed_page_may_read_answers_and_errors():
    origin = "https://chat.example"
    with serving(app(allowed_origins=(origin,), keyring=keyring())) as server:
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = server.request("OPTIONS", "/v1/completions", headers=asked)
        assert preflight.status == 200
        assert preflight.headers["access-control-allow-origin"] == origin
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        for headers, status in (({}, 401), (bearer(KEY), 200)):
            reply = server.request("POST", "/v1/completions", BODY, {"Origin": origin, **headers})
            assert reply.status == status
            assert reply.headers["access-control-allow-origin"] == origin
        foreign = server.request("OPTIONS", "/v1/completions", headers={**asked, **PAGE})
        assert foreign.headers.get("access-control-allow-origin") != PAGE["Origin"]


def test_without_listed_origins_no_page_is_told_anything():
    with serving(app()) as server:
        asked = {**PAGE, "Access-Control-Request-Method": "POST"}
        assert server.request("OPTIONS", "/v1/completions", headers=asked).status == 405
        reply = server.request("GET", "/v1/models", headers=PAGE)
        assert "access-control-allow-origin" not in reply.headers


# ---- TLS


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_https(model, tmp_path):  # noqa: F811
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    process = subprocess.Popen(
        [
            *(sys.executable, SCRIPT, "ok"),
            *("--model", str(model), "--port", "0"),
            *("--tls-cert-file", str(cert), "--tls-key-file", str(key)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = process.stdout.readline()
        url = line.split()[-1].removesuffix("/v1")
        assert url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=cert)
        with urllib.request.urlopen(f"{url}/ready", context=context) as response:
            assert response.status == 200
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def test_a_certificate_that_cannot_be_used_is_one_line(model, tmp_path):  # noqa: F811
    (tmp_path / "cert.pem").write_text("no certificate")
    for flags, message in (
        (("--tls-cert-file", "x"), "needs both"),
        (("--tls-cert-file", "/none", "--tls-key-file", "/none"), "No such file"),
        (("--tls-cert-file", f"{tmp_path}/cert.pem", "--tls-key-file", "/none"), "cannot use"),
    ):
        result = run_to_end(model, "ok", "--port", "0", *flags)
        assert result.returncode == 2
        [line] = result.stderr.splitlines()
        assert message in line
