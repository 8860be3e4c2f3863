"""OpenAI's Responses as they arrive, and as a chat completion request.

https://platform.openai.com/docs/api-reference/responses. Items are checked one by one, since
clients send kinds that only OpenAI's service knows: in the history such items are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from quire.serve.errors import invalid
from quire.serve.field_names import FieldNames
from quire.serve.grammar_check import CheckRequest
from quire.serve.output_form import TextForm, carries
from quire.serve.protocol import (
    MAX_MESSAGES,
    AssistantMessage,
    ChatCompletionRequest,
    DeveloperMessage,
    FunctionCall,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    Message,
    NonEmptyStr,
    PositiveInt,
    ResponseFormat,
    SystemMessage,
    TextFormat,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from quire.serve.tools import (
    FunctionTool,
    NamedChoice,
    NamedFunction,
    ToolChoice,
    check_tools,
    decode_tool,
)

Item = dict[str, Any]

_DEFAULT_NAMESPACE: Final = "functions"  # its tools go by their bare names


class Reasoning(Struct, forbid_unknown_fields=True):
    effort: str | None = None
    summary: str | None = None  # the reasoning itself is sent, which needs no summary
    generate_summary: str | None = None
    context: Any = None


class SchemaFormat(JsonSchema, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """Unlike a chat's, all in one object."""


class TextConfig(Struct, forbid_unknown_fields=True):
    format: TextFormat | JsonObjectFormat | SchemaFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    model: str
    input: str | Annotated[list[Item], Meta(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None  # None: true
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: PositiveInt | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] | None = None
    # No effect on the answer, by definition.
    include: list[str] | None = None
    stream_options: Any = None
    client_metadata: Any = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None
    max_tool_calls: int | None = None  # of tools that run in the service
    # Only their values for "off" are taken.
    background: bool | None = None
    truncation: str | None = None
    top_logprobs: int | None = None
    conversation: Any = None
    prompt: Any = None

    @property
    def items(self) -> list[Item]:
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input


_OFF: Final[Mapping[str, tuple[object, ...]]] = {
    "background": (None, False),
    "truncation": (None, "disabled"),
    "top_logprobs": (None, 0),
    "conversation": (None,),
    "prompt": (None,),
}


_LOGPROBS: Final = "message.output_text.logprobs"


class ToolName(Struct, frozen=True):
    """What a tool is called by the client; the model knows one flat list of functions."""

    name: str
    namespace: str | None = None
    custom: bool = False  # takes text instead of arguments


class Conversation(Struct):
    chat: ChatCompletionRequest
    names: dict[str, ToolName]  # by the function's name
    fields: FieldNames
    ignored: list[str]  # fields that are accepted although nothing comes of them
    texts: dict[str, TextForm]  # by the function's name


def to_chat(body: ResponsesRequest, items: Sequence[Item], family: str) -> Conversation:
    """Raises :class:`ApiError` (400).

    Args:
        items: the whole conversation.
        family: that writes the model's tool calls; "" where no grammar can be enforced.
    """
    for field, harmless in _OFF.items():
        if getattr(body, field) not in harmless:
            raise invalid(field, f"{field} is not supported; leave it out.")
    ignored: list[str] = []
    if _LOGPROBS in (body.include or ()):
        raise invalid("include", f"include: {_LOGPROBS} is not supported; leave it out.")
    if body.text is not None and body.text.verbosity is not None:
        ignored.append("text.verbosity")
    reader = _ToolReader(family, ignored)
    for index, tool in enumerate(body.tools or []):
        reader.add(tool, f"[{index}]")
    tools, fields = reader.functions, FieldNames("parameters", reader.places, _FORMATS)
    choice = _choice(body.tool_choice)
    check_tools(tools, choice, reader.places)
    chat = ChatCompletionRequest(
        model=body.model,
        messages=messages_of(body.instructions, items, ignored),
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stream=body.stream,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        response_format=_response_format(body.text),
    )
    return Conversation(chat, reader.names, fields, ignored, reader.texts)


def messages_of(
    instructions: str | None, items: Sequence[Item], ignored: list[str]
) -> list[Message]:
    """Adds to ``ignored`` the items that are passed over. Raises :class:`ApiError` (400)."""
    messages: list[Message] = [SystemMessage(instructions)] if instructions else []
    messages += _Reader(ignored).read(items)
    if not any(isinstance(message, UserMessage | ToolMessage) for message in messages):
        raise invalid("input", "input holds no message of the user.")
    return messages


def _response_format(text: TextConfig | None) -> ResponseFormat | None:
    form = text.format if text else None
    if isinstance(form, SchemaFormat):
        return JsonSchemaFormat(JsonSchema(form.schema, strict=form.strict))
    return form


_FORMATS: Final = {
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
}


# ---- tools


class _CustomFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: NonEmptyStr | None = None


class _ToolReader:
    """Tools as functions with flat names; what takes text is a function of one argument."""

    def __init__(self, family: str, ignored: list[str]) -> None:
        self.functions: list[FunctionTool] = []
        self.places: list[str] = []  # of the functions, behind "tools"
        self.names: dict[str, ToolName] = {}
        self.texts: dict[str, TextForm] = {}
        self._family = family
        self._ignored = ignored

    def add(self, tool: dict[str, Any], place: str, namespace: str | None = None) -> None:
        """``place`` is the tool's, behind "tools". Raises :class:`ApiError` (400)."""
        kind, name = tool.get("type"), tool.get("name")
        if not isinstance(kind, str):
            raise invalid(f"tools{place}.type", f"tools{place}.type must be a text.")
        if kind == "namespace":
            self._add_children(tool, place)
            return
        if kind not in ("function", "custom"):  # one that OpenAI would run
            self._ignored.append(f"tools{place}")
            return
        if not isinstance(name, str):
            raise invalid(f"tools{place}.name", f"tools{place}.name is required.")
        flat = _flat(namespace, name)
        bare_namespace = None if namespace == _DEFAULT_NAMESPACE else namespace
        self.names[flat] = ToolName(name, bare_namespace, custom=kind == "custom")
        parameters = tool.get("parameters")
        if kind == "custom":
            self._read_format(tool.get("format"), flat, f"{place}.format")
            parameters = {
                "type": "object",
                "properties": {"input": {"type": "string"}},
                "required": ["input"],
                "additionalProperties": False,
            }
        function = {
            "name": flat,
            "description": tool.get("description"),
            "parameters": parameters,
            "strict": tool.get("strict"),
        }
        self.functions.append(decode_tool(function, f"tools{place}"))
        self.places.append(place)

    def _add_children(self, namespace: dict[str, Any], place: str) -> None:
        name, children = namespace.get("name"), namespace.get("tools") or []
        if not isinstance(name, str):
            raise invalid(f"tools{place}.name", f"tools{place}.name is required.")
        if not isinstance(children, list):
            raise invalid(f"tools{place}.tools", f"tools{place}.tools must be a list.")
        for index, child in enumerate(children):
            below = f"{place}.tools[{index}]"
            if not isinstance(child, dict):
                raise invalid(f"tools{below}", f"tools{below} must be an object.")
            self.add(child, below, name)

    def _read_format(self, raw: Any, name: str, place: str) -> None:
        param = f"tools{place}"
        try:
            form = msgspec.convert(raw or {"type": "text"}, _CustomFormat)
        except msgspec.ValidationError as error:
            raise invalid(param, f"{param}: {error}.") from None
        if form.type == "text":
            return
        if form.syntax is None or form.definition is None:
            raise invalid(param, f"{param}: a grammar needs syntax and definition.")
        if not carries(self._family, form.syntax):
            self._ignored.append(param)
            return
        self.texts[name] = TextForm(
            CheckRequest(form.syntax, form.definition), f"{place}.definition"
        )


def _flat(namespace: object, name: str) -> str:
    return f"{namespace}__{name}" if namespace and namespace != _DEFAULT_NAMESPACE else name


def _choice(choice: str | dict[str, Any] | None) -> ToolChoice | None:
    if choice is None or choice in ("auto", "none", "required"):
        return choice  # type: ignore[return-value]
    if isinstance(choice, dict) and choice.get("type") in ("function", "custom"):
        return NamedChoice(NamedFunction(_flat(choice.get("namespace"), str(choice.get("name")))))
    raise invalid("tool_choice", f"tool_choice={choice!r:.80} is not supported.")


# ---- items


class _MessageItem(Struct):
    role: str
    content: str | list[dict[str, Any]]


class _CallItem(Struct):
    call_id: str
    name: str
    arguments: str = ""
    input: str = ""  # of a custom tool
    namespace: str | None = None


class _OutputItem(Struct):
    call_id: str
    output: str | list[dict[str, Any]]


class _ReasoningItem(Struct):
    summary: list[dict[str, Any]] = []
    content: list[dict[str, Any]] | None = None


class _Reader:
    """Items in a row: what the assistant thought, said and called is one turn."""

    def __init__(self, ignored: list[str]) -> None:
        self._ignored = ignored
        self._messages: list[Message] = []
        self._turn: AssistantMessage | None = None

    def read(self, items: Sequence[Item]) -> list[Message]:
        for index, item in enumerate(items):
            param = f"input[{index}]"
            try:
                self._item(item, param)
            except msgspec.ValidationError as error:
                raise invalid(param, f"{param}: {error}.") from None
        self._end_turn()
        return self._messages

    def _item(self, item: Item, param: str) -> None:
        match item.get("type", "message"):
            case "message":
                self._message(msgspec.convert(item, _MessageItem), param)
            case "function_call":
                call = msgspec.convert(item, _CallItem)
                self._call(call, call.arguments)
            case "custom_tool_call":
                call = msgspec.convert(item, _CallItem)
                self._call(call, msgspec.json.encode({"input": call.input}).decode())
            case "function_call_output" | "custom_tool_call_output":
                result = msgspec.convert(item, _OutputItem)
                self._end_turn()
                text = _text(result.output, f"{param}.output", omit_images=True)
                self._messages.append(ToolMessage(text, result.call_id))
            case "reasoning":
                thought = msgspec.convert(item, _ReasoningItem)
                parts = thought.content or thought.summary
                text = "\n".join(str(part.get("text", "")) for part in parts)
                turn = self._assistant()
                turn.reasoning_content = "\n".join(filter(None, [turn.reasoning_content, text]))
            case _:  # something that only OpenAI's service can read
                self._ignored.append(param)

    def _message(self, item: _MessageItem, param: str) -> None:
        text = _text(item.content, f"{param}.content")
        if item.role == "assistant":
            turn = self._assistant()
            turn.content = f"{turn.content or ''}{text}"
            return
        self._end_turn()
        kinds: dict[str, Callable[[str], Message]] = {
            "user": UserMessage,
            "system": SystemMessage,
            "developer": DeveloperMessage,
        }
        if item.role not in kinds:
            raise invalid(f"{param}.role", f"{param}.role: {item.role!r:.40} is none.")
        self._messages.append(kinds[item.role](text))

    def _call(self, item: _CallItem, arguments: str) -> None:
        turn = self._assistant()
        function = FunctionCall(_flat(item.namespace, item.name), arguments)
        turn.tool_calls = [*(turn.tool_calls or []), ToolCall(item.call_id, function)]

    def _assistant(self) -> AssistantMessage:
        if self._turn is None:
            self._turn = AssistantMessage()
        return self._turn

    def _end_turn(self) -> None:
        if (turn := self._turn) is not None:
            if not turn.tool_calls:
                turn.content = turn.content or ""
            self._messages.append(turn)
            self._turn = None


def _text(content: str | list[dict[str, Any]], param: str, *, omit_images: bool = False) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type")
        text = part.get("refusal") if kind == "refusal" else part.get("text")
        if kind in ("input_text", "output_text", "text", "refusal") and isinstance(text, str):
            texts.append(text)
        elif omit_images and kind == "input_image":
            texts.append("[image omitted]")
        else:
            where = f"{param}[{index}].type"
            raise invalid(where, f"{where}: only text is supported, not {kind!r:.40}.")
    return "".join(texts)
