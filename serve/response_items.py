"""Events of an answer as output items of OpenAI's Responses, with the events of their stream."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from quire.serve.parsers.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    ContentDelta,
    Event,
    ReasoningDelta,
)
from quire.serve.responses_input import Item
from quire.serve.responses_tools import ToolName

Payload = dict[str, Any]


class ItemStream:
    """``output`` holds the items so far; one at most is open.

    Payloads lack their sequence numbers.
    """

    def __init__(self, names: Mapping[str, ToolName]) -> None:
        self.output: list[Item] = []
        self._names = names
        self._open: str | None = None  # the open item's type
        self._parts: list[str] = []  # of the open item's text, arguments or input

    def payloads(self, event: Event) -> list[Payload]:
        match event:
            case ReasoningDelta(text):
                opening = self._enter_text("reasoning", "reasoning_text")
                return [*opening, self._piece("response.reasoning_text.delta", text)]
            case ContentDelta(text):
                opening = self._enter_text("message", "output_text")
                return [*opening, self._piece("response.output_text.delta", text, logprobs=[])]
            case CallStarted(_, call_id, name):
                return self._enter_call(call_id, self._names.get(name, ToolName(name)))
            case ArgumentsDelta(_, text):
                if self._open == "custom_tool_call":  # its text is inside the arguments
                    self._parts.append(text)
                    return []
                kind = "response.function_call_arguments.delta"
                return [self._piece(kind, text, content_index=None)]
            case CallEnded():
                return self._end("completed")

    def close(self, *, cut: bool = False) -> list[Payload]:
        """Ends the open item, if there is one; ``cut``: by the limit of tokens.

        A call that is still open is one that the model did not finish.
        """
        text = self._open in ("message", "reasoning")
        return self._end("completed" if text and not cut else "incomplete")

    def _end(self, status: str) -> list[Payload]:
        if self._open is None:
            return []
        kind, self._open = self._open, None
        item, text = self.output[-1], "".join(self._parts)
        item["status"] = status
        if kind == "message":
            part = _output_text(text)
            item["content"] = [part]
            done = self._at("response.output_text.done", text=text, logprobs=[], content_index=0)
            payloads = [done, self._part("done", part)]
        elif kind == "reasoning":
            part = {"type": "reasoning_text", "text": text}
            item["content"] = [part]
            done = self._at("response.reasoning_text.done", text=text, content_index=0)
            payloads = [done, self._part("done", part)]
        elif kind == "custom_tool_call":
            item["input"] = _custom_input(text)
            payloads = [
                self._at("response.custom_tool_call_input.delta", delta=item["input"]),
                self._at("response.custom_tool_call_input.done", input=item["input"]),
            ]
        else:
            item["arguments"] = text
            name = "response.function_call_arguments.done"
            payloads = [self._at(name, arguments=text, name=item["name"])]
        return [*payloads, self._item("done")]

    def _enter_text(self, kind: str, part_type: str) -> list[Payload]:
        """The events that open an item of text, unless one of its type is open."""
        if self._open == kind:
            return []
        closing = self.close()
        if kind == "message":
            item = {"id": _new_id("msg"), "type": kind, "role": "assistant", "content": []}
            part = _output_text("")
        else:
            item = {"id": _new_id("rs"), "type": kind, "summary": [], "content": []}
            part = {"type": part_type, "text": ""}
        return [*closing, self._add(item), self._part("added", part)]

    def _enter_call(self, call_id: str, tool: ToolName) -> list[Payload]:
        closing = self.close()
        kind, prefix, field = (
            ("custom_tool_call", "ctc", "input")
            if tool.custom
            else ("function_call", "fc", "arguments")
        )
        item: Item = {
            "id": _new_id(prefix),
            "type": kind,
            "call_id": call_id,
            "name": tool.name,
            field: "",
        }
        if tool.namespace is not None:
            item["namespace"] = tool.namespace
        return [*closing, self._add(item)]

    def _add(self, item: Item) -> Payload:
        item["status"] = "in_progress"
        self.output.append(item)
        self._open = item["type"]
        self._parts = []
        return self._item("added")

    def _item(self, what: str) -> Payload:
        return {
            "type": f"response.output_item.{what}",
            "output_index": len(self.output) - 1,
            "item": dict(self.output[-1]),
        }

    def _part(self, what: str, part: Payload) -> Payload:
        return self._at(f"response.content_part.{what}", part=part, content_index=0)

    def _piece(self, kind: str, text: str, **more: Any) -> Payload:
        self._parts.append(text)
        fields = {"content_index": 0, **more}
        return self._at(
            kind, delta=text, **{key: value for key, value in fields.items() if value is not None}
        )

    def _at(self, kind: str, **fields: Any) -> Payload:
        return {
            "type": kind,
            "item_id": self.output[-1]["id"],
            "output_index": len(self.output) - 1,
            **fields,
        }


def _output_text(text: str) -> Payload:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _custom_input(arguments: str) -> str:
    """The text in {"input": text}; what is not of that form is the text itself."""
    try:
        return str(msgspec.json.decode(arguments, type=dict[str, Any])["input"])
    except (msgspec.DecodeError, KeyError, RecursionError):
        return arguments


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
