"""Answers of OpenAI's Responses as /openapi.json describes them, whole and streamed."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

ItemStatus = Literal["in_progress", "completed", "incomplete"]

# ---- output


class OutputText(Struct, tag_field="type", tag="output_text", forbid_unknown_fields=True):
    text: str
    annotations: list[Any]  # always empty, as are those below
    logprobs: list[Any]


class ReasoningText(Struct, tag_field="type", tag="reasoning_text", forbid_unknown_fields=True):
    text: str


class OutputMessage(Struct, tag_field="type", tag="message", forbid_unknown_fields=True):
    id: str
    role: Literal["assistant"]
    content: list[OutputText]
    status: ItemStatus


class OutputReasoning(Struct, tag_field="type", tag="reasoning", forbid_unknown_fields=True):
    id: str
    summary: list[Any]
    content: list[ReasoningText]
    status: ItemStatus


class OutputCall(Struct, tag_field="type", tag="function_call", forbid_unknown_fields=True):
    id: str
    call_id: str
    name: str
    arguments: str  # JSON text
    status: ItemStatus
    namespace: str | UnsetType = UNSET


class OutputCustomCall(
    Struct, tag_field="type", tag="custom_tool_call", forbid_unknown_fields=True
):
    id: str
    call_id: str
    name: str
    input: str
    status: ItemStatus
    namespace: str | UnsetType = UNSET


OutputItem = OutputMessage | OutputReasoning | OutputCall | OutputCustomCall


class InputDetails(Struct, forbid_unknown_fields=True):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Struct, forbid_unknown_fields=True):
    reasoning_tokens: int


class ResponseUsage(Struct, forbid_unknown_fields=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseFault(Struct, forbid_unknown_fields=True):
    code: str
    message: str


class Incomplete(Struct, forbid_unknown_fields=True):
    reason: str


class Effort(Struct, forbid_unknown_fields=True):
    effort: str | None
    summary: str | None


class ResponseAnswer(Struct, tag_field="object", tag="response", forbid_unknown_fields=True):
    id: str
    created_at: int  # seconds since the epoch
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: ResponseFault | None
    incomplete_details: Incomplete | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    reasoning: Effort
    store: bool
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    truncation: Literal["disabled"]
    # As in the request.
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str] | None
    previous_response_id: str | None
    temperature: float | None
    top_p: float | None
    user: str | UnsetType = UNSET
    usage: ResponseUsage | UnsetType = UNSET  # at the end only


class DeletedResponse(Struct, tag_field="object", tag="response", forbid_unknown_fields=True):
    id: str
    deleted: Literal[True]


# ---- events


class Numbered(Struct, kw_only=True):
    sequence_number: int


class _Whole(Numbered, kw_only=True):
    response: ResponseAnswer


class ResponseCreated(
    _Whole, tag_field="type", tag="response.created", forbid_unknown_fields=True
): ...


class ResponseInProgress(
    _Whole, tag_field="type", tag="response.in_progress", forbid_unknown_fields=True
): ...


class ResponseCompleted(
    _Whole, tag_field="type", tag="response.completed", forbid_unknown_fields=True
): ...


class ResponseIncomplete(
    _Whole, tag_field="type", tag="response.incomplete", forbid_unknown_fields=True
): ...


class ResponseFailed(
    _Whole, tag_field="type", tag="response.failed", forbid_unknown_fields=True
): ...


class _Item(Numbered, kw_only=True):
    output_index: int
    item: OutputItem


class ItemAdded(
    _Item, tag_field="type", tag="response.output_item.added", forbid_unknown_fields=True
): ...


class ItemDone(
    _Item, tag_field="type", tag="response.output_item.done", forbid_unknown_fields=True
): ...


class _Place(Numbered, kw_only=True):
    item_id: str
    output_index: int


class _Part(_Place, kw_only=True):
    content_index: int
    part: OutputText | ReasoningText


class PartAdded(
    _Part, tag_field="type", tag="response.content_part.added", forbid_unknown_fields=True
): ...


class PartDone(
    _Part, tag_field="type", tag="response.content_part.done", forbid_unknown_fields=True
): ...


class OutputTextDelta(
    _Place, tag_field="type", tag="response.output_text.delta", forbid_unknown_fields=True
):
    content_index: int
    delta: str
    logprobs: list[Any]


class OutputTextDone(
    _Place, tag_field="type", tag="response.output_text.done", forbid_unknown_fields=True
):
    content_index: int
    text: str
    logprobs: list[Any]


class ReasoningTextDelta(
    _Place, tag_field="type", tag="response.reasoning_text.delta", forbid_unknown_fields=True
):
    content_index: int
    delta: str


class ReasoningTextDone(
    _Place, tag_field="type", tag="response.reasoning_text.done", forbid_unknown_fields=True
):
    content_index: int
    text: str


class ArgumentsPiece(
    _Place,
    tag_field="type",
    tag="response.function_call_arguments.delta",
    forbid_unknown_fields=True,
):
    delta: str


class ArgumentsDone(
    _Place,
    tag_field="type",
    tag="response.function_call_arguments.done",
    forbid_unknown_fields=True,
):
    arguments: str
    name: str


class CustomInputPiece(
    _Place,
    tag_field="type",
    tag="response.custom_tool_call_input.delta",
    forbid_unknown_fields=True,
):
    delta: str


class CustomInputDone(
    _Place,
    tag_field="type",
    tag="response.custom_tool_call_input.done",
    forbid_unknown_fields=True,
):
    input: str


ResponseEvent = (
    ResponseCreated
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ArgumentsPiece
    | ArgumentsDone
    | CustomInputPiece
    | CustomInputDone
)
