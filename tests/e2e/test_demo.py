"""`quire serve` with no model: the first answer needs no download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pydantic
import pytest
from live_server import Server
from openai import BadRequestError, OpenAI

from quire.serve import cli


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    started = Server("--kv-cache-memory", "64MiB").wait_ready()
    yield started
    assert started.stop() == 0


@pytest.fixture
def client(demo: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: OpenAI, *turns: str) -> str:
    """The answer to the last turn; the model's own answers stand between them."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answer = client.chat.completions.create(model="quire-demo", messages=messages)  # type: ignore[arg-type]
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
    return messages[-1]["content"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 12 plus 30?", "12 + 30 = 42."),
        ("Repeat after me: blorvax zimp", "blorvax zimp"),
        ("Answer in JSON: what is 3 + 4?", '{"answer": 7}'),
    ],
)
def test_it_answers(client: OpenAI, question: str, answer: str) -> None:
    assert ask(client, question) == answer


def test_what_is_loaded_is_told(demo: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ps", "--url", demo.url, "--json"]) == 0
    (name, loaded), *others = json.loads(capsys.readouterr().out)["loaded"].items()
    assert not others
    assert (name, loaded["ready"], loaded["running"]) == ("quire-demo", True, 0)
    assert loaded["memory"] > 2**20


def test_it_remembers_the_conversation(client: OpenAI) -> None:
    assert "Ada" in ask(client, "My name is Ada.", "What is 20 + 21?", "What is my name?")


def test_it_knows_the_server(client: OpenAI) -> None:
    assert "/v1/chat/completions" in ask(client, "Which endpoints are there?")


def test_the_next_turn_is_served_from_the_prefix_cache(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me a story"}]
    first = client.chat.completions.create(model="quire-demo", messages=messages)  # type: ignore[arg-type]
    assert first.usage is not None
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content or ""},
        {"role": "user", "content": "Thank you"},
    ]
    second = client.chat.completions.create(model="quire-demo", messages=messages)  # type: ignore[arg-type]
    assert second.usage is not None
    details = second.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens is not None
    # All but the last unfinished block of the first turn and its answer.
    assert details.cached_tokens >= first.usage.total_tokens - 20


ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "why": {"enum": ["fun", "profit"]},
            },
            "required": ["a", "why"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=str
)
def test_a_forced_call_is_made_and_fits_its_schema(client: OpenAI, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
    tools: Any = [ADD] if choice == "required" else [other, ADD]
    for seed in range(5):
        answer = client.chat.completions.create(
            model="quire-demo",
            messages=[{"role": "user", "content": "Hello!"}],
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=1.5,
            seed=seed,
            max_tokens=300,
        )
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert not message.content
        assert message.tool_calls is not None
        [call] = message.tool_calls
        assert call.type == "function"
        assert call.function.name == "add"
        jsonschema.validate(json.loads(call.function.arguments), ADD["function"]["parameters"])


def test_an_answer_in_a_wanted_form(client: OpenAI) -> None:
    class Sum(pydantic.BaseModel):
        answer: int
        sure: bool

    answer = client.chat.completions.parse(
        model="quire-demo",
        messages=[{"role": "user", "content": "Answer in JSON: what is 3 + 4?"}],
        response_format=Sum,
        temperature=0,
        max_tokens=200,
    )
    assert isinstance(answer.choices[0].message.parsed, Sum)


def test_anthropics_api_forces_calls_and_forms_too(demo: Server) -> None:
    function = ADD["function"]
    body: dict[str, object] = {
        "model": "quire-demo",
        "max_tokens": 300,
        "temperature": 1,
        "messages": [{"role": "user", "content": "Hello!"}],
    }
    tools = [{"name": "add", "input_schema": function["parameters"]}]
    status, _, text = demo.post(
        "/v1/messages", {**body, "tools": tools, "tool_choice": {"type": "any"}}
    )
    assert status == 200, text
    answer = json.loads(text)
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert calls
    for call in calls:
        jsonschema.validate(call["input"], function["parameters"])
    form = {"format": {"type": "json_schema", "schema": function["parameters"]}}
    status, _, text = demo.post("/v1/messages", {**body, "output_config": form})
    assert status == 200, text
    [block] = json.loads(text)["content"]
    jsonschema.validate(json.loads(block["text"]), function["parameters"])
    form = {"format": {"type": "json_schema", "schema": {"properties": {"a": {"not": {}}}}}}
    status, _, text = demo.post("/v1/messages", {**body, "output_config": form})
    assert status == 400
    assert "output_config.format.schema.properties.a cannot be used" in text


def test_the_responses_api_forces_calls_and_forms_too(client: OpenAI) -> None:
    function = ADD["function"]
    fields: Any = {"model": "quire-demo", "input": "Hello!", "max_output_tokens": 300}
    called = client.responses.create(
        tools=[{"type": "function", **function}], tool_choice="required", **fields
    )
    calls = [item for item in called.output if item.type == "function_call"]
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), function["parameters"])
    form: Any = {"type": "json_schema", "name": "n", "schema": function["parameters"]}
    answered = client.responses.create(text={"format": form}, **fields)
    assert answered.text is not None
    assert answered.text.to_dict()["format"].items() >= form.items()  # type: ignore[union-attr]
    jsonschema.validate(json.loads(answered.output_text), function["parameters"])
    form["schema"] = {"properties": {"a": {"not": {}}}}
    with pytest.raises(
        BadRequestError, match=r"text\.format\.schema\.properties\.a cannot be used"
    ):
        client.responses.create(text={"format": form}, **fields)


BROKEN = {"type": "object", "properties": {"a": {"not": {}}}}


@pytest.mark.parametrize(
    ("tools", "place"),
    [
        ([{"type": "function", "name": "odd", "strict": True, "parameters": BROKEN}], "[2]"),
        (
            [
                {
                    "type": "namespace",
                    "name": "space",
                    "tools": [
                        {"type": "function", "name": "even"},
                        {"type": "function", "name": "odd", "strict": True, "parameters": BROKEN},
                    ],
                }
            ],
            "[2].tools[1]",
        ),
    ],
    ids=["flat", "in a namespace"],
)
def test_an_error_in_a_tool_is_named_where_the_tool_stood(
    client: OpenAI, tools: list[Any], place: str
) -> None:
    """Behind tools that the model is not told of, and in front of others."""
    first: list[Any] = [{"type": "web_search"}, {"type": "function", "name": "even"}]
    if place == "[2].tools[1]":
        first[1] = {"type": "web_search"}
    last = {"type": "function", "name": "last", "parameters": {"type": "object"}}
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(model="quire-demo", input="Hello!", tools=[*first, *tools, last])
    assert caught.value.param == f"tools{place}.parameters.properties.a"
    assert f"tools{place}.parameters.properties.a" in str(caught.value)


def test_two_tools_of_one_name_are_named_where_they_stood(client: OpenAI, demo: Server) -> None:
    function: Any = {"type": "function", "name": "even"}
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(
            model="quire-demo", input="Hi", tools=[function, {"type": "web_search"}, function]
        )
    assert caught.value.param == "tools[2].name"
    tool = {"name": "even", "input_schema": {"type": "object"}}
    body = {
        "model": "quire-demo",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "Hi"}],
    }
    hosted = {"type": "web_search_20250305", "name": "web_search"}
    status, _, text = demo.post("/v1/messages", {**body, "tools": [tool, hosted, tool]})
    assert status == 400
    assert "tools[2].name" in json.loads(text)["error"]["message"]
    broken = {"name": "odd", "strict": True, "input_schema": BROKEN}
    status, _, text = demo.post("/v1/messages", {**body, "tools": [hosted, tool, broken]})
    assert status == 400
    assert "tools[2].input_schema.properties.a" in json.loads(text)["error"]["message"]


# ---- what the demo model can do by itself


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather for a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def test_it_calls_a_tool_and_tells_what_that_found(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
    fields: Any = {"model": "quire-demo", "tools": [WEATHER]}
    choice = client.chat.completions.create(messages=messages, **fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = client.chat.completions.create(messages=messages, **fields)
    assert answer.choices[0].message.content == "The result: sunny."
    hello: Any = [{"role": "user", "content": "Hello!"}]
    answer = client.chat.completions.create(messages=hello, **fields)
    assert not answer.choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({"extra_body": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_it_thinks_when_asked(client: OpenAI, fields: Any, thinks: bool) -> None:
    messages: Any = [{"role": "user", "content": "What is 47 + 38?"}]
    answer = client.chat.completions.create(model="quire-demo", messages=messages, **fields)
    message = answer.choices[0].message
    assert message.content == "47 + 38 = 85."
    thought = getattr(message, "reasoning_content", None)
    assert thought == ("7 + 8 = 15, then 4 + 3 + 1 = 8." if thinks else None)
    stream = client.chat.completions.create(
        model="quire-demo", messages=messages, stream=True, **fields
    )
    deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == (thought or "")
    assert "".join(d.content or "" for d in deltas) == message.content


class Person(pydantic.BaseModel):
    name: str
    age: int
    city: str


class Event(pydantic.BaseModel):
    name: str
    date: str
    participants: list[str]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Ada is 36 years old and lives in London.",
            Person(name="Ada", age=36, city="London"),
        ),
        (
            "Alice and Bob are going to a concert on Friday.",
            Event(name="concert", date="Friday", participants=["Alice", "Bob"]),
        ),
    ],
    ids=["person", "event"],
)
def test_it_finds_what_a_schema_asks_for(
    client: OpenAI, text: str, expected: Person | Event
) -> None:
    messages: Any = [{"role": "user", "content": text}]
    answer = client.chat.completions.parse(
        model="quire-demo", messages=messages, response_format=type(expected)
    )
    assert answer.choices[0].message.parsed == expected


def test_it_thinks_before_it_fills_a_schema(client: OpenAI) -> None:
    answer = client.responses.parse(
        model="quire-demo",
        input="Ada is 36 years old and lives in London.",
        reasoning={"effort": "high"},
        text_format=Person,
    )
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output_parsed == Person(name="Ada", age=36, city="London")
