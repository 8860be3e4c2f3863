"""Turns what a client asks of its output into a grammar, and finds out whether that can be used.

Runs in helper processes: see :mod:`quire.serve.grammar`. A schema of a few kilobytes can keep a
compiler busy for minutes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import msgspec
from llguidance import LLMatcher, LLTokenizer

from quire.engine.grammar_tokens import PARSER_LIMITS, make_tokenizer
from quire.serve.helper_process import Refused
from quire.serve.lark import Lark, ReasoningForm, quote
from quire.serve.schema_check import (
    Path,
    Schema,
    SchemaRefused,
    Verbatim,
    path_text,
    prepare,
    subschemas,
)
from quire.serve.tool_grammar import CallableTool, CallRules, calls_grammar, takes_text

Kind = Literal["json_schema", "regex", "choice", "lark", "tools"]

# Any more in one place, and a weak model pads for ever. Pretty printing fits.
_WHITESPACE: Final = r"[\x20\x0A]{1,20}"
_ESCAPES_WITHOUT_UNICODE: Final = 'nrbtf\\"'
_MAX_TRIES: Final = 200  # compilations to find the place of an error
_ONE_OF: Final = "oneOf constraints are not supported"


class CheckRequest(msgspec.Struct, frozen=True):
    kind: Kind
    # A JSON schema, a regular expression, a JSON list of strings, a Lark grammar, or Tools in JSON.
    text: str
    strict: bool = True  # of a schema: oneOf means exactly one
    reasoning: ReasoningForm | None = None  # which comes before; tools have their own
    instead: CheckRequest | None = None  # of tools: what the answer may be where it calls none


class Tool(msgspec.Struct, frozen=True):
    name: str
    parameters: Schema
    strict: bool = False  # else a schema that cannot be carried out counts as any object
    place: str = ""  # of the schema, or of the text's form, behind the field's name
    text: CheckRequest | None = None  # what its only argument is, which is a text


class Tools(msgspec.Struct, frozen=True):
    rules: CallRules
    tools: list[Tool]


Piece = dict[str, Any]  # one of llguidance's grammars


class CheckRefusal(msgspec.Struct, frozen=True):
    reason: str
    path: str = ""  # of the part of the schema that is to blame, behind the field's name


class CheckerConfig(msgspec.Struct, frozen=True):
    tokenizer: str  # path of tokenizer.json, or its text
    eos_token_ids: list[int]
    markers: dict[str, int]  # of quire.serve.lark.markers_of


def make_checker(config: Any) -> Callable[[Any], str]:
    """The handler of helper processes: a :class:`CheckRequest` to the text of a grammar."""
    settings = msgspec.convert(config, CheckerConfig)
    checker = Checker(make_tokenizer(settings.tokenizer, settings.eos_token_ids), settings.markers)

    def check(request: Any) -> str:
        try:
            return checker.build(msgspec.convert(request, CheckRequest))
        except SchemaRefused as refused:
            refusal = CheckRefusal(refused.reason, path_text(refused.path))
            raise Refused(msgspec.to_builtins(refusal)) from None
        except RecursionError:
            refusal = CheckRefusal("it is nested too deeply")
            raise Refused(msgspec.to_builtins(refusal)) from None

    return check


class Checker:
    """Builds grammars and tries them.

    Args:
        markers: of :func:`quire.serve.lark.markers_of`.
    """

    def __init__(self, tokenizer: LLTokenizer, markers: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        self._markers = markers

    def build(self, request: CheckRequest) -> str:
        """llguidance's text of a grammar that works. Raises :class:`SchemaRefused`."""
        lark = Lark(self._markers)
        frame: str | None = None
        texts: list[Piece] = []  # what calls refer to
        if request.instead is not None:
            frame, texts = self._tools(request.text, other="@output")
            output = self._piece(request.instead, beside_calls=True)
        elif request.kind == "tools":
            calls, texts = self._tools(request.text)
            output = {"lark_grammar": calls}
        else:
            output = self._piece(request)
            if request.reasoning is not None:
                frame = lark.build(f"{lark.reasoning(request.reasoning)} @output")
        output["name"] = "output"
        grammar = _pack([output] if frame is not None else [output, *texts])
        self._try(grammar)
        if frame is not None:
            grammar = _pack([{"name": "frame", "lark_grammar": frame}, output, *texts])
            self._try(grammar)
        return grammar

    def _piece(self, request: CheckRequest, *, beside_calls: bool = False) -> Piece:
        """One of llguidance's grammars, without what stands around the output."""
        match request.kind:
            case "json_schema":
                return {"json_schema": self._schema(request.text, request.strict, beside_calls)}
            case "choice":
                choices = dict.fromkeys(msgspec.json.decode(request.text, type=list[str]))
                # One lexeme: as alternatives of a rule more than 5,000 are beyond the parser.
                lark = "start: CHOICE\nCHOICE: " + " | ".join(map(quote, choices))
                return {"lark_grammar": lark}
            case "regex":
                return _first_grammar(LLMatcher.grammar_from_regex(request.text))
            case "lark":
                return {"lark_grammar": request.text}
            case "tools":
                raise AssertionError("calls are no part of another grammar")

    def _schema(self, text: str, strict: bool, beside_calls: bool) -> Schema:
        try:
            schema = msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SchemaRefused(f"a JSON schema must be an object ({error})") from None
        return self._checked_schema(schema, strict, beside_calls)

    def _checked_schema(self, schema: Schema, strict: bool, beside_calls: bool = True) -> Schema:
        """The schema with the settings that llguidance needs."""
        prepared = prepare(schema)
        # Grammars that begin alike are told apart only if their settings are the same.
        escapes = prepared.unicode_escapes and not beside_calls
        grammar = {**prepared.schema, "x-guidance": json_settings(escapes)}
        wrong = self._compile(_pack([{"json_schema": grammar}]))
        if not strict and wrong.startswith(_ONE_OF):
            grammar["x-guidance"] = json_settings(escapes, any_of=True)
            wrong = self._compile(_pack([{"json_schema": grammar}]))
        if wrong:
            raise SchemaRefused(_explain(wrong), _locate(prepared.schema, wrong))
        return grammar

    def _tools(self, text: str, other: str = "") -> tuple[str, list[Piece]]:
        """The grammar of calls, and those that it refers to."""
        asked = msgspec.json.decode(text, type=Tools)
        texts: list[Piece] = []
        ready = [self._tool(asked.rules, tool, texts) for tool in asked.tools]
        # Values of several schemas stand in one grammar, and may then differ in nothing else.
        settings = json_settings(unicode_escapes=False)
        return calls_grammar(asked.rules, ready, self._markers, settings, other), texts

    def _tool(self, rules: CallRules, tool: Tool, texts: list[Piece]) -> CallableTool:
        """A tool whose calls can be written; any object where its schema is beyond that.

        The grammar of its text, if it has one, joins ``texts``.
        """
        if tool.text is not None:
            return self._text_tool(rules, tool, tool.text, texts)
        settings = json_settings(unicode_escapes=False)
        place: Path = (Verbatim(tool.place),) if tool.place else ()
        try:
            self._checked_schema(tool.parameters, tool.strict)
            ready = CallableTool(tool.name, prepare(tool.parameters).schema)
            self._try(calls_grammar(rules, [ready], self._markers, settings))
        except SchemaRefused as refused:
            if tool.strict:
                raise SchemaRefused(refused.reason, (*place, *refused.path)) from None
            ready = CallableTool(tool.name, {"type": "object"})
        return ready

    def _text_tool(
        self, rules: CallRules, tool: Tool, text: CheckRequest, texts: list[Piece]
    ) -> CallableTool:
        schema = prepare(tool.parameters).schema
        piece = self._piece(text)
        if wrong := self._compile(_pack([piece])):
            raise SchemaRefused(wrong, (Verbatim(tool.place),))
        if not takes_text(rules.family):
            # In JSON's notation a pattern can be kept to.
            [(name, kind)] = schema["properties"].items()
            kind = {**kind, "pattern": f"^({text.text})$"}
            return CallableTool(tool.name, {**schema, "properties": {name: kind}})
        piece["name"] = f"text{len(texts)}"
        texts.append(piece)
        return CallableTool(tool.name, schema, f"@{piece['name']}")

    def _compile(self, grammar: str) -> str:
        """What is wrong with a grammar, or nothing; its first mask is computed too."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=PARSER_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()
            if matcher.is_error() and "NoExtension" in matcher.get_error():
                return "no text fits it"
        return _clean(matcher.get_error())

    def _try(self, grammar: str) -> None:
        if wrong := self._compile(grammar):
            raise SchemaRefused(wrong)


def json_settings(unicode_escapes: bool = True, *, any_of: bool = False) -> dict[str, Any]:
    """What llguidance reads besides a schema.

    Args:
        unicode_escapes: let strings hold \\uXXXX.
        any_of: take oneOf for anyOf.
    """
    settings: dict[str, Any] = {"whitespace_pattern": _WHITESPACE}
    if not unicode_escapes:
        settings["json_allowed_escapes"] = _ESCAPES_WITHOUT_UNICODE
    if any_of:
        settings["coerce_one_of"] = True
    return settings


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


def _clean(error: str) -> str:
    return " ".join(error.replace("<non-verbose/>", "").split())


def _pack(grammars: list[dict[str, Any]]) -> str:
    return msgspec.json.encode({"grammars": grammars}).decode()


def _first_grammar(text: str) -> dict[str, Any]:
    grammar: dict[str, Any] = msgspec.json.decode(text)["grammars"][0]
    return {key: value for key, value in grammar.items() if value is not None}
