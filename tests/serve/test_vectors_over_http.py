"""Every family's answers through all three chat APIs, streamed and whole, by scripted tokens.

Cuts at other places are tried on the parsers alone, in parsers/test_vectors.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from fake_backend import (
    MODEL,
    TEMPLATE,
    FakeBackend,
    Script,
    Server,
    one_model_app,
    ready,
    served_model,
    serving,
)
from serve.parsers.support import REASONING, TOOLS, single_tokens
from serve.parsers.vectors import VECTORS, Vector
from tokenizers import AddedToken

from quire.serve.detokenizer import TokenBytes
from quire.serve.parsers.families import REASONING_TAGS, Family, ParserFactory
from quire.serve.served_model import ServedModel

END = "<|eos|>"  # no family's marker

# What the family's special tokens cannot show is tested with tokens that are text as well.
CASES = [vector for vector in VECTORS if vector.markers != "text"]
FUNCTIONS = [
    {"name": name, "parameters": TOOLS.schema(name) or {"type": "object", "properties": {}}}
    for name in TOOLS.names
]


@cache
def model_of(family: str, in_reasoning: bool, special: bool) -> ServedModel:
    spec = Family(family, REASONING.get(family, "think"))
    opener = REASONING_TAGS[spec.reasoning].opener + "\n" if in_reasoning else ""
    template = TEMPLATE.replace("<assistant>{%", f"<assistant>{opener}{{%")
    markers = sorted(single_tokens(family))
    made = served_model([END] if special else [*markers, END], template)
    tokenizer = made.encoder.tokenizer
    if special:
        tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    return dataclasses.replace(
        made,
        parsers=ParserFactory(spec, tokenizer),
        token_bytes=TokenBytes(tokenizer),
        eos_token_ids=(tokenizer.token_to_id(END),),
    )


@contextlib.contextmanager
def answering(vector: Vector, *, at_once: bool = False) -> Iterator[tuple[Server, int]]:
    """A server whose model says the vector, and how many tokens it says."""
    served = model_of(vector.family, vector.in_reasoning, vector.markers == "special")
    text = vector.text + ("" if vector.cut else END)
    ids = served.encoder.tokenizer.encode(text, add_special_tokens=False).ids
    steps = [ids] if at_once else [[token] for token in ids]
    backend = FakeBackend([Script(steps)], info=ready(max_model_len=4096))
    with serving(one_model_app(backend, served)) as server:
        yield server, len(ids)


def finish(vector: Vector) -> str:
    ended = len(vector.calls) - (vector.cut and bool(vector.calls))
    return "length" if vector.cut else "tool_calls" if ended else "stop"


def chat(server: Server, limit: int, stream: bool) -> tuple[Any, ...]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "?"}],
        "tools": [{"type": "function", "function": function} for function in FUNCTIONS],
        "max_tokens": limit,
        "stream": stream,
    }
    path = "/v1/chat/completions"
    if not stream:
        [choice] = server.request("POST", path, body).json["choices"]
        message = choice["message"]
        functions = [call["function"] for call in message.get("tool_calls", [])]
        calls = [(function["name"], function["arguments"]) for function in functions]
        reasoning = message.get("reasoning_content", "")
        assert reasoning == message.get("reasoning", "")
        return message["content"] or "", reasoning, calls, choice["finish_reason"]
    content = reasoning = reason = ""
    made: list[list[str]] = []
    for chunk in server.events(path, body)[:-1]:
        [choice] = chunk["choices"]
        delta = choice["delta"]
        content += delta.get("content") or ""
        reasoning += delta.get("reasoning_content", "")
        for piece in delta.get("tool_calls", []):
            if "id" in piece:
                assert piece["index"] == len(made)
                made.append([piece["function"]["name"], ""])
            made[piece["index"]][1] += piece["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return content, reasoning, [tuple(call) for call in made], reason


@pytest.mark.parametrize("vector", CASES, ids=lambda v: f"{v.family} {v.name}")
def test_chat_completions(vector: Vector) -> None:
    expected = (vector.content, vector.reasoning, list(vector.calls), finish(vector))
    with answering(vector) as (server, limit):
        assert chat(server, limit, False) == expected
    with answering(vector) as (server, limit):
        assert chat(server, limit, True) == expected
    with answering(vector, at_once=True) as (server, limit):
        assert chat(server, limit, True) == expected


@pytest.mark.parametrize("vector", CASES, ids=lambda v: f"{v.family} {v.name}")
def test_messages(vector: Vector) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "?"}],
        "tools": [{"name": f["name"], "input_schema": f["parameters"]} for f in FUNCTIONS],
        "thinking": {"type": "adaptive"},
    }
    with answering(vector) as (server, limit):
        body["max_tokens"] = limit
        answer = server.request("POST", "/v1/messages", body).json
        stream = server.request("POST", "/v1/messages", {**body, "stream": True}).body
    text = "".join(b["text"] for b in answer["content"] if b["type"] == "text")
    thought = "".join(b["thinking"] for b in answer["content"] if b["type"] == "thinking")
    calls = [(b["name"], b["input"]) for b in answer["content"] if b["type"] == "tool_use"]
    complete = vector.calls[:-1] if vector.cut else vector.calls
    assert (text, thought) == (vector.content, vector.reasoning)
    assert calls == [(name, json.loads(arguments)) for name, arguments in complete]
    reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
    assert answer["stop_reason"] == reasons[finish(vector)]
    streamed, reason = put_together(payloads(stream))
    # A call that was cut off is in the stream alone: its input is no object yet.
    if vector.cut and streamed and streamed[-1]["type"] == "tool_use":
        assert streamed.pop()["input"] == vector.calls[-1][1]
    for block in streamed:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"])
    assert [without_ids(b) for b in streamed] == [without_ids(b) for b in answer["content"]]
    assert reason == answer["stop_reason"]


def payloads(stream: bytes) -> list[Any]:
    lines = stream.decode().splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def without_ids(block: Any) -> Any:
    return {key: value for key, value in block.items() if key not in ("id", "signature")}


def put_together(events: list[Any]) -> tuple[list[Any], str]:
    """The blocks of Anthropic's stream, with the input of calls as text, and why it stopped."""
    blocks: list[Any] = []
    reason = ""
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
                if blocks[-1]["type"] == "tool_use":
                    blocks[-1]["input"] = ""
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                kind = event["delta"]["type"].removesuffix("_delta")
                field, given = ("input", "partial_json") if kind == "input_json" else (kind, kind)
                blocks[-1][field] += event["delta"][given]
            case "message_delta":
                reason = event["delta"]["stop_reason"]
    return blocks, reason


@pytest.mark.parametrize("vector", CASES, ids=lambda v: f"{v.family} {v.name}")
def test_responses(vector: Vector) -> None:
    tools = [{"type": "function", **function} for function in FUNCTIONS]
    with answering(vector) as (server, limit):
        body = {"model": MODEL, "input": "?", "tools": tools, "max_output_tokens": limit}
        answer = server.request("POST", "/v1/responses", body).json
        events = payloads(server.request("POST", "/v1/responses", {**body, "stream": True}).body)
    texts = {
        kind: "".join(i["content"][0]["text"] for i in answer["output"] if i["type"] == kind)
        for kind in ("message", "reasoning")
    }
    calls = [(i["name"], i["arguments"]) for i in answer["output"] if i["type"] == "function_call"]
    assert texts == {"message": vector.content, "reasoning": vector.reasoning}
    assert calls == list(vector.calls)
    assert answer["status"] == ("incomplete" if vector.cut else "completed")
    final = events[-1]["response"]
    assert final["status"] == answer["status"]
    for streamed, whole in zip(final["output"], answer["output"], strict=True):
        ids = {key: whole[key] for key in ("id", "call_id") if key in whole}
        assert {**streamed, **ids} == whole
    pieces: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            pieces[event["item_id"]] = pieces.get(event["item_id"], "") + event["delta"]
    for item in final["output"]:
        said = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert pieces.get(item["id"], "") == said
