"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, as Claude Code uses it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from quire.serve import conversation
from quire.serve.answer import Collected
from quire.serve.backend import BackendError
from quire.serve.body_helpers import BodyHelpers, RequestReader
from quire.serve.disconnect import unless_disconnected
from quire.serve.errors import ApiError, from_backend, invalid, message_error
from quire.serve.generation import GenerationGroup
from quire.serve.heartbeat import HEARTBEAT, with_heartbeats
from quire.serve.message_blocks import BlockStream, whole_blocks
from quire.serve.openai_answer import encode, ignored_header
from quire.serve.prompt_length import PromptTooLong
from quire.serve.registry import Registry
from quire.serve.request_kinds import COUNT_TOKENS, MESSAGES
from quire.serve.sse import EventStream, LastEvent, named_event

_STOP_REASONS: Final = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


class Messages:
    def __init__(self, registry: Registry, bodies: BodyHelpers | None = None) -> None:
        self._registry = registry
        self._reader = RequestReader(MESSAGES, bodies)
        self._counted = RequestReader(COUNT_TOKENS, bodies)

    async def create(self, request: Request) -> Response:
        received = await self._reader.read(request)
        chat, ignored = received.request.chat, received.request.ignored
        served = await self._registry.open(request, chat.model)
        info = served.backend.admit()
        if chat.thinking_token_budget is not None and not served.model.parsers.reads_reasoning:
            chat.thinking_token_budget = None
            ignored.append("thinking.budget_tokens")
        limit = info.max_model_len
        try:
            prompt = await unless_disconnected(
                request,
                conversation.encode_conversation(
                    served, chat, limit, counts=True, large=received.messages
                ),
            )
        except PromptTooLong as error:
            raise _too_long(error.fewest, limit) from None
        count = len(prompt.token_ids)
        if count >= limit:
            raise _too_long(count, limit)
        if chat.max_tokens is not None and chat.max_tokens > limit - count:
            # Agents ask for 32,000 tokens whatever the model holds.
            chat.max_tokens = limit - count
            ignored.append("max_tokens")
        grammar = await unless_disconnected(
            request, conversation.check_output(served, chat, prompt, received.request.names)
        )
        group = conversation.start(served, info, chat, prompt, grammar)
        shows_thinking = received.request.shows_thinking
        answer = _Answer(served.model.id, group, shows_thinking=shows_thinking)
        headers = ignored_header(ignored)
        if chat.stream:
            return EventStream(answer.events(), close=group.close, headers=headers)
        try:
            whole = await unless_disconnected(request, answer.whole())
        finally:
            group.close()
        return Response(encode(whole), media_type="application/json", headers=headers)

    async def count_tokens(self, request: Request) -> Response:
        received = await self._counted.read(request)
        chat = received.request.chat
        served = await self._registry.open(request, chat.model)
        prompt = await unless_disconnected(
            request,
            conversation.encode_conversation(served, chat, None, large=received.messages),
        )
        return Response(
            encode({"input_tokens": len(prompt.token_ids)}),
            media_type="application/json",
            headers=ignored_header(received.request.ignored),
        )


def _too_long(count: int, limit: int) -> ApiError:
    """Claude Code shortens its conversation when it reads these words."""
    message = f"prompt is too long: {count} tokens > {limit} maximum"
    return invalid("messages", message, code="context_length_exceeded")


class _Answer:
    """One answer, from one sequence."""

    def __init__(self, model_id: str, group: GenerationGroup, *, shows_thinking: bool) -> None:
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._model_id = model_id
        self._group = group
        self._generation = group.generations[0]
        self._shows_thinking = shows_thinking

    def _message(self, content: Sequence[Any], stop: tuple[str | None, str | None]) -> Any:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model_id,
            "content": content,
            "stop_reason": stop[0],
            "stop_sequence": stop[1],
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        generation = self._generation
        return {
            # Cached tokens are not counted twice.
            "input_tokens": generation.prompt_tokens - generation.cached_tokens,
            "output_tokens": generation.completion_tokens,
            "cache_read_input_tokens": generation.cached_tokens,
            "cache_creation_input_tokens": 0,
        }

    def _stop(self) -> tuple[str, str | None]:
        """The reason, and the stop sequence if that is it."""
        generation = self._generation
        if generation.finish_reason == "stop" and generation.stop_string is not None:
            return "stop_sequence", generation.stop_string
        return _STOP_REASONS[generation.finish_reason or "stop"], None

    async def whole(self) -> Any:
        collected = Collected()
        async for batch in self._group.deltas():
            for delta in batch:
                collected.add(delta)
        blocks = whole_blocks(collected.events, shows_thinking=self._shows_thinking)
        return self._message(blocks, self._stop())

    async def events(self) -> AsyncIterator[bytes]:
        yield _event({"type": "message_start", "message": self._message([], (None, None))})
        blocks = BlockStream(shows_thinking=self._shows_thinking)
        try:
            async for batch in with_heartbeats(self._group.deltas()):
                if batch is HEARTBEAT:
                    yield _event({"type": "ping"})
                    continue
                payloads = [
                    payload
                    for delta in batch
                    for event in delta.events
                    for payload in blocks.payloads(event)
                ]
                if payloads:
                    yield b"".join(map(_event, payloads))
        except BackendError as error:
            yield _event(message_error(from_backend(error)))
            return
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        last = {"type": "message_delta", "delta": delta, "usage": self._usage()}
        ending = [*blocks.close(), last, {"type": "message_stop"}]
        yield LastEvent(b"".join(map(_event, ending)))


def _event(payload: dict[str, Any]) -> bytes:
    return named_event(payload["type"], payload)
