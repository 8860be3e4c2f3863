"""/v1/messages over HTTP, read by Anthropic's client; what Claude Code sends."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from fake_backend import MODEL, FakeBackend, Script, Server, one_model_app, ready, serving
from test_chat_tools import CALL, SECOND, SERVED, ids, says

from quire.serve.backend import GenerationFailed, QueueFull

PATH = "/v1/messages"
USER = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "name": "weather",
        "description": "The weather.",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
        "cache_control": {"type": "ephemeral"},
    },
    {"type": "custom", "name": "clock", "input_schema": {"type": "object", "properties": {}}},
]


@contextlib.contextmanager
def messages(
    *scripts: Script, limit: int = 4096, **options: Any
) -> Iterator[tuple[Server, anthropic.Anthropic, FakeBackend]]:
    backend = FakeBackend(list(scripts), info=ready(max_model_len=limit), **options)
    with serving(one_model_app(backend, SERVED)) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        with contextlib.closing(client):
            yield server, client, backend


def ask(client: anthropic.Anthropic, stream: bool, **fields: Any) -> Any:
    fields = {"model": MODEL, "messages": USER, "max_tokens": 1000, **fields}
    if not stream:
        return client.messages.create(**fields)
    with client.messages.stream(**fields) as events:
        return events.get_final_message()


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": USER, "max_tokens": 1000, **fields}


def prompt_of(backend: FakeBackend, index: int = 0) -> str:
    prompt = backend.streams[index].request.prompt_token_ids
    return SERVED.encoder.tokenizer.decode(prompt, skip_special_tokens=False)


RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
THINKING = {"type": "adaptive"}


@both
def test_thinking_text_and_calls_are_blocks(stream: bool) -> None:
    script = says("Hm.\n</think>\n\nLet me see.\n" + CALL + SECOND)
    script.cached_tokens = 2
    with messages(script) as (_, client, _):
        answer = ask(client, stream, tools=TOOLS, thinking=THINKING)
    thought, text, first, second = answer.content
    assert (thought.type, thought.thinking) == ("thinking", "Hm.")
    assert thought.signature
    assert (text.type, text.text) == ("text", "Let me see.")
    assert (first.type, first.name, first.input) == (
        "tool_use",
        "weather",
        {"city": "Rome", "days": 3},
    )
    assert (second.name, second.input) == ("clock", {})
    assert (answer.stop_reason, answer.stop_sequence) == ("tool_use", None)
    assert answer.usage.cache_read_input_tokens == 2
    assert (
        answer.usage.output_tokens == len(ids("Hm.\n</think>\n\nLet me see.\n" + CALL + SECOND)) + 1
    )


def test_the_stream_has_every_event_in_order() -> None:
    with messages(says("Hm.</think>Hi" + CALL)) as (server, _, _):
        reply = server.request("POST", PATH, body(stream=True, tools=TOOLS, thinking=THINKING))
    names, payloads = [], []
    for event in reply.body.decode().strip().split("\n\n"):
        name, data = event.split("\n")
        names.append(name.removeprefix("event: "))
        payloads.append(json.loads(data.removeprefix("data: ")))
    assert names == [payload["type"] for payload in payloads]
    assert (names[0], names[-2], names[-1]) == ("message_start", "message_delta", "message_stop")
    start = payloads[0]["message"]
    assert start["content"] == []
    assert start["usage"]["input_tokens"] > 0
    open_block = None
    kinds = []
    for payload in payloads[1:-2]:
        if payload["type"] == "content_block_start":
            assert open_block is None
            open_block = payload["index"]
            assert open_block == len(kinds)
            kinds.append(payload["content_block"]["type"])
        elif payload["type"] == "content_block_stop":
            assert payload["index"] == open_block
            open_block = None
        else:
            assert payload["type"] == "content_block_delta"
            assert payload["index"] == open_block
    assert open_block is None
    assert kinds == ["thinking", "text", "tool_use"]


@both
def test_thinking_is_kept_back_from_those_who_did_not_ask(stream: bool) -> None:
    with messages(says("<think>Hm.</think>Hi")) as (_, client, _):
        answer = ask(client, stream)
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == "Hi"


@both
def test_a_stop_sequence_is_named(stream: bool) -> None:
    script = Script([*says("Well, stop here", end="").steps, "hang"])
    with messages(script) as (_, client, _):
        answer = ask(client, stream, stop_sequences=["never", "stop"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "stop")
    assert answer.content[0].text == "Well, "


@both
def test_a_limit_beyond_the_context_is_what_is_left(stream: bool) -> None:
    with messages(Script([ids("a")] * 500), limit=200) as (_, client, backend):
        answer = ask(client, stream, max_tokens=20_000)
    request = backend.streams[0].request
    assert request.max_tokens == 200 - len(request.prompt_token_ids)
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == request.max_tokens


@both
def test_a_call_that_is_cut_off_is_not_made(stream: bool) -> None:
    with messages(says(CALL)) as (_, client, _):
        answer = ask(client, stream, tools=TOOLS, max_tokens=len(ids(CALL)) - 60)
    assert answer.stop_reason == "max_tokens"


def test_what_claude_code_sends_is_rendered_in_place() -> None:
    history = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "See."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"z": 1, "city": "R"}},
            ],
        },
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "and?"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "is_error": True,
                    "content": [
                        {"type": "text", "text": "no"},
                        {"type": "image", "source": {"type": "base64"}},
                    ],
                },
            ],
        },
    ]
    fields = {
        "messages": history,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
            {"type": "text", "text": "You help.", "cache_control": {"type": "ephemeral"}},
        ],
        "tools": [*TOOLS, {"type": "web_search_20250305", "name": "web_search"}],
        "thinking": THINKING,
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "u"},
        "inference_geo": "eu",
        "max_tokens": 32_000,
    }
    with messages(says("</think>x")) as (server, _, backend):
        reply = server.request("POST", f"{PATH}?beta=true", body(**fields))
        assert reply.status == 200, reply.body
        counted = {
            k: v
            for k, v in body(**fields).items()
            if k not in ("max_tokens", "metadata", "inference_geo")
        }
        count = server.request("POST", f"{PATH}/count_tokens", counted).json
    assert reply.headers["x-quire-ignored"] == "tools[2], max_tokens"
    prompt = prompt_of(backend)
    expected = (
        "<system>You help.<user>a\nb"
        '<assistant>(Hm)See.[weather {"z": 1, "city": "R"}]'
        "<system>be brief<tool>Error: no\n[image omitted]<user>and?<assistant><think>\n"
    )
    assert prompt.endswith(expected)
    assert "cch" not in prompt
    assert count == {"input_tokens": len(backend.streams[0].request.prompt_token_ids)}


def test_claude_models_are_the_served_one() -> None:
    with messages(says("x")) as (_, client, _):
        assert ask(client, False, model="claude-haiku-4-5").model == MODEL
        with pytest.raises(anthropic.NotFoundError):
            ask(client, False, model="gpt-5")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"tool_choice": {"type": "tool", "name": "absent"}, "tools": TOOLS}, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        ({"context_management": {"edits": [{"type": "compact"}]}}, "context_management.edits[0]"),
        (
            {
                "messages": [
                    *USER,
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
                    },
                ]
            },
            "messages[1]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [RESULT, {"type": "image", "source": {}}]}]},
            "messages[0].content[1].type",
        ),
        ({"nonsense": 1}, "nonsense"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"stop_sequences": ["x" * 1025]}, "stop_sequences"),
        ({"tools": [{"name": "f", "parameters": {}}]}, "tools[0].parameters"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": TOOLS * 600}, "tools"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "prompt is too long: 50"),
    ],
)
def test_refusals_have_anthropics_shape(fields: dict[str, Any], word: str) -> None:
    with messages(says("x")) as (server, client, _):
        reply = server.request("POST", PATH, body(**fields))
        with pytest.raises(anthropic.BadRequestError):
            client.post("/v1/messages", body=body(**fields), cast_to=object)
    assert reply.status == 400
    assert reply.json["type"] == "error"
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert word in reply.json["error"]["message"]
    assert reply.json["request_id"] == reply.headers["request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_goes_on_where_the_last_message_ends(stream: bool) -> None:
    prefilled = [*USER, {"role": "assistant", "content": "So"}]
    with messages(says(" it is")) as (_, client, backend):
        answer = ask(client, stream, messages=prefilled)
    assert [block.text for block in answer.content] == [" it is"]
    [request] = [stream.request for stream in backend.streams]
    assert SERVED.encoder.tokenizer.decode(request.prompt_token_ids).endswith("So")


def test_failures_in_mid_stream_are_events() -> None:
    failing = Script([*says("Hi", end="").steps, GenerationFailed("The worker died.")])
    with messages(failing) as (_, client, _), pytest.raises(anthropic.APIError, match="died"):
        ask(client, True)


def test_a_full_queue_is_a_rate_limit() -> None:
    with messages(says("x"), refusal=QueueFull("Full.", 3)) as (_, client, _):
        with pytest.raises(anthropic.RateLimitError) as caught:
            ask(client, False)
        assert caught.value.response.headers["retry-after"] == "3"


def test_each_turn_of_an_agents_trace_begins_with_the_one_before() -> None:
    """What changes from request to request, as Claude Code sends it, breaks no cached prefix."""
    history: list[dict[str, Any]] = [{"role": "user", "content": "fix it"}]
    turns = 10
    with messages(*[says("Hm.</think>Step." + CALL)] * turns, limit=20_000) as (_, client, backend):
        for turn in range(turns):
            billing = {"type": "text", "text": f"x-anthropic-billing-header: cch={turn};"}
            answer = ask(
                client,
                turn % 2 == 0,
                messages=history,
                system=[billing, {"type": "text", "text": "You help."}],
                tools=TOOLS,
                thinking=THINKING,
            )
            history += [
                {"role": "assistant", "content": [b.model_dump() for b in answer.content]},
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": answer.content[-1].id,
                            "content": f"result {turn}",
                        }
                    ],
                },
                {"role": "system", "content": f"{1000 - turn} tokens left"},
            ]
    prompts = [prompt_of(backend, turn) for turn in range(turns)]
    for before, after in itertools.pairwise(prompts):
        assert after.startswith(before.removesuffix("<think>\n"))
        assert "cch" not in after
