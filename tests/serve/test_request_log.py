"""One line for each request that ran or was refused: what it says, and what it never says."""

from __future__ import annotations

import json
import logging
import re
import socket

import pytest
from fake_backend import MODEL, FakeBackend, Script, one_model_app, post, served_model, serving
from fake_worker import ERROR, STALL
from test_serve_command import model, run_to_end, serve, until  # noqa: F401

from quire.serve.http_protocol import ConnectionGuard, HttpLimits
from quire.serve.request_log import RefusalLog

SECRET = "the plan for tomorrow"


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "quire.requests")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "quire.requests"]


def fields_of(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=('[^']*'|\"[^\"]*\"|\S+)", line))


def completion(server, **fields: object):
    return server.request("POST", "/v1/completions", {"model": MODEL, "prompt": "ab", **fields})


def test_an_id_comes_back_or_is_made():
    with serving(one_model_app(FakeBackend(), served_model())) as server:
        given = server.request("GET", "/health", headers={"X-Request-Id": "abc-1"})
        assert given.headers["x-request-id"] == "abc-1"
        made = [server.request("GET", "/health").headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        for unusable in ("a b", "x" * 129, "\xe9"):
            reply = server.request("GET", "/nowhere", headers={"X-Request-Id": unusable})
            assert reply.headers["x-request-id"].startswith("req_")


def test_two_requests_of_one_id_do_not_meet():
    backend = FakeBackend([Script([[65]]), Script([[66]])])
    with serving(one_model_app(backend, served_model())) as server:
        texts = {
            server.request(
                "POST",
                "/v1/completions",
                {"model": MODEL, "prompt": "ab", "max_tokens": 1},
                headers={"X-Request-Id": "same"},
            ).json["choices"][0]["text"]
            for _ in range(2)
        }
        assert len(texts) == 2


def test_a_refused_request_says_why(lines):
    with serving(one_model_app(FakeBackend(), served_model())) as server:
        completion(server, temperature=9)
        server.request("POST", "/v1/messages", {"model": "none"})
        server.request("GET", "/nowhere")
    bad, message, unknown = lines()
    assert bad.startswith("POST /v1/completions 400 id=req_")
    assert "temperature" in fields_of(bad)["error"]
    assert message.startswith("POST /v1/messages 400 ")
    assert "error=" in message
    assert unknown.startswith("GET /nowhere 404 ")


def test_monitors_leave_no_lines(lines):
    with serving(one_model_app(FakeBackend(), served_model())) as server:
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            assert server.request("GET", path).status == 200
    assert lines() == []


def test_a_failure_of_the_server_is_answered_and_logged(lines):
    broken = FakeBackend()
    broken.admit = lambda: 1 / 0
    with serving(one_model_app(broken, served_model())) as server:
        reply = completion(server)
        assert reply.status == 500
        assert reply.error["type"] == "server_error"
        assert "x-request-id" in reply.headers
    assert fields_of(lines()[-1])["error"] == "ZeroDivisionError"


def test_a_client_cannot_forge_lines(lines):
    with serving(one_model_app(FakeBackend(), served_model())) as server:
        server.request("GET", "/x%0aGET%20/v1%20200", headers={"X-Request-Id": 'a"b=c'})
    [line] = lines()
    assert "\n" not in line
    assert line.startswith("GET '/x\\nGET /v1 200' 404 ")


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_all_of_a_request_over_a_worker(model, tmp_path):  # noqa: F811
    with serve(model, tmp_path, "ok", "--log-format", "json") as server:
        with server.request(
            "POST",
            "/v1/completions",
            {"model": "bytes", "prompt": [65, 66, 67, 68], "max_tokens": 3},
            **{"X-Request-Id": "mine"},
        ) as response:
            assert response.headers["X-Request-Id"] == "mine"
            response.read()
        with server.complete([[65, 66], [67, 68]], max_tokens=2) as response:
            response.read()
        with server.complete([ERROR, 66], max_tokens=3, stream=True) as response:
            response.read()
        with server.complete([STALL, 66], max_tokens=3, stream=True) as response:
            response.readline()
        until(lambda: "abort" in server.log.read_text())
        logged = json_lines(server.log.read_text())
    one, two, failed, left = [line for line in logged if line["logger"] == "quire.requests"]
    assert one["id"] == "mine"
    assert one["client"].startswith("127.0.0.1:")
    assert (one["path"], one["status"], one["model"]) == ("/v1/completions", 200, "bytes")
    assert (one["prompt_tokens"], one["cached_tokens"], one["generated_tokens"]) == (4, 2, 3)
    assert one["finish_reason"] == "length"
    assert one["seconds"] >= one["first_token_seconds"] >= one["queue_seconds"] >= 0
    assert one["tokens_per_second"] > 0
    assert (two["prompt_tokens"], two["generated_tokens"]) == (4, 4)
    assert (failed["finish_reason"], failed["error"]) == ("error", "The scripted failure.")
    assert failed["level"] == "WARNING"
    assert left["finish_reason"] == "abort"
    for line in logged:
        assert set(line) >= {"time", "level", "logger"}


def test_prompts_are_logged_only_when_asked_for(model, tmp_path):  # noqa: F811
    for flags, expected in (((), False), (("--log-prompts", "yes"), True)):
        with serve(model, tmp_path, "ok", "--log-level", "debug", *flags) as server:
            with server.request(
                "POST",
                f"/v1/completions?key={SECRET.replace(' ', '+')}",
                {"model": "bytes", "prompt": SECRET, "max_tokens": 2},
                Authorization="Bearer sk-very-secret",
            ) as response:
                response.read()
            until(lambda: "finish_reason" in server.log.read_text())
            text = server.log.read_text()
        assert (SECRET in text) is expected
        assert "sk-very-secret" not in text
        assert SECRET.replace(" ", "+") not in text


def test_errors_of_a_start_are_json_too(tmp_path):
    result = run_to_end(tmp_path / "none", "ok", "--port", "0", "--log-format", "json")
    [line] = json_lines(result.stderr)
    assert line["level"] == "CRITICAL"
    assert "no such folder" in line["message"]


def test_malformed_http_is_logged_with_its_client_and_not_without_end(lines):
    log = RefusalLog()
    guard = ConnectionGuard(HttpLimits(), log.refused)
    with serving(one_model_app(FakeBackend(), served_model()), guard) as server:
        for _ in range(200):
            with socket.create_connection((server.host, server.port)) as connection:
                connection.sendall(b"NONSENSE\r\n\r\n")
                assert b"400" in connection.recv(4096)
        with server.connect(post("/v1/completions", {"model": MODEL, "prompt": "a"})) as good:
            assert b"200" in good.recv(100)
    refused = [line for line in lines() if line.startswith("refused")]
    assert fields_of(refused[0])["client"].startswith("127.0.0.1:")
    assert "not valid HTTP" in refused[0]
    assert 50 <= len(refused) < 150
