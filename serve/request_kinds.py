"""What the requests of each API are made of: a prompt, which may be megabytes, and the rest.

Of a large body a helper process hands back the rest only; a stand-in takes the prompt's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from msgspec import Struct, structs

from quire.serve.embeddings_protocol import EmbeddingRequest
from quire.serve.messages_protocol import (
    CountTokensRequest,
    MessagesChat,
    MessagesRequest,
    to_chat,
)
from quire.serve.openai_protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    TokenizeRequest,
    UserMessage,
)
from quire.serve.request_decoder import RequestDecoder
from quire.serve.responses_input import Item, messages_of
from quire.serve.responses_protocol import ResponsesRequest

T = TypeVar("T", bound=Struct)
MessagesOf = Callable[[T, Sequence[Item]], tuple[Sequence[Message], Sequence[str]]]

_STAND_IN: Final[list[Message]] = [UserMessage("")]


@dataclass(frozen=True)
class RequestKind(Generic[T]):
    """The requests of one API.

    Attributes:
        decode: a body to a checked request. Raises :class:`ApiError` (400).
        without_prompt: the same request with a stand-in for its prompt.
        messages: of a request whose conversation begins with earlier items; also which parts were
            passed over. Raises :class:`ApiError` (400).
        texts: or token ids, where the prompt is none of messages. Raises :class:`ApiError` (400).
    """

    name: str
    type: type[T]
    decode: Callable[[bytes], T]
    without_prompt: Callable[[T], T]
    messages: MessagesOf[T] | None = None
    texts: Callable[[T], Sequence[str | list[int]]] | None = None


def _kind(name: str, kind: type[T], stand_in: dict[str, Any], **prompt: Any) -> RequestKind[T]:
    """Where the prompt is in fields of the request itself."""

    def without_prompt(request: T) -> T:
        present = {f: v for f, v in stand_in.items() if getattr(request, f) is not None}
        return structs.replace(request, **present)

    return RequestKind(name, kind, RequestDecoder(kind).decode, without_prompt, **prompt)


def _messages_kind(name: str, kind: type[CountTokensRequest]) -> RequestKind[MessagesChat]:
    decode = RequestDecoder(kind).decode
    return RequestKind(
        name,
        MessagesChat,
        lambda data: to_chat(decode(data)),
        lambda talk: structs.replace(talk, chat=CHAT.without_prompt(talk.chat)),
        lambda talk, _: (talk.chat.messages, ()),
    )


def _items(request: ResponsesRequest, previous: Sequence[Item]) -> tuple[list[Message], list[str]]:
    ignored: list[str] = []
    items = [*previous, *request.items]
    return messages_of(request.instructions, items, ignored, len(previous)), ignored


CHAT: Final = _kind(
    "chat",
    ChatCompletionRequest,
    {"messages": _STAND_IN},
    messages=lambda request, _: (request.messages, ()),
)
COMPLETION: Final = _kind(
    "completion", CompletionRequest, {"prompt": ""}, texts=lambda request: request.prompts
)
EMBEDDING: Final = _kind(
    "embedding", EmbeddingRequest, {"input": ""}, texts=lambda request: request.inputs
)
TOKENIZE: Final = _kind(
    "tokenize",
    TokenizeRequest,
    {"prompt": "", "messages": _STAND_IN},
    messages=lambda request, _: (request.messages or (), ()),
    texts=lambda request: [request.prompt or ""],
)
RESPONSES: Final = _kind(
    "responses", ResponsesRequest, {"input": "", "instructions": ""}, messages=_items
)
MESSAGES: Final = _messages_kind("messages", MessagesRequest)
COUNT_TOKENS: Final = _messages_kind("count_tokens", CountTokensRequest)

KINDS: Final[Mapping[str, RequestKind[Any]]] = {
    kind.name: kind
    for kind in (CHAT, COMPLETION, EMBEDDING, TOKENIZE, RESPONSES, MESSAGES, COUNT_TOKENS)
}
