"""POST /v1/embeddings: what comes in and goes out, and how it shares the queue."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fake_backend import (
    HIDDEN_SIZE,
    MAX_MODEL_LEN,
    MODEL,
    FakeBackend,
    Script,
    Server,
    one_model_app,
    post,
    ready,
    served_model,
    serving,
)

from quire.engine.messages import Pooling
from quire.serve.backend import GenerationFailed, QueueFull

MODEL_SIDE = served_model()
ENCODE = MODEL_SIDE.encoder.tokenizer.encode


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def server(backend: FakeBackend) -> Iterator[Server]:
    with serving(one_model_app(backend, MODEL_SIDE)) as running:
        yield running


def embed(server: Server, input: Any, **fields: Any) -> Any:
    return server.request("POST", "/v1/embeddings", {"model": MODEL, "input": input} | fields)


def vector(first: int, length: int, dimensions: int = HIDDEN_SIZE) -> list[float]:
    """What the scripted backend makes of a prompt."""
    return ([float(first), float(length)] * dimensions)[:dimensions]


def test_the_answer_has_openais_form(server: Server) -> None:
    reply = embed(server, "hello")
    assert reply.status == 200
    ids = ENCODE("hello").ids
    assert reply.json == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector(ids[0], len(ids))}],
        "model": MODEL,
        "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids)},
    }


@pytest.mark.parametrize(
    "inputs", [["a", "bcd"], [[5], [6, 7, 8]]], ids=["texts", "lists of token ids"]
)
def test_each_input_has_its_vector_in_order(server: Server, inputs: list[Any]) -> None:
    reply = embed(server, inputs)
    ids = [ENCODE(each).ids if isinstance(each, str) else each for each in inputs]
    assert [each["index"] for each in reply.json["data"]] == [0, 1]
    assert [each["embedding"] for each in reply.json["data"]] == [
        vector(each[0], len(each)) for each in ids
    ]
    assert reply.json["usage"]["prompt_tokens"] == 4


def test_token_ids_are_one_input(server: Server) -> None:
    [data] = embed(server, [9, 8, 7]).json["data"]
    assert data["embedding"] == vector(9, 3)


def test_base64_is_the_same_in_little_endian_float32(server: Server) -> None:
    [data] = embed(server, [9, 8, 7], encoding_format="base64").json["data"]
    assert struct.unpack(f"<{HIDDEN_SIZE}f", base64.b64decode(data["embedding"])) == tuple(
        vector(9, 3)
    )


def test_the_engine_is_asked_for_what_the_fields_say(backend: FakeBackend) -> None:
    model = replace(MODEL_SIDE, pooling="mean")
    with serving(one_model_app(backend, model)) as server:
        reply = embed(server, [1, 2], dimensions=3, priority=2, cache_salt="s", user="u")
        assert len(reply.json["data"][0]["embedding"]) == 3
    request = backend.streams[0].request
    assert request.pooling == Pooling("mean", 3)
    assert (request.prompt_token_ids, request.max_tokens) == ([1, 2], 0)
    assert (request.priority, request.cache_salt) == (2, "s")


def test_an_input_may_fill_the_context(server: Server) -> None:
    assert embed(server, [1] * MAX_MODEL_LEN).status == 200
    assert embed(server, "x" * MAX_MODEL_LEN).status == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", None),
        ({"input": []}, "input", None),
        ({"input": [[]]}, "input", None),
        ({"input": ["a", ""]}, "input", None),
        ({"input": ["a", 1]}, "input", None),
        ({"input": [5000]}, "input", None),
        ({"input": [-1]}, "input[0]", None),
        ({"input": ["a"] * 2049}, "input", None),
        ({"input": "x" * (MAX_MODEL_LEN + 1)}, "input", "context_length_exceeded"),
        ({"input": "x" * 100_000}, "input", "context_length_exceeded"),
        ({"input": [1] * (MAX_MODEL_LEN + 1)}, "input", "context_length_exceeded"),
        ({"dimensions": 0}, "dimensions", None),
        ({"dimensions": HIDDEN_SIZE + 1}, "dimensions", None),
        ({"encoding_format": "int8"}, "encoding_format", None),
        ({"temperature": 1}, "temperature", None),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
def test_what_cannot_be_done_names_the_field(
    server: Server, backend: FakeBackend, fields: Any, param: str, code: str | None
) -> None:
    reply = server.request("POST", "/v1/embeddings", {"model": MODEL, "input": "a"} | fields)
    assert reply.status == (404 if code == "model_not_found" else 400)
    assert (reply.error["param"], reply.error["code"]) == (param, code)
    assert backend.streams == []


def test_a_model_without_reachable_states_says_so() -> None:
    backend = FakeBackend(info=ready(hidden_size=0))
    with serving(one_model_app(backend, MODEL_SIDE)) as server:
        reply = embed(server, "a")
    assert reply.status == 400
    assert reply.error["param"] == "model"
    assert "cannot be reached" in reply.error["message"]


class Crowded(FakeBackend):
    """Has room for ``room`` sequences at a time, and remembers the most that ran."""

    room = 3
    most = 0

    def submit(self, request: Any) -> Any:
        if self.active >= self.room:
            raise QueueFull("full", 1)
        stream = super().submit(request)
        self.most = max(self.most, self.active)
        return stream


@pytest.mark.parametrize("room", [2, 100])
def test_a_long_list_takes_a_few_places_at_a_time(room: int) -> None:
    backend = Crowded()
    backend.room = room
    with serving(one_model_app(backend, MODEL_SIDE)) as server:
        reply = embed(server, [[i % 200, 1] for i in range(2048)])
    assert [each["embedding"][0] for each in reply.json["data"]] == [i % 200 for i in range(2048)]
    assert backend.most == min(room, ready().max_num_seqs // 2)


def test_no_room_at_all_is_a_429() -> None:
    backend = Crowded()
    backend.room = 0
    with serving(one_model_app(backend, MODEL_SIDE)) as server:
        reply = embed(server, ["a", "b"])
    assert reply.status == 429
    assert reply.headers["retry-after"] == "1"


def test_a_failure_ends_the_others() -> None:
    backend = FakeBackend([Script([GenerationFailed("The worker died.")]), Script(["hang"])])
    with serving(one_model_app(backend, MODEL_SIDE)) as server:
        reply = embed(server, ["a", "b", "c"])
        assert reply.status == 500
        backend.wait_until_idle()
    assert [stream.close_reasons for stream in backend.streams[1:]] == [["abort"], ["abort"]]


def test_a_client_that_leaves_ends_its_requests() -> None:
    backend = FakeBackend([Script(["hang"])])
    with serving(one_model_app(backend, MODEL_SIDE)) as server:
        with server.connect(post("/v1/embeddings", {"model": MODEL, "input": ["a", "b"]})):
            while len(backend.streams) < 2:
                pass
        backend.wait_until_idle()
    assert all(stream.close_reasons == ["abort"] for stream in backend.streams)
