"""Tool calls as grammars, by family of models: which calls may, or must, be made, and how.

The forms are those that the families' chat templates write; :mod:`quire.serve.parsers` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Final

import msgspec

from quire.serve.lark import TEXT, Lark, ReasoningForm, quote
from quire.serve.schema_check import Schema
from quire.serve.tool_arguments import (
    DEFINITIONS,
    JsonValue,
    Parameter,
    gemma_object,
    keywords,
    parameters_of,
    tagged,
    tagged_value,
    texts_of,
)

HARMONY: Final = "harmony"


class CallableTool(msgspec.Struct, frozen=True):
    """A function that may be called; its schema has been made ready."""

    name: str
    schema: Schema
    text: str = ""  # an expression that its one argument, a text, has to fit

    @property
    def parameters(self) -> list[Parameter]:
        return [replace(each, text=self.text) for each in parameters_of(self.schema)]


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a family writes calls. ``call`` gives one, without what opens and closes it.

    ``takes_text``: strings stand in a call as they are, not in JSON's notation.
    """

    opener: str
    closer: str
    call: Callable[[Lark, CallableTool, JsonValue], str]
    separator: str = ""  # an expression, between two calls
    opens_each: bool = True  # else one opener and one closer stand around all calls
    takes_text: bool = False


def _json_call(before: str, after: str) -> Callable[[Lark, CallableTool, JsonValue], str]:
    """A call with one JSON object; NAME stands for the function's name."""

    def call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
        head = lark.literal(before.replace("NAME", tool.name))
        return f"{head} {json(tool.schema)} {lark.literal(after)}"

    return call


def _object_call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
    head = f'{{"name": {quote(tool.name)}, "arguments": '
    return f'{quote(head)} {json(tool.schema)} "}}"'


def _llama_call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
    # All of it is one value in JSON: an answer that is to be JSON too begins in the same way.
    value: Schema = {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": tool.schema},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
    return json(value | {key: tool.schema[key] for key in DEFINITIONS if key in tool.schema})


def _tagged_call(
    before: str, after: str, tags: Callable[[str, bool], tuple[str, str]]
) -> Callable[[Lark, CallableTool, JsonValue], str]:
    def call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
        head = lark.literal(before.replace("NAME", tool.name))
        arguments = tagged(lark, tool.parameters, json, tags)
        return f"{head} {arguments} {lark.literal(after)}"

    return call


def _glm_call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
    # GLM 4.5 and 4.6 write a line end after each tag, later ones do not.
    parts = [quote(tool.name), '"\\n"?']
    for parameter in tool.parameters:
        key = lark.literal(f"<arg_key>{parameter.name}</arg_key>")
        value = tagged_value(lark, parameter, json, "<arg_value>", "</arg_value>")
        element = lark.rule(f'{key} "\\n"? {value} "\\n"?')
        parts.append(element if parameter.required else f"{element}?")
    return " ".join(parts)


def _kimi_k3_call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
    # The kinds that the template writes for values that are not strings.
    head = lark.literal(f'<|open|>call tool="{escape(tool.name)}" index="')
    parts = [head, "/[0-9]{1,3}/", lark.literal('"<|sep|>')]
    for parameter in tool.parameters:
        kind = (
            '"string"' if texts_of(parameter) is not None else "/number|boolean|null|object|array/"
        )
        key = lark.literal(f'<|open|>argument key="{escape(parameter.name)}" type="')
        value = tagged_value(lark, parameter, json, '"<|sep|>', "<|close|>argument<|sep|>")
        element = lark.rule(f"{key} {kind} {value}")
        parts.append(element if parameter.required else f"{element}?")
    return " ".join([*parts, lark.literal("<|close|>call<|sep|>")])


def _kimi_k2_call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
    head = lark.literal(f"<|tool_call_begin|>functions.{tool.name}:")
    mark, end = lark.literal("<|tool_call_argument_begin|>"), lark.literal("<|tool_call_end|>")
    return f"{head} /[0-9]{{1,4}}/ {mark} {json(tool.schema)} {end}"


def _deepseek_call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
    begin, end = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    now = _json_call(f"{begin}NAME<｜tool▁sep｜>", end)  # V3.1
    older = _json_call(f"{begin}function<｜tool▁sep｜>NAME\n```json\n", f"\n```{end}")  # V3, R1
    return lark.either([now(lark, tool, json), older(lark, tool, json)])


def _gemma_call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
    arguments = gemma_object(lark, tool.parameters)
    return f'{quote(tool.name + "{")} {arguments} "}}"'


def _pythonic_call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
    arguments = keywords(lark, tool.parameters, json)
    return f'{quote(tool.name + "(")} {arguments} ")"'


def _mistral_call(lark: Lark, tool: CallableTool, json: JsonValue) -> str:
    # Small 3.2 writes an id; its text means nothing.
    number = f"{lark.literal('[CALL_ID]')} /[a-zA-Z0-9]{{9}}/"
    mark = lark.literal("[ARGS]")
    return f"{quote(tool.name)} ({number})? {mark} {json(tool.schema)}"


_DSML: Final = "｜DSML｜"

FORMS: Final[Mapping[str, CallForm]] = {
    "qwen_xml": CallForm(
        "<tool_call>\n",
        "</tool_call>",
        _tagged_call(
            "<function=NAME>\n",
            "</function>\n",
            lambda name, _: (f"<parameter={name}>\n", "\n</parameter>\n"),
        ),
        separator='"\\n"',
        takes_text=True,
    ),
    "hermes": CallForm("<tool_call>\n", "\n</tool_call>", _object_call, separator='"\\n"'),
    "granite3": CallForm("<|tool_call|>[", "]", _object_call, '", "', opens_each=False),
    "gemma4": CallForm("<|tool_call>call:", "<tool_call|>", _gemma_call, takes_text=True),
    "glm": CallForm("<tool_call>", "</tool_call>", _glm_call, separator='"\\n"?', takes_text=True),
    "minimax": CallForm(
        "<minimax:tool_call>\n",
        "</minimax:tool_call>",
        _tagged_call(
            '<invoke name="NAME">\n',
            "</invoke>\n",
            lambda name, _: (f'<parameter name="{name}">', "</parameter>\n"),
        ),
        opens_each=False,
        takes_text=True,
    ),
    "kimi_k2": CallForm(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        _kimi_k2_call,
        opens_each=False,
    ),
    "kimi_k3": CallForm(
        "<|open|>tools<|sep|>",
        "<|close|>tools<|sep|>",
        _kimi_k3_call,
        opens_each=False,
        takes_text=True,
    ),
    "deepseek": CallForm(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        _deepseek_call,
        separator='"\\n"?',
        opens_each=False,
    ),
    "deepseek_dsml": CallForm(
        f"<{_DSML}function_calls>\n",
        f"</{_DSML}function_calls>",
        _tagged_call(
            f'<{_DSML}invoke name="NAME">\n',
            f"</{_DSML}invoke>\n",
            lambda name, is_text: (
                f'<{_DSML}parameter name="{name}" string="{str(is_text).lower()}">',
                f"</{_DSML}parameter>\n",
            ),
        ),
        opens_each=False,
        takes_text=True,
    ),
    "mistral": CallForm("[TOOL_CALLS]", "", _mistral_call),
    "llama3": CallForm("", "", _llama_call),
    "pythonic": CallForm(
        "<|tool_call_start|>[", "]<|tool_call_end|>", _pythonic_call, '", "', opens_each=False
    ),
}
# Mistral's tokenizers before v11 have no token between name and arguments.
_MISTRAL_ARRAY: Final = CallForm("[TOOL_CALLS][", "]", _object_call, '", "', opens_each=False)

FAMILIES: Final = (*FORMS, HARMONY)


def takes_text(family: str) -> bool:
    """Whether a grammar of a text can be enforced in the family's calls."""
    return family in FORMS and FORMS[family].takes_text


class CallRules(msgspec.Struct, frozen=True):
    """Which calls a request wants."""

    family: str
    required: bool  # else text with calls in it, or without
    parallel: bool = True  # more than one call
    reasoning: ReasoningForm | None = None  # which comes first


def calls_grammar(
    rules: CallRules,
    tools: list[CallableTool],
    markers: Mapping[str, int],
    json: Settings,
    other: str = "",
) -> str:
    """The grammar of a whole answer, in Lark.

    Args:
        tools: those that may be called; at least one.
        markers: of :func:`quire.serve.lark.markers_of`.
        json: the settings that values in JSON are written by.
        other: an expression for an answer without calls; "": any text, unless they are required.

    Raises:
        SchemaRefused: a tool's arguments cannot be written in this family's form.
    """
    lark = Lark(markers)

    def value(schema: Schema) -> str:
        return lark.json({**schema, "x-guidance": json})

    if rules.family == HARMONY:
        return lark.build(_harmony(lark, rules, tools, value, other))
    form = FORMS[rules.family]
    if rules.family == "mistral" and "[ARGS]" not in markers:
        form = _MISTRAL_ARRAY
    call = lark.either([lark.rule(form.call(lark, tool, value)) for tool in tools])
    thought = lark.reasoning(rules.reasoning) if rules.reasoning else ""
    if rules.family == "llama3":
        call = f"{lark.literal('<|python_tag|>')}? {call}"
        if not rules.required:  # what begins with a brace is a call
            call = lark.either([call, other or r"/([^{](.|\n)*)?/"])
        return lark.build(f"{thought} {call}")
    if rules.required or other:
        blank = lark.rule(r"/\n{0,3}/")
        calls = _calls(lark, form, call, lark.literal(form.opener), rules.parallel)
        if other:
            calls = lark.either([calls, other])
        return lark.build(f"{thought} {blank} {calls}")
    calls = _calls(lark, form, call, lark.text_before(form.opener), rules.parallel)
    free = f"({calls})*" if rules.parallel else f"({calls})?"
    return lark.build(f"{thought} {free} {lark.rule(TEXT)}")


Settings = Mapping[str, Any]


def _calls(lark: Lark, form: CallForm, call: str, opener: str, parallel: bool) -> str:
    """One call or several, with what opens the first of them, and maybe text before that."""
    closer, again = lark.literal(form.closer), lark.literal(form.opener)
    if not form.opens_each:
        more = f"({form.separator} {call})*" if parallel else ""
        return f"{opener} {call} {more} {closer}"
    more = f"({form.separator} {again} {call} {closer})*" if parallel else ""
    return f"{opener} {call} {closer} {more}"


def _harmony(
    lark: Lark, rules: CallRules, tools: list[CallableTool], json: JsonValue, other: str
) -> str:
    """gpt-oss: one call, after any reasoning. The token that ends a call is an end of text."""
    between = lark.text_before("<|end|><|start|>assistant")
    analysis = lark.rule(f"{lark.literal('<|channel|>analysis<|message|>')} {between}")
    preamble = lark.rule(f"{lark.literal('<|channel|>commentary<|message|>')} {between}")
    call_of = _json_call("<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", "")
    call = lark.either([lark.rule(call_of(lark, tool, json)) for tool in tools])
    if not rules.required:
        final = f"{lark.literal('<|channel|>final<|message|>')} {other or lark.rule(TEXT)}"
        call = lark.either([call, lark.rule(final)])
    return f"({analysis} | {preamble})* {call}"
