"""JSON schemas by the feature they use, in the groups that JSONSchemaBench sorts schemas by."""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]

INT: Final[Schema] = {"type": "integer"}
BOOL: Final[Schema] = {"type": "boolean"}
SHORT: Final[Schema] = {"type": "string", "maxLength": 8}


def closed(**properties: Schema) -> Schema:
    """An object of exactly these properties, as OpenAI's strict mode wants."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def array(items: Schema, **limits: Any) -> Schema:
    return {"type": "array", "items": items, **limits}


TYPES: Final = [
    *({"type": name} for name in ("null", "boolean", "integer", "number", "string")),
    {"type": "object"},
    {"type": "array"},
    {"type": ["string", "null"]},
    {"type": ["integer", "boolean"]},
    {"type": ["array", "object"]},
    {},
    {"title": "T", "description": "d", "default": 3, "examples": [1], "$comment": "c", **INT},
    {"type": "integer", "format": "int32"},
    {"type": "string", "contentEncoding": "base64", "maxLength": 8},
    {"type": "string", "nullable": True},
    {"type": "string", "x-vendor": {"a": 1}, "deprecated": True, "readOnly": True},
]

NUMBERS: Final = [
    {"type": "integer", "minimum": 0},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 13},
    {"type": "integer", "maximum": -100},
    {"type": "integer", "minimum": 99999, "maximum": 100001},
    {"type": "integer", "multipleOf": 7},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25},
    {"type": "number", "exclusiveMinimum": 0},
    {"type": "number", "maximum": 1e6},
    {"type": "integer", "minimum": 1.5, "maximum": 3.5},
    {"type": ["number", "null"], "minimum": 3},
    {"type": "integer", "minimum": 2147483647},
    {"type": "integer", "minimum": -9007199254740993, "maximum": 9007199254740993},
    {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer",
        "minimum": 3,
        "exclusiveMinimum": True,
    },
]

STRINGS: Final = [
    {"type": "string", "minLength": 3},
    {"type": "string", "maxLength": 0},
    {"type": "string", "minLength": 2, "maxLength": 2},
    {"type": "string", "minLength": 1, "maxLength": 500},
    {"type": "string", "pattern": "^[a-z]+$"},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"type": "string", "pattern": "[0-9]"},
    {"type": "string", "pattern": "^(red|green|blue)$"},
    {"type": "string", "pattern": "^#[0-9a-fA-F]{6}$"},
    {"type": "string", "pattern": '^[^"\\\\]{1,5}$'},
    {"type": "string", "pattern": "^a?b*c+$"},
    {"type": "string", "pattern": "^\\d{3}-\\d{2}$"},
    {"type": "string", "pattern": "^\\+?[1-9]\\d{1,14}$"},
    {"type": "string", "pattern": "^.{1,10}$"},
    {"type": "string", "pattern": "^/([a-z]+/)*$"},
    {"type": "string", "pattern": "^[0-9]+$", "minLength": 2, "maxLength": 4},
    *({"type": "string", "format": name} for name in ("date-time", "time", "date", "duration")),
    *({"type": "string", "format": name} for name in ("email", "hostname", "ipv4", "ipv6")),
    *({"type": "string", "format": name} for name in ("uuid", "uri")),
    *({"type": "string", "format": name} for name in ("password", "binary", "my-own", "path")),
    {"type": ["string", "null"], "format": "date"},
]

ENUMS: Final = [
    {"enum": ["a", "b", "c"]},
    {"enum": [1, 2.5, None, True, "x"]},
    {"enum": [{"a": 1}, [1, 2], []]},
    {"enum": ['quo"te', "back\\slash", "new\nline", "tab\t", "ünï", "✓", "\U0001f600"]},
    {"type": "string", "enum": ["only"]},
    {"type": "integer", "enum": [1, 22, 333]},
    {"const": "fixed"},
    {"const": 0},
    {"const": False},
    {"const": None},
    {"const": {"deep": {"er": [1, {"x": None}]}}},
    {"const": [1, "a", []]},
    {"enum": [f"value-{i}" for i in range(500)]},
    {"type": ["string", "integer"], "enum": ["a", 1]},
    {"enum": ["a", "ab", "abc"]},
    {"enum": ["", " ", "  "]},
    {"enum": [-1, 1e3, 0.1]},
]

ARRAYS: Final = [
    array(INT),
    array(INT, minItems=2),
    array(BOOL, maxItems=3),
    array(SHORT, minItems=1, maxItems=1),
    array(INT, maxItems=0),
    array({"enum": ["a", "b"]}, minItems=3, maxItems=5),
    array(array(BOOL, maxItems=2), maxItems=2),
    array(closed(a=INT), maxItems=2),
    array({}, maxItems=2),
    {"type": "array", "prefixItems": [INT, BOOL]},
    {"type": "array", "prefixItems": [INT, BOOL], "items": False},
    {"type": "array", "prefixItems": [INT, BOOL], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [SHORT], "items": INT, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": False},
    {"type": "array", "uniqueItems": False, "items": INT},
    {"type": "array", "items": True, "maxItems": 1},
    {"type": ["array", "null"], "items": BOOL},
    array({"anyOf": [BOOL, {"type": "null"}]}, minItems=1),
    array({"type": "number", "minimum": 0, "maximum": 1}, minItems=3, maxItems=3),
    {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [INT, BOOL],
        "additionalItems": False,
    },
]

OBJECTS: Final = [
    closed(),
    closed(a=INT),
    closed(a=INT, b=SHORT, c=BOOL),
    closed(outer=closed(inner=closed(leaf={"type": "null"}))),
    {"type": "object", "properties": {"a": INT, "b": BOOL}, "additionalProperties": False},
    {"type": "object", "properties": {"a": INT, "b": BOOL}, "required": ["b"]},
    {"type": "object", "properties": {"a": INT}},
    {"type": "object", "properties": {"a": INT}, "additionalProperties": BOOL},
    {"type": "object", "properties": {"a": INT}, "additionalProperties": SHORT, "required": ["a"]},
    {"type": "object", "additionalProperties": INT},
    {"type": "object", "additionalProperties": closed(x=BOOL)},
    {"type": "object", "required": ["z", "y"]},
    {"type": "object", "required": ["z"], "properties": {"y": BOOL}},
    {"type": "object", "required": ["z"], "additionalProperties": INT},
    {"type": "object", "patternProperties": {"^a": INT}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^a": INT, "^b": BOOL}},
    {"type": "object", "patternProperties": {"a": INT}},
    {
        "type": "object",
        "properties": {"id": INT},
        "patternProperties": {"^x-": SHORT},
        "additionalProperties": False,
    },
    {"type": "object", "minProperties": 1},
    {"type": "object", "maxProperties": 2, "additionalProperties": BOOL},
    {"type": "object", "maxProperties": 0},
    {"type": "object", "minProperties": 1, "maxProperties": 3, "additionalProperties": INT},
    {"type": "object", "minProperties": 2, "required": ["a", "b"], "properties": {"a": INT}},
    {"type": "object", "properties": {'quo"te': INT, "back\\": BOOL, "ü\n": BOOL, "": INT}},
    closed(**{'quo"te': INT, "back\\slash": BOOL, "ünï": BOOL, "a/b~c": INT, " ": BOOL}),
    closed(**{f"p{i}": BOOL for i in range(20)}),
    {
        "type": "object",
        "properties": {f"p{i}": SHORT for i in range(100)},
        "additionalProperties": False,
    },
    {"properties": {"a": INT}, "required": ["a"]},
    {"type": "object", "propertyNames": True, "additionalProperties": INT},
    {"type": "object", "unevaluatedProperties": True, "properties": {"a": INT}},
    {"type": ["object", "null"], "properties": {"a": INT}, "additionalProperties": False},
    closed(a={"type": "object", "properties": {"b": array(closed(c=INT), maxItems=2)}}),
    closed(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}, tags=array(SHORT)),
]

COMBINED: Final = [
    {"anyOf": [INT, BOOL]},
    {"anyOf": [SHORT, {"type": "null"}]},
    {"anyOf": [closed(a=INT), closed(b=BOOL)]},
    {"anyOf": [closed(kind={"const": "x"}, v=INT), closed(kind={"const": "y"}, v=BOOL)]},
    {"anyOf": [{"minimum": 3}, {"maxLength": 4}], "type": ["integer", "string"]},
    {"oneOf": [INT, SHORT]},
    {"oneOf": [closed(kind={"const": "x"}, v=INT), closed(kind={"const": "y"}, v=BOOL)]},
    {"oneOf": [{"const": "a"}, {"const": "b"}]},
    {"oneOf": [{"enum": ["a", "b"]}, {"type": "null"}]},
    {"allOf": [INT]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
    {"allOf": [{"properties": {"a": INT}, "required": ["a"]}, {"properties": {"b": BOOL}}]},
    {
        "allOf": [
            {"type": "object", "properties": {"a": INT}, "required": ["a"]},
            {"type": "object", "properties": {"b": BOOL}, "required": ["b"]},
        ]
    },
    {"allOf": [{"enum": ["a", "b", "c"]}, {"enum": ["b", "c", "d"]}]},
    {"anyOf": [{"required": ["a"]}, {"required": ["b"]}], **closed(a=INT, b=INT)},
    {
        "type": "object",
        "properties": {"a": INT, "b": INT},
        "additionalProperties": False,
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    {"type": "object", "properties": {"a": {"anyOf": [INT, array(INT, maxItems=2)]}}},
    {"anyOf": [{"allOf": [INT, {"minimum": 0}]}, {"anyOf": [BOOL, {"type": "null"}]}]},
    closed(a={"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]}),
    closed(a={"oneOf": [BOOL, {"type": "null"}], "description": "optional"}),
    {"allOf": [{"anyOf": [INT, BOOL]}, {"anyOf": [INT, SHORT]}]},
    array({"anyOf": [closed(a=INT), BOOL, SHORT]}, maxItems=3),
]

_NODE: Final = {
    "type": "object",
    "properties": {"v": INT, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}
REFERENCES: Final = [
    {"$defs": {"x": INT}, "$ref": "#/$defs/x"},
    {"definitions": {"x": INT}, "properties": {"a": {"$ref": "#/definitions/x"}}},
    {"$defs": {"node": _NODE}, "$ref": "#/$defs/node"},
    {"$defs": {"node": _NODE}, **closed(first={"$ref": "#/$defs/node"})},
    {
        "type": "object",
        "properties": {"child": {"$ref": "#"}, "v": BOOL},
        "additionalProperties": False,
    },
    {"type": "array", "items": {"anyOf": [{"$ref": "#"}, BOOL]}, "maxItems": 2},
    {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": BOOL},
        "$ref": "#/$defs/a",
    },
    {"$defs": {"x/y": INT, "m~n": BOOL}, **closed(a={"$ref": "#/$defs/x~1y"})},
    {"$defs": {"x": SHORT}, **closed(a={"$ref": "#/$defs/x", "description": "beside"})},
    {
        "$defs": {"x": {"type": "integer", "minimum": 3}},
        **closed(a={"$ref": "#/$defs/x", "maximum": 7}),
    },
    {"$id": "https://example.com/s", "$defs": {"x": INT}, **closed(a={"$ref": "#/$defs/x"})},
    {"$defs": {"x": {"$anchor": "here", **BOOL}}, **closed(a={"$ref": "#here"})},
    closed(a=INT, b={"$ref": "#/properties/a"}),
    {
        "$defs": {
            "expr": {
                "anyOf": [
                    INT,
                    closed(
                        op={"enum": ["+", "-"]}, args=array({"$ref": "#/$defs/expr"}, maxItems=2)
                    ),
                ]
            }
        },
        "$ref": "#/$defs/expr",
    },
    {
        "$defs": {
            "even": closed(o={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/odd"}]}),
            "odd": closed(e={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/even"}]}),
        },
        "$ref": "#/$defs/even",
    },
]

TOOLS: Final = [
    closed(location=SHORT, unit={"type": "string", "enum": ["celsius", "fahrenheit"]}),
    closed(path=SHORT, old=SHORT, new=SHORT, replace_all=BOOL),
    closed(command=array(SHORT, maxItems=3), timeout={"type": ["integer", "null"]}),
    closed(todos=array(closed(text=SHORT, status={"enum": ["pending", "done"]}), maxItems=2)),
    closed(query=SHORT, limit={"type": "integer", "minimum": 1, "maximum": 50}),
    closed(steps=array(closed(explanation=SHORT, output=SHORT), maxItems=2), final_answer=SHORT),
    {"type": "object", "properties": {}, "required": []},
    {
        "type": "object",
        "properties": {"q": SHORT},
        "required": ["q"],
        "additionalProperties": False,
    },
    closed(
        when={"type": "string", "format": "date-time"},
        who=array({"type": "string", "format": "email"}, maxItems=1),
    ),
    closed(
        lat={"type": "number", "minimum": -90, "maximum": 90},
        lon={"type": "number", "minimum": -180, "maximum": 180},
    ),
]

# Every simple value inside an object and an array, as real schemas have them.
NESTED: Final = [
    *(closed(value=schema) for schema in (*NUMBERS[:8], *STRINGS[:8], *ENUMS[:8])),
    *(array(schema, maxItems=2) for schema in (*NUMBERS[:6], *STRINGS[4:10], *ENUMS[:6])),
    *(
        {"type": "object", "properties": {"v": schema, "w": BOOL}, "additionalProperties": False}
        for schema in (*ARRAYS[:6], *OBJECTS[:6])
    ),
]

GROUPS: Final[dict[str, list[Schema]]] = {
    "types": TYPES,
    "numbers": NUMBERS,
    "strings": STRINGS,
    "enums": ENUMS,
    "arrays": ARRAYS,
    "objects": OBJECTS,
    "combined": COMBINED,
    "references": REFERENCES,
    "tools": TOOLS,
    "nested": NESTED,
}
CASES: Final = [
    (f"{group}-{index}", schema)
    for group, schemas in GROUPS.items()
    for index, schema in enumerate(schemas)
]
