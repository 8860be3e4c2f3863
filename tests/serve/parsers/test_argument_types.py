"""Types by JSON schema, and bare text made to fit them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.serve.parsers.schemas import ANY, Tools, json_of, types_of

ROOT = {
    "$defs": {"Id": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}},
    "properties": {"a": {"type": "string"}},
}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"integer", "null"}),
        ({"oneOf": [{"type": "integer"}, {}]}, set()),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": "integer"}]}, {"integer"}),
        ({"enum": ["a", 1, None]}, {"string", "integer", "null"}),
        ({"const": True}, {"boolean"}),
        ({"$ref": "#/$defs/Id"}, {"integer"}),
        ({"$ref": "#/$defs/Loop"}, set()),
        ({"$ref": "https://example.com/x"}, set()),
        ({"type": "integer", "nullable": True}, {"integer", "null"}),
        ({"properties": {}}, {"object"}),
        ({"items": {}}, {"array"}),
        (True, set()),
    ],
)
def test_types(schema: object, expected: set[str]) -> None:
    assert types_of(schema, ROOT) == expected


@pytest.mark.parametrize(
    ("text", "types", "expected"),
    [
        ("5", {"string"}, '"5"'),
        ("null", {"string"}, '"null"'),
        ("null", {"string", "null"}, "null"),
        ("5", {"string", "integer"}, '"5"'),
        (" 5\n", {"integer"}, "5"),
        ("5.0", {"integer"}, "5"),
        ("9007199254740993", {"integer"}, "9007199254740993"),
        ("-1.50", {"number"}, "-1.50"),
        (".5", {"number"}, "0.5"),
        ("1e400", {"number"}, '"1e400"'),
        ("inf", {"number"}, '"inf"'),
        ("five", {"integer"}, '"five"'),
        ("True", {"boolean"}, "true"),
        ("1", {"boolean"}, '"1"'),
        ("None", {"integer", "null"}, "null"),
        ('{"a": [1, 2.0]}', {"object"}, '{"a": [1, 2.0]}'),
        ('{"a": "x\ny"}', {"object"}, '{"a": "x\\ny"}'),
        ("[1]", {"object"}, '"[1]"'),
        ("{'a': 1}", {"object"}, "\"{'a': 1}\""),
        ("[1, 2]", set(), "[1, 2]"),
        ("5", set(), "5"),
        ("say NaN", set(), '"say NaN"'),
        ("NaN", set(), '"NaN"'),
        ("[" * 100_000, {"array"}, '"' + "[" * 100_000 + '"'),
    ],
)
def test_bare_text(text: str, types: set[str], expected: str) -> None:
    assert json_of(text, frozenset(types)) == expected


@given(st.text(), st.sets(st.sampled_from(["string", "integer", "number", "boolean", "null",
                                            "object", "array"])))  # fmt: skip
def test_any_text_becomes_json(text: str, types: set[str]) -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    json.loads(json_of(text, frozenset(types)), parse_constant=refuse)


def test_parameters_are_found_behind_references_and_alternatives() -> None:
    tools = Tools({"f": {"anyOf": [ROOT, {"properties": {"b": {"$ref": "#/x"}}}]}, "g": None})
    assert tools.parameters("f") == {"a": {"string"}, "b": ANY}
    assert tools.parameters("g") == {}
