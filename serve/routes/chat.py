"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from quire.serve import conversation
from quire.serve.answer import Answer, Collected, UsageField
from quire.serve.conversation import Reply
from quire.serve.disconnect import unless_disconnected
from quire.serve.generation import TextDelta
from quire.serve.middleware import read_json
from quire.serve.parsers.events import (
    ArgumentsDelta,
    CallStarted,
    ContentDelta,
    Event,
    ReasoningDelta,
)
from quire.serve.protocol import ChatCompletionRequest, RequestDecoder
from quire.serve.registry import Registry
from quire.serve.responses import (
    AssistantReply,
    CalledFunction,
    CallPiece,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    CompletedCall,
    Delta,
    FunctionPiece,
)


class ChatCompletions:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._decoder = RequestDecoder(ChatCompletionRequest)

    async def create(self, request: Request) -> Response:
        body = self._decoder.decode(await read_json(request))
        served = self._registry.find(body.model)
        info = served.backend.admit()
        prompt = await unless_disconnected(
            request, conversation.encode_conversation(served, body, info.max_model_len)
        )
        grammar = await unless_disconnected(
            request, conversation.check_output(served, body, prompt)
        )
        group = conversation.start(served, info, body, prompt, grammar)
        return await ChatAnswer(served.model.id, group).respond(request, body)


class ChatAnswer(Answer[ChatChunkChoice]):
    id_prefix = "chatcmpl"

    def opening(self) -> list[ChatChunkChoice]:
        return [ChatChunkChoice(0, Delta(role="assistant", content=""))]

    def pieces(self, delta: TextDelta) -> list[ChatChunkChoice]:
        pieces = [
            ChatChunkChoice(0, piece)
            for event in delta.events
            if (piece := _piece(event)) is not None
        ]
        if delta.finish_reason is not None:
            pieces.append(ChatChunkChoice(0, Delta(), delta.finish_reason))
        return pieces

    def chunk(self, choices: list[ChatChunkChoice], usage: UsageField) -> ChatCompletionChunk:
        return ChatCompletionChunk(self.id, self.created, self.model_id, choices, usage)

    def whole(self, results: Sequence[Collected]) -> ChatCompletion:
        choices = []
        for index, result in enumerate(results):
            reply = Reply()
            reply.add(result.events)
            choices.append(ChatChoice(index, _message(reply), result.finish_reason))
        return ChatCompletion(self.id, self.created, self.model_id, choices, self.group.usage)


def _piece(event: Event) -> Delta | None:
    match event:
        case ContentDelta(text):
            return Delta(content=text)
        case ReasoningDelta(text):
            return Delta(reasoning_content=text, reasoning=text)
        case CallStarted(index, call_id, name):
            return Delta(tool_calls=[CallPiece(index, FunctionPiece(name), call_id, "function")])
        case ArgumentsDelta(index, text):
            return Delta(tool_calls=[CallPiece(index, FunctionPiece(arguments=text))])
    return None  # the end of a call has no chunk of its own


def _message(reply: Reply) -> AssistantReply:
    calls = [
        CompletedCall(call.id, CalledFunction(call.name, call.arguments)) for call in reply.calls
    ]
    reasoning = reply.reasoning or UNSET
    return AssistantReply(
        reply.content if reply.content or not calls else None,
        tool_calls=calls or UNSET,
        reasoning_content=reasoning,
        reasoning=reasoning,
    )
