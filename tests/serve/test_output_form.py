"""From a request's fields to what its output must be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from quire.serve.errors import ApiError
from quire.serve.grammar_check import Tools
from quire.serve.lark import ReasoningForm
from quire.serve.openai_protocol import ChatCompletionRequest, CompletionRequest
from quire.serve.output_form import Wanted, reasoning_form, wanted_of_chat, wanted_of_text
from quire.serve.parsers.families import Family, ParserFactory
from quire.serve.request_decoder import RequestDecoder
from quire.serve.tool_grammar import CallRules

CHAT = RequestDecoder(ChatCompletionRequest)
TEXT = RequestDecoder(CompletionRequest)
SCHEMA = {"type": "object", "properties": {"z": {}, "a": {}}}
THINK = ReasoningForm("<think>", "</think>", is_open=True)


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **fields}}


F, G, STRICT = tool("f"), tool("g"), tool("h", strict=True)


def wanted(
    family: str = "hermes", reasoning: ReasoningForm | None = None, **fields: Any
) -> Wanted | None:
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], **fields}
    return wanted_of_chat(CHAT.decode(json.dumps(body).encode()), family, reasoning)


def format_of(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **fields}}


def calls(**fields: Any) -> tuple[CallRules, list[str]]:
    found = wanted(**fields)
    assert found is not None
    assert found.request.kind == "tools"
    import msgspec

    asked = msgspec.json.decode(found.request.text, type=Tools)
    assert all(
        each.place == f"[{'fgh'.index(each.name)}].function.parameters" for each in asked.tools
    )
    return asked.rules, [each.name + "!" * each.strict for each in asked.tools]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"tools": [F, G]},
        {"tools": [F], "tool_choice": "auto", "parallel_tool_calls": False},
        {"tools": [STRICT], "tool_choice": "none"},
        {"tools": []},
    ],
)
def test_what_any_text_will_do_for_has_no_grammar(fields: dict[str, Any]) -> None:
    assert wanted(**fields) is None


def test_a_schema_keeps_the_order_of_its_keys() -> None:
    found = wanted(response_format=format_of())
    assert found is not None
    assert json.loads(found.request.text) == SCHEMA
    assert found.request.text.index('"z"') < found.request.text.index('"a"')
    assert found.param == "response_format.json_schema.schema"
    assert found.request.strict is False
    strict = wanted(response_format=format_of(strict=True))
    assert strict is not None
    assert strict.request.strict is True


@pytest.mark.parametrize(
    ("outputs", "kind", "text"),
    [
        ({"json": SCHEMA}, "json_schema", json.dumps(SCHEMA, separators=(",", ":"))),
        ({"json": '{"type": "null"}'}, "json_schema", '{"type": "null"}'),
        ({"json_object": True}, "json_schema", '{"type":"object"}'),
        ({"regex": "[a-z]+"}, "regex", "[a-z]+"),
        ({"choice": ["a", "b"]}, "choice", '["a","b"]'),
        ({"grammar": "start: /a/"}, "lark", "start: /a/"),
    ],
)
def test_structured_outputs(outputs: dict[str, Any], kind: str, text: str) -> None:
    body = {"model": "m", "prompt": "x", "structured_outputs": outputs}
    for found in (
        wanted(structured_outputs=outputs),
        wanted_of_text(TEXT.decode(json.dumps(body).encode())),
    ):
        assert found is not None
        assert (found.request.kind, found.request.text) == (kind, text)
        assert found.param == f"structured_outputs.{next(iter(outputs))}"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"family": "none", "tools": [F], "tool_choice": "required"}, "tool_choice"),
        ({"family": "none", "tools": [STRICT]}, "tools"),
    ],
)
def test_what_contradicts_itself_or_is_not_known_is_refused(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as error:
        wanted(**fields)
    assert (error.value.status, error.value.param) == (400, param)


def test_calls_that_must_be_made_or_be_right_have_a_grammar() -> None:
    every = [F, G, STRICT]
    rules, names = calls(tools=every, tool_choice="required")
    assert (rules.required, rules.parallel, names) == (True, True, ["f", "g", "h!"])
    named = {"type": "function", "function": {"name": "g"}}
    rules, names = calls(tools=every, tool_choice=named, parallel_tool_calls=False)
    assert (rules.required, rules.parallel, names) == (True, False, ["g"])
    rules, names = calls(tools=every)
    assert (rules.required, names) == (False, ["f", "g", "h!"])
    rules, _ = calls(tools=every, reasoning=THINK, family="glm")
    assert (rules.reasoning, rules.family) == (THINK, "glm")


def test_content_of_a_form_comes_after_reasoning() -> None:
    found = wanted(response_format={"type": "json_object"}, reasoning=THINK)
    assert found is not None
    assert found.request.reasoning == THINK


def test_beside_tools_an_answer_is_calls_or_of_the_form() -> None:
    for tools in ([F], [STRICT]):
        found = wanted(response_format=format_of(), tools=tools)
        assert found is not None
        assert found.alone is not None
        assert found.alone.param == "response_format.json_schema.schema"
        assert found.request.instead == found.alone.request
        assert (found.param, found.request.kind) == ("tools", "tools")
    found = wanted(response_format=format_of(), tools=[F], tool_choice="required")
    assert found is not None
    assert found.request.instead is None
    found = wanted(response_format=format_of(), tools=[F], tool_choice="none")
    assert found is not None
    assert found.request.kind == "json_schema"


@pytest.mark.parametrize(
    ("family", "opening", "form"),
    [
        ("none", "<think>", None),
        ("think", "<assistant><think>\n", THINK),
        ("think", "<assistant>", ReasoningForm("<think>", "</think>", is_open=False)),
        (
            "think",
            "<assistant><think>\n\n</think>\n\n",
            ReasoningForm("<think>", "</think>", is_open=False),
        ),
        (
            "kimi_k3",
            "",
            ReasoningForm(
                "<|open|>think<|sep|>",
                "<|close|>think<|sep|>",
                is_open=False,
                before_answer="<|open|>response<|sep|>",
            ),
        ),
    ],
)
def test_how_a_model_reasons_is_read_from_its_prompt(
    family: str, opening: str, form: ReasoningForm | None
) -> None:
    parsers = ParserFactory(Family("none", family), Tokenizer(models.BPE()))
    assert reasoning_form(parsers, opening) == form


def test_gpt_oss_answers_in_its_final_channel() -> None:
    parsers = ParserFactory(Family("harmony", "harmony"), Tokenizer(models.BPE()))
    form = reasoning_form(parsers, "<|start|>assistant")
    assert form is not None
    assert form.before_answer == "<|channel|>final<|message|>"
