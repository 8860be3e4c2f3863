"""What a request wants of its output's form: JSON, a schema, a regular expression, tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from quire.serve.errors import invalid
from quire.serve.grammar import JSON_OBJECT, choice_request, tools_request
from quire.serve.grammar_check import CheckRequest, Tool
from quire.serve.lark import ReasoningForm
from quire.serve.openai_protocol import (
    ChatCompletionRequest,
    GenerationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    StructuredOutputs,
    TextFormat,
)
from quire.serve.parsers.families import HARMONY, REASONING_TAGS, ParserFactory
from quire.serve.tool_grammar import FAMILIES, CallRules, takes_text
from quire.serve.tools import FunctionTool, NamedChoice

_HARMONY_FORM = ReasoningForm(
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant",
    is_open=False,
    before_answer="<|channel|>final<|message|>",
)


@dataclass(frozen=True, slots=True)
class Wanted:
    request: CheckRequest
    param: str  # the field that says so
    alone: Wanted | None = None  # a part that must be right by itself


@dataclass(frozen=True, slots=True)
class TextForm:
    """What a tool's only argument is, which is a text."""

    request: CheckRequest
    place: str  # of the field that says so, behind "tools"


TextForms = Mapping[str, TextForm]  # by the tool's name
_NONE: TextForms = {}


def carries(family: str, kind: str) -> bool:
    """Whether a tool's text can be made to fit a "lark" grammar or a "regex".

    Args:
        family: that writes the model's tool calls.
    """
    return family in FAMILIES and (kind == "regex" or takes_text(family))


def reasoning_form(parsers: ParserFactory, opening: str) -> ReasoningForm | None:
    """How a model reasons before it answers a prompt that ends with ``opening``."""
    family = parsers.family.reasoning
    if family == HARMONY:
        return _HARMONY_FORM
    if (tags := REASONING_TAGS.get(family)) is None:
        return None
    before = tags.silent[0] if tags.silent else ""
    return ReasoningForm(tags.opener, tags.closer, parsers.starts_in_reasoning(opening), before)


def wanted_of_chat(
    body: ChatCompletionRequest,
    family: str,
    reasoning: ReasoningForm | None,
    texts: TextForms = _NONE,
) -> Wanted | None:
    """None where any text will do. Raises :class:`ApiError`.

    Args:
        family: that writes the model's tool calls.
    """
    content = _wanted_content(body)
    calls = _wanted_calls(body, family, reasoning, texts)
    if content is None or calls is None:
        if content is not None and body.tools and body.tool_choice != "none":
            calls = _calls(body, list(enumerate(body.tools)), family, reasoning, texts)
            return _either(content, calls)
        return calls or _after(content, reasoning)
    if body.tool_choice in (None, "auto"):
        return _either(content, calls)
    return calls  # which are all that the answer may be


def wanted_of_text(body: GenerationRequest) -> Wanted | None:
    """Of a completion. None where any text will do. Raises :class:`ApiError`."""
    outputs = body.structured_outputs
    return None if outputs is None else _structured(outputs)


def _after(content: Wanted | None, reasoning: ReasoningForm | None) -> Wanted | None:
    if content is None:
        return None
    return Wanted(msgspec.structs.replace(content.request, reasoning=reasoning), content.param)


def _wanted_content(body: ChatCompletionRequest) -> Wanted | None:
    asked = body.response_format
    if asked is not None and not isinstance(asked, TextFormat):
        if body.structured_outputs is not None:
            raise invalid(
                "structured_outputs", "Send either response_format or structured_outputs."
            )
        if isinstance(asked, JsonObjectFormat):
            return Wanted(JSON_OBJECT, "response_format")
        return _schema(asked)
    return wanted_of_text(body)


def _schema(asked: JsonSchemaFormat) -> Wanted:
    text = msgspec.json.encode(asked.json_schema.schema).decode()
    strict = asked.json_schema.strict is True
    return Wanted(CheckRequest("json_schema", text, strict), "response_format.json_schema.schema")


def _structured(asked: StructuredOutputs) -> Wanted:
    given = [
        name
        for name in ("json", "json_object", "regex", "choice", "grammar")
        if getattr(asked, name) not in (None, False)
    ]
    if len(given) != 1:
        raise invalid(
            "structured_outputs",
            "structured_outputs needs exactly one of json, json_object, regex, choice and grammar.",
        )
    param = f"structured_outputs.{given[0]}"
    if asked.json is not None:
        text = (
            asked.json if isinstance(asked.json, str) else msgspec.json.encode(asked.json).decode()
        )
        return Wanted(CheckRequest("json_schema", text), param)
    if asked.regex is not None:
        return Wanted(CheckRequest("regex", asked.regex), param)
    if asked.choice is not None:
        return Wanted(choice_request(asked.choice), param)
    if asked.grammar is not None:
        return Wanted(CheckRequest("lark", asked.grammar), param)
    return Wanted(JSON_OBJECT, param)


def _wanted_calls(
    body: ChatCompletionRequest, family: str, reasoning: ReasoningForm | None, texts: TextForms
) -> Wanted | None:
    """None where calls need no grammar."""
    tools, choice = list(enumerate(body.tools or ())), body.tool_choice
    if not tools or choice == "none":
        return None
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        tools = [(index, tool) for index, tool in tools if tool.function.name == name]
    elif choice in (None, "auto") and not (texts or any(tool.function.strict for _, tool in tools)):
        return None
    return _calls(body, tools, family, reasoning, texts)


def _calls(
    body: ChatCompletionRequest,
    tools: list[tuple[int, FunctionTool]],
    family: str,
    reasoning: ReasoningForm | None,
    texts: TextForms,
) -> Wanted:
    required = body.tool_choice not in (None, "auto")
    if family not in FAMILIES:
        param = "tool_choice" if required else "tools"
        raise invalid(
            param,
            f"{param}: this model's form of tool calls is not known, so none can be enforced.",
        )
    rules = CallRules(family, required, body.parallel_tool_calls is not False, reasoning)
    return Wanted(
        tools_request(rules, [_tool(index, tool, texts) for index, tool in tools]), "tools"
    )


def _tool(index: int, tool: FunctionTool, texts: TextForms) -> Tool:
    function = tool.function
    schema = function.parameters or {"type": "object", "properties": {}}
    if (form := texts.get(function.name)) is not None:
        return Tool(function.name, schema, place=form.place, text=form.request)
    place = f"[{index}].function.parameters"
    return Tool(function.name, schema, strict=function.strict is True, place=place)


def _either(content: Wanted, calls: Wanted) -> Wanted:
    """Calls, or an answer of the wanted form."""
    request = msgspec.structs.replace(calls.request, instead=content.request)
    return Wanted(request, calls.param, alone=content)
