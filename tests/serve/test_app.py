"""Routes, probes, the error envelope everywhere, and a server that is told to stop."""

import dataclasses
import signal
import time

import anthropic
import openai
import pytest
from fake_backend import MODEL, FakeBackend, Script, one_model_app, post, served_model, serving

from quire.serve.app import create_app
from quire.serve.metrics import Metrics
from quire.serve.registry import Registry, Served

SERVED = served_model()
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def backend():
    return FakeBackend()


@pytest.fixture(scope="module")
def server(backend):
    with serving(one_model_app(backend, SERVED)) as server:
        yield server


def test_models_can_be_listed_and_retrieved(server):
    card = {
        "id": MODEL,
        "object": "model",
        "type": "model",
        "created": SERVED.created,
        "created_at": "2023-11-14T22:13:20Z",
        "display_name": MODEL,
        "max_model_len": 256,
        "context_length": 256,
        "chat_template_kwargs": [],
        "owned_by": "quire",
    }
    listing = server.request("GET", "/v1/models").json
    assert listing == {
        "object": "list",
        "data": [card],
        "first_id": MODEL,
        "last_id": MODEL,
        "has_more": False,
    }
    assert server.request("GET", f"/v1/models/{MODEL}").json == card
    assert server.request("GET", "/v1/models/test%2Fmodel").json == card
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
    with anthropic.Anthropic(base_url=server.url, api_key="none") as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).created_at.year == 2023


def test_further_names_of_the_model():
    registry = Registry([Served(SERVED, FakeBackend())], ["claude-*", "gpt-4o"])
    with serving(create_app(registry, Metrics())) as server:
        for name in (MODEL, "claude-opus-9", "gpt-4o"):
            answer = server.request("POST", CHAT, {**BODY, "model": name})
            assert answer.json["model"] == MODEL
        assert server.request("POST", CHAT, {**BODY, "model": "gpt-4o-mini"}).status == 404


def test_a_template_is_applied_without_generating(server):
    body = {**BODY, "add_generation_prompt": False}
    assert server.request("POST", "/apply-template", body).json == {"prompt": "<user>hi\n"}
    assert server.request("POST", "/apply-template", BODY).json["prompt"].endswith("<assistant>")
    error = server.request("POST", "/apply-template", {**BODY, "messages": []}).error
    assert error["param"] == "messages"


@pytest.mark.parametrize("name", ["other", "../../etc/passwd", "%2e%2e/x", "x%00y", "test"])
def test_an_unknown_model_is_not_found(server, name):
    reply = server.request("GET", f"/v1/models/{name}")
    assert reply.status == 404
    assert reply.error["code"] == "model_not_found"


def test_text_to_tokens_and_back(server):
    tokens = server.request("POST", "/tokenize", {"model": MODEL, "prompt": "aé"}).json
    assert tokens == {
        "tokens": SERVED.encoder.tokenizer.encode("aé").ids,
        "count": 3,
        "max_model_len": 256,
    }
    text = server.request("POST", "/detokenize", {"tokens": tokens["tokens"]}).json
    assert text == {"prompt": "aé"}
    chat = server.request("POST", "/tokenize", {"messages": BODY["messages"]}).json
    assert SERVED.encoder.tokenizer.decode(chat["tokens"]) == "<user>hi\n<assistant>"
    more = {"messages": BODY["messages"], "add_generation_prompt": False}
    chat = server.request("POST", "/tokenize", more).json
    assert SERVED.encoder.tokenizer.decode(chat["tokens"]) == "<user>hi\n"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {"model": "other", "prompt": "a"}, 404),
        ("/tokenize", {}, 400),
        ("/detokenize", {"model": "other", "tokens": []}, 404),
        ("/detokenize", {"tokens": "abc"}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [2**40]}, 400),
        ("/detokenize", {"tokens": [1, 99_999]}, 400),
        ("/detokenize", {"tokens": [1] * (2**20 + 1)}, 400),
    ],
)
def test_bad_token_requests_are_refused(server, path, body, status):
    reply = server.request("POST", path, body)
    assert reply.status == status
    assert reply.error["param"]


def test_the_index_lists_the_endpoints(server):
    index = server.request("GET", "/").json
    assert index["model"] == MODEL
    assert {CHAT, "/openapi.json", "/v1/models/{id}"} <= set(index["endpoints"])


@pytest.mark.parametrize(
    ("alive", "info", "health", "readiness"),
    [(True, True, 200, 200), (True, False, 200, 503), (False, False, 503, 503)],
)
def test_probes_follow_the_worker(server, backend, alive, info, health, readiness):
    before = backend.info
    backend.alive, backend.info = alive, before if info else None
    try:
        assert server.request("GET", "/health").status == health
        reply = server.request("GET", "/ready")
        assert reply.status == readiness
        if readiness == 503:
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.error["type"] == "server_error"
        assert server.request("GET", "/metrics").status == 200
    finally:
        backend.alive, backend.info = True, before


def test_metrics_are_those_the_app_was_given():
    metrics = Metrics()
    metrics.for_model("test/model").worker_restarts.inc(7)
    with serving(create_app(Registry([Served(SERVED, FakeBackend())]), metrics)) as server:
        reply = server.request("GET", "/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b'quire_worker_restarts_total{model="test/model"} 7.0\n' in reply.body
        again = server.request("GET", "/metrics").body
    assert b'quire_http_requests_total{code="200",method="GET",route="/metrics"} 1.0' in again


def test_a_second_model_is_a_second_entry():
    other = dataclasses.replace(SERVED, id="test/other", chat_template=None)
    backends = [FakeBackend(), FakeBackend()]
    registry = Registry([Served(SERVED, backends[0]), Served(other, backends[1])])
    with serving(create_app(registry, Metrics())) as server:
        names = [card["id"] for card in server.request("GET", "/v1/models").json["data"]]
        assert names == [MODEL, "test/other"]
        body = {"model": "test/other", "prompt": "a"}
        assert server.request("POST", "/v1/completions", body).json["model"] == "test/other"
        assert [len(backend.streams) for backend in backends] == [0, 1]
        reply = server.request("POST", "/v1/completions", {**body, "model": "third"})
        assert reply.status == 404
        assert MODEL in reply.error["message"]
        assert "test/other" in reply.error["message"]
        # With more than one, a request for tokens must say whose.
        assert server.request("POST", "/tokenize", {"prompt": "a"}).error["param"] == "model"
        backends[1].info = None
        assert server.request("POST", CHAT, BODY).status == 200
        assert server.request("POST", "/v1/completions", body).status == 503
        assert server.request("GET", "/ready").status == 503
        assert server.request("GET", "/health").json["worker"] == "starting"


def test_model_names_are_unique():
    with pytest.raises(ValueError, match="test/model"):
        Registry([Served(SERVED, FakeBackend()), Served(SERVED, FakeBackend())])


@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/chat/completions/", "//", "/v1/rerank"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_not_found(server, method, path):
    reply = server.request(method, path)
    assert reply.status == 404
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", CHAT, "POST"), ("OPTIONS", CHAT, "POST"), ("PUT", "/v1/completions", "POST")],
)
def test_a_wrong_method_is_named(server, method, path, allowed):
    reply = server.request(method, path)
    assert (reply.status, reply.headers["allow"]) == (405, allowed)
    assert method in reply.error["message"]


def test_head_is_answered_like_get(server):
    reply = server.request("HEAD", "/health")
    assert (reply.status, reply.body) == (200, b"")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_must_say_that_it_is_json(server, kind):
    reply = server.request("POST", CHAT, BODY, {"Content-Type": kind})
    assert reply.status == 415
    assert "application/json" in reply.error["message"]


def test_a_charset_may_follow_the_content_type(server):
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert server.request("POST", CHAT, BODY, headers).status == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": "\x00"}', b"\xff"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
def test_a_body_that_is_no_request_has_the_envelope(server, path, body):
    reply = server.request("POST", path, body)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"


def test_an_unexpected_error_has_the_envelope_and_tells_nothing(server, backend, monkeypatch):
    def broken(request):
        raise RuntimeError("secret")

    monkeypatch.setattr(backend, "submit", broken)
    reply = server.request("POST", CHAT, BODY)
    assert reply.status == 500
    assert "secret" not in reply.error["message"]


def test_old_clients_are_answered(server):
    request = post(CHAT, BODY)
    for data in (
        request.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: localhost\r\n", b""),
        request.replace(b"Content-Type", b"Connection: close\r\nContent-Type"),
    ):
        with server.connect(data) as connection:
            reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert b" 200 OK\r\n" in reply
        assert b'"chat.completion"' in reply


def test_a_client_may_wait_for_a_go_ahead(server):
    head, body = post(CHAT, BODY).split(b"\r\n\r\n")
    with server.connect(head + b"\r\nExpect: 100-continue\r\n\r\n") as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_stopping_server_lets_running_streams_finish():
    script = Script([[0], "hold", [0]])
    backend = FakeBackend([script])
    with (
        serving(one_model_app(backend, SERVED)) as server,
        server.connect(post(CHAT, {**BODY, "stream": True})) as connection,
    ):
        received = connection.recv(1 << 16)
        server.uvicorn.handle_exit(signal.SIGTERM, None)
        # Longer than the tenth of a second after which uvicorn looks whether it should stop.
        time.sleep(0.3)
        script.released = True
        while data := connection.recv(1 << 16):
            received += data
    assert b"data: [DONE]" in received
    assert backend.streams[0].close_reasons == []
