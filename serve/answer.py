"""What chat completions and completions share: deltas, sent as a stream or as one body."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar, Generic, TypeVar

from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from quire.serve.disconnect import unless_disconnected
from quire.serve.generation import GenerationGroup, TextDelta
from quire.serve.openai_answer import FinishReason, Usage, ignored_header, json_response
from quire.serve.openai_protocol import GenerationRequest, StreamOptions
from quire.serve.parsers.events import Event
from quire.serve.served_model import ServedModel
from quire.serve.sse import DONE, EventStream, LastEvent, event
from quire.serve.token_log import ShownToken

Choice = TypeVar("Choice", bound=Struct)
UsageField = Usage | None | UnsetType


class Collected(Struct):
    """All that one sequence has produced."""

    finish_reason: FinishReason = "stop"
    text: str = ""
    events: list[Event] = []
    token_ids: list[int] = []
    tokens: list[ShownToken] = []

    def add(self, delta: TextDelta) -> None:
        self.text += delta.text
        self.events += delta.events
        self.token_ids += delta.token_ids
        self.tokens += delta.tokens
        self.finish_reason = delta.finish_reason or self.finish_reason


class Answer(ABC, Generic[Choice]):
    """The answer to one request; subclasses give it the endpoint's wire format."""

    id_prefix: ClassVar[str]

    def __init__(self, model: ServedModel, group: GenerationGroup, body: GenerationRequest) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.group = group
        self.body = body

    @abstractmethod
    def opening(self) -> list[Choice]:
        """Choices of the chunks that precede the first delta."""

    @abstractmethod
    def pieces(self, delta: TextDelta) -> list[Choice]:
        """Choices of the chunks for one delta."""

    @abstractmethod
    def chunk(self, choices: list[Choice], usage: UsageField) -> Struct: ...

    @abstractmethod
    def whole(self, results: Sequence[Collected]) -> Struct:
        """The body for what the sequences have produced, in their order."""

    async def respond(self, request: Request) -> Response:
        headers = ignored_header(self.group.ignored)
        if self.body.stream:
            options = self.body.stream_options or StreamOptions()
            return EventStream(self._events(options), close=self.group.close, headers=headers)
        try:
            whole = await unless_disconnected(request, self._collect())
        finally:
            self.group.close()
        return json_response(whole, headers=headers)

    async def _collect(self) -> Struct:
        results = [Collected() for _ in self.group.generations]
        async for batch in self.group.deltas():
            for delta in batch:
                results[delta.index].add(delta)
        return self.whole(results)

    async def _events(self, options: StreamOptions) -> AsyncIterator[bytes]:
        choices = self.opening()
        usage: UsageField = None if options.include_usage else UNSET
        running, last = len(self.group.generations), b""
        async for batch in self.group.deltas():
            for delta in batch:
                choices += self.pieces(delta)
                running -= delta.finish_reason is not None
            if options.continuous_usage_stats:
                usage = self.group.usage
            chunks = b"".join([event(self.chunk([choice], usage)) for choice in choices])
            choices = []
            if running:
                yield chunks
            else:
                last = chunks
        if options.include_usage:
            last += event(self.chunk([], self.group.usage))
        yield LastEvent(last + DONE)
