"""Answers, whole and streamed, fit the schemas that OpenAI publishes for its own API."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import signal
import struct
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from live_server import PATIENCE, Server, eventually

SPEC = Path(__file__).parent / "openai_spec"

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

Body = dict[str, Any]
MODEL = "quire-demo"
SUM = [{"role": "user", "content": "What is 3 + 4?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "maximum": 99},
        "b": {"type": "integer", "maximum": 99},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
ADD: Body = {"name": "add", "description": "Add two numbers", "parameters": PARAMETERS}
NOTE: Body = {"type": "custom", "name": "note", "description": "Save a note"}
FORM: Body = {"name": "sum", "schema": PARAMETERS, "strict": True}

CHATS: dict[str, Body] = {
    "plain": {},
    "several": {"n": 2, "temperature": 1, "seed": 1},
    "log-probabilities": {"logprobs": True, "top_logprobs": 2},
    "cut": {"max_completion_tokens": 3},
    "stopped": {"stop": ["="]},
    "tools": {"tools": [{"type": "function", "function": ADD}]},
    "called": {"tools": [{"type": "function", "function": ADD}], "tool_choice": "required"},
    "thinking": {"reasoning_effort": "high"},
    "schema": {"response_format": {"type": "json_schema", "json_schema": FORM}},
    "object": {"response_format": {"type": "json_object"}},
    "result": {
        "messages": [
            *SUM,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "7"},
        ]
    },
}
COMPLETIONS: dict[str, Body] = {
    "plain": {},
    "several": {"prompt": ["3 + 4 =", "5 + 6 ="], "n": 2},
    "log-probabilities": {"logprobs": 2},
    "echo": {"echo": True, "logprobs": 2},
}
RESPONSES: dict[str, Body] = {
    "plain": {},
    "instructions": {"instructions": "Be brief.", "metadata": {"for": "a test"}},
    "cut": {"max_output_tokens": 3},
    "tools": {"tools": [{"type": "function", "strict": True, **ADD}]},
    "called": {"tools": [{"type": "function", **ADD}], "tool_choice": "required"},
    "named": {
        "tools": [{"type": "function", **ADD}],
        "tool_choice": {"type": "function", "name": "add"},
    },
    "custom": {"tools": [NOTE], "tool_choice": {"type": "custom", "name": "note"}},
    "hosted": {"tools": [{"type": "web_search"}], "user": "me"},
    "namespace": {
        "tools": [
            {
                "type": "namespace",
                "name": "sums",
                "description": "Sums",
                "tools": [{"type": "function", **ADD}],
            }
        ],
        "tool_choice": "required",
    },
    "thinking": {"reasoning": {"effort": "high"}},
    "schema": {"text": {"format": {"type": "json_schema", **FORM}}},
    "items": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]},
}
EMBEDDINGS: dict[str, Body] = {
    "one": {"input": "Hello"},
    "several": {"input": ["Hello", "Goodbye"], "dimensions": 8, "encoding_format": "float"},
}
REFUSED: dict[str, tuple[str, Body]] = {
    "model": ("/v1/chat/completions", {"model": "another", "messages": SUM}),
    "range": ("/v1/chat/completions", {"model": MODEL, "messages": SUM, "temperature": 9}),
    "type": ("/v1/completions", {"model": MODEL, "prompt": 4.5}),
    "unknown": ("/v1/responses", {"model": MODEL, "input": "Hello", "colour": "red"}),
    "missing": ("/v1/embeddings", {"model": MODEL}),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def violations(answer: Any, name: str) -> list[str]:
    """What is wrong with ``answer`` as one of the specification's schemas."""
    document = json.loads((SPEC / "answers.json").read_text())
    validator = Draft202012Validator({"$ref": f"#/components/schemas/{name}", **document})
    return [_deepest(error) for error in validator.iter_errors(answer)]


def _deepest(error: Any) -> str:
    """Of alternatives that all fail, what is wrong with the one that comes closest."""
    while error.context:
        named = [each for each in error.context if list(each.schema_path)[-1] != "enum"]
        error = max(named or error.context, key=lambda each: len(each.absolute_path))
    return f"{error.json_path}: {error.message[:300]}"


def ask(server: Server, path: str, body: Body) -> Any:
    status, _, text = server.post(path, body)
    assert status == 200, text
    return json.loads(text)


def events(server: Server, path: str, body: Body) -> list[Any]:
    status, _, text = server.post(path, {**body, "stream": True})
    assert status == 200, text
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in data if line != "[DONE]"]


def test_the_schemas_are_the_ones_that_were_cut_out() -> None:
    digest = hashlib.sha256((SPEC / "answers.json").read_bytes()).hexdigest()
    assert f"sha256 {digest}  answers.json" in (SPEC / "SOURCE").read_text()


def test_a_wrong_answer_is_seen() -> None:
    right: Body = {"object": "list", "data": [], "model": "m"}
    right["usage"] = {"prompt_tokens": 1, "total_tokens": 1}
    assert not violations(right, "CreateEmbeddingResponse")
    assert violations({**right, "object": "lists"}, "CreateEmbeddingResponse")
    assert violations({**right, "usage": {}}, "CreateEmbeddingResponse")


@pytest.mark.parametrize("name", CHATS)
def test_chats(server: Server, name: str) -> None:
    body = {"model": MODEL, "messages": SUM, "temperature": 0, "max_tokens": 100, **CHATS[name]}
    if "max_completion_tokens" in body:
        del body["max_tokens"]
    path = "/v1/chat/completions"
    assert not violations(ask(server, path, body), "CreateChatCompletionResponse")
    chunks = events(server, path, {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["usage"]
    for chunk in chunks:
        assert not violations(chunk, "CreateChatCompletionStreamResponse"), chunk


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(server: Server, name: str) -> None:
    body = {"model": MODEL, "prompt": "3 + 4 =", "temperature": 0, **COMPLETIONS[name]}
    chunks = events(server, "/v1/completions", body)
    for chunk in (ask(server, "/v1/completions", body), *chunks):
        for choice in chunk["choices"]:
            # Their streams have no schema of their own: a choice that goes on has no reason yet.
            if chunk in chunks:
                choice["finish_reason"] = choice["finish_reason"] or "stop"
            # Nothing stands before an echoed prompt's first token; OpenAI's service says null too.
            if name == "echo" and choice["logprobs"] and choice["logprobs"]["text_offset"][0] == 0:
                assert choice["logprobs"]["token_logprobs"].pop(0) is None
                assert choice["logprobs"]["top_logprobs"].pop(0) is None
        assert not violations(chunk, "CreateCompletionResponse"), chunk


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(server: Server, name: str) -> None:
    body = {"model": MODEL, "input": "What is 3 + 4?", "temperature": 0, **RESPONSES[name]}
    body.setdefault("max_output_tokens", 100)
    answer = ask(server, "/v1/responses", body)
    assert not violations(answer, "Response"), answer
    status, _, text = server.get(f"/v1/responses/{answer['id']}")
    assert status == 200
    assert not violations(json.loads(text), "Response")
    more = ask(server, "/v1/responses", {**body, "previous_response_id": answer["id"]})
    assert not violations(more, "Response")
    for event in events(server, "/v1/responses", body):
        assert not violations(event, "ResponseStreamEvent"), event


@contextlib.contextmanager
def story(server: Server) -> Iterator[Iterator[Body]]:
    """The events of a long answer as they come."""
    body = {"model": MODEL, "input": "Tell me a story", "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/responses",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        lines = (line[6:] for line in reply if line.startswith(b"data: "))
        yield map(json.loads, lines)


def interrupted(server: Server, end: Callable[[str], None], status: str) -> list[Body]:
    """The events of an answer that ``end`` of its id brings to ``status`` once it has begun."""
    for _ in range(10):  # now and then the answer is sooner
        with story(server) as coming:
            events = [next(coming)]
            while "delta" not in events[-1]:
                events.append(next(coming))
            end(events[0]["response"]["id"])
            events += coming
        if events[-1]["response"]["status"] == status:
            return events
    raise AssertionError(f"no answer was {status}")


def check_interrupted(server: Server, events: list[Body]) -> None:
    for event in events:
        assert not violations(event, "ResponseStreamEvent"), event
    last = events[-1]["response"]
    assert last["output"][0]["content"][0]["text"].startswith("On")
    kept = json.loads(server.get(f"/v1/responses/{last['id']}")[2])
    assert kept == last


def test_a_cancelled_response(server: Server) -> None:
    def cancel(response_id: str) -> None:
        status, _, text = server.post(f"/v1/responses/{response_id}/cancel", {})
        name = "Response" if status == 200 else "ErrorResponse"
        assert not violations(json.loads(text), name), text

    check_interrupted(server, interrupted(server, cancel, "cancelled"))


def test_a_failed_response(server: Server) -> None:
    def kill(_: str) -> None:
        os.kill(server.worker_pid(), signal.SIGKILL)
        eventually(lambda: server.get("/ready")[0] != 200, "the loss is noticed")
        eventually(lambda: server.get("/ready")[0] == 200, "there is a worker again")

    events = interrupted(server, kill, "failed")
    check_interrupted(server, events)
    assert events[-1]["type"] == "response.failed"


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(server: Server, name: str) -> None:
    answer = ask(server, "/v1/embeddings", {"model": MODEL, **EMBEDDINGS[name]})
    assert not violations(answer, "CreateEmbeddingResponse")


def test_vectors_in_base64(server: Server) -> None:
    """Which the description leaves out: they are the same vectors otherwise."""
    body: Body = {"model": MODEL, "input": ["Hello", "Goodbye"]}
    plain = ask(server, "/v1/embeddings", body)
    packed = ask(server, "/v1/embeddings", {**body, "encoding_format": "base64"})
    for each in packed["data"]:
        data = base64.b64decode(each["embedding"], validate=True)
        each["embedding"] = list(struct.unpack(f"<{len(data) // 4}f", data))
    assert not violations(packed, "CreateEmbeddingResponse")
    single = struct.Struct("<f")
    for each in plain["data"]:
        each["embedding"] = [single.unpack(single.pack(x))[0] for x in each["embedding"]]
    assert packed == plain


def test_models(server: Server) -> None:
    listed = json.loads(server.get("/v1/models")[2])
    assert not violations(listed, "ListModelsResponse")
    assert not violations(json.loads(server.get(f"/v1/models/{MODEL}")[2]), "Model")


@pytest.mark.parametrize("name", REFUSED)
def test_errors(server: Server, name: str) -> None:
    status, _, text = server.post(*REFUSED[name])
    assert status in (400, 404, 422)
    assert not violations(json.loads(text), "ErrorResponse")
