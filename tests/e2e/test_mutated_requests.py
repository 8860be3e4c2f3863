"""Requests that have been bent at random, on every endpoint: refused or answered, never harmful."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import random
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_server import PATIENCE, Server

TOOL = {
    "name": "look",
    "description": "Look it up.",
    "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
}
USER = {"role": "user", "content": "hi"}
SEEDS: list[tuple[str, str, Any]] = [
    (
        "POST",
        "/v1/chat/completions",
        {
            "model": "small",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "a",
                            "type": "function",
                            "function": {"name": "look", "arguments": '{"what": "x"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "a", "content": "found"},
            ],
            "max_tokens": 4,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 3,
            "n": 2,
            "stop": ["a", "bb"],
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"70": 2},
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": "auto",
            "stream_options": {"include_usage": True},
            "stream": True,
        },
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "model": "small",
            "messages": [USER],
            "max_completion_tokens": 6,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}},
            },
            "presence_penalty": 0.5,
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ),
    (
        "POST",
        "/v1/completions",
        {
            "model": "small",
            "prompt": ["one", "two"],
            "max_tokens": 4,
            "echo": True,
            "logprobs": 1,
            "bad_words": ["x"],
            "repetition_penalty": 1.2,
            "structured_outputs": {"regex": "[ab]{2}"},
            "min_tokens": 1,
            "priority": 1,
            "truncate_prompt_tokens": 3,
        },
    ),
    ("POST", "/v1/completions", {"model": "small", "prompt": [5, 6], "max_tokens": 3, "n": 2}),
    (
        "POST",
        "/v1/responses",
        {
            "model": "small",
            "input": [
                {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "x"}],
                }
            ],
            "instructions": "be brief",
            "max_output_tokens": 4,
            "tools": [{"type": "function", **TOOL}],
            "stream": True,
            "store": False,
        },
    ),
    (
        "POST",
        "/v1/messages",
        {
            "model": "claude-x",
            "max_tokens": 4,
            "system": [
                {"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}
            ],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "tools": [{"name": "look", "input_schema": TOOL["parameters"]}],
            "thinking": {"type": "enabled", "budget_tokens": 10},
            "stop_sequences": ["x"],
        },
    ),
    ("POST", "/v1/messages/count_tokens", {"model": "small", "messages": [USER]}),
    ("POST", "/tokenize", {"model": "small", "prompt": "abc", "add_special_tokens": False}),
    ("POST", "/detokenize", {"model": "small", "tokens": [5, 6, 7]}),
    ("POST", "/apply-template", {"model": "small", "messages": [USER]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/small", None),
    ("GET", "/v1/responses/resp_none", None),
    ("DELETE", "/v1/responses/resp_none", None),
]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 1.5, -0.0, 1e308, "", "x", "\0", "\ud800",
    "é" * 50, "x" * 3000, [], {}, [[]], [None], {"": None}, {"type": "text"}, [1, "a"],
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside, with each of its keys."""
    if isinstance(value, dict | list):
        for key in [*(value if isinstance(value, dict) else range(len(value)))]:
            yield value, key
            yield from places(value[key])


def mutated(draw: random.Random) -> tuple[str, str, bytes | None]:
    method, path, seed = draw.choice(SEEDS)
    body = copy.deepcopy(seed)
    for _ in range(draw.randint(1, 3)):
        found = [*places(body)]
        if not found:
            break
        holder, key = draw.choice(found)
        match draw.randrange(5):
            case 0 if isinstance(holder, dict):
                holder[draw.choice(["x", "", "type", "model", "n", str(key) + "s"])] = holder.pop(
                    key
                )
            case 1:
                del holder[key]
            case 2 if isinstance(holder, list):
                holder += [copy.deepcopy(holder[key])] * draw.choice([1, 2, 40])
            case _:
                holder[key] = copy.deepcopy(draw.choice(ODD))
    data = None if body is None else json.dumps(body).encode()
    if data is not None and draw.random() < 0.1:
        place = draw.randrange(len(data) + 1)
        data = draw.choice([data[:place], data[:place] + b"\xff" + data[place:], b"[" * 5000])
    return draw.choices([method, "PUT", "GET"], [0.96, 0.02, 0.02])[0], path, data


def send(server: Server, seed: int) -> None:
    draw = random.Random(seed)
    method, path, data = mutated(draw)
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, data, {"Content-Type": "application/json"})
        if draw.random() < 0.05:
            return  # the client leaves
        response = connection.getresponse()
        text = response.read()
    what = f"seed {seed}: {method} {path} {data!r:.2000}\n{response.status} {text!r:.2000}"
    assert response.status < 500, what
    if response.status >= 400:
        check_envelope(path, text, what)
    elif response.headers.get_content_type() == "application/json":
        json.loads(text)


def check_envelope(path: str, text: bytes, what: str) -> None:
    error = json.loads(text)["error"]
    assert isinstance(error["message"], str), what
    if not path.startswith("/v1/messages"):
        assert set(error) == {"message", "type", "param", "code"}, what


def check_health(server: Server) -> None:
    metrics = server.idle_metrics()
    assert server.get("/health")[0] == server.get("/ready")[0] == 200
    assert metrics["quire_worker_restarts_total"] == 0
    body = {"model": "small", "prompt": "Once", "max_tokens": 2}
    assert server.post("/v1/completions", body)[0] == 200


def fuzz(server: Server, seeds: range) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda seed: send(server, seed), seeds):
            pass
    check_health(server)


@pytest.fixture(scope="module")
def server(small_model: Path) -> Iterator[Server]:
    running = Server(model=small_model)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def test_mutated_requests(server: Server) -> None:
    fuzz(server, range(600))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_thousand_mutated_requests(server: Server) -> None:
    fuzz(server, range(1000, 21_000))
