"""What a model's output means: the events that every parser produces, whatever the family."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from msgspec import Struct


class ContentDelta(Struct, frozen=True):
    text: str


class ReasoningDelta(Struct, frozen=True):
    text: str


class CallStarted(Struct, frozen=True):
    index: int  # of the call within the answer
    id: str
    name: str


class ArgumentsDelta(Struct, frozen=True):
    index: int
    text: str  # a piece of the arguments' JSON text


class CallEnded(Struct, frozen=True):
    """The call is complete. A call that is cut off by the token limit never gets one."""

    index: int


Event = ContentDelta | ReasoningDelta | CallStarted | ArgumentsDelta | CallEnded


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class EventLog:
    """Collects events between two :meth:`drain` calls; neighbours of one kind become one."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._events: list[Event] = []
        self._parts: list[str] = []  # of a delta that may still grow
        self._part_kind: Callable[[str], Event] | None = None
        self.started_calls = 0
        self.ended_calls = 0

    def content(self, text: str) -> None:
        self._append(ContentDelta, text)

    def reasoning(self, text: str) -> None:
        self._append(ReasoningDelta, text)

    def start_call(self, name: str, call_id: str | None = None) -> None:
        self._flush()
        self._events.append(CallStarted(self.started_calls, call_id or self._new_id(), name))
        self.started_calls += 1

    def arguments(self, text: str) -> None:
        """Of the call that started last."""
        self._append(self._arguments_delta, text)

    def end_call(self) -> None:
        self._flush()
        self._events.append(CallEnded(self.started_calls - 1))
        self.ended_calls += 1

    def drain(self) -> list[Event]:
        self._flush()
        events, self._events = self._events, []
        return events

    def _arguments_delta(self, text: str) -> Event:
        return ArgumentsDelta(self.started_calls - 1, text)

    def _append(self, kind: Callable[[str], Event], text: str) -> None:
        if not text:
            return
        if kind != self._part_kind:
            self._flush()
            self._part_kind = kind
        self._parts.append(text)

    def _flush(self) -> None:
        if self._part_kind is not None:
            self._events.append(self._part_kind("".join(self._parts)))
            self._parts.clear()
            self._part_kind = None
