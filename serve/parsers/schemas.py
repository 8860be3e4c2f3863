"""What a tool's JSON schema says about the types of its arguments, and values made to fit them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

# JSON schema's names of types.
Types = frozenset[str]
ANY: Final[Types] = frozenset()  # nothing is known

_MAX_DEPTH: Final = 16  # of references and combinations; a schema may refer to itself
_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
_LITERALS: Final = {"True": "true", "False": "false", "None": "null"}


class Tools:
    """The functions a request offers, by name, with the types of their parameters."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any] | None] | None = None) -> None:
        """``schemas`` are the JSON schemas of the functions' parameters, None for no parameters."""
        self._schemas = dict(schemas or {})
        self._parameters: dict[str, dict[str, Types]] = {}
        self.names = tuple(self._schemas)

    def __contains__(self, name: object) -> bool:
        return name in self._schemas

    def schema(self, name: str) -> Mapping[str, Any] | None:
        return self._schemas[name]

    def parameters(self, name: str) -> Mapping[str, Types]:
        """The declared parameters; empty if the schema declares none."""
        if name not in self._parameters:
            schema = self._schemas.get(name) or {}
            self._parameters[name] = {
                key: types_of(value, schema) for key, value in _properties(schema, schema, 0)
            }
        return self._parameters[name]


def _properties(schema: object, root: Mapping[str, Any], depth: int) -> list[tuple[str, object]]:
    schema = _resolve(schema, root)
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return []
    found = schema.get("properties")
    own = list(found.items()) if isinstance(found, Mapping) else []
    for name in ("allOf", "anyOf", "oneOf"):
        for part in _list(schema.get(name)):
            own += _properties(part, root, depth + 1)
    return own


def types_of(schema: object, root: Mapping[str, Any], depth: int = 0) -> Types:
    """The types that ``schema`` allows. ``root`` is the document its ``$ref``s point into."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return ANY
    if "$ref" in schema:
        return types_of(_resolve(schema, root), root, depth + 1)
    allowed = _own_types(schema)
    for name in ("anyOf", "oneOf"):
        if parts := _list(schema.get(name)):
            each = [types_of(part, root, depth + 1) for part in parts]
            allowed = _both(allowed, ANY if ANY in each else frozenset().union(*each))
    for part in _list(schema.get("allOf")):
        allowed = _both(allowed, types_of(part, root, depth + 1))
    return allowed


def _own_types(schema: Mapping[str, Any]) -> Types:
    named = schema.get("type")
    if isinstance(named, str):
        types = {named}
    elif isinstance(named, list):
        types = {item for item in named if isinstance(item, str)}
    elif "const" in schema:
        types = {_type_name(schema["const"])}
    elif isinstance(schema.get("enum"), list):
        types = {_type_name(value) for value in schema["enum"]}
    elif "properties" in schema:
        types = {"object"}
    elif "items" in schema:
        types = {"array"}
    else:
        return ANY
    if schema.get("nullable") is True:
        types.add("null")
    return frozenset(types)


def _both(first: Types, second: Types) -> Types:
    """Intersection, where a contradiction counts as nothing known."""
    if not first or not second:
        return first or second
    return first & second


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _resolve(schema: object, root: Mapping[str, Any]) -> object:
    """Follows ``$ref``s of the form ``#/a/b``; None where one leads nowhere."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            return schema
        reference = schema["$ref"]
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        target: object = root
        for step in reference[1:].split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, Mapping) else None
        schema = target
    return None


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def json_of(text: str, types: Types) -> str:
    """JSON of an argument that a model wrote as bare text.

    Text stays text where a string is allowed. What fits none of the types goes out as a string, so
    that the caller's own validation, and not this server, says what is wrong with it.
    """
    if "string" in types:
        return "null" if text == "null" and "null" in types else quote(text)
    bare = text.strip()
    kept = quote(bare if types else text)
    bare = _LITERALS.get(bare, bare)
    number = _number(bare, types)
    if number is not None:
        return number
    try:
        value = msgspec.json.decode(bare)
    except (msgspec.DecodeError, RecursionError):
        try:
            value = json.loads(bare, strict=False)  # line ends inside strings
            bare = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):
            return kept
    if isinstance(value, int | float) and not isinstance(value, bool) and types:
        return kept  # a number that _number did not take
    fits = not types or _type_name(value) in types
    return bare if fits else kept


def _number(text: str, types: Types) -> str | None:
    """``text`` as a JSON number, exactly, if a number is allowed and it is one."""
    if types and not types & {"integer", "number"}:
        return None
    if _INTEGER.fullmatch(text):
        return str(int(text)) if types else None
    if not types:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    if value.is_integer() and "integer" in types and abs(value) < 2**53:
        return str(int(value))
    if "number" not in types:
        return None
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return repr(value)
    return text
