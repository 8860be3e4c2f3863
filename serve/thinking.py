"""Switches of a chat template: what a request may set, and what its effort of reasoning sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from quire.serve.errors import invalid
from quire.serve.parsers.names import SWITCHES

_OFF: Final = ("none", "minimal")
_LOW_TO_HIGH: Final = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}


def check_switches(switches: Mapping[str, Any] | None) -> None:
    """Raises :class:`ApiError` (400) for a variable that is none of :data:`SWITCHES`, or for a
    value that is neither text, a number nor a boolean."""
    for name, value in (switches or {}).items():
        param = f"chat_template_kwargs.{name}"
        if name not in SWITCHES:
            raise invalid(param, f"{param} is not allowed; it may be {', '.join(SWITCHES)}.")
        if value is not None and not isinstance(value, str | int | float):
            raise invalid(param, f"{param} must be text, a number, true or false.")


def switches_of(
    source: str,
    effort: str | None,
    enable_thinking: bool | None,
    given: Mapping[str, Any] | None,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The template's variables. What the request gives by name wins, the ``defaults`` come last.

    An effort that the model cannot make has no effect: clients send one to every model.
    """
    switches: dict[str, Any] = dict(defaults or {})
    if effort is not None:
        has_levels_only = "reasoning_effort" in source and "enable_thinking" not in source
        if effort in _OFF and enable_thinking is None and not has_levels_only:
            enable_thinking = False
        switches["reasoning_effort"] = _LOW_TO_HIGH.get(effort, effort)
        switches["thinking_effort"] = _LOW_TO_HIGH.get(effort, effort)
    if enable_thinking is not None:
        switches |= {"enable_thinking": enable_thinking, "thinking": enable_thinking}
    switches |= {name: value for name, value in (given or {}).items() if value is not None}
    return switches
