"""Streams and whole answers agree, whatever fields a request combines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(small_model: Path) -> Iterator[Server]:
    running = Server(model=small_model)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def random_request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A request that is valid and draws the same each time."""
    path = draw.choice([COMPLETIONS, CHAT])
    body: dict[str, Any] = {"model": "small", "max_tokens": draw.randint(1, 24)}
    body["seed"] = draw.randrange(1 << 40)
    words = "".join(chr(draw.randrange(97, 123)) for _ in range(draw.randint(1, 30)))
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": words}]
    else:
        body["prompt"] = draw.choice([words, [words, "and more"], [5, 6, 7], [[8], [9, 10]]])

    def maybe(name: str, *values: Any) -> None:
        if draw.random() < 0.3:
            body[name] = draw.choice(values)

    maybe("temperature", 0, 0.7, 1.5)
    maybe("top_p", 0.5, 0.95)
    maybe("top_k", 1, 5, 40)
    maybe("min_p", 0.05)
    maybe("presence_penalty", -1.5, 0.5, 2)
    maybe("frequency_penalty", -0.5, 1.2)
    maybe("repetition_penalty", 0.8, 1.3)
    maybe("logit_bias", {"70": 3.0, "71": -100}, {"100": 5})
    maybe("n", 2, 3)
    maybe("stop", "a", ["e", "st"], ["\ufffd"])
    maybe("include_stop_str_in_output", True)
    maybe("min_tokens", 0, 1)
    maybe("ignore_eos", True)
    maybe("stop_token_ids", [80, 81, 82])
    maybe("skip_special_tokens", False)
    maybe("return_token_ids", True)
    maybe("truncate_prompt_tokens", 1, 4)
    maybe("priority", -1, 3)
    maybe("bad_words", ["a", "th"])
    if path == CHAT:
        maybe("logprobs", True)
        if body.get("logprobs"):
            maybe("top_logprobs", 0, 3, 20)
        maybe("response_format", {"type": "json_schema", "json_schema": {"schema": SCHEMA}})
    else:
        maybe("logprobs", 0, 2, 5)
        maybe("echo", True)
        maybe("structured_outputs", {"regex": "[a-f]{3,9}"}, {"choice": ["one", "two"]})
    if "bad_words" not in body and not {"response_format", "structured_outputs"} & set(body):
        maybe("allowed_token_ids", list(range(60, 130)))
    return path, body


def stream(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The stream put together, in the form of a whole answer."""
    options = {"include_usage": True}
    status, _, text = server.post(path, {**body, "stream": True, "stream_options": options})
    assert status == 200, text
    *events, rest = text.split("\n\n")
    assert rest == ""
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    last = chunks.pop()
    assert last["choices"] == []
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        assert chunk["usage"] is None
        for piece in chunk["choices"]:
            choice = choices.setdefault(
                piece["index"],
                {"text": "", "finish_reason": None, "logprobs": None, "token_ids": []},
            )
            assert choice["finish_reason"] is None, "something follows on the end"
            choice["text"] += piece.get("text", "") or piece.get("delta", {}).get("content", "")
            choice["finish_reason"] = piece["finish_reason"]
            choice["token_ids"] += piece.get("token_ids", [])
            for key, value in (piece["logprobs"] or {}).items():
                if value is not None:
                    choice["logprobs"] = choice["logprobs"] or {}
                    choice["logprobs"].setdefault(key, []).extend(value)
    return {"choices": [choices[i] for i in sorted(choices)], "usage": last["usage"]}


def whole(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    status, _, text = server.post(path, body)
    assert status == 200, text
    answer = json.loads(text)
    choices = []
    for index, choice in enumerate(answer["choices"]):
        assert choice["index"] == index
        logprobs = {
            key: value for key, value in (choice["logprobs"] or {}).items() if value is not None
        }
        message = choice.get("message", {})
        choices.append(
            {
                "text": choice.get("text", "") or message.get("content", ""),
                "finish_reason": choice["finish_reason"],
                "logprobs": logprobs if any(logprobs.values()) else None,
                "token_ids": choice.get("token_ids", []),
            }
        )
    return {"choices": choices, "usage": answer["usage"]}


def check(server: Server, seed: int) -> None:
    path, body = random_request(random.Random(seed))
    # Without what the one leaves in the cache for the other: sums in another order are rounded in
    # other places.
    expected = whole(server, path, {**body, "cache_salt": f"{seed} whole"})
    found = stream(server, path, {**body, "cache_salt": f"{seed} stream"})
    assert_alike(found, expected, body)
    repeated = len(body["prompt"]) if path == COMPLETIONS and is_list(body["prompt"]) else 1
    assert len(found["choices"]) == body.get("n", 1) * repeated
    if body.get("return_token_ids"):
        counted = sum(len(choice["token_ids"]) for choice in found["choices"])
        assert counted == found["usage"]["completion_tokens"]


def assert_alike(found: Any, expected: Any, body: dict[str, Any]) -> None:
    """Equal but for the last digits of log-probabilities: the sequences of a request may share
    their steps in another way, and sums of another shape are rounded in other places."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), body
        for key, value in expected.items():
            assert_alike(found[key], value, body)
    elif isinstance(expected, list):
        assert len(found) == len(expected), body
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other, body)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4), body
    else:
        assert found == expected, body


def is_list(prompt: Any) -> bool:
    return isinstance(prompt, list) and not isinstance(prompt[0], int)


def test_stream_is_whole(server: Server) -> None:
    for seed in range(40):
        check(server, seed)
    server.idle_metrics()


@pytest.mark.long
def test_stream_is_whole_a_thousand_times(server: Server) -> None:
    for seed in range(100, 1100):
        check(server, seed)
    server.idle_metrics()
