"""The tools of a Responses request as functions with flat names."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from quire.serve.errors import invalid
from quire.serve.grammar_check import CheckRequest
from quire.serve.openai_protocol import NonEmptyStr
from quire.serve.output_form import TextForm, carries
from quire.serve.tools import (
    FunctionTool,
    NamedChoice,
    NamedFunction,
    ToolChoice,
    decode_tool,
    refuse_others,
)

_DEFAULT_NAMESPACE: Final = "functions"  # its tools go by their bare names


# The last three have no meaning outside OpenAI's service.
_COMMON: Final = frozenset(
    ("type", "name", "description", "defer_loading", "allowed_callers", "async")
)
_FIELDS: Final = {
    "function": _COMMON | {"parameters", "strict", "output_schema"},
    "custom": _COMMON | {"format"},
}


class ToolName(Struct, frozen=True):
    """What a tool is called by the client; the model knows one flat list of functions."""

    name: str
    namespace: str | None = None
    custom: bool = False  # takes text instead of arguments


class _CustomFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: NonEmptyStr | None = None


class ToolReader:
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
            if namespace is not None:
                raise invalid(f"tools{place}", f"tools{place}: a namespace holds none.")
            self._add_children(tool, place)
            return
        if kind not in ("function", "custom"):  # one that OpenAI would run
            self._ignored.append(f"tools{place}")
            return
        if not isinstance(name, str):
            raise invalid(f"tools{place}.name", f"tools{place}.name is required.")
        refuse_others(tool, _FIELDS[kind], f"tools{place}")
        flat = flat_name(namespace, name)
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


def flat_name(namespace: object, name: str) -> str:
    """What the model calls a tool of a namespace."""
    return f"{namespace}__{name}" if namespace and namespace != _DEFAULT_NAMESPACE else name


def choice_of(choice: str | dict[str, Any] | None) -> ToolChoice | None:
    """Raises :class:`ApiError` (400)."""
    if choice is None or choice in ("auto", "none", "required"):
        return choice  # type: ignore[return-value]
    if isinstance(choice, dict) and choice.get("type") in ("function", "custom"):
        return NamedChoice(
            NamedFunction(flat_name(choice.get("namespace"), str(choice.get("name"))))
        )
    raise invalid("tool_choice", f"tool_choice={choice!r:.80} is not supported.")
