"""The arguments of a tool call as a grammar, in the forms that are not one JSON object.

Some families write each argument between tags, strings as they are; some write keyword arguments;
Gemma writes an object of its own notation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from quire.serve.lark import TEXT, Lark, quote
from quire.serve.schema_check import Path, Schema, SchemaRefused

_MAX_DEPTH: Final = 16
# What a schema may say of a string that only JSON's notation of strings can enforce.
_TEXT_KEYWORDS: Final = ("pattern", "format", "minLength", "maxLength", "allOf", "not")
_LIST_KEYWORDS: Final = ("minItems", "maxItems", "prefixItems")
DEFINITIONS: Final = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    schema: Schema
    required: bool
    path: Path
    text: str = ""  # an expression that a text has to fit; "": any text does


def parameters_of(schema: Schema) -> list[Parameter]:
    """The parameters of a function, in the schema's order.

    Raises:
        SchemaRefused: its arguments are more than a list of properties.
    """
    root = _resolved(schema, schema)
    for key in ("anyOf", "oneOf", "allOf", "patternProperties", "minProperties", "maxProperties"):
        if key in root:
            raise SchemaRefused(f"{key} is not supported for the arguments as a whole", (key,))
    required = root.get("required", ())
    shared = {key: schema[key] for key in DEFINITIONS if key in schema}
    properties: Schema = dict(root.get("properties", {}))
    for name in required:
        properties.setdefault(name, {})
    found = []
    for name, inner in properties.items():
        own = {**inner, **shared} if isinstance(inner, dict) else {}
        found.append(Parameter(name, own, name in required, ("properties", name)))
    return found


def _resolved(schema: Schema, root: Schema) -> Schema:
    """The schema that a reference into the definitions means."""
    for _ in range(_MAX_DEPTH):
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        target: Any = root
        for part in reference.removeprefix("#/").split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            break
        schema = target
    raise SchemaRefused(f"{reference} cannot be followed here", ("$ref",))


def texts_of(parameter: Parameter) -> list[str] | None:
    """None if no string fits; else the only texts that do, or [] for any text.

    A null counts as the text that stands for it.

    Raises:
        SchemaRefused: strings are restricted in a way that text without quotes cannot keep to.
    """
    return _texts_of(parameter.schema, parameter.schema, parameter.path)


def _texts_of(schema: Schema, root: Schema, path: Path, depth: int = 0) -> list[str] | None:
    schema = _resolved(schema, root)
    if depth > _MAX_DEPTH:
        raise SchemaRefused("it refers to itself", path)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        return _literal_texts(values, path)
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches is not None:
        each = [_texts_of(b, root, path, depth + 1) for b in branches if isinstance(b, dict)]
        if all(texts is None for texts in each):
            return None
        if [] in each:
            return []
        nulls = ["null"] if any(b == {"type": "null"} for b in branches) else []
        return [text for texts in each for text in texts or ()] + nulls
    kinds = schema.get("type", "string")
    if "string" not in ([kinds] if isinstance(kinds, str) else kinds):
        return None
    for key in _TEXT_KEYWORDS:
        if key in schema:
            raise SchemaRefused(
                f"{key} of a string is not supported with this model's form of calls", (*path, key)
            )
    return []


def _literal_texts(values: list[Any], path: Path) -> list[str] | None:
    if not any(isinstance(value, str) for value in values):
        return None
    if not all(isinstance(value, str) or value is None for value in values):
        raise SchemaRefused(
            "strings beside other values are not supported with this model's form of calls", path
        )
    return ["null" if value is None else value for value in values]


# ---- values


JsonValue = Callable[[Schema], str]  # an expression for a value of a schema, in JSON


def tagged_value(
    lark: Lark, parameter: Parameter, json: JsonValue, opener: str, closer: str
) -> str:
    """A value between tags: a string as it is, everything else in JSON."""
    if parameter.text:
        return f"{lark.literal(opener)} {parameter.text} {lark.literal(closer)}"
    texts = texts_of(parameter)
    if texts == []:
        return f"{lark.literal(opener)} {lark.text_before(closer)}"
    value = json(parameter.schema) if texts is None else lark.either(list(map(quote, texts)))
    return f"{lark.literal(opener)} {value} {lark.literal(closer)}"


def tagged(
    lark: Lark,
    parameters: list[Parameter],
    json: JsonValue,
    tags: Callable[[str, bool], tuple[str, str]],
) -> str:
    """Each argument between tags.

    Args:
        tags: what stands before and after a value, by the parameter's name and whether the value
            is a string.
    """
    parts = []
    for parameter in parameters:
        opener, closer = tags(parameter.name, texts_of(parameter) is not None)
        element = lark.rule(tagged_value(lark, parameter, json, opener, closer))
        parts.append(element if parameter.required else f"{element}?")
    return " ".join(parts)


def keywords(lark: Lark, parameters: list[Parameter], json: JsonValue) -> str:
    """``n=1, s="x"``."""
    elements = [
        (lark.rule(f"{quote(p.name + '=')} {json(p.schema)}"), p.required) for p in parameters
    ]
    return _separated(lark, elements, '", "')


def gemma_object(lark: Lark, parameters: list[Parameter]) -> str:
    """``n:1,s:<|"|>x<|"|>``: keys in alphabetical order, as the model's template writes them."""
    elements = []
    for p in sorted(parameters, key=lambda parameter: parameter.name):
        value = f"{lark.literal(_QUOTE)} {p.text} {lark.literal(_QUOTE)}"
        if not p.text:
            value = _gemma_value(lark, p.schema, p.schema, p.path, 0)
        elements.append((lark.rule(f"{quote(p.name + ':')} {value}"), p.required))
    return _separated(lark, elements, '","')


def _separated(lark: Lark, elements: list[tuple[str, bool]], separator: str) -> str:
    """Elements in order, those that are not required left out at will."""
    rest, whole = "", ""
    for element, required in reversed(elements):
        after = rest
        begun = f"{element} {after}"
        whole = begun if required or not whole else lark.either([begun, whole])
        if not required:
            whole = lark.rule(f"({whole})?") if whole == begun else whole
        following = f"{separator} {element}"
        rest = f"{following} {after}" if required else f"({following})? {after}"
        rest = lark.rule(rest)
    return whole


_QUOTE: Final = '<|"|>'


def _gemma_value(lark: Lark, schema: Schema, root: Schema, path: Path, depth: int) -> str:
    if depth > _MAX_DEPTH:
        raise SchemaRefused("it is nested too deeply for this model's form of calls", path)
    schema = _resolved(schema, root)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        return lark.either([lark.rule(_gemma_literal(lark, value)) for value in values])
    if branches := schema.get("anyOf") or schema.get("oneOf"):
        inner = [b if isinstance(b, dict) else {} for b in branches]
        return lark.either([_gemma_value(lark, b, root, path, depth + 1) for b in inner])
    kinds = schema.get("type")
    if isinstance(kinds, list):
        each = [{**schema, "type": kind} for kind in kinds]
        return lark.either([_gemma_value(lark, one, root, path, depth + 1) for one in each])
    match kinds:
        case "string":
            _refuse(schema, _TEXT_KEYWORDS, path)
            return _gemma_string(lark)
        case "array":
            _refuse(schema, _LIST_KEYWORDS, path)
            items = schema.get("items")
            item = _gemma_value(
                lark, items if isinstance(items, dict) else {}, root, path, depth + 1
            )
            return lark.rule(f'"[" ({item} ("," {item})*)? "]"')
        case "object":
            return _gemma_mapping(lark, schema, root, path, depth)
        case None:
            return _gemma_anything(lark)
    return lark.json({key: schema[key] for key in schema if key not in DEFINITIONS})


def _gemma_mapping(lark: Lark, schema: Schema, root: Schema, path: Path, depth: int) -> str:
    _refuse(schema, ("allOf", "patternProperties", "minProperties", "maxProperties"), path)
    properties: Mapping[str, Any] = schema.get("properties", {})
    required = schema.get("required", ())
    if not properties and not required:
        return _gemma_anything(lark, "gemma_mapping")
    elements = []
    for name in sorted({*properties, *required}):
        inner = properties.get(name)
        own = inner if isinstance(inner, dict) else {}
        value = _gemma_value(lark, own, root, (*path, "properties", name), depth + 1)
        elements.append((lark.rule(f"{quote(name + ':')} {value}"), name in required))
    body = _separated(lark, elements, '","')
    return lark.rule(f'"{{" {body} "}}"')


def _gemma_string(lark: Lark) -> str:
    return lark.rule(f"{lark.literal(_QUOTE)} {lark.text_before(_QUOTE)}")


def _gemma_anything(lark: Lark, name: str = "gemma_value") -> str:
    text = lark.define("gemma_string", f"{lark.literal(_QUOTE)} gemma_text {lark.literal(_QUOTE)}")
    lark.define("gemma_text", TEXT)
    lark.define("gemma_scalar", '%json {"type": ["number", "boolean", "null"]}')
    lark.define("gemma_key", "/[A-Za-z_][A-Za-z0-9_-]{0,63}/")
    pair = 'gemma_key ":" gemma_value'
    lark.define("gemma_mapping", f'"{{" ({pair} ("," {pair})*)? "}}"')
    lark.define(
        "gemma_value",
        f'gemma_scalar | {text} | gemma_mapping | "[" (gemma_value ("," gemma_value)*)? "]"',
    )
    return name


def _gemma_literal(lark: Lark, value: Any) -> str:
    match value:
        case str():
            return " ".join(filter(None, map(lark.literal, (_QUOTE, value, _QUOTE))))
        case list():
            items = ' "," '.join(_gemma_literal(lark, item) for item in value)
            return f'"[" {items} "]"'
        case dict():
            pairs = ' "," '.join(
                f"{quote(key + ':')} {_gemma_literal(lark, item)}"
                for key, item in sorted(value.items())
            )
            return f'"{{" {pairs} "}}"'
    return quote(msgspec.json.encode(value).decode())


def _refuse(schema: Schema, keys: tuple[str, ...], path: Path) -> None:
    for key in keys:
        if key in schema:
            raise SchemaRefused(
                f"{key} is not supported with this model's form of calls", (*path, key)
            )
