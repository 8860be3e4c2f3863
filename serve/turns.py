"""A request's messages as the turns that one chat template takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from quire.serve.errors import invalid
from quire.serve.openai_protocol import (
    AssistantMessage,
    Content,
    DeveloperMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from quire.serve.template_style import TemplateStyle
from quire.serve.written_calls import Calls

Turn = dict[str, Any]
WriteCalls = Callable[[Calls], str]


def turns_of(
    messages: Sequence[Message], style: TemplateStyle, write: WriteCalls | None = None
) -> list[Turn]:
    """Raises :class:`ApiError` (400) where a call's arguments are no JSON object.

    ``write`` writes calls for templates that show none.
    """
    turns: list[Turn] = []
    names: dict[str, str] = {}  # of called functions, by call id
    for index, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            turns += _assistant(message, index, style, write)
            names |= {call.id: call.function.name for call in message.tool_calls or []}
        elif isinstance(message, ToolMessage):
            _add_result(turns, message, names.get(message.tool_call_id), style)
        elif isinstance(message, SystemMessage | DeveloperMessage):
            _add_instructions(turns, message, style)
        else:
            _add_user(turns, _named("user", message.content, message.name), style)
    if not style.many_calls:
        turns = _one_call_each(turns)
    return turns


def text_of(content: Content | None) -> str:
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


def _named(role: str, content: Content, name: str | None) -> Turn:
    turn: Turn = {"role": role, "content": text_of(content)}
    return turn if name is None else turn | {"name": name}


def _assistant(
    message: AssistantMessage, index: int, style: TemplateStyle, write: WriteCalls | None
) -> list[Turn]:
    content = None if message.content is None else text_of(message.content)
    turn: Turn = {"role": "assistant", "content": content}
    if message.name is not None:
        turn["name"] = message.name
    reasoning = message.reasoning_content or message.reasoning
    if reasoning and style.reasoning_key is not None:
        turn[style.reasoning_key] = reasoning
    if not message.tool_calls:
        turn["content"] = content or ""
        return [turn]
    if not style.shows_calls:
        written = "" if write is None else write(_parsed_calls(message.tool_calls, index))
        turn["content"] = (content or "") + written
        return [turn]
    turn["content"] = content or style.no_content
    turn["tool_calls"] = [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.function.name,
                "arguments": _arguments(
                    call.function.arguments,
                    _place(index, number),
                    style,
                ),
            },
        }
        for number, call in enumerate(message.tool_calls)
    ]
    beside = style.content_beside_calls
    if reasoning and style.reasoning_key is not None:
        beside = style.content_beside_reasoned_calls
    if not content or beside:
        return [turn]
    silent = turn | {"content": style.no_content}
    before = [{"role": "assistant", "content": content}] if style.content_before_calls else []
    return [*before, silent]


def _parsed_calls(calls: Sequence[ToolCall], index: int) -> Calls:
    return [
        (call.function.name, _parsed(call.function.arguments, _place(index, number)))
        for number, call in enumerate(calls)
    ]


def _place(index: int, number: int) -> str:
    return f"messages[{index}].tool_calls[{number}].function.arguments"


def _arguments(text: str, param: str, style: TemplateStyle) -> object:
    parsed = _parsed(text, param)
    return parsed if style.parsed_arguments else text or "{}"


def _parsed(text: str, param: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise invalid(param, f"{param} must be a JSON object, as text.") from None


def _add_result(
    turns: list[Turn], message: ToolMessage, name: str | None, style: TemplateStyle
) -> None:
    content = text_of(message.content)
    if style.attached_results:
        caller = next((turn for turn in reversed(turns) if turn["role"] == "assistant"), None)
        if caller is not None:
            response = {"name": name or message.name or "", "response": content}
            caller.setdefault("tool_responses", []).append(response)
            return
    turn = {"role": "tool", "content": content, "tool_call_id": message.tool_call_id}
    if name := message.name or name:
        turn["name"] = name
    turns.append(turn)


def _add_instructions(
    turns: list[Turn], message: SystemMessage | DeveloperMessage, style: TemplateStyle
) -> None:
    """Instructions stay where they are: moved to the front they would undo the cached prefix.

    Several in front are one turn where the template takes no more, as Codex sends them.
    """
    late = any(turn["role"] not in ("system", "developer") for turn in turns)
    if late and not style.late_system:
        text = f"<system-reminder>\n{text_of(message.content)}\n</system-reminder>"
        _add_user(turns, {"role": "user", "content": text}, style)
        return
    if turns and not late and not style.repeated_system:
        turns[-1]["content"] += "\n\n" + text_of(message.content)
        return
    is_developer = isinstance(message, DeveloperMessage) and style.developer
    role = "developer" if is_developer else "system"
    turns.append(_named(role, message.content, message.name))


def _add_user(turns: list[Turn], turn: Turn, style: TemplateStyle) -> None:
    if turns and turns[-1]["role"] == "user" and not style.repeated_user:
        turns[-1]["content"] += "\n\n" + turn["content"]
    else:
        turns.append(turn)


def _one_call_each(turns: list[Turn]) -> list[Turn]:
    """Turns of several calls as turns of one call and its result each."""
    out: list[Turn] = []
    index = 0
    while index < len(turns):
        turn = turns[index]
        index += 1
        calls = turn.get("tool_calls", [])
        if len(calls) < 2:
            out.append(turn)
            continue
        end = index
        while end < len(turns) and turns[end]["role"] == "tool":
            end += 1
        results, index = turns[index:end], end
        known = {call["id"] for call in calls}
        for number, call in enumerate(calls):
            # What was said and thought belongs to the first.
            head = turn if number == 0 else {"role": "assistant", "content": ""}
            out.append(head | {"tool_calls": [call]})
            out += [result for result in results if result["tool_call_id"] == call["id"]]
        out += [result for result in results if result["tool_call_id"] not in known]
    return out
