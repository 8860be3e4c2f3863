"""Anthropic's Messages as they arrive, and as a chat completion request.

https://docs.anthropic.com/en/api/messages. Fields that say how Anthropic's own service runs have no
meaning here and are accepted; what would change the answer and cannot be honoured is a 400.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from quire.serve.errors import invalid
from quire.serve.field_names import FieldNames
from quire.serve.openai_protocol import (
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    AssistantMessage,
    ChatCompletionRequest,
    Effort,
    FunctionCall,
    JsonSchema,
    JsonSchemaFormat,
    Message,
    PositiveInt,
    StopString,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from quire.serve.tools import (
    MAX_TOOLS,
    FunctionTool,
    NamedChoice,
    NamedFunction,
    ToolChoice,
    check_tools,
    decode_tool,
    refuse_others,
)

# Claude Code's first system block changes with every request: no prefix would ever be found again.
_BILLING: Final = "x-anthropic-billing-header"


class _Block(Struct, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    cache_control: Any = None  # every prefix is cached


class TextBlock(_Block, tag="text"):
    text: str
    citations: Any = None


class ImageBlock(_Block, tag="image"):
    source: Any
    transformations: Any = None


class ThinkingBlock(_Block, tag="thinking"):
    thinking: str
    signature: str = ""  # any is taken: it protects nothing here


class RedactedThinkingBlock(_Block, tag="redacted_thinking"):
    data: str


class ToolUseBlock(_Block, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None
    toolset_name: str | None = None


class ToolResultBlock(_Block, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock] | None = None
    is_error: bool | None = None
    toolset_name: str | None = None


Block = (
    TextBlock | ImageBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
)


class Turn(Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Choice(Struct, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, forbid_unknown_fields=True):
    type: Literal["enabled", "adaptive", "disabled", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=0)] | None = None
    display: str | None = None


class OutputFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    schema: dict[str, Any]


class OutputConfig(Struct, forbid_unknown_fields=True):
    effort: Effort | None = None
    format: OutputFormat | None = None


class ContextManagement(Struct, forbid_unknown_fields=True):
    edits: list[dict[str, Any]] = []


class CountTokensRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    model: str
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    # No meaning outside Anthropic's service.
    cache_control: Any = None
    betas: Any = None
    speed: Any = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesRequest(CountTokensRequest, kw_only=True, forbid_unknown_fields=True):
    max_tokens: PositiveInt
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    # No meaning outside Anthropic's service.
    metadata: Any = None
    service_tier: str | None = None
    inference_geo: str | None = None
    diagnostics: Any = None
    # Not supported.
    container: Any = None
    mcp_servers: list[Any] | None = None

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"


class MessagesChat(Struct):
    """The same conversation as a chat."""

    chat: ChatCompletionRequest
    names: FieldNames  # of the chat's fields here
    ignored: list[str]  # fields that are accepted although nothing comes of them
    shows_thinking: bool = False


# The last ones have no meaning outside Anthropic's service, or no effect on the answer.
_TOOL_FIELDS: Final = {
    *("type", "name", "description", "input_schema", "strict", "cache_control", "input_examples"),
    *("defer_loading", "allowed_callers", "eager_input_streaming"),
}
_EDITS: Final = {"type": "clear_thinking_20251015", "keep": "all"}


def to_chat(body: CountTokensRequest) -> MessagesChat:
    """Raises :class:`ApiError` (400) for what cannot be honoured."""
    ignored: list[str] = []
    _refuse(body)
    tools, places = _tools(body.tools or [], ignored)
    choice, parallel = _choice(body.tool_choice)
    check_tools(tools, choice, places)
    thinking, output = body.thinking, body.output_config
    if thinking is not None and thinking.display not in (None, "summarized"):
        ignored.append("thinking.display")
    chat = ChatCompletionRequest(
        model=body.model,
        messages=[*_system(body.system), *_messages(body.messages)],
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        enable_thinking=None if thinking is None else thinking.type != "disabled",
        reasoning_effort=output.effort if output else None,
        thinking_token_budget=None if thinking is None else thinking.budget_tokens,
        response_format=_response_format(output),
    )
    if isinstance(last := chat.messages[-1], AssistantMessage):
        if last.tool_calls or not last.content:
            param = f"messages[{len(body.messages) - 1}]"
            raise invalid(param, f"{param}: an answer can only go on behind text.")
        chat.continue_final_message = True
    talk = MessagesChat(chat, FieldNames("input_schema", places, _FORMATS), ignored)
    if isinstance(body, MessagesRequest):
        talk.shows_thinking = body.shows_thinking
        chat.max_tokens = body.max_tokens
        chat.stop = body.stop_sequences or None
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
        chat.stream = body.stream
    return talk


def _response_format(output: OutputConfig | None) -> JsonSchemaFormat | None:
    if output is None or output.format is None:
        return None
    return JsonSchemaFormat(JsonSchema(output.format.schema, strict=True))


_FORMATS: Final = {
    "response_format.json_schema.schema": "output_config.format.schema",
}


def _refuse(body: CountTokensRequest) -> None:
    for index, edit in enumerate(body.context_management.edits if body.context_management else []):
        if edit != _EDITS:
            param = f"context_management.edits[{index}]"
            raise invalid(param, f"{param} is not supported; send {_EDITS} or nothing.")
    for field in ("container", "mcp_servers"):
        if getattr(body, field, None):
            raise invalid(field, f"{field} is not supported; leave it out.")


def _tools(
    raw: Sequence[dict[str, Any]], ignored: list[str]
) -> tuple[list[FunctionTool], list[str]]:
    """The functions, and where each stands."""
    functions, places = [], []
    for index, tool in enumerate(raw):
        if tool.get("type", "custom") not in ("custom", None):  # one that Anthropic would run
            ignored.append(f"tools[{index}]")
            continue
        refuse_others(tool, _TOOL_FIELDS, f"tools[{index}]")
        if not isinstance(tool.get("input_schema"), dict):
            param = f"tools[{index}].input_schema"
            raise invalid(param, f"{param} must be a JSON schema.")
        function = {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool["input_schema"],
            "strict": tool.get("strict"),
        }
        functions.append(decode_tool(function, f"tools[{index}]"))
        places.append(f"[{index}]")
    if raw and not functions:
        raise invalid("tools", "tools names only tools that Anthropic's service runs itself.")
    return functions, places


def _choice(choice: Choice | None) -> tuple[ToolChoice | None, bool | None]:
    if choice is None:
        return None, None
    parallel = False if choice.disable_parallel_tool_use else None
    if choice.type == "tool":
        if not choice.name:
            raise invalid("tool_choice.name", "tool_choice.name is required for a tool.")
        return NamedChoice(NamedFunction(choice.name)), parallel
    kinds: dict[str, ToolChoice] = {"auto": "auto", "any": "required", "none": "none"}
    return kinds[choice.type], parallel


def _system(system: str | list[TextBlock] | None) -> list[Message]:
    texts = [system] if isinstance(system, str) else [block.text for block in system or []]
    kept = [text for text in texts if not text.startswith(_BILLING)]
    return [SystemMessage("\n".join(kept))] if kept else []


def _messages(turns: Iterable[Turn]) -> list[Message]:
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        blocks = [TextBlock(text=turn.content)] if isinstance(turn.content, str) else turn.content
        if turn.role == "assistant":
            messages.append(_assistant(blocks, index))
            continue
        # Results come first in a user's turn, whatever stands before them.
        messages += [_result(block) for block in blocks if isinstance(block, ToolResultBlock)]
        texts = _texts(blocks, index, (ToolResultBlock,))
        if texts or not blocks:
            kind = SystemMessage if turn.role == "system" else UserMessage
            messages.append(kind("\n".join(texts)))
    return messages


def _texts(blocks: Iterable[Block], index: int, others: tuple[type[Struct], ...]) -> list[str]:
    """The texts of the blocks that are of none of the types ``others``. Raises :class:`ApiError`
    (400) for a block that is no text."""
    texts = []
    for number, block in enumerate(blocks):
        if isinstance(block, others):
            continue
        if not isinstance(block, TextBlock):
            param = f"messages[{index}].content[{number}].type"
            raise invalid(param, f"{param}: only text and tool results are supported here.")
        texts.append(block.text)
    return texts


def _assistant(blocks: Sequence[Block], index: int) -> AssistantMessage:
    calls = [
        ToolCall(block.id, FunctionCall(block.name, msgspec.json.encode(block.input).decode()))
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    skipped = (ToolUseBlock, ThinkingBlock, RedactedThinkingBlock)
    texts = _texts(blocks, index, skipped)
    return AssistantMessage(
        content="".join(texts) if texts or not calls else None,
        tool_calls=calls or None,
        reasoning_content="\n".join(thoughts) or None,
    )


def _result(block: ToolResultBlock) -> ToolMessage:
    parts = [block.content] if isinstance(block.content, str) else block.content or []
    texts = [
        part if isinstance(part, str) else part.text
        # Agents do not survive a refusal here, and the model is told what it does not see.
        if isinstance(part, TextBlock) else "[image omitted]"
        for part in parts
    ]  # fmt: skip
    text = "\n".join(texts)
    return ToolMessage(f"Error: {text}" if block.is_error else text, block.tool_use_id)
