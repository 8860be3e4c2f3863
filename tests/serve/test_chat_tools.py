"""Tools and reasoning over HTTP: what OpenAI's client reads of a scripted model's markup."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_backend import EOS, MODEL, FakeBackend, Script, Server, one_model_app, ready, served_model
from fake_backend import serving as serve_app

from quire.serve.thinking import switches_of

PATH = "/v1/chat/completions"
WORDS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
SIGNS = "{# <tool_call> <function= <think> #}"
TEMPLATE = (
    SIGNS + "{{ tools | tojson if tools else '' }}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
SERVED = served_model(WORDS, TEMPLATE)
USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
SECOND = "\n<tool_call>\n<function=clock>\n</function>\n</tool_call>"


def ids(text: str) -> list[int]:
    return SERVED.encoder.tokenizer.encode(text, add_special_tokens=False).ids


def says(text: str, *, end: str = EOS) -> Script:
    return Script([[token_id] for token_id in ids(text + end)])


@contextlib.contextmanager
def chat(*scripts: Script) -> Iterator[tuple[Server, openai.OpenAI, FakeBackend]]:
    backend = FakeBackend(list(scripts), info=ready(max_model_len=4096))
    with serve_app(one_model_app(backend, SERVED)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with contextlib.closing(client):
            yield server, client, backend


def ask(client: openai.OpenAI, stream: bool, **fields: Any) -> tuple[Any, Any]:
    """The answer's choice and usage, streamed through the official accumulator or whole."""
    fields = {"model": MODEL, "messages": USER, "tools": TOOLS, **fields}
    if not stream:
        answer = client.chat.completions.create(**fields)
        return answer.choices[0], answer.usage
    helper = client.chat.completions.stream(stream_options={"include_usage": True}, **fields)
    with helper as events:
        for _ in events:
            pass
        try:
            final = events.get_final_completion()
        except openai.LengthFinishReasonError as error:
            final = error.completion
    return final.choices[0], final.usage


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@both
def test_calls_are_told_from_content(stream: bool) -> None:
    with chat(says("Let me see.\n\n" + CALL + SECOND)) as (_, client, _):
        choice, usage = ask(client, stream)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name) == ("function", "weather")
    assert first.function.arguments == '{"city":"Rome","days":3}'
    assert (second.function.name, second.function.arguments) == ("clock", "{}")
    assert len({first.id, second.id}) == 2
    assert first.id.startswith("call_")
    assert usage.completion_tokens == len(ids("Let me see.\n\n" + CALL + SECOND + EOS))
    assert usage.completion_tokens_details.reasoning_tokens == 0


@both
def test_only_calls_leave_no_content(stream: bool) -> None:
    with chat(says(CALL)) as (_, client, _):
        choice, _ = ask(client, stream)
    assert not choice.message.content
    assert choice.finish_reason == "tool_calls"


def test_the_stream_names_each_call_once() -> None:
    with chat(says(CALL + SECOND)) as (server, _, _):
        body = {"model": MODEL, "messages": USER, "tools": TOOLS, "stream": True}
        *chunks, done = server.events(PATH, body)
    assert done == "[DONE]"
    pieces = [
        piece
        for chunk in chunks
        for choice in chunk["choices"]
        for piece in choice["delta"].get("tool_calls", [])
    ]
    heads = [piece for piece in pieces if "id" in piece]
    assert [(p["index"], p["function"]["name"], p["type"]) for p in heads] == [
        (0, "weather", "function"),
        (1, "clock", "function"),
    ]
    rest = [piece for piece in pieces if "id" not in piece]
    assert all(set(piece) == {"index", "function"} for piece in rest)
    assert all(set(piece["function"]) == {"arguments"} for piece in rest)
    assert sum(len(piece["function"]["arguments"]) == 1 for piece in rest) >= len("ome")


@both
def test_one_call_ends_the_generation_where_calls_are_not_parallel(stream: bool) -> None:
    script = Script([*says(CALL + SECOND, end="").steps, "hang"])
    with chat(script) as (_, client, backend):
        choice, usage = ask(client, stream, parallel_tool_calls=False)
        assert backend.streams[0].close_reasons == ["stop"]
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
    assert choice.finish_reason == "tool_calls"
    assert usage.completion_tokens <= len(ids(CALL))


@both
def test_a_call_that_is_cut_off_is_no_call_to_make(stream: bool) -> None:
    with chat(says(CALL)) as (_, client, _):
        choice, _ = ask(client, stream, max_tokens=len(ids(CALL)) - 60)
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments.startswith('{"city":"R')


@both
@pytest.mark.parametrize("fields", [{"tools": None}, {"tool_choice": "none"}])
def test_without_tools_to_call_markup_is_text(stream: bool, fields: dict[str, Any]) -> None:
    with chat(says(CALL)) as (_, client, _):
        choice, _ = ask(client, stream, **{k: v or openai.omit for k, v in fields.items()})
    assert choice.message.content == CALL
    assert not choice.message.tool_calls
    assert choice.finish_reason == "stop"


@both
def test_reasoning_goes_under_both_names_and_is_counted(stream: bool) -> None:
    with chat(says("Hm, stop.\n</think>\n\nFine." + SECOND)) as (_, client, _):
        choice, usage = ask(client, stream, stop=["stop"], extra_body={"enable_thinking": True})
    message = choice.message
    assert message.model_extra["reasoning_content"] == "Hm, stop."
    assert message.model_extra["reasoning"] == "Hm, stop."
    assert message.content == "Fine."
    assert message.tool_calls[0].function.name == "clock"
    assert usage.completion_tokens_details.reasoning_tokens == len(ids("Hm, stop.\n</think>"))


@both
def test_a_stop_string_ends_the_content(stream: bool) -> None:
    script = Script([*says("Hm, stop.</think>All right, stop here", end="").steps, "hang"])
    with chat(script) as (_, client, backend):
        choice, _ = ask(
            client, stream, stop=["stop"], reasoning_effort="low",
            extra_body={"chat_template_kwargs": {"enable_thinking": True}},
        )  # fmt: skip
        assert backend.streams[0].close_reasons == ["stop"]
    assert choice.message.content == "All right, "
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "opened"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"enable_thinking": True}, True),
        ({"reasoning_effort": "none", "enable_thinking": None}, False),
        ({}, False),
    ],
)
def test_switches_reach_the_template(fields: dict[str, Any], opened: bool) -> None:
    with chat(says("x")) as (server, _, backend):
        reply = server.request("POST", PATH, {"model": MODEL, "messages": USER, **fields})
        assert reply.status == 200, reply.body
    prompt = SERVED.encoder.tokenizer.decode(
        backend.streams[0].request.prompt_token_ids, skip_special_tokens=False
    )
    assert prompt.endswith("<think>\n") is opened


@pytest.mark.parametrize(
    ("source", "switches"),
    [
        ("reasoning_effort enable_thinking", {"enable_thinking": False, "thinking": False}),
        ("enable_thinking", {"enable_thinking": False, "thinking": False}),
        ("reasoning_effort", {}),  # it has levels, and no way to leave thinking out
    ],
)
def test_no_effort_is_no_thinking_where_thinking_can_be_left_out(
    source: str, switches: dict[str, bool]
) -> None:
    levels = {"reasoning_effort": "low", "thinking_effort": "low"}
    assert switches_of(source, "none", None, None) == {**levels, **switches}


def test_a_conversation_goes_back_as_it_came() -> None:
    """What clients replay, reasoning and calls included, is rendered; tools head the prompt."""
    with chat(says("Hm</think>" + CALL), says("Sunny.")) as (_, client, backend):
        fields = {"extra_body": {"enable_thinking": True}}
        choice, _ = ask(client, False, **fields)
        history = [
            *USER,
            choice.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "sunny"},
        ]
        choice, _ = ask(client, True, messages=history, **fields)
    prompt = SERVED.encoder.tokenizer.decode(
        backend.streams[1].request.prompt_token_ids, skip_special_tokens=False
    )
    given = json.dumps(WEATHER, ensure_ascii=False)
    assert prompt.startswith(f"[{given}, ")
    assert '<assistant>(Hm)[weather {"city": "Rome", "days": 3}]<tool>sunny' in prompt


def test_leniency_for_what_clients_add() -> None:
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "s", "cache_control": {}}]},
        {**USER[0], "cache_control": {"type": "ephemeral"}},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "r",
            "reasoning_details": [],
            "function_call": None,
            "tool_calls": [
                {
                    "id": "c",
                    "index": 0,
                    "type": "function",
                    "function": {"name": "clock", "arguments": ""},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "12:00"},
    ]
    fields = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    with chat(says("x")) as (server, _, _):
        reply = server.request("POST", PATH, {"model": MODEL, "messages": turns, **fields})
    assert reply.status == 200, reply.body


def test_the_servers_switches_hold_until_a_request_says_otherwise() -> None:
    model = dataclasses.replace(SERVED, default_switches={"enable_thinking": True})
    backend = FakeBackend([says("x")], info=ready(max_model_len=4096))
    with serve_app(one_model_app(backend, model)) as server:
        for fields in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
            server.request("POST", PATH, {"model": MODEL, "messages": USER, **fields})
    ends = [
        SERVED.encoder.tokenizer.decode(s.request.prompt_token_ids, skip_special_tokens=False)
        for s in backend.streams
    ]
    assert [prompt.endswith("<think>\n") for prompt in ends] == [True, False]
