"""What of a JSON schema can be carried out: sizes, types of keywords, and what means nothing.

The rest, whether llguidance supports the keywords that are left, is found by compiling the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Schema = dict[str, Any]
Path = tuple[str | int, ...]

MAX_DEPTH: Final = 32  # schemas inside schemas
MAX_PROPERTIES: Final = 1_000  # in all
MAX_ENUM_VALUES: Final = 10_000  # in all
MAX_PATTERN: Final = 1_024  # characters

_MAPS: Final = ("$defs", "definitions", "properties", "patternProperties")
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMAS: Final = ("items", "additionalProperties", "additionalItems", "contains", "not", "if")
_SCHEMAS_TOO: Final = ("then", "else", "propertyNames", "unevaluatedItems", "unevaluatedProperties")

# The formats of JSON Schema itself. Others are notes to the reader: no validator checks them.
_FORMATS: Final = (
    *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname"),
    *("ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template"),
    *("json-pointer", "relative-json-pointer", "regex"),
)

# llguidance has the 29th of February in every year.
_DATE: Final = (
    r"(?:[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|"
    r"(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))|"
    r"(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
)
_TIME: Final = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?"
    r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_FORMAT_PATTERNS: Final = {"date": f"^{_DATE}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}


class SchemaRefused(Exception):
    """A schema that cannot be honoured: ``reason``, and the ``path`` of what it is about."""

    def __init__(self, reason: str, path: Path = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path


class Verbatim(str):
    """A part of a path that is a path itself."""


def path_text(path: Path) -> str:
    """``.properties.a.anyOf[1]``: to be put behind the name of the field that holds the schema."""
    return "".join(_key_text(key) for key in path)


def _key_text(key: str | int) -> str:
    if isinstance(key, Verbatim):
        return key
    return f"[{key}]" if isinstance(key, int) else f".{key}"


def subschemas(schema: Mapping[str, Any]) -> list[tuple[Path, Schema]]:
    """The schemas directly inside a schema, definitions first, with their places."""
    found: list[tuple[Path, Any]] = []
    for key in _MAPS:
        if isinstance(value := schema.get(key), dict):
            found += [((key, name), inner) for name, inner in value.items()]
    for key in (*_LISTS, "items"):  # up to draft 2019-09 `items` may be a list
        if isinstance(value := schema.get(key), list):
            found += [((key, index), inner) for index, inner in enumerate(value)]
    for key in (*_SCHEMAS, *_SCHEMAS_TOO):
        found.append(((key,), schema.get(key)))
    return [(path, inner) for path, inner in found if isinstance(inner, dict)]


@dataclass(slots=True)
class Prepared:
    """A schema without what constrains nothing, and what its grammar must look out for."""

    schema: Schema
    # Whether a string may hold \\uXXXX. Not where an object has named properties and others too: a
    # name so written would pass as one of the others and read as the one that it spells.
    unicode_escapes: bool = True
    num_properties: int = field(default=0, repr=False)
    num_enum_values: int = field(default=0, repr=False)


def prepare(schema: Schema) -> Prepared:
    """Check a schema and drop what means nothing. Raises :class:`SchemaRefused`."""
    prepared = Prepared({})
    draft = schema.get("$schema")
    is_draft_4 = isinstance(draft, str) and "draft-04" in draft
    prepared.schema = _prepare(schema, (), 0, prepared, is_draft_4)
    # llguidance's own settings, among them one that ignores what it cannot do.
    prepared.schema.pop("x-guidance", None)
    return prepared


def _prepare(
    schema: Schema, path: Path, depth: int, prepared: Prepared, is_draft_4: bool
) -> Schema:
    if depth > MAX_DEPTH:
        raise SchemaRefused(f"schemas are nested more than {MAX_DEPTH} deep", path[:8])
    for key, value in schema.items():
        if (expected := _TYPES.get(key)) and not expected[1](value):
            if is_draft_4 and key.startswith("exclusive") and isinstance(value, bool):
                continue
            raise SchemaRefused(f"{key} must be {expected[0]}", (*path, key))
    _count(schema, path, prepared)
    kept = {key: value for key, value in schema.items() if not _means_nothing(key, value, schema)}
    if pattern := _FORMAT_PATTERNS.get(kept.get("format", "")):
        del kept["format"]
        kept["allOf"] = [*kept.get("allOf", ()), {"pattern": pattern}]
    for place, inner in subschemas(kept):
        _replace(kept, place, _prepare(inner, (*path, *place), depth + 1, prepared, is_draft_4))
    return kept


def _replace(schema: Schema, place: Path, inner: Schema) -> None:
    """Put ``inner`` in its place; the client's own lists and maps stay as they are."""
    key = place[0]
    assert isinstance(key, str)
    if len(place) == 1:
        schema[key] = inner
        return
    holder = schema[key]
    schema[key] = holder = holder.copy()
    holder[place[1]] = inner


def _count(schema: Schema, path: Path, prepared: Prepared) -> None:
    properties = schema.get("properties", {})
    prepared.num_properties += len(properties) + len(schema.get("patternProperties", {}))
    if prepared.num_properties > MAX_PROPERTIES:
        raise SchemaRefused(f"more than {MAX_PROPERTIES} properties", (*path, "properties"))
    prepared.num_enum_values += len(schema.get("enum", ()))
    if prepared.num_enum_values > MAX_ENUM_VALUES:
        raise SchemaRefused(f"more than {MAX_ENUM_VALUES} values of enums", (*path, "enum"))
    patterns = [(schema.get("pattern", ""), (*path, "pattern"))]
    patterns += [
        (pattern, (*path, "patternProperties", pattern[:32]))
        for pattern in schema.get("patternProperties", {})
    ]
    for pattern, place in patterns:
        if len(pattern) > MAX_PATTERN:
            raise SchemaRefused(f"a pattern of more than {MAX_PATTERN} characters", place)
    # Keys that are not named may repeat, so that there may be fewer than it seems.
    required = schema.get("required", ())
    if schema.get("minProperties", 0) > max(1, len(required)):
        raise SchemaRefused(
            "minProperties of more than 1 and more than the required ones is not supported",
            (*path, "minProperties"),
        )
    is_open = schema.get("additionalProperties") is not False
    if is_open and (properties or required or schema.get("patternProperties")):
        prepared.unicode_escapes = False


def _means_nothing(key: str, value: Any, schema: Schema) -> bool:
    match key:
        case "uniqueItems":
            return value is False
        case "unevaluatedProperties" | "unevaluatedItems" | "propertyNames":
            return value is True or value == {}
        case "minProperties":
            return bool(value <= len(schema.get("required", ())))
        case "format":
            return value not in _FORMATS
        case "then" | "else":
            return "if" not in schema
        case "minContains" | "maxContains":
            return "contains" not in schema
    return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_schema, value))


def _is_schema_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_Check = tuple[str, Callable[[Any], bool]]
_COUNT: Final[_Check] = ("an integer of 0 or more", _is_count)
_NUMBER: Final[_Check] = ("a number", _is_number)
_SCHEMA: Final[_Check] = ("a schema", _is_schema)
_STRING: Final[_Check] = ("a string", lambda value: isinstance(value, str))
_BOOL: Final[_Check] = ("true or false", lambda value: isinstance(value, bool))
# After the metaschema of draft 2020-12; llguidance passes over some wrong types without a word.
_TYPES: Final[Mapping[str, _Check]] = {
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _COUNT),
    **dict.fromkeys(("minProperties", "maxProperties"), _COUNT),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBER),
    **dict.fromkeys(_MAPS, ("an object of schemas", _is_schema_map)),
    **dict.fromkeys(_LISTS, ("a list of schemas", _is_schemas)),
    **dict.fromkeys((*_SCHEMAS, *_SCHEMAS_TOO), _SCHEMA),
    **dict.fromkeys(("pattern", "format", "$ref", "$schema"), _STRING),
    "items": ("a schema", lambda value: _is_schema(value) or _is_schemas(value)),
    "multipleOf": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "uniqueItems": _BOOL,
    "enum": ("a list of values", lambda value: isinstance(value, list) and bool(value)),
    "required": ("a list of names", _is_strings),
    "type": (
        "a type's name or a list of them",
        lambda value: isinstance(value, str) or (_is_strings(value) and bool(value)),
    ),
}
