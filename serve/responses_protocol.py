"""OpenAI's Responses as they arrive, and as a chat completion request.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from quire.serve.errors import invalid
from quire.serve.field_names import FieldNames
from quire.serve.openai_protocol import (
    MAX_MESSAGES,
    ChatCompletionRequest,
    Effort,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    PositiveInt,
    ResponseFormat,
    TextFormat,
)
from quire.serve.output_form import TextForm
from quire.serve.responses_input import Item, messages_of
from quire.serve.responses_tools import ToolName, ToolReader, choice_of
from quire.serve.tools import check_tools


class Reasoning(Struct, forbid_unknown_fields=True):
    effort: Effort | None = None
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


class Conversation(Struct):
    chat: ChatCompletionRequest
    names: dict[str, ToolName]  # by the function's name
    fields: FieldNames
    ignored: list[str]  # fields that are accepted although nothing comes of them
    texts: dict[str, TextForm]  # by the function's name


def to_chat(
    body: ResponsesRequest, items: Sequence[Item], family: str, num_previous: int = 0
) -> Conversation:
    """Raises :class:`ApiError` (400).

    Args:
        items: the whole conversation.
        family: that writes the model's tool calls; "" where no grammar can be enforced.
        num_previous: of its first items, which are not the request's own.
    """
    for field, harmless in _OFF.items():
        if getattr(body, field) not in harmless:
            raise invalid(field, f"{field} is not supported; leave it out.")
    ignored: list[str] = []
    if _LOGPROBS in (body.include or ()):
        raise invalid("include", f"include: {_LOGPROBS} is not supported; leave it out.")
    if body.text is not None and body.text.verbosity is not None:
        ignored.append("text.verbosity")
    reader = ToolReader(family, ignored)
    for index, tool in enumerate(body.tools or []):
        reader.add(tool, f"[{index}]")
    tools, fields = reader.functions, FieldNames("parameters", reader.places, _FORMATS)
    choice = choice_of(body.tool_choice)
    check_tools(tools, choice, reader.places)
    chat = ChatCompletionRequest(
        model=body.model,
        messages=messages_of(body.instructions, items, ignored, num_previous),
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


def _response_format(text: TextConfig | None) -> ResponseFormat | None:
    form = text.format if text else None
    if isinstance(form, SchemaFormat):
        return JsonSchemaFormat(JsonSchema(form.schema, strict=form.strict))
    return form


_FORMATS: Final = {
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
}
