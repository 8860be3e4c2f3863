"""Events of an answer as the content blocks of Anthropic's Messages, streamed and whole."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import msgspec

from quire.serve.parsers.events import (
    ArgumentsDelta,
    CallStarted,
    ContentDelta,
    Event,
    ReasoningDelta,
)

Payload = dict[str, Any]


class BlockStream:
    """Numbers the blocks and keeps one open at a time."""

    def __init__(self, *, shows_thinking: bool) -> None:
        self._shows_thinking = shows_thinking
        self._index = -1
        self._open: str | None = None  # the open block's type

    def payloads(self, event: Event) -> list[Payload]:
        match event:
            case ReasoningDelta(text):
                if not self._shows_thinking:
                    return []
                delta = {"type": "thinking_delta", "thinking": text}
                return [*self._enter("thinking", thinking="", signature=""), self._delta(delta)]
            case ContentDelta(text):
                delta = {"type": "text_delta", "text": text}
                return [*self._enter("text", text=""), self._delta(delta)]
            case CallStarted(_, call_id, name):
                return [*self.close(), *self._enter("tool_use", id=call_id, name=name, input={})]
            case ArgumentsDelta(_, text):
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
        return self.close()

    def _enter(self, kind: str, **block: Any) -> list[Payload]:
        """The events that open a block, unless one of its type is open."""
        if self._open == kind:
            return []
        closing = self.close()
        self._open = kind
        self._index += 1
        start = {"type": kind, **block}
        return [
            *closing,
            {"type": "content_block_start", "index": self._index, "content_block": start},
        ]

    def _delta(self, delta: Payload) -> Payload:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def close(self) -> list[Payload]:
        if self._open is None:
            return []
        payloads = []
        if self._open == "thinking":
            payloads.append(self._delta({"type": "signature_delta", "signature": _signature()}))
        payloads.append({"type": "content_block_stop", "index": self._index})
        self._open = None
        return payloads


def whole_blocks(events: Iterable[Event], *, shows_thinking: bool) -> list[Payload]:
    """The blocks that the stream of the same events builds up.

    A call that was cut off is left out: its input is no object yet.
    """
    stream = BlockStream(shows_thinking=shows_thinking)
    blocks: list[Payload] = []
    arguments: dict[int, str] = {}
    for payload in [p for event in events for p in stream.payloads(event)] + stream.close():
        if payload["type"] == "content_block_start":
            blocks.append(payload["content_block"])
        elif payload["type"] == "content_block_delta":
            delta, block = payload["delta"], blocks[payload["index"]]
            if delta["type"] == "input_json_delta":
                arguments[payload["index"]] = (
                    arguments.get(payload["index"], "") + delta["partial_json"]
                )
            else:
                name = delta["type"].removesuffix("_delta")
                block[name] += delta[name]
    return [
        block for index, block in enumerate(blocks) if _complete(block, arguments.get(index, ""))
    ]


def _complete(block: Payload, arguments: str) -> bool:
    if block["type"] != "tool_use":
        return True
    try:
        block["input"] = msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _signature() -> str:
    """Clients want one and send it back; nothing is checked by it."""
    return uuid.uuid4().hex
