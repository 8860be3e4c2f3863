"""/v1/responses over HTTP, read by OpenAI's client; what Codex sends."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_backend import MODEL, FakeBackend, Script, Server, one_model_app, ready, serving
from test_chat_tools import CALL, SECOND, SERVED, ids, says

from quire.serve.api_keys import ApiKey, Keyring, hash_key
from quire.serve.backend import GenerationFailed, QueueFull

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}
CLOCK = {"type": "function", "name": "clock", "parameters": None}
TOOLS = [WEATHER, CLOCK]


@contextlib.contextmanager
def responses(
    *scripts: Script, limit: int = 4096, **options: Any
) -> Iterator[tuple[Server, openai.OpenAI, FakeBackend]]:
    backend = FakeBackend(list(scripts), info=ready(max_model_len=limit), **options)
    with serving(one_model_app(backend, SERVED)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with contextlib.closing(client):
            yield server, client, backend


def ask(client: openai.OpenAI, stream: bool, **fields: Any) -> Any:
    fields = {"model": MODEL, "input": "hi", **fields}
    if not stream:
        return client.responses.create(**fields)
    with client.responses.stream(**fields) as events:
        for _ in events:
            pass
        return events.get_final_response()


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "hi", **fields}


def events_of(server: Server, **fields: Any) -> list[dict[str, Any]]:
    reply = server.request("POST", PATH, body(stream=True, **fields))
    assert reply.status == 200, reply.body
    payloads = []
    for event in reply.body.decode().strip().split("\n\n"):
        name, data = event.split("\n")
        payloads.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {payloads[-1]['type']}"
    assert [payload["sequence_number"] for payload in payloads] == list(range(len(payloads)))
    return payloads


def prompt_of(backend: FakeBackend, index: int = 0) -> str:
    prompt = backend.streams[index].request.prompt_token_ids
    return SERVED.encoder.tokenizer.decode(prompt, skip_special_tokens=False)


BOX = {"type": "namespace", "name": "box", "tools": [CLOCK]}
both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
SAID = "<think>Hm.</think>Let me see.\n" + CALL + SECOND


@both
def test_reasoning_text_and_calls_are_items(stream: bool) -> None:
    script = says(SAID)
    script.cached_tokens = 2
    with responses(script) as (_, client, _):
        answer = ask(client, stream, tools=TOOLS, metadata={"a": "b"})
    thought, message, first, second = answer.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "Hm.")
    assert answer.output_text == message.content[0].text == "Let me see."
    assert (first.type, first.name) == ("function_call", "weather")
    assert json.loads(first.arguments) == {"city": "Rome", "days": 3}
    assert (second.name, second.arguments) == ("clock", "{}")
    assert {item.status for item in answer.output} == {"completed"}
    assert answer.status == "completed"
    assert answer.usage.input_tokens_details.cached_tokens == 2
    assert answer.usage.output_tokens == len(ids(SAID)) + 1
    assert answer.usage.output_tokens_details.reasoning_tokens == len(ids("<think>Hm.</think>"))
    assert answer.metadata == {"a": "b"}


def test_the_stream_has_every_event_in_order() -> None:
    with responses(says("<think>Hm.</think>Hi" + CALL)) as (server, _, _):
        payloads = events_of(server, tools=TOOLS)
    kinds: list[str] = []
    for payload in payloads:
        if not kinds or payload["type"] != kinds[-1]:
            kinds.append(payload["type"])
    assert kinds == [
        f"response.{name}"
        for name in (
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "reasoning_text.delta",
            "reasoning_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        )
    ]
    done = [p["item"] for p in payloads if p["type"] == "response.output_item.done"]
    assert payloads[-1]["response"]["output"] == done
    added = [p["item"]["id"] for p in payloads if p["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in done]
    assert payloads[0]["response"]["output"] == []


def test_a_conversation_goes_on_from_what_is_stored() -> None:
    with responses(says(SAID), says("Sunny."), says("Bye.")) as (_, client, backend):
        first = ask(client, True, tools=TOOLS, instructions="Be brief.")
        output = {"type": "function_call_output", "call_id": first.output[2].call_id}
        second = ask(
            client,
            False,
            tools=TOOLS,
            previous_response_id=first.id,
            input=[{**output, "output": [{"type": "input_text", "text": "sunny"}]}],
        )
        third = ask(client, False, previous_response_id=second.id, store=False)
        assert client.responses.retrieve(second.id).output_text == "Sunny."
        client.responses.delete(second.id)
        for gone in (second.id, third.id):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(gone)
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, False, previous_response_id=gone)
            assert caught.value.code == "previous_response_not_found"
    assert "<system>Be brief.<user>hi<assistant>" in prompt_of(backend)
    # Instructions are those of one request.
    calls = '[weather {"city": "Rome", "days": 3}][clock {}]'
    talk = f"<user>hi<assistant>(Hm.)Let me see.{calls}<tool>sunny<assistant>"
    assert prompt_of(backend, 1).endswith("]" + talk)
    assert prompt_of(backend, 2) == f"{talk}Sunny.<user>hi<assistant>"


def test_what_the_assistant_said_in_several_messages_is_one_turn() -> None:
    said = [{"role": "assistant", "content": text} for text in ("One.", "Two.")]
    nothing = {"type": "reasoning", "summary": [], "encrypted_content": "x"}
    with responses(says("a"), says("b")) as (_, client, backend):
        ask(client, False, input=[{"role": "developer", "content": "hi"}])  # of nobody's
        user = {"role": "user", "content": "hi"}
        ask(client, False, input=[user, *said, user, nothing, user])
    assert prompt_of(backend, 1) == ("<user>hi<assistant>One.\n\nTwo.<user>hi<user>hi<assistant>")


def test_places_are_those_of_the_request() -> None:
    unread = {"type": "web_search_call", "id": "ws"}
    with responses(says("a"), says("b")) as (server, client, _):
        first = ask(client, False, input=[unread, {"role": "user", "content": "hi"}])
        fields = {"previous_response_id": first.id, "store": False}
        image = {"role": "user", "content": [{"type": "input_image"}]}
        refused = server.request("POST", PATH, body(input=[image], **fields))
        several = [unread] * 1500
        reply = server.request(
            "POST", PATH, body(input=[*several, image | {"content": "x"}], **fields)
        )
    assert refused.error["param"] == "input[0].content[0].type"
    assert reply.headers["x-quire-ignored"].startswith("input[0], input[1], ")
    assert reply.headers["x-quire-ignored"].endswith("input[19], and 1480 more")


def test_what_codex_sends() -> None:
    namespace = {
        "type": "namespace",
        "name": "mcp",
        "tools": [{"type": "function", "name": "clock", "parameters": {"type": "object"}}],
    }
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /(.|\\n)+/"}
    patch = {"type": "custom", "name": "apply_patch", "format": grammar}
    history = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "d"}]},
        {"role": "user", "content": "fix it"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** p"},
        {
            "type": "function_call",
            "call_id": "c2",
            "name": "clock",
            "namespace": "mcp",
            "arguments": "{}",
        },
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"},
        {"type": "function_call_output", "call_id": "c2", "output": "12:00"},
        {"type": "web_search_call", "id": "ws_1"},
    ]
    call = "<tool_call>\n<function=mcp__clock>\n</function>\n</tool_call>"
    custom = (
        "<tool_call>\n<function=apply_patch>\n<parameter=input>\n*** a\n+b\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    fields = {
        "instructions": "You are Codex.",
        "input": history,
        "tools": [namespace, patch, {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "client_metadata": {"a": "b"},
    }
    with responses(says(call + custom)) as (server, _, backend):
        payloads = events_of(server, **fields)
        reply = server.request("POST", PATH, body(**fields))
    assert reply.headers["x-quire-ignored"] == "tools[1].format, tools[2], input[7]"
    first, second = payloads[-1]["response"]["output"]
    assert (first["type"], first["name"], first["namespace"]) == ("function_call", "clock", "mcp")
    assert (second["type"], second["name"]) == ("custom_tool_call", "apply_patch")
    assert second["input"] == "*** a\n+b"
    assert any(p["type"] == "response.custom_tool_call_input.done" for p in payloads)
    assert prompt_of(backend).endswith(
        "<system>You are Codex.<system>d<user>fix it"
        '<assistant>[apply_patch {"input": "*** p"}][mcp__clock {}]<tool>ok<tool>12:00<assistant>'
    )


@both
def test_a_cut_answer_is_incomplete(stream: bool) -> None:
    with responses(says("Hi" + CALL)) as (server, client, _):
        fields = {"tools": TOOLS, "max_output_tokens": len(ids("Hi" + CALL)) - 60}
        if stream:
            payloads = events_of(server, **fields)
            assert payloads[-1]["type"] == "response.incomplete"
            answer = openai.types.responses.Response.model_validate(payloads[-1]["response"])
        else:
            answer = ask(client, False, **fields)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in answer.output] == ["completed", "incomplete"]


def test_a_failure_in_mid_stream_is_the_last_event() -> None:
    failing = Script([*says("Hi", end="").steps, GenerationFailed("The worker died.")])
    with responses(failing) as (server, client, _):
        *_, closed, last = events_of(server)
        kept = client.responses.retrieve(last["response"]["id"])
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "The worker died."}
    assert closed["type"] == "response.output_item.done"
    assert closed["item"]["status"] == "incomplete"
    assert (kept.status, kept.output_text) == ("failed", "Hi")
    assert last["response"]["output"] == [closed["item"]]


def test_a_full_queue_is_a_503_that_codex_comes_back_from() -> None:
    with responses(says("x"), refusal=QueueFull("Full.", 3)) as (server, _, _):
        reply = server.request("POST", PATH, body())
    assert (reply.status, reply.headers["retry-after"]) == (503, "3")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"nonsense": 1}, "nonsense"),
        ({"input": [{"type": "item_reference", "id": "msg_of_nobody"}]}, "input[0].id"),
        ({"tools": [{**CLOCK, "params": {}}]}, "tools[0].params"),
        (
            {"tools": [{**BOX, "tools": [BOX]}]},
            "tools[0].tools[0]",
        ),
        ({"tools": [{"type": [None], "name": "look"}]}, "tools[0].type"),
        ({"tools": [CLOCK, {"type": "namespace", "tools": []}]}, "tools[1].name"),
        ({"tools": [{"type": "namespace", "name": "mcp", "tools": {"a": 1}}]}, "tools[0].tools"),
        ({"tools": [{"type": "namespace", "name": "mcp", "tools": ["x"]}]}, "tools[0].tools[0]"),
    ],
)
def test_what_cannot_be_honoured_names_its_place(fields: dict[str, Any], param: str) -> None:
    with responses(says("x")) as (server, _, backend):
        reply = server.request("POST", PATH, body(**fields))
    assert reply.status == 400
    assert reply.error["param"] == param
    assert backend.streams == []


def test_what_is_stored_is_found_by_its_own_key_only() -> None:
    keys = {key: ApiKey(sha256=hash_key(key), name=key) for key in ("alice", "bob")}
    backend = FakeBackend([says("x"), Script([ids("Hello"), "hang"])])
    app = one_model_app(backend, SERVED, keyring=Keyring(keys))
    with serving(app) as server, contextlib.ExitStack() as stack:
        alice, bob = (
            stack.enter_context(
                contextlib.closing(
                    openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
                )
            )
            for key in keys
        )
        kept = ask(alice, False).id
        running = alice.responses.create(model=MODEL, input="hi", stream=True)
        events = iter(running)
        started = next(events).response.id  # type: ignore[union-attr]
        for refused in (bob.responses.retrieve, bob.responses.delete, bob.responses.cancel):
            for response_id in (kept, started):
                with pytest.raises(openai.NotFoundError):
                    refused(response_id)
        with pytest.raises(openai.BadRequestError, match="not found"):
            ask(bob, False, previous_response_id=kept)
        assert len(backend.streams) == 2
        assert alice.responses.retrieve(kept).id == kept
        assert alice.responses.cancel(started).status == "cancelled"
        running.close()
        alice.responses.delete(kept)


def test_an_answer_can_be_cancelled() -> None:
    with responses(Script([ids("Hello"), "hang"])) as (_, client, backend):
        with client.responses.create(model=MODEL, input="hi", stream=True) as stream:
            events = iter(stream)
            for event in events:
                if event.type == "response.created":
                    response_id = event.response.id
                if event.type == "response.output_text.delta":
                    break
            cancelled = client.responses.cancel(response_id)
            *_, closed, last = events
        assert cancelled.status == "cancelled"
        assert cancelled.output_text == "Hello"
        assert closed.type == "response.output_item.done"
        assert last.response == cancelled == client.responses.retrieve(response_id)
        assert backend.streams[0].close_reasons == ["abort"]
        with pytest.raises(openai.BadRequestError, match="nothing to cancel"):
            client.responses.cancel(response_id)
        with pytest.raises(openai.NotFoundError):
            client.responses.cancel("resp_none")
