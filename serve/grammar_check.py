"""Turns what a client asks of its output into a grammar, and finds out whether that can be used.

Runs in helper processes: see :mod:`quire.serve.grammar`. A schema of a few kilobytes can keep a
compiler busy for minutes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
from llguidance import LLMatcher, LLTokenizer

from quire.engine.grammar_tokens import PARSER_LIMITS, make_tokenizer
from quire.serve.helper_process import Refused
from quire.serve.lark import quote
from quire.serve.schema_check import Schema, SchemaRefused, path_text, prepare, subschemas

Kind = Literal["json_schema", "regex", "choice", "lark"]

# Any more in one place, and a weak model pads for ever. Pretty printing fits.
_WHITESPACE: Final = r"[\x20\x0A]{1,20}"
_ESCAPES_WITHOUT_UNICODE: Final = 'nrbtf\\"'
_MAX_TRIES: Final = 200  # compilations to find the place of an error
_ONE_OF: Final = "oneOf constraints are not supported"


class CheckRequest(msgspec.Struct, frozen=True):
    kind: Kind
    text: str  # a JSON schema, a regular expression, a JSON list of strings or a Lark grammar
    strict: bool = True  # of a schema: oneOf means exactly one
    # A Lark grammar of the whole output, which names the above as @output; None: nothing but that.
    frame: str | None = None


class CheckRefusal(msgspec.Struct, frozen=True):
    reason: str
    path: str = ""  # of the part of the schema that is to blame, behind the field's name


class CheckerConfig(msgspec.Struct, frozen=True):
    tokenizer: str  # path of tokenizer.json, or its text
    eos_token_ids: list[int]


def make_checker(config: Any) -> Callable[[Any], str]:
    """The handler of helper processes: a :class:`CheckRequest` to the text of a grammar."""
    settings = msgspec.convert(config, CheckerConfig)
    tokenizer = make_tokenizer(settings.tokenizer, settings.eos_token_ids)

    def check(request: Any) -> str:
        try:
            return build_grammar(tokenizer, msgspec.convert(request, CheckRequest))
        except SchemaRefused as refused:
            refusal = CheckRefusal(refused.reason, path_text(refused.path))
            raise Refused(msgspec.to_builtins(refusal)) from None
        except RecursionError:
            refusal = CheckRefusal("it is nested too deeply")
            raise Refused(msgspec.to_builtins(refusal)) from None

    return check


def build_grammar(tokenizer: LLTokenizer, request: CheckRequest) -> str:
    """llguidance's text of a grammar that works. Raises :class:`SchemaRefused`."""
    match request.kind:
        case "json_schema":
            output = _from_schema(tokenizer, request.text, request.strict)
        case "choice":
            choices = msgspec.json.decode(request.text, type=list[str])
            output = {"lark_grammar": "start: " + " | ".join(map(quote, choices))}
        case "regex":
            output = _grammars(LLMatcher.grammar_from_regex(request.text))[0]
        case "lark":
            output = {"lark_grammar": request.text}
    output = {key: value for key, value in output.items() if value is not None}
    output["name"] = "output"
    grammar = _pack([output])
    _raise_if(_compile(tokenizer, grammar))
    if request.frame is None:
        return grammar
    grammar = _pack([{"name": "frame", "lark_grammar": request.frame}, output])
    _raise_if(_compile(tokenizer, grammar))
    return grammar


def schema_grammar(schema: Schema, *, unicode_escapes: bool, any_of: bool = False) -> Schema:
    """A schema with the settings that llguidance reads from it.

    Args:
        any_of: take oneOf for anyOf.
    """
    settings: Schema = {"whitespace_pattern": _WHITESPACE}
    if not unicode_escapes:
        settings["json_allowed_escapes"] = _ESCAPES_WITHOUT_UNICODE
    if any_of:
        settings["coerce_one_of"] = True
    return {**schema, "x-guidance": settings}


def _from_schema(tokenizer: LLTokenizer, text: str, strict: bool) -> Schema:
    try:
        schema = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SchemaRefused(f"a JSON schema must be an object ({error})") from None
    prepared = prepare(schema)
    escapes = prepared.unicode_escapes
    grammar = schema_grammar(prepared.schema, unicode_escapes=escapes)
    wrong = _compile(tokenizer, _pack([{"json_schema": grammar}]))
    if not strict and wrong.startswith(_ONE_OF):
        grammar = schema_grammar(prepared.schema, unicode_escapes=escapes, any_of=True)
        wrong = _compile(tokenizer, _pack([{"json_schema": grammar}]))
    if wrong:
        raise SchemaRefused(_explain(wrong), _locate(prepared.schema, wrong))
    return {"json_schema": grammar}


def _explain(error: str) -> str:
    """llguidance's message in the words of JSON Schema, where it speaks of its own."""
    if error.startswith(_ONE_OF):
        return "oneOf is only supported where its branches exclude each other"
    if keys := re.fullmatch(r'Unimplemented keys: \["(.*)"\]', error):
        return f"not supported: {keys[1].replace(chr(34), '')}"
    return error


def _locate(root: Schema, error: str) -> tuple[str | int, ...]:
    """The innermost schema that gives the same error alone."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    path: tuple[str | int, ...] = ()
    schema, tries = root, 0
    while True:
        for place, inner in subschemas(schema):
            tries += 1
            if tries > _MAX_TRIES:
                return path
            grammar = _pack([{"json_schema": {**shared, **inner}}])
            if _clean(LLMatcher.validate_grammar(grammar, None, limits=PARSER_LIMITS)) == error:
                path, schema = path + place, inner
                break
        else:
            return path


def _compile(tokenizer: LLTokenizer, grammar: str) -> str:
    """What is wrong with a grammar, or nothing; its first mask is computed too."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=PARSER_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
        if matcher.is_error() and "NoExtension" in matcher.get_error():
            return "no text fits it"
    return _clean(matcher.get_error())


def _clean(error: str) -> str:
    return " ".join(error.replace("<non-verbose/>", "").split())


def _raise_if(error: str) -> None:
    if error:
        raise SchemaRefused(error)


def _pack(grammars: list[dict[str, Any]]) -> str:
    return msgspec.json.encode({"grammars": grammars}).decode()


def _grammars(text: str) -> list[dict[str, Any]]:
    grammars: list[dict[str, Any]] = msgspec.json.decode(text)["grammars"]
    return grammars
