"""Grammars of tool calls' arguments, by the tools' schemas."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tool_call_forms import (
    Model,
    one_call,
    tools,
)

from quire.serve.grammar_check import Tool
from quire.serve.schema_check import SchemaRefused, path_text
from quire.serve.tool_grammar import CallRules

TAGGED = "<tool_call>\n<function=f>\n{}</function>\n</tool_call>"


def argument(name: str, value: str) -> str:
    return f"<parameter={name}>\n{value}\n</parameter>\n"


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string"}, ["", "5", "null", "if (a</parameter>b) <x>", "a\n\nb"], []),
        ({"type": ["string", "null"]}, ["null", "text"], []),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["null", "text"], []),
        ({"enum": ["red", "green"]}, ["red"], ["blue", '"red"', "red\n"]),
        ({"enum": ["red", None]}, ["red", "null"], ["green"]),
        ({"const": "x y"}, ["x y"], ["x"]),
        ({"anyOf": [{"const": "a"}, {"type": "null"}]}, ["a", "null"], ["b"]),
        ({"type": "integer"}, ["-5"], ["five", "5.5", '"5"']),
        ({"type": "boolean"}, ["true"], ["True", "1"]),
        ({"enum": [1, 2]}, ["2"], ["3"]),
        ({"type": "array", "items": {"type": "string"}}, ['["a", "b"]'], ["a"]),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            ['{"k": 1}'],
            ['{"k": ""}'],
        ),
        ({"$ref": "#/$defs/day"}, ["mon"], ["sun", '"mon"']),
        ({}, ["anything", "5"], []),
    ],
)
def test_tagged_arguments_are_text_where_a_string_fits_and_json_elsewhere(
    schema: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    model = Model("qwen_xml")
    parameters = {
        "type": "object",
        "properties": {"a": schema, "after": {"type": "integer"}},
        "required": ["a"],
        "$defs": {"day": {"enum": ["mon", "tue"]}},
    }
    grammar = model.grammar(CallRules("qwen_xml", True), [Tool("f", parameters, strict=True)])
    for value in right:
        assert model.takes(grammar, TAGGED.format(argument("a", value)))
        both = argument("a", value) + argument("after", "1")
        assert model.takes(grammar, TAGGED.format(both))
    for value in wrong:
        assert not model.takes(grammar, TAGGED.format(argument("a", value)))
    assert not model.takes(grammar, TAGGED.format(argument("after", "1")))


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string"}, ['<|"|>a "q" {x}<|"|>'], ['"a"', "a"]),
        ({"enum": ["x", 1, None]}, ['<|"|>x<|"|>', "1", "null"], ["x", "2"]),
        (
            {"type": "array", "items": {"type": "number"}},
            ["[]", "[1,2.5]"],
            ["[1,]", '[<|"|>a<|"|>]'],
        ),
        ({"type": ["integer", "null"]}, ["3", "null"], ["true"]),
        ({"type": "object"}, ['{k:[1,true,null,<|"|>z<|"|>],x-y:{}}', "{}"], ["[]", '{"k":1}']),
        (
            {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "boolean"}}},
            ["{a:true,b:1}", "{b:1}", "{a:false}", "{}"],
            ["{b:1,a:true}", "{a:1}"],
        ),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '<|"|>1<|"|>'], ["true"]),
        ({}, ["1", '<|"|><|"|>', "[{}]"], ["x"]),
    ],
)
def test_gemma_writes_values_in_its_own_notation(
    schema: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    model = Model("gemma4")
    parameters = {"type": "object", "properties": {"v": schema}, "required": ["v"]}
    grammar = model.grammar(CallRules("gemma4", True), [Tool("f", parameters, strict=True)])
    for value in right:
        assert model.takes(grammar, f"<|tool_call>call:f{{v:{value}}}<tool_call|>")
    for value in wrong:
        assert not model.takes(grammar, f"<|tool_call>call:f{{v:{value}}}<tool_call|>")


@pytest.mark.parametrize("required", [[], ["a"], ["b"], ["c"], ["a", "c"], ["a", "b", "c"]])
def test_arguments_that_are_not_required_are_left_out_at_will(required: list[str]) -> None:
    model = Model("pythonic")
    parameters = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in "abc"},
        "required": required,
    }
    grammar = model.grammar(CallRules("pythonic", True), [Tool("f", parameters, strict=True)])
    for chosen in ("", "a", "b", "c", "ab", "ac", "bc", "abc"):
        call = f"f({', '.join(f'{name}=1' for name in chosen)})"
        right = set(required) <= set(chosen)
        assert model.takes(grammar, f"<|tool_call_start|>[{call}]<|tool_call_end|>") == right


UNSUPPORTED: list[tuple[str, dict[str, Any], str, str]] = [
    ("hermes", {"properties": {"a": {"not": {}}}}, "not supported: not", ".properties.a"),
    (
        "qwen_xml",
        {"properties": {"a": {"type": "string", "pattern": "^x$"}}},
        "pattern",
        ".properties.a.pattern",
    ),
    ("qwen_xml", {"anyOf": [{"required": ["a"]}], "properties": {"a": {}}}, "anyOf", ".anyOf"),
    (
        "gemma4",
        {"properties": {"a": {"type": "array", "minItems": 2}}},
        "minItems",
        ".properties.a.minItems",
    ),
]


@pytest.mark.parametrize(("family", "schema", "reason", "path"), UNSUPPORTED)
def test_a_strict_tool_is_refused_where_another_may_have_any_arguments(
    family: str, schema: dict[str, Any], reason: str, path: str
) -> None:
    model = Model(family)
    place = "[3].function.parameters"
    with pytest.raises(SchemaRefused) as refused:
        model.grammar(CallRules(family, True), [*tools("f"), Tool("h", schema, True, place)])
    assert reason in refused.value.reason
    assert path_text(refused.value.path) == place + path
    grammar = model.grammar(CallRules(family, True), [*tools("f"), Tool("h", schema, False, place)])
    assert model.takes(grammar, one_call(family))


def test_many_tools_of_agents_stand_in_one_grammar() -> None:
    parameters = {
        "type": "object",
        "properties": {
            "path": {"type": "string", "description": "A path."},
            "edits": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"old": {"type": "string"}, "new": {"type": "string"}},
                    "required": ["old", "new"],
                    "additionalProperties": False,
                },
            },
            "mode": {"type": "string", "enum": ["read", "write"]},
        },
        "required": ["path"],
    }
    many = [Tool(f"tool_{i}", parameters, strict=i % 2 == 0) for i in range(40)]
    for family in ("qwen_xml", "hermes", "gemma4", "pythonic"):
        model = Model(family)
        assert json.loads(model.grammar(CallRules(family, required=False), many))
