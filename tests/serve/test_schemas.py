"""Whatever is drawn through a schema's masks parses and validates, if it came to its end."""

from __future__ import annotations

import json
import zlib
from datetime import date
from typing import Any

import jsonschema
import numpy as np
import pytest
from grammar_walk import draw_text, grammar_tokenizer, may_end, small_tokenizer, start
from schema_cases import CASES

from quire.engine.errors import GrammarError
from quire.serve.grammar_check import Checker, CheckRequest
from quire.serve.lark import markers_of
from quire.serve.schema_check import SchemaRefused, path_text

_CHECKER = Checker(grammar_tokenizer(), markers_of(small_tokenizer()))
_TEXTS = 8
_FORMATS = ["date", "ipv4", "ipv6", "uuid", "email"]  # what jsonschema checks by itself


def test_there_are_at_least_200_schemas() -> None:
    assert len({json.dumps(schema) for _, schema in CASES}) >= 200


@pytest.mark.parametrize(("name", "schema"), CASES, ids=[name for name, _ in CASES])
def test_random_texts_validate(name: str, schema: dict[str, Any]) -> None:
    grammar = _CHECKER.build(CheckRequest("json_schema", json.dumps(schema)))
    validator = jsonschema.validators.validator_for(
        schema, default=jsonschema.Draft202012Validator
    )(schema, format_checker=jsonschema.FormatChecker(_FORMATS))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    texts = [draw_text(start(grammar), rng) for _ in range(_TEXTS)]
    complete = [json.loads(text.content) for text in texts if text.is_complete]
    for value in complete:
        validator.validate(value)
    assert complete


@pytest.mark.parametrize("kind", ["date", "date-time"])
def test_dates_exist(kind: str) -> None:
    request = CheckRequest("json_schema", json.dumps({"type": "string", "format": kind}))
    grammar = _CHECKER.build(request)
    rng = np.random.default_rng(7)
    for _ in range(300):
        value = json.loads(draw_text(start(grammar), rng).content)
        date.fromisoformat(value[:10])
    for text in ("2023-02-29", "1900-02-29", "2024-02-30", "2024-13-01", "2024-04-31"):
        assert not fits(grammar, text if kind == "date" else f"{text}T00:00:00Z")
    for text in ("2024-02-29", "2000-02-29", "1999-12-31"):
        assert fits(grammar, text if kind == "date" else f"{text}T23:59:59.123+01:00")


def fits(grammar: str, value: Any) -> bool:
    """Whether a grammar lets a JSON value through as compact JSON."""
    return fits_text(grammar, json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def fits_text(grammar: str, text: str) -> bool:
    state = start(grammar)
    try:
        for token in small_tokenizer().encode(text).ids:
            state.accept(token)
    except GrammarError:
        return False
    return may_end(state)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 1, "b": {"c": []}}),
        ({"type": "string"}, "\u001b[31m"),
        ({"type": "number"}, -1.5e10),
        ({"enum": ["ünï", "✓"]}, "✓"),
        ({"type": "string", "pattern": "b"}, "abc"),
        ({"type": "array", "items": {"type": "integer"}}, [1, 2, 3]),
        ({}, {"anything": [None, True, "x"]}),
    ],
)
def test_what_is_right_gets_through(schema: dict[str, Any], value: Any) -> None:
    grammar = _CHECKER.build(CheckRequest("json_schema", json.dumps(schema)))
    assert fits(grammar, value)


def test_a_name_spelled_in_escapes_does_not_pass_for_another_one() -> None:
    """`{"\\u0061": "x"}` reads as a property `a` of the wrong type."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": {"type": "string"},
    }
    grammar = _CHECKER.build(CheckRequest("json_schema", json.dumps(schema)))
    assert fits_text(grammar, '{"b":"x"}')
    assert not fits_text(grammar, '{"\\u0061":"x"}')


REFUSED = [
    ({"not": {"type": "string"}}, "not supported: not", ""),
    ({"if": {}, "then": {}}, "if, then", ""),
    ({"items": {"uniqueItems": True}}, "uniqueItems", ".items"),
    ({"properties": {"a": {"contains": {}}}}, "contains", ".properties.a"),
    ({"anyOf": [{}, {"dependentRequired": {"a": ["b"]}}]}, "dependentRequired", ".anyOf[1]"),
    ({"$defs": {"x": {"propertyNames": {"maxLength": 3}}}, "$ref": "#/$defs/x"}, "", ".$defs.x"),
    ({"prefixItems": [{}, {"unevaluatedItems": False}]}, "unevaluated", ".prefixItems[1]"),
    ({"properties": {"a": {"oneOf": [{}, {"minLength": 2}]}}}, "oneOf", ".properties.a"),
    ({"oneOf": [{"const": 1}, {"const": 2}]}, "oneOf", ""),
    ({"items": {"type": "string", "format": "uri-reference"}}, "uri-reference", ".items"),
    ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "look-around", ".properties.a"),
    ({"type": "string", "pattern": "(a"}, "unclosed group", ""),
    ({"properties": {"a": {"type": "strung"}}}, "strung", ".properties.a"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum", ""),
    ({"type": "integer", "exclusiveMinimum": True, "minimum": 3}, "number", ".exclusiveMinimum"),
    ({"$ref": "https://example.com/other"}, "not present", ""),
    ({"items": {"$ref": "#/nowhere"}}, "does not exist", ".items"),
    ({"type": 5}, "type's name", ".type"),
    ({"properties": []}, "an object of schemas", ".properties"),
    ({"properties": {"a": 5}}, "an object of schemas", ".properties"),
    ({"anyOf": []}, "a list of schemas", ".anyOf"),
    ({"items": {"minLength": -1}}, "0 or more", ".items.minLength"),
    ({"maxItems": 1.5}, "0 or more", ".maxItems"),
    ({"multipleOf": 0}, "above 0", ".multipleOf"),
    ({"enum": []}, "list of values", ".enum"),
    ({"required": "a"}, "list of names", ".required"),
    ({"uniqueItems": 1}, "true or false", ".uniqueItems"),
    ({"type": "object", "minProperties": 2}, "minProperties", ".minProperties"),
    ({"properties": {f"p{i}": {} for i in range(1001)}}, "more than 1000", ".properties"),
    ({"enum": list(range(10_001))}, "more than 10000", ".enum"),
    ({"pattern": "a" * 1025}, "more than 1024", ".pattern"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "not supported: not", ""),
    ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text fits", ""),
]


@pytest.mark.parametrize(("schema", "reason", "path"), REFUSED)
def test_what_cannot_be_honoured_is_refused_with_its_place(
    schema: dict[str, Any], reason: str, path: str
) -> None:
    with pytest.raises(SchemaRefused) as refused:
        _CHECKER.build(CheckRequest("json_schema", json.dumps(schema)))
    assert reason in refused.value.reason
    assert path_text(refused.value.path) == path


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(33):
        schema = {"items": schema}
    with pytest.raises(SchemaRefused, match="more than 32 deep"):
        _CHECKER.build(CheckRequest("json_schema", json.dumps(schema)))


def test_one_of_is_read_as_any_of_only_where_the_schema_is_not_strict() -> None:
    text = json.dumps({"oneOf": [{"const": 1}, {"const": 2}]})
    grammar = _CHECKER.build(CheckRequest("json_schema", text, strict=False))
    assert fits(grammar, 2)
    assert not fits(grammar, 3)


def test_the_largest_schemas_run_to_their_end() -> None:
    schema = {
        "type": "object",
        "properties": {f"property_{i}": {"type": "integer"} for i in range(1000)},
        "additionalProperties": False,
    }
    grammar = _CHECKER.build(CheckRequest("json_schema", json.dumps(schema)))
    assert fits(grammar, {"property_3": 1, "property_999": 2})
