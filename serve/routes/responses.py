"""/v1/responses: OpenAI's Responses API, as Codex, the agents SDK and the AI SDK use it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, Final, Literal

import msgspec
from msgspec import structs
from starlette.requests import Request
from starlette.responses import Response

from quire.serve import conversation, request_record
from quire.serve.backend import BackendError, QueueFull
from quire.serve.body_helpers import BodyHelpers, Received, RequestReader
from quire.serve.disconnect import unless_disconnected
from quire.serve.errors import ApiError, from_backend, invalid
from quire.serve.generation import GenerationGroup
from quire.serve.heartbeat import HEARTBEAT, with_heartbeats
from quire.serve.middleware import MAX_BODY_BYTES
from quire.serve.openai_answer import encode, ignored_header
from quire.serve.registry import Registry
from quire.serve.request_kinds import RESPONSES
from quire.serve.response_history import NO_ITEMS, asked, joined, resolved
from quire.serve.response_items import ItemStream
from quire.serve.response_store import ResponseStore, Stored
from quire.serve.responses_protocol import (
    Conversation,
    ResponsesRequest,
    TextConfig,
    to_chat,
)
from quire.serve.sse import EventStream, LastEvent, named_event

# Fields of the request that stand in the response as they came.
_ECHOED: Final = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "previous_response_id",
    "temperature",
    "top_p",
)
# What a tool in the response has even if the request says nothing of it.
_UNSAID: Final[Mapping[Any, Mapping[str, None]]] = {
    "function": {"parameters": None, "strict": None}
}


class Responses:
    def __init__(self, registry: Registry, bodies: BodyHelpers | None = None) -> None:
        self._registry = registry
        self._reader = RequestReader(RESPONSES, bodies)
        self._store = ResponseStore()
        self._running: dict[tuple[str, str], _Answer] = {}  # by owner and id

    async def create(self, request: Request) -> Response:
        received = await self._reader.read(request)
        served = await self._registry.open(request, received.request.model)
        received = self._with_items(received)
        previous = self._previous(received.request)
        received = self._reader.after(received, len(bytes(previous)))
        body, large = received.request, received.messages
        before = msgspec.json.decode(previous) if large is None else []
        items = [*before, *body.items]
        info = served.backend.admit()
        model = served.model
        has_grammars = model.grammars is not None and info.abilities.grammars
        family = model.parsers.family.tools if has_grammars else ""
        talk = to_chat(body, items, family, len(before))
        prompt = await unless_disconnected(
            request,
            conversation.encode_conversation(
                served,
                talk.chat,
                info.max_model_len,
                large=None if large is None else structs.replace(large, previous=previous),
            ),
        )
        talk.ignored += prompt.ignored
        left = info.max_model_len - len(prompt.token_ids)
        if talk.chat.max_tokens is not None and 0 < left < talk.chat.max_tokens:
            talk.chat.max_tokens = left
            talk.ignored.append("max_output_tokens")
        grammar = await unless_disconnected(
            request, conversation.check_output(served, talk.chat, prompt, talk.fields, talk.texts)
        )
        try:
            group = conversation.start(served, info, talk.chat, prompt, grammar)
        except QueueFull as error:
            # Codex does not come back after a 429, but does after this.
            headers = {"Retry-After": str(max(error.retry_after, 1))}
            raise ApiError(503, error.message, code="queue_full", headers=headers) from None
        said = asked(received.body)
        body = structs.replace(body, instructions=said.instructions)
        history, owner = joined(previous, said.items), _owner()
        answer = _Answer(served.model.id, body, talk, history, group, self._store, owner)
        headers = ignored_header(talk.ignored)
        key = owner, answer.response["id"]
        self._running[key] = answer

        def close() -> None:
            self._running.pop(key, None)
            group.close()

        if body.stream:
            return EventStream(answer.events(), close=close, headers=headers)
        try:
            await unless_disconnected(request, answer.collect())
        finally:
            close()
        return _json(answer.response, headers)

    def _with_items(self, received: Received[ResponsesRequest]) -> Received[ResponsesRequest]:
        """With what has been stored where the input refers to it, as the AI SDK does."""
        body = resolved(received.body, self._store.items(_owner()), MAX_BODY_BYTES)
        if body is None:
            return received
        request = received.request
        if not received.is_large:
            request = structs.replace(request, input=msgspec.json.decode(asked(body).items))
        return replace(received, request=request, body=body)

    def _previous(self, body: ResponsesRequest) -> msgspec.Raw:
        """The items that come before the body's own. Raises :class:`ApiError` (400)."""
        if body.previous_response_id is None:
            return NO_ITEMS
        return self._store.previous(_owner(), body.previous_response_id).items

    async def retrieve(self, request: Request) -> Response:
        return _json(self._store.find(_owner(), request.path_params["id"]).response)

    async def cancel(self, request: Request) -> Response:
        """Ends an answer that is being generated; what there is of it is its end."""
        key = _owner(), request.path_params["id"]
        answer = self._running.get(key)
        response = self._store.find(*key).response if answer is None else answer.response
        if answer is None or response["status"] != "in_progress":
            what = f"The response is {response['status']}; there is nothing to cancel."
            raise invalid("response_id", what)
        return _json(answer.cancel())

    async def delete(self, request: Request) -> Response:
        response_id = request.path_params["id"]
        self._store.delete(_owner(), response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})


def _owner() -> str:
    """Who may come back to the current request's response: the key it was asked with."""
    record = request_record.current()
    return record.api_key.sha256 if record is not None and record.api_key is not None else ""


def _format(text: TextConfig | None) -> dict[str, Any]:
    """As OpenAI's service gives it back."""
    form = msgspec.to_builtins(text.format) if text and text.format else {"type": "text"}
    return {key: value for key, value in form.items() if value is not None}


def _json(content: object, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(content), media_type="application/json", headers=headers)


class _Answer:
    """One answer, from one sequence; ``response`` is the object as it stands."""

    def __init__(
        self,
        model_id: str,
        body: ResponsesRequest,
        talk: Conversation,
        history: msgspec.Raw,
        group: GenerationGroup,
        store: ResponseStore,
        owner: str,
    ) -> None:
        self._history = history
        self._group = group
        self._generation = group.generations[0]
        self._store = store if body.store is not False else None
        self._owner = owner
        self._stream = ItemStream(talk.names)
        self._sequence_number = 0
        self._closing: list[dict[str, Any]] = []  # events that a cancelled stream has yet to send
        reasoning = body.reasoning
        self.response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": model_id,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": reasoning.summary if reasoning else None,
            },
            "store": body.store is not False,
            "text": {"format": _format(body.text)},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{**_UNSAID.get(tool.get("type"), {}), **tool} for tool in body.tools or []],
            "truncation": "disabled",
            **{field: getattr(body, field) for field in _ECHOED},
        }
        self.response["metadata"] = body.metadata or {}
        if body.user is not None:  # which clients know as text only
            self.response["user"] = body.user

    def cancel(self) -> dict[str, Any]:
        """The response, which ends here."""
        self._group.close()
        self._closing = self._finish("cancelled")
        return self.response

    @property
    def _is_cancelled(self) -> bool:
        return bool(self.response["status"] == "cancelled")

    async def collect(self) -> None:
        try:
            async for batch in self._group.deltas():
                if self._is_cancelled:
                    return
                for delta in batch:
                    for event in delta.events:
                        self._stream.payloads(event)
        except BackendError:
            if self._is_cancelled:
                return
            raise
        self._finish()

    async def events(self) -> AsyncIterator[bytes]:
        yield self._whole("response.created") + self._whole("response.in_progress")
        try:
            async for batch in with_heartbeats(self._group.deltas()):
                if self._is_cancelled:
                    break
                if batch is HEARTBEAT:
                    yield self._whole("response.in_progress")
                    continue
                payloads = [
                    payload
                    for delta in batch
                    for event in delta.events
                    for payload in self._stream.payloads(event)
                ]
                if payloads:
                    yield b"".join(map(self._event, payloads))
        except BackendError as error:
            if not self._is_cancelled:
                message = from_backend(error).message
                self.response["error"] = {"code": "server_error", "message": message}
                last = self._finish("failed")
                yield b"".join(map(self._event, last)) + self._whole("response.failed")
                return
        last = self._closing if self._is_cancelled else self._finish()
        # No event says that a response was cancelled.
        kind = "incomplete" if self._is_cancelled else self.response["status"]
        ending = b"".join(map(self._event, last)) + self._whole(f"response.{kind}")
        yield LastEvent(ending)

    def _finish(self, status: Literal["cancelled", "failed"] | None = None) -> list[dict[str, Any]]:
        """Brings ``response`` to its end, its own if there is no other ``status``; gives the events
        that lead there."""
        cut = self._generation.finish_reason == "length"
        payloads = self._stream.close(cut=cut or status is not None)
        self.response["output"] = self._stream.output
        self.response["status"] = status or ("incomplete" if cut else "completed")
        if self.response["status"] == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        generation = self._generation
        self.response["usage"] = {
            "input_tokens": generation.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": generation.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": generation.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": generation.reasoning_tokens or 0},
            "total_tokens": generation.prompt_tokens + generation.completion_tokens,
        }
        if self._store is not None:
            items = joined(self._history, msgspec.json.encode(self._stream.output))
            self._store.add(self._owner, self.response["id"], Stored(items, self.response))
        return payloads

    def _whole(self, kind: str) -> bytes:
        return self._event({"type": kind, "response": self.response})

    def _event(self, payload: dict[str, Any]) -> bytes:
        payload = {**payload, "sequence_number": self._sequence_number}
        self._sequence_number += 1
        return named_event(payload["type"], payload)
