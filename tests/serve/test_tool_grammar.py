"""Grammars of tool calls: what a family writes passes, what nobody asked for does not."""

from __future__ import annotations

import pytest
from tool_call_forms import (
    F_ARGUMENTS,
    FORMS,
    SINGLE,
    Model,
    one_call,
    tools,
    with_string_for_integer,
)

from quire.serve.grammar_check import CheckRequest
from quire.serve.lark import ReasoningForm
from quire.serve.tool_grammar import FAMILIES, CallRules


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
