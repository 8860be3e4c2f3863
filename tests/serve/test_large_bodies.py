"""Bodies that a helper process reads get the answers of bodies that the server reads itself."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from fake_backend import EOS, TEMPLATE, FakeBackend, Reply, Server, one_model_app, serving
from fake_backend import MODEL as NAME
from fake_backend import served_model as make_model

from quire.serve import body_helpers, request_kinds
from quire.serve.body_helpers import BodyHelpers
from quire.serve.raw_body import LARGE_BODY, RawBody
from quire.serve.routes import responses as responses_route
from quire.serve.template_helpers import TemplateHelpers

USER = {"role": "user", "content": 'hällo \n"you"'}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
HOPELESS = "x" * 100_000


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [USER], "max_tokens": 2, **fields}


def messages(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [USER], "max_tokens": 2, **fields}


def responses(given: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": NAME, "input": given, "max_output_tokens": 2, **fields}


def completion(prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": prompt, "max_tokens": 2, **fields}


CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES, RESPONSES, TOKENIZE = "/v1/messages", "/v1/responses", "/tokenize"

REQUESTS: list[tuple[str, Any]] = [
    (CHAT, chat()),
    (CHAT, chat(seed=2**62, temperature=1, logit_bias={"7": -1}, stop=["a"], n=2)),
    (CHAT, chat(tools=[TOOL], tool_choice="none", metadata={"a": "b"})),
    (
        CHAT,
        chat(
            messages=[
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "2", "tool_call_id": "c1"},
            ]
        ),
    ),
    (
        CHAT,
        chat(
            messages=[USER, {"role": "assistant", "content": "It is"}],
            continue_final_message=True,
        ),
    ),
    (CHAT, chat(messages=[{"role": "user", "content": HOPELESS}])),
    (CHAT, chat(messages=[{"role": "user", "content": "x" * 300}])),  # only its tokens tell
    (CHAT, chat(messages=[{"role": "user", "content": "x" * 300}], truncate_prompt_tokens=9)),
    (CHAT, chat(messages=[])),
    (CHAT, chat(messages=[{"role": "user", "content": 7}])),
    (CHAT, chat(temperature=3)),
    (CHAT, chat(nonsense=1)),
    (CHAT, chat(audio={})),
    (CHAT, chat(model="other")),
    (CHAT, chat(tool_choice="required")),
    (CHAT, b"{"),
    (CHAT, b'{"model": "\xff"}'),
    (CHAT, b"[1]"),
    (CHAT, b"[" * 100_000),
    (COMPLETIONS, completion()),
    (COMPLETIONS, completion(["a", "bc"], echo=True, logprobs=1)),
    (COMPLETIONS, completion([1, 2, 3])),
    (COMPLETIONS, completion([[1, 2], [3]])),
    (COMPLETIONS, completion([1, "a"])),
    (COMPLETIONS, completion(HOPELESS)),
    (COMPLETIONS, completion(["a", HOPELESS])),
    (COMPLETIONS, completion([1] * 300)),
    (COMPLETIONS, completion(suffix="b")),
    (COMPLETIONS, completion(best_of=1, n=2)),
    (EMBEDDINGS, {"model": NAME, "input": ["a", "bc"]}),
    (EMBEDDINGS, {"model": NAME, "input": [1, 2]}),
    (EMBEDDINGS, {"model": NAME, "input": HOPELESS}),
    (EMBEDDINGS, {"model": NAME, "input": [1] * 300}),
    (MESSAGES, messages(system="Be kind.", stop_sequences=["a"])),
    (MESSAGES, messages(max_tokens=32000, thinking={"type": "enabled", "budget_tokens": 9})),
    (MESSAGES, messages(messages=[USER, {"role": "assistant", "content": "It"}])),
    (MESSAGES, messages(tools=[{"name": "f", "input_schema": {"type": "object"}}])),
    (MESSAGES, messages(messages=[{"role": "user", "content": HOPELESS}])),
    (MESSAGES, messages(messages=[{"role": "user", "content": [{"type": "image", "source": 1}]}])),
    (MESSAGES, messages(container={"a": 1})),
    (MESSAGES + "/count_tokens", {"model": NAME, "messages": [USER], "system": "Be kind."}),
    (RESPONSES, responses(instructions="Be kind.", metadata={"a": "b"})),
    (RESPONSES, responses([{"role": "user", "content": "hi"}, {"type": "web_search_call"}])),
    (RESPONSES, responses([{"type": "web_search_call"}])),
    (RESPONSES, responses(HOPELESS)),
    (RESPONSES, responses(instructions=HOPELESS)),
    (RESPONSES, responses(tools=[{"type": "custom", "name": "f"}])),
    (RESPONSES, responses(previous_response_id="resp_none")),
    (TOKENIZE, {"prompt": "hi"}),
    (TOKENIZE, {"messages": [USER]}),
    (TOKENIZE, {"prompt": "hi", "messages": [USER]}),
    ("/apply-template", chat(tools=[TOOL])),
]


@contextlib.contextmanager
def server_with(bodies: BodyHelpers | None) -> Iterator[tuple[Server, FakeBackend]]:
    backend = FakeBackend()
    template = TemplateHelpers(TEMPLATE, {"eos_token": EOS})
    model = dataclasses.replace(make_model(), chat_template=template)
    app = one_model_app(backend, model, bodies=bodies)

    @contextlib.asynccontextmanager
    async def running(_: Any) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for helpers in (template, bodies):
                if helpers is not None:
                    await stack.enter_async_context(helpers)
            yield

    app.router.lifespan_context = running
    with serving(app) as server:
        yield server, backend


@pytest.fixture(scope="module")
def here() -> Iterator[tuple[Server, FakeBackend]]:
    with server_with(None) as running:
        yield running


@pytest.fixture(scope="module")
def helped() -> Iterator[tuple[Server, FakeBackend]]:
    with server_with(BodyHelpers()) as running:
        yield running


def shown(reply: Reply) -> tuple[int, Any, Any]:
    """All but what is new in each answer."""
    return reply.status, without_ids(reply.json), reply.headers.get("x-quire-ignored")


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        new = ("id", "created", "created_at", "request_id", "item_id")
        return {name: without_ids(part) for name, part in value.items() if name not in new}
    return [without_ids(part) for part in value] if isinstance(value, list) else value


def submitted(backend: FakeBackend) -> list[Any]:
    """What has been asked of the backend since the last call."""
    requests = [msgspec.structs.replace(s.request, request_id=0) for s in backend.streams]
    backend.streams.clear()
    return requests


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_a_helper_reads_a_body_as_the_server_would(here, helped, monkeypatch, path, body):
    expected = shown(here[0].request("POST", path, body))
    monkeypatch.setattr(body_helpers, "LARGE_BODY", 1)
    assert shown(helped[0].request("POST", path, body)) == expected
    assert submitted(helped[1]) == submitted(here[1])


def test_a_conversation_goes_on_whoever_read_its_bodies(helped, monkeypatch):
    server, backend = helped
    monkeypatch.setattr(body_helpers, "LARGE_BODY", 1)
    first = server.request("POST", RESPONSES, responses("one", instructions="Be kind.")).json
    assert first["instructions"] == "Be kind."
    again = responses("two", previous_response_id=first["id"])
    third = server.request("POST", RESPONSES, again).json
    monkeypatch.setattr(body_helpers, "LARGE_BODY", LARGE_BODY)
    submitted(backend)
    for previous in (first, third):
        body = responses("two", previous_response_id=previous["id"])
        assert server.request("POST", RESPONSES, body).status == 200
    short, long = (request.prompt_token_ids for request in submitted(backend))
    model = make_model()
    text = model.encoder.tokenizer.decode(long)
    assert [text.count(word) for word in ("one", "two")] == [1, 2]
    assert len(short) < len(long)


def test_what_the_helpers_read_is_not_read_here(helped, monkeypatch):
    def here(*args: Any) -> None:
        raise AssertionError("decoded on the event loop")

    server, backend = helped
    item = {"id": "m" * LARGE_BODY, "role": "user", "content": "one"}
    items = [item, {"type": "web_search_call"}]
    reading = dataclasses.replace(request_kinds.RESPONSES, decode=here)
    monkeypatch.setattr(responses_route, "RESPONSES", reading)
    submitted(backend)
    first = server.request("POST", RESPONSES, responses(items, instructions="Be kind."))
    assert first.json["instructions"] == "Be kind."
    # A short body behind a long conversation is no less to read.
    seen: list[Any] = []
    to_chat = responses_route.to_chat
    monkeypatch.setattr(
        responses_route,
        "to_chat",
        lambda body, items, *more: seen.append(items) or to_chat(body, items, *more),
    )
    again = server.request(
        "POST", RESPONSES, responses("two", previous_response_id=first.json["id"])
    )
    named = [reply.headers.get("x-quire-ignored") for reply in (first, again)]
    assert named == ["input[1]", None]  # of the request's own items
    assert len(msgspec.json.encode(seen)) < 1000
    _, request = submitted(backend)
    text = make_model().encoder.tokenizer.decode(request.prompt_token_ids)
    assert [text.count(word) for word in ("one", "two")] == [1, 1]


def test_fields_beside_the_prompt_have_a_limit_of_their_own(helped):
    body = chat(metadata={"a": "x" * 3 * 2**20})
    reply = helped[0].request("POST", CHAT, body)
    assert reply.status == 400
    assert "fields beside the prompt" in reply.error["message"]


def children() -> set[int]:
    found = set()
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            found |= {int(pid) for pid in file.read().split()}
    return found


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")


@needs_proc
def test_everybody_else_is_served_while_large_bodies_are_read():
    """Their reader is stopped: whatever of them the server did itself would go on."""
    body = chat(messages=[{"role": "user", "content": HOPELESS * 50}])
    before = children()
    with server_with(BodyHelpers()) as (server, _), ThreadPoolExecutor(8) as pool:
        deadline = time.monotonic() + 20
        while len(children() - before) < 2:  # of the template; that of bodies comes when needed
            assert time.monotonic() < deadline
            time.sleep(0.01)
        templates = children()
        refused = server.request("POST", CHAT, body)
        assert refused.error["code"] == "context_length_exceeded"
        [reader] = children() - templates
        os.kill(reader, signal.SIGSTOP)
        try:
            waiting = [pool.submit(server.request, "POST", CHAT, body) for _ in range(8)]
            for _ in range(20):
                assert server.request("POST", CHAT, chat()).status == 200
                assert server.request("GET", "/health").status == 200
            assert not any(reply.done() for reply in waiting)
        finally:
            os.kill(reader, signal.SIGCONT)
        assert {shown(reply.result()) == shown(refused) for reply in waiting} == {True}


@needs_proc
def test_a_reader_that_dies_costs_no_request():
    body = RawBody([msgspec.json.encode(chat())])

    async def check() -> None:
        async with BodyHelpers() as helpers:
            before = children()
            expected = await helpers.rest(request_kinds.CHAT, body)
            [reader] = children() - before
            os.kill(reader, signal.SIGKILL)
            assert await helpers.rest(request_kinds.CHAT, body) == expected

    asyncio.run(check())


def test_the_start_of_a_body_is_taken_from_its_pieces():
    body = RawBody([b"abc", b"", b"defg"])
    assert (body.size, body.whole()) == (7, b"abcdefg")
    assert [body.start(size) for size in (0, 2, 5, 9)] == [b"", b"ab", b"abcde", b"abcdefg"]
