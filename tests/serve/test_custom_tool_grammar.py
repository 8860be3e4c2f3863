"""Tools that take a text of a wanted form: what fits passes in each family's form of calls."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from test_tool_grammar import Model
from test_tool_round_trip import draw

from quire.serve.errors import ApiError
from quire.serve.grammar_check import CheckRequest, Tool
from quire.serve.output_form import TextForm, carries
from quire.serve.parsers.events import ArgumentsDelta
from quire.serve.parsers.families import Family, ParserFactory
from quire.serve.parsers.schemas import Tools
from quire.serve.responses_protocol import ResponsesRequest, to_chat
from quire.serve.schema_check import SchemaRefused
from quire.serve.tool_grammar import FAMILIES, HARMONY, CallRules

# As Codex describes its patches, shortened.
PATCH = """start: "*** Begin Patch" LF hunk+ "*** End Patch" LF?
hunk: "*** Update File: " /(.+)/ LF change+
change: ("+" | "-" | " ") /(.*)/ LF

%import common.LF
"""
FITS = '*** Begin Patch\n*** Update File: a.py\n-x = "<b>"\n+y = {1}\n*** End Patch'
FITS_NOT = "*** Begin Patch\n+x\n*** End Patch"
SCHEMA = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
LARK = [family for family in FAMILIES if carries(family, "lark")]
CALLS = {
    "qwen_xml": "<tool_call>\n<function=edit>\n<parameter=input>\nTEXT\n</parameter>\n"
    "</function>\n</tool_call>",
    "gemma4": '<|tool_call>call:edit{input:<|"|>TEXT<|"|>}<tool_call|>',
    "glm": "<tool_call>edit\n<arg_key>input</arg_key>\n<arg_value>TEXT</arg_value>\n</tool_call>",
    "minimax": '<minimax:tool_call>\n<invoke name="edit">\n<parameter name="input">TEXT'
    "</parameter>\n</invoke>\n</minimax:tool_call>",
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="edit" index="1"<|sep|>'
    '<|open|>argument key="input" type="string"<|sep|>TEXT<|close|>argument<|sep|>'
    "<|close|>call<|sep|><|close|>tools<|sep|>",
    "deepseek_dsml": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="edit">\n'
    '<｜DSML｜parameter name="input" string="true">TEXT</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
}


def edit(kind: str, definition: str) -> Tool:
    form = CheckRequest(kind, definition)  # type: ignore[arg-type]
    return Tool("edit", SCHEMA, place="[3].format.definition", text=form)


OTHER = Tool("other", {"type": "object", "properties": {"n": {"type": "integer"}}}, place="[1]")


def inputs(model: Model, family: str, tokens: list[int]) -> list[str]:
    """The inputs of an answer's calls, as a client would get them."""
    factory = ParserFactory(
        Family(family, HARMONY if family == HARMONY else "none"), model.tokenizer
    )
    parser = factory.parser(Tools({"edit": SCHEMA}))
    text = model.tokenizer.decode(tokens, skip_special_tokens=False)
    arguments: dict[int, str] = {}
    for event in [*parser.push(factory.markers.fold(text)), *parser.finish(truncated=False)]:
        if isinstance(event, ArgumentsDelta):
            arguments[event.index] = arguments.get(event.index, "") + event.text
    return [json.loads(each)["input"] for each in arguments.values()]


def test_families_that_write_text_as_it_is_carry_lark() -> None:
    assert set(CALLS) == set(LARK)
    assert all(carries(family, "regex") for family in FAMILIES)
    assert not carries("", "regex")


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("family", LARK)
def test_a_call_has_a_text_that_fits(family: str, required: bool) -> None:
    model = Model(family)
    grammar = model.grammar(CallRules(family, required), [OTHER, edit("lark", PATCH)])
    assert model.takes(grammar, CALLS[family].replace("TEXT", FITS))
    assert model.takes(grammar, CALLS[family].replace("TEXT", FITS + "\n"))
    assert not model.takes(grammar, CALLS[family].replace("TEXT", FITS_NOT))
    assert model.takes(grammar, "Hello") is not required


@pytest.mark.parametrize("family", LARK)
def test_texts_that_are_drawn_are_read_as_they_were_meant(family: str) -> None:
    model = Model(family)
    rules = CallRules(family, required=True)
    fits = r"start: line{1,3}\nline: /[a-z<\/>=]{1,9}/ LF\n%import common.LF\n".replace(r"\n", "\n")
    grammar = model.grammar(rules, [edit("lark", fits)])
    found = 0
    for seed in range(8):
        tokens = draw(model, grammar, rules, seed)
        for text in inputs(model, family, tokens or []):
            assert re.fullmatch(r"([a-z</>=]{1,9}\n)+", text + "\n" * (not text.endswith("\n")))
            found += 1
    assert found >= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_regex_holds_in_every_form(family: str) -> None:
    model = Model(family)
    rules = CallRules(family, required=True)
    grammar = model.grammar(rules, [edit("regex", 'a+"b|c[0-9]{2}')])
    found = set()
    for seed in range(8):
        for text in inputs(model, family, draw(model, grammar, rules, seed) or []):
            assert re.fullmatch('a+"b|c[0-9]{2}', text), text
            found.add(text[0])
    assert found == {"a", "c"}


@pytest.mark.parametrize("kind", ["lark", "regex"])
def test_a_form_that_cannot_be_read_is_named(kind: str) -> None:
    with pytest.raises(SchemaRefused) as refused:
        Model("qwen_xml").grammar(CallRules("qwen_xml", required=False), [edit(kind, "start: (")])
    assert refused.value.path == ("[3].format.definition",)


# ---- in /v1/responses


def asked(syntax: str, family: str) -> Any:
    form = {"type": "grammar", "syntax": syntax, "definition": "start: /x/"}
    tools = [
        {"type": "web_search"},
        {"type": "namespace", "name": "ns", "tools": [{"type": "custom", "name": "e"}]},
        {"type": "custom", "name": "edit", "format": form},
    ]
    body = msgspec.convert({"model": "m", "input": "hi", "tools": tools}, ResponsesRequest)
    return to_chat(body, body.items, family)


@pytest.mark.parametrize(
    ("syntax", "family", "carried"),
    [
        ("lark", "qwen_xml", True),
        ("regex", "qwen_xml", True),
        ("regex", "hermes", True),
        ("lark", "hermes", False),
        ("lark", "none", False),
        ("regex", "", False),
    ],
)
def test_what_no_call_can_carry_is_named_as_ignored(
    syntax: str, family: str, carried: bool
) -> None:
    talk = asked(syntax, family)
    assert ("tools[2].format" in talk.ignored) is not carried
    assert talk.texts == (
        {"edit": TextForm(CheckRequest(syntax, "start: /x/"), "[2].format.definition")}
        if carried
        else {}
    )


@pytest.mark.parametrize(
    "form",
    [{"type": "grammar"}, {"type": "json"}, {"type": "grammar", "syntax": "ebnf"}, {"x": 1}, 5],
)
def test_a_format_of_another_kind_is_refused(form: Any) -> None:
    tool = {"type": "custom", "name": "edit", "format": form}
    body = msgspec.convert({"model": "m", "input": "hi", "tools": [tool]}, ResponsesRequest)
    with pytest.raises(ApiError) as refused:
        to_chat(body, body.items, "qwen_xml")
    assert refused.value.param == "tools[0].format"
