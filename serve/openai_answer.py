"""Answers of chat completions, completions and models as they leave, after OpenAI's schema.

Keys that the schema requires but allows to be null are always present; ``UNSET`` keys are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.responses import Response

FinishReason = Literal["stop", "length", "tool_calls"]

_SHOWN_IGNORED = 20

encode = msgspec.json.Encoder().encode


def json_response(
    content: Struct, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(encode(content), status, headers, media_type="application/json")


def ignored_header(fields: Sequence[str]) -> dict[str, str]:
    """Names what was accepted although nothing comes of it, as far as clients can read it: they
    refuse heads of some thousand bytes."""
    shown = list(fields[:_SHOWN_IGNORED])
    if len(fields) > len(shown):
        shown.append(f"and {len(fields) - len(shown)} more")
    return {"X-Quire-Ignored": ", ".join(shown)} if fields else {}


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(Struct, frozen=True):
    reasoning_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


# ---- log-probabilities


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[ContentLogprob]
    refusal: None = None


class CompletionLogprobs(Struct, frozen=True):
    """Lists with an entry for each token. A prompt's first token has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # in characters of the choice's text


# ---- chat completions


class CalledFunction(Struct, frozen=True):
    name: str
    arguments: str  # JSON text


class CompletedCall(Struct, frozen=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AssistantReply(Struct, frozen=True):
    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[CompletedCall] | UnsetType = UNSET
    # Clients read the one name or the other.
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    index: int
    message: AssistantReply
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    token_ids: Sequence[int] | UnsetType = UNSET


class ChatCompletion(Struct, tag_field="object", tag="chat.completion", frozen=True):
    id: str
    created: int  # seconds since the epoch
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class FunctionPiece(Struct, frozen=True):
    name: str | UnsetType = UNSET
    arguments: str = ""


class CallPiece(Struct, frozen=True):
    index: int
    function: FunctionPiece
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CallPiece] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: Sequence[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct, tag_field="object", tag="chat.completion.chunk", frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


# ---- completions: one shape, streamed or not


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: CompletionLogprobs | None = None
    token_ids: Sequence[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class Completion(Struct, tag_field="object", tag="text_completion", frozen=True):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


# ---- models and tokens


class ModelCard(Struct, tag_field="object", tag="model", frozen=True):
    """In the words of OpenAI's clients and of Anthropic's."""

    id: str
    created: int  # seconds since the epoch
    created_at: str  # the same, after RFC 3339
    display_name: str
    max_model_len: int | UnsetType = UNSET  # tokens; not known before the model is ready
    context_length: int | UnsetType = UNSET  # the same
    # The names that its chat template reads; not known while it is not in memory.
    chat_template_kwargs: tuple[str, ...] | UnsetType = UNSET
    type: Literal["model"] = "model"
    owned_by: str = "quire"


class ModelList(Struct, tag_field="object", tag="list", frozen=True):
    data: list[ModelCard]
    first_id: str
    last_id: str
    has_more: Literal[False] = False


class RenderedPrompt(Struct, frozen=True):
    prompt: str


class Tokenized(Struct, frozen=True):
    tokens: list[int]
    count: int
    max_model_len: int | None  # null while the model is not ready


class Detokenized(Struct, frozen=True):
    prompt: str
