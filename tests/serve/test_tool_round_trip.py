"""Random answers drawn through the grammar of tool calls, read by the family's parser."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from grammar_walk import EOS
from test_tool_grammar import Model

from quire.serve.grammar_check import Tool
from quire.serve.lark import ReasoningForm
from quire.serve.parsers.events import ArgumentsDelta, CallEnded, CallStarted, ContentDelta
from quire.serve.parsers.families import Family, ParserFactory
from quire.serve.parsers.schemas import Tools
from quire.serve.tool_grammar import FAMILIES, HARMONY, CallRules

PARAMETERS: dict[str, dict[str, Any]] = {
    "f": {
        "type": "object",
        "properties": {
            "s": {"type": "string"},
            "n": {"type": "integer"},
            "x": {"type": "number", "minimum": -1000, "maximum": 1000},
            "b": {"type": "boolean"},
            "o": {
                "type": "object",
                "properties": {"k": {"type": "array", "items": {"type": "integer"}}},
                "required": ["k"],
                "additionalProperties": False,
            },
            "u": {"type": ["string", "null"]},
            "e": {"enum": ["red", "green"]},
        },
        "required": ["s", "n"],
        "additionalProperties": False,
    },
    "g": {"type": "object", "properties": {}, "additionalProperties": False},
    "ns-g.h": {
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "l": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["l"],
        "additionalProperties": False,
    },
}
THINK = ReasoningForm("<think>", "</think>", is_open=True)
RULES = [
    {"required": True},
    {"required": True, "parallel": False},
    {"required": False},
    {"required": True, "reasoning": THINK},
]
TEXTS = 8


def draw(model: Model, grammar: str, rules: CallRules, seed: int) -> list[int] | None:
    """The tokens of an answer behind its reasoning; None if it was cut off."""
    state = model.compiler.new_state(model.compiler.compile(grammar).result())
    if rules.reasoning is not None:
        for token in model.tokenizer.encode("Well." + rules.reasoning.closer).ids:
            state.accept(token)
    rng = np.random.default_rng(seed)
    width, eos = model.compiler.vocab_size, model.tokenizer.token_to_id(EOS)
    added = model.tokenizer.get_added_tokens_decoder()
    closing = [
        token in added or model.tokenizer.decode([token]).strip()[:1] in ('"', "}", "]", ")", "<")
        for token in range(width)
    ]
    masks = np.empty((1, -(-width // 32)), np.int32)
    tokens: list[int] = []
    for step in range(400):
        if state.is_finished:
            return tokens
        model.compiler.fill_masks([state], masks)
        allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")[:width])
        eagerness = np.array(closing)[allowed] * (step / 20)
        token = int(allowed[np.argmax(rng.gumbel(size=allowed.size) + eagerness)])
        if token == eos:
            return tokens
        state.accept(token)
        tokens.append(token)
    return None


def read(model: Model, family: str, tokens: list[int]) -> tuple[list[tuple[str, str]], str]:
    """The calls of an answer, each of which is complete, and its content."""
    reasoning = HARMONY if family == HARMONY else "none"
    factory = ParserFactory(Family(family, reasoning), model.tokenizer)
    parser = factory.parser(Tools(PARAMETERS))
    text = model.tokenizer.decode(tokens, skip_special_tokens=False)
    events = [*parser.push(factory.markers.fold(text)), *parser.finish(truncated=False)]
    calls: list[list[str]] = []
    content, ended = "", 0
    for event in events:
        match event:
            case CallStarted(_, _, name):
                calls.append([name, ""])
            case ArgumentsDelta(index, piece):
                calls[index][1] += piece
            case CallEnded():
                ended += 1
            case ContentDelta(piece):
                content += piece
    assert ended == len(calls)
    return [(name, arguments) for name, arguments in calls], content.strip()


@pytest.mark.parametrize("fields", RULES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_call_is_read_and_valid(family: str, fields: dict[str, Any]) -> None:
    if family == HARMONY and "reasoning" in fields:
        pytest.skip("its reasoning is part of its form")
    model = Model(family)
    rules = CallRules(family, **fields)
    tools = [Tool(name, schema, strict=True) for name, schema in PARAMETERS.items()]
    grammar = model.grammar(rules, tools)
    read_calls = complete = 0
    for seed in range(TEXTS):
        tokens = draw(model, grammar, rules, seed)
        if tokens is None:
            continue
        complete += 1
        calls, content = read(model, family, tokens)
        read_calls += len(calls)
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), PARAMETERS[name])
        if rules.required:
            assert calls
            assert not content
        assert rules.parallel or len(calls) <= 1
    assert complete
    assert read_calls or not rules.required
