"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from quire.serve import submission
from quire.serve.answer import Answer, UsageField
from quire.serve.disconnect import unless_disconnected
from quire.serve.generation import TextDelta
from quire.serve.middleware import read_json
from quire.serve.prompt import encode_chat
from quire.serve.protocol import ChatCompletionRequest, RequestDecoder
from quire.serve.registry import Registry
from quire.serve.responses import (
    AssistantReply,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    Delta,
    FinishReason,
)


class ChatCompletions:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._decoder = RequestDecoder(ChatCompletionRequest)

    async def create(self, request: Request) -> Response:
        body = self._decoder.decode(await read_json(request))
        served = self._registry.find(body.model)
        info = served.backend.admit()
        model = served.model
        prompt = await unless_disconnected(
            request,
            encode_chat(model.encoder, model.chat_template, body.messages, info.max_model_len),
        )
        group = submission.start(served, info, body, [prompt], "messages")
        return await ChatAnswer(model.id, group).respond(request, body)


class ChatAnswer(Answer[ChatChunkChoice]):
    id_prefix = "chatcmpl"

    def opening(self) -> list[ChatChunkChoice]:
        return [ChatChunkChoice(0, Delta(role="assistant", content=""))]

    def pieces(self, delta: TextDelta) -> list[ChatChunkChoice]:
        pieces = [ChatChunkChoice(0, Delta(content=delta.text))] if delta.text else []
        if delta.finish_reason is not None:
            pieces.append(ChatChunkChoice(0, Delta(), delta.finish_reason))
        return pieces

    def chunk(self, choices: list[ChatChunkChoice], usage: UsageField) -> ChatCompletionChunk:
        return ChatCompletionChunk(self.id, self.created, self.model_id, choices, usage)

    def whole(self, results: Sequence[tuple[str, FinishReason]]) -> ChatCompletion:
        choices = [
            ChatChoice(index, AssistantReply(text), reason)
            for index, (text, reason) in enumerate(results)
        ]
        return ChatCompletion(self.id, self.created, self.model_id, choices, self.group.usage)
