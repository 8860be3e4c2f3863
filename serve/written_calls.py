"""Calls of earlier turns as the model wrote them, for chat templates that know of no calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

# A function's name and its arguments.
Calls = Sequence[tuple[str, Mapping[str, Any]]]
_PYTHON: Final = {True: "True", False: "False", None: "None"}


def _pythonic(calls: Calls) -> str:
    written = [
        f"{name}({', '.join(f'{key}={_literal(value)}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]
    return f"<|tool_call_start|>[{', '.join(written)}]<|tool_call_end|>"


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return _PYTHON[value]
    return json.dumps(value, ensure_ascii=False)


def _granite(calls: Calls) -> str:
    objects = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return "<|tool_call|>" + json.dumps(objects, ensure_ascii=False)


# By what stands in the template of a family: LFM2's, and that of Granite before 4.
_WRITERS: Final[Mapping[str, Callable[[Calls], str]]] = {
    "<|tool_list_start|>": _pythonic,
    "<|tool_call|>": _granite,
}


def writer_of(source: str) -> Callable[[Calls], str] | None:
    """How a template's family writes calls; None where that is not known."""
    return next((write for sign, write in _WRITERS.items() if sign in source), None)
