"""The tools of a request: checked, made ready for the chat template and for the parsers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from quire.serve.errors import invalid
from quire.serve.parsers.schemas import Tools

MAX_TOOLS: Final = 1024

FunctionName = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\s<>\"'{}\[\]()|]+$")]


class Function(Struct, forbid_unknown_fields=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    function: Function
    cache_control: Any = None  # every prefix is cached


class NamedFunction(Struct, forbid_unknown_fields=True):
    name: str


class NamedChoice(Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


def check_tools(
    tools: Sequence[FunctionTool] | None,
    choice: ToolChoice | None,
    places: Sequence[str] | None = None,
) -> None:
    """Raises :class:`ApiError` (400) for what cannot be carried out.

    Args:
        places: of the tools in a request of another protocol, behind "tools".
    """
    seen: set[str] = set()
    for index, tool in enumerate(tools or ()):
        name = tool.function.name
        if name in seen:
            place = f"[{index}].function" if places is None else places[index]
            param = f"tools{place}.name"
            raise invalid(param, f"{param}: two tools are called {name!r}.")
        seen.add(name)
    if isinstance(choice, NamedChoice) and choice.function.name not in seen:
        raise invalid(
            "tool_choice", f"tool_choice names {choice.function.name!r}, which no tool is."
        )
    if choice == "required" and not seen:
        raise invalid("tool_choice", "tool_choice is 'required', but there are no tools.")


def for_template(tools: Sequence[FunctionTool]) -> list[dict[str, Any]]:
    """As templates expect them, with the keys in the client's order within each schema.

    They stand at the head of the prompt: any other order would miss the cached prefix. Templates
    read ``description`` and ``parameters`` without asking, so both are always there.
    """
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]


def for_parser(tools: Sequence[FunctionTool]) -> Tools:
    schemas: Mapping[str, Mapping[str, Any] | None] = {
        tool.function.name: tool.function.parameters for tool in tools
    }
    return Tools(schemas)


def refuse_others(tool: Mapping[str, Any], known: Collection[str], param: str) -> None:
    """Raises :class:`ApiError` (400) for fields that nobody has heard of."""
    for field in tool:
        if field not in known:
            where = f"{param}.{field[:100]}"
            raise invalid(where, f"{where} is not a field of a tool.")


def decode_tool(function: Mapping[str, Any], param: str) -> FunctionTool:
    """A tool of another protocol, already in this one's form. Raises :class:`ApiError` (400)."""
    try:
        return FunctionTool(msgspec.convert(function, Function))
    except msgspec.ValidationError as error:
        raise invalid(param, f"{param}: {error}.") from None
