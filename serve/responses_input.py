"""The items of a Responses request as the messages of a chat.

Items are checked one by one, since clients send kinds that only OpenAI's service knows: in the
history such items are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from quire.serve.errors import invalid
from quire.serve.openai_protocol import (
    AssistantMessage,
    DeveloperMessage,
    FunctionCall,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from quire.serve.responses_tools import flat_name

Item = dict[str, Any]


def messages_of(
    instructions: str | None, items: Sequence[Item], ignored: list[str], num_previous: int = 0
) -> list[Message]:
    """Adds to ``ignored`` the items that are passed over. Raises :class:`ApiError` (400).

    Args:
        items: the whole conversation.
        num_previous: of its first items, which are not the request's own.
    """
    messages: list[Message] = [SystemMessage(instructions)] if instructions else []
    said = _Reader(ignored, num_previous).read(items)
    if not said:
        raise invalid("input", "input holds no message.")
    return messages + said


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

    def __init__(self, ignored: list[str], num_previous: int) -> None:
        self._ignored = ignored
        self._num_previous = num_previous
        self._messages: list[Message] = []
        self._turn: AssistantMessage | None = None

    def read(self, items: Sequence[Item]) -> list[Message]:
        for index, item in enumerate(items, -self._num_previous):
            try:
                self._item(item, index)
            except msgspec.ValidationError as error:
                param = f"input[{index}]"
                raise invalid(param, f"{param}: {error}.") from None
        self._end_turn()
        return self._messages

    def _item(self, item: Item, index: int) -> None:
        """``index`` is the item's in the request; those of before have negative ones."""
        param = f"input[{index}]"
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
            case "item_reference":  # those of stored items stand for them no more
                where = f"{param}.id"
                raise invalid(where, f"{where}: no item {str(item.get('id'))[:100]!r} is stored.")
            case _:  # something that only OpenAI's service can read
                if index >= 0:  # else it was named when it came
                    self._ignored.append(param)

    def _message(self, item: _MessageItem, param: str) -> None:
        text = _text(item.content, f"{param}.content")
        if item.role == "assistant":
            turn = self._assistant()
            turn.content = f"{turn.content}\n\n{text}" if turn.content else text
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
        function = FunctionCall(flat_name(item.namespace, item.name), arguments)
        turn.tool_calls = [*(turn.tool_calls or []), ToolCall(item.call_id, function)]

    def _assistant(self) -> AssistantMessage:
        if self._turn is None:
            self._turn = AssistantMessage()
        return self._turn

    def _end_turn(self) -> None:
        if (turn := self._turn) is not None:
            self._turn = None
            if not turn.tool_calls:
                turn.content = turn.content or ""
            if turn.tool_calls or turn.content or turn.reasoning_content:
                self._messages.append(turn)


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
