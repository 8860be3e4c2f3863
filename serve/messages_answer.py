"""Answers of Anthropic's Messages as /openapi.json describes them, whole and streamed."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

# ---- content


class AnswerText(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


class AnswerThinking(Struct, tag_field="type", tag="thinking", forbid_unknown_fields=True):
    thinking: str
    signature: str


class AnswerToolUse(Struct, tag_field="type", tag="tool_use", forbid_unknown_fields=True):
    id: str
    name: str
    input: dict[str, Any]


ContentBlock = AnswerText | AnswerThinking | AnswerToolUse
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(Struct, forbid_unknown_fields=True):
    input_tokens: int  # without those that were cached
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class MessageAnswer(Struct, tag_field="type", tag="message", forbid_unknown_fields=True):
    id: str
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Struct, forbid_unknown_fields=True):
    input_tokens: int


# ---- events


class MessageStart(Struct, tag_field="type", tag="message_start", forbid_unknown_fields=True):
    message: MessageAnswer


class BlockStart(Struct, tag_field="type", tag="content_block_start", forbid_unknown_fields=True):
    index: int
    content_block: ContentBlock


class TextPiece(Struct, tag_field="type", tag="text_delta", forbid_unknown_fields=True):
    text: str


class ThinkingPiece(Struct, tag_field="type", tag="thinking_delta", forbid_unknown_fields=True):
    thinking: str


class SignaturePiece(Struct, tag_field="type", tag="signature_delta", forbid_unknown_fields=True):
    signature: str


class InputPiece(Struct, tag_field="type", tag="input_json_delta", forbid_unknown_fields=True):
    partial_json: str


class BlockDelta(Struct, tag_field="type", tag="content_block_delta", forbid_unknown_fields=True):
    index: int
    delta: TextPiece | ThinkingPiece | SignaturePiece | InputPiece


class BlockStop(Struct, tag_field="type", tag="content_block_stop", forbid_unknown_fields=True):
    index: int


class Ending(Struct, forbid_unknown_fields=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, tag_field="type", tag="message_delta", forbid_unknown_fields=True):
    delta: Ending
    usage: MessageUsage


class MessageStop(Struct, tag_field="type", tag="message_stop", forbid_unknown_fields=True):
    pass


class Ping(Struct, tag_field="type", tag="ping", forbid_unknown_fields=True):
    pass


class MessageErrorDetail(Struct, forbid_unknown_fields=True):
    type: str
    message: str


class MessageError(Struct, tag_field="type", tag="error", forbid_unknown_fields=True):
    error: MessageErrorDetail


MessageEvent = (
    MessageStart
    | BlockStart
    | BlockDelta
    | BlockStop
    | MessageDelta
    | MessageStop
    | Ping
    | MessageError
)
