"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType, structs
from starlette.requests import Request
from starlette.responses import Response

from quire.serve import conversation
from quire.serve.answer import Answer, Collected, UsageField
from quire.serve.body_helpers import BodyHelpers, RequestReader
from quire.serve.conversation import Reply
from quire.serve.disconnect import unless_disconnected
from quire.serve.generation import TextDelta
from quire.serve.logprob_format import chat_logprobs
from quire.serve.openai_answer import (
    AssistantReply,
    CalledFunction,
    CallPiece,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    CompletedCall,
    Delta,
    FunctionPiece,
)
from quire.serve.parsers.events import (
    ArgumentsDelta,
    CallStarted,
    ContentDelta,
    Event,
    ReasoningDelta,
)
from quire.serve.registry import Registry
from quire.serve.request_kinds import CHAT
from quire.serve.token_log import ShownToken


class ChatCompletions:
    def __init__(self, registry: Registry, bodies: BodyHelpers | None = None) -> None:
        self._registry = registry
        self._reader = RequestReader(CHAT, bodies)

    async def create(self, request: Request) -> Response:
        received = await self._reader.read(request)
        body = received.request
        served = await self._registry.open(request, body.model)
        info = served.backend.admit()
        prompt, grammar = await unless_disconnected(
            request, conversation.prepare(served, info, body, received.messages)
        )
        group = conversation.start(served, info, body, prompt, grammar)
        return await ChatAnswer(served.model, group, body).respond(request)


class ChatAnswer(Answer[ChatChunkChoice]):
    id_prefix = "chatcmpl"

    def opening(self) -> list[ChatChunkChoice]:
        return [
            ChatChunkChoice(index, Delta(role="assistant", content=""))
            for index in range(len(self.group.generations))
        ]

    def pieces(self, delta: TextDelta) -> list[ChatChunkChoice]:
        deltas = [piece for event in delta.events if (piece := _piece(event)) is not None]
        pieces = [ChatChunkChoice(delta.index, piece) for piece in deltas]
        if delta.finish_reason is not None or not pieces:
            pieces.append(ChatChunkChoice(delta.index, Delta(), delta.finish_reason))
        if delta.tokens or delta.token_ids:
            # With the content they belong to, where there is any.
            contents = [place for place, piece in enumerate(deltas) if piece.content is not UNSET]
            place = contents[0] if contents else -1
            pieces[place] = structs.replace(
                pieces[place],
                logprobs=self._logprobs(delta.tokens) if delta.tokens else None,
                token_ids=self._token_ids(delta.token_ids),
            )
        return pieces

    def chunk(self, choices: list[ChatChunkChoice], usage: UsageField) -> ChatCompletionChunk:
        is_first = any(choice.delta.role is not UNSET for choice in choices)
        return ChatCompletionChunk(
            self.id,
            self.created,
            self.model.id,
            choices,
            usage,
            self._prompt_token_ids if is_first else UNSET,
        )

    @property
    def _prompt_token_ids(self) -> Sequence[int] | UnsetType:
        return self._token_ids(self.group.generations[0].prompt_token_ids)

    def _token_ids(self, token_ids: Sequence[int]) -> Sequence[int] | UnsetType:
        return token_ids if self.body.return_token_ids else UNSET

    def _logprobs(self, tokens: Sequence[ShownToken]) -> ChatLogprobs | None:
        num_top = self.body.num_top_logprobs
        if num_top is None:
            return None
        return chat_logprobs(tokens, self.model.all_token_bytes, num_top)

    def whole(self, results: Sequence[Collected]) -> ChatCompletion:
        choices = []
        for index, result in enumerate(results):
            reply = Reply()
            reply.add(result.events)
            choices.append(
                ChatChoice(
                    index,
                    _message(reply),
                    result.finish_reason,
                    self._logprobs(result.tokens),
                    self._token_ids(result.token_ids),
                )
            )
        return ChatCompletion(
            self.id,
            self.created,
            self.model.id,
            choices,
            self.group.usage,
            self._prompt_token_ids,
        )


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
