"""Grammars of tool calls: what a family writes passes, what nobody asked for does not."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from grammar_walk import EOS, small_tokenizer
from tokenizers import AddedToken, Tokenizer

from quire.engine.errors import GrammarError
from quire.engine.grammar import GrammarCompiler
from quire.engine.grammar_tokens import make_tokenizer
from quire.serve.grammar_check import Checker, CheckRequest, Tool, Tools
from quire.serve.lark import ReasoningForm, markers_of
from quire.serve.schema_check import SchemaRefused, path_text
from quire.serve.tool_grammar import FAMILIES, CallRules

MARKERS = {
    "qwen_xml": ["<tool_call>", "</tool_call>"],
    "hermes": ["<tool_call>", "</tool_call>"],
    "granite3": ["<|tool_call|>"],
    "gemma4": ["<|tool_call>", "<tool_call|>", '<|"|>'],
    "glm": [
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ],
    "minimax": ["<minimax:tool_call>", "</minimax:tool_call>"],
    "kimi_k2": [
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
        *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ],
    "kimi_k3": ["<|open|>", "<|close|>", "<|sep|>"],
    "deepseek": [
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
        *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    ],
    "deepseek_dsml": ["｜DSML｜"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    "llama3": ["<|python_tag|>"],
    "pythonic": ["<|tool_call_start|>", "<|tool_call_end|>"],
    "harmony": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"],
}

# One call f(s="a <b>", n=1), and one g() where a second may follow: what opens, what it is, what
# stands between two, what closes.
F_ARGUMENTS = '{"s": "a <b>", "n": 1}'
FORMS: dict[str, tuple[str, str, str, str, str]] = {
    "qwen_xml": (
        "<tool_call>\n",
        "<function=f>\n<parameter=s>\na <b>\n</parameter>\n"
        "<parameter=n>\n1\n</parameter>\n</function>\n",
        "</tool_call>\n<tool_call>\n",
        "<function=g>\n</function>\n",
        "</tool_call>",
    ),
    "hermes": (
        "<tool_call>\n",
        '{"name": "f", "arguments": ' + F_ARGUMENTS + "}",
        "\n</tool_call>\n<tool_call>\n",
        '{"name": "g", "arguments": {}}',
        "\n</tool_call>",
    ),
    "granite3": (
        "<|tool_call|>[",
        '{"name": "f", "arguments": ' + F_ARGUMENTS + "}",
        ", ",
        '{"name": "g", "arguments": {}}',
        "]",
    ),
    "gemma4": (
        "<|tool_call>call:",
        'f{n:1,s:<|"|>a <b><|"|>}',
        "<tool_call|><|tool_call>call:",
        "g{}",
        "<tool_call|>",
    ),
    "glm": (
        "<tool_call>",
        "f\n<arg_key>s</arg_key>\n<arg_value>a <b></arg_value>\n"
        "<arg_key>n</arg_key><arg_value>1</arg_value>",
        "</tool_call><tool_call>",
        "g",
        "</tool_call>",
    ),
    "minimax": (
        "<minimax:tool_call>\n",
        '<invoke name="f">\n<parameter name="s">a <b></parameter>\n'
        '<parameter name="n">1</parameter>\n</invoke>\n',
        "",
        '<invoke name="g">\n</invoke>\n',
        "</minimax:tool_call>",
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|>",
        f"<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{F_ARGUMENTS}<|tool_call_end|>",
        "",
        "<|tool_call_begin|>functions.g:12<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ),
    "kimi_k3": (
        "<|open|>tools<|sep|>",
        '<|open|>call tool="f" index="1"<|sep|>'
        '<|open|>argument key="s" type="string"<|sep|>a <b><|close|>argument<|sep|>'
        '<|open|>argument key="n" type="number"<|sep|>1<|close|>argument<|sep|>'
        "<|close|>call<|sep|>",
        "",
        '<|open|>call tool="g" index="2"<|sep|><|close|>call<|sep|>',
        "<|close|>tools<|sep|>",
    ),
    "deepseek": (
        "<｜tool▁calls▁begin｜>",
        f"<｜tool▁call▁begin｜>f<｜tool▁sep｜>{F_ARGUMENTS}<｜tool▁call▁end｜>",
        "",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek_dsml": (
        "<｜DSML｜function_calls>\n",
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="s" string="true">a <b></｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n',
        "",
        '<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n',
        "</｜DSML｜function_calls>",
    ),
    "mistral": (
        "[TOOL_CALLS]",
        f"f[ARGS]{F_ARGUMENTS}",
        "[TOOL_CALLS]",
        "g[CALL_ID]abc123456[ARGS]{}",
        "",
    ),
    "pythonic": ("<|tool_call_start|>[", 'f(s="a <b>", n=1)', ", ", "g()", "]<|tool_call_end|>"),
}
# Families that write one call at most.
SINGLE = {
    "llama3": '{"name": "f", "parameters": ' + F_ARGUMENTS + "}",
    "harmony": "<|channel|>commentary to=functions.f <|constrain|>json<|message|>" + F_ARGUMENTS,
}

PARAMETERS: dict[str, dict[str, Any]] = {
    "f": {
        "type": "object",
        "properties": {"s": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["s", "n"],
        "additionalProperties": False,
    },
    "g": {"type": "object", "properties": {}, "additionalProperties": False},
}


class Model:
    """A tokenizer with a family's markers, or with all of them as text."""

    def __init__(self, family: str, markers: list[str] | None = None) -> None:
        self.tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
        texts = MARKERS[family] if markers is None else markers
        self.tokenizer.add_tokens([AddedToken(text, special=True) for text in texts])
        table = make_tokenizer(self.tokenizer.to_str(), [self.tokenizer.token_to_id(EOS)])
        self.checker = Checker(table, markers_of(self.tokenizer))
        self.compiler = GrammarCompiler(table, threads=1)

    def grammar(
        self, rules: CallRules, tools: list[Tool], instead: CheckRequest | None = None
    ) -> str:
        text = msgspec.json.encode(Tools(rules, tools)).decode()
        return self.checker.build(CheckRequest("tools", text, instead=instead))

    def takes(self, grammar: str, text: str) -> bool:
        """Whether a text may be the whole output."""
        state = self.compiler.new_state(self.compiler.compile(grammar).result())
        try:
            for token in self.tokenizer.encode(text).ids:
                state.accept(token)
        except GrammarError:
            return False
        return state.may_end


def tools(*names: str, strict: bool = True) -> list[Tool]:
    return [Tool(name, PARAMETERS[name], strict) for name in names]


def one_call(family: str) -> str:
    if family in SINGLE:
        return SINGLE[family]
    opener, first, _, _, closer = FORMS[family]
    return opener + first + closer


def with_string_for_integer(text: str) -> str:
    """The same call with n=x."""
    for found, wrong in (
        ('"n": 1', '"n": "x"'),
        ("n=1", 'n="x"'),
        ("n:1", 'n:<|"|>x<|"|>'),
        ("\n1\n", "\nx\n"),
        (">1<", ">x<"),
    ):
        if found in text:
            return text.replace(found, wrong)
    raise AssertionError(text)


def test_every_family_has_its_case() -> None:
    assert {*FORMS, *SINGLE} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_required_means_calls_and_nothing_else(family: str) -> None:
    model = Model(family)
    grammar = model.grammar(CallRules(family, required=True), tools("f", "g"))
    call = one_call(family)
    assert model.takes(grammar, call)
    assert not model.takes(grammar, "")
    assert not model.takes(grammar, "Sure, I can do that.")
    assert not model.takes(grammar, with_string_for_integer(call))
    assert not model.takes(grammar, call.replace("f", "h", 1) if family != "harmony" else "x")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_named_tool_is_the_only_one(family: str) -> None:
    model = Model(family)
    assert model.takes(model.grammar(CallRules(family, True), tools("f")), one_call(family))
    assert not model.takes(model.grammar(CallRules(family, True), tools("g")), one_call(family))


@pytest.mark.parametrize("family", FORMS)
def test_several_calls_only_where_parallel_calls_are_wanted(family: str) -> None:
    model = Model(family)
    both = "".join(FORMS[family])
    for required in (True, False):
        many = model.grammar(CallRules(family, required, parallel=True), tools("f", "g"))
        one = model.grammar(CallRules(family, required, parallel=False), tools("f", "g"))
        assert model.takes(many, both)
        assert not model.takes(one, both)
        assert model.takes(one, one_call(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_calls_are_free_text_is_too_but_each_call_is_right(family: str) -> None:
    model = Model(family)
    grammar = model.grammar(CallRules(family, required=False), tools("f", "g"))
    call, text = one_call(family), "Sure {1} <b>\n"
    if family == "harmony":
        text = "<|channel|>final<|message|>" + text
    assert model.takes(grammar, text)
    assert model.takes(grammar, call)
    assert not model.takes(grammar, with_string_for_integer(call))
    if family in FORMS:
        assert model.takes(grammar, text + call)
        assert not model.takes(grammar, text + with_string_for_integer(call))


@pytest.mark.parametrize("family", ["qwen_xml", "hermes", "glm", "minimax", "deepseek_dsml"])
def test_markers_that_are_ordinary_text_do_as_well(family: str) -> None:
    model = Model(family, [])
    for required in (True, False):
        grammar = model.grammar(CallRules(family, required), tools("f", "g"))
        assert model.takes(grammar, "".join(FORMS[family]))
        assert not model.takes(grammar, with_string_for_integer(one_call(family)))


def test_mistral_without_a_token_for_arguments_writes_an_array() -> None:
    model = Model("mistral", ["[TOOL_CALLS]"])
    grammar = model.grammar(CallRules("mistral", True), tools("f", "g"))
    calls = '{"name": "f", "arguments": ' + F_ARGUMENTS + '}, {"name": "g", "arguments": {}}'
    assert model.takes(grammar, f"[TOOL_CALLS][{calls}]")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "harmony"])
def test_calls_come_after_reasoning_in_one_pass(family: str) -> None:
    model = Model(family)
    call = one_call(family)
    for is_open in (True, False):
        form = ReasoningForm("<think>", "</think>", is_open)
        for required in (True, False):
            rules = CallRules(family, required, reasoning=form)
            grammar = model.grammar(rules, tools("f", "g"))
            opener = "" if is_open else "<think>"
            assert model.takes(grammar, f"{opener}I could call {{f}}.</think>\n\n{call}")
            assert model.takes(grammar, call) == (not is_open)


def test_gpt_oss_reasons_before_its_call() -> None:
    model = Model("harmony")
    grammar = model.grammar(CallRules("harmony", True), tools("f"))
    thought = "<|channel|>analysis<|message|>Need f.<|end|><|start|>assistant"
    said = "<|channel|>commentary<|message|>Looking.<|end|><|start|>assistant"
    assert model.takes(grammar, thought + said + SINGLE["harmony"])
    assert not model.takes(grammar, thought + "<|channel|>final<|message|>Hi")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_calls_or_of_the_form_that_is_wanted(family: str) -> None:
    model = Model(family)
    choice = CheckRequest("choice", '["yes", "no"]')
    grammar = model.grammar(CallRules(family, required=False), tools("f", "g"), choice)
    header = "<|channel|>final<|message|>" if family == "harmony" else ""
    assert model.takes(grammar, header + "yes")
    assert model.takes(grammar, one_call(family))
    assert not model.takes(grammar, header + "perhaps")
    assert not model.takes(grammar, with_string_for_integer(one_call(family)))
    wanted = CheckRequest("json_schema", '{"type": "object", "required": ["a"]}')
    grammar = model.grammar(CallRules(family, required=False), tools("f", "g"), wanted)
    assert model.takes(grammar, header + '{"a": 1}')
    assert not model.takes(grammar, header + '{"b": 1}')
    if family != "llama3":  # whose calls are objects, too
        assert model.takes(grammar, one_call(family))


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
