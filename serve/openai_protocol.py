"""Requests as they arrive, after OpenAI's schema for chat completions and completions.

A field is honoured, or has no effect by OpenAI's own definition, or is refused by name: nothing is
accepted and forgotten. Fields that exist in the schema but not here yet are declared all the same,
so that a value that means "off" passes and any other gets a 400 that says so: see
:mod:`quire.serve.request_decoder`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from quire.serve.errors import invalid
from quire.serve.tools import MAX_TOOLS, FunctionTool, ToolChoice

MAX_MESSAGES: Final = 16384
MAX_PROMPTS: Final = 1024
MAX_DETOKENIZED: Final = 2**20

NonEmptyStr = Annotated[str, Meta(min_length=1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
# Every character of an answer is compared with all of them.
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
MAX_STOP_STRINGS: Final = 16
StopStrings = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
PositiveInt = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Choices = Annotated[int, Meta(ge=1, le=128)]
TextsOrIds = str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
LogitBias = Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]


class TextPart(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str
    cache_control: Any = None  # every prefix is cached, here and below


Content = str | list[TextPart]


class FunctionCall(Struct, forbid_unknown_fields=True):
    name: str
    arguments: str  # a JSON object, as text


class ToolCall(Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    id: str
    function: FunctionCall
    index: int | None = None  # a call put together from a stream may still carry it


class SystemMessage(Struct, tag_field="role", tag="system", forbid_unknown_fields=True):
    content: Content
    name: str | None = None
    cache_control: Any = None


class DeveloperMessage(Struct, tag_field="role", tag="developer", forbid_unknown_fields=True):
    content: Content
    name: str | None = None
    cache_control: Any = None


class UserMessage(Struct, tag_field="role", tag="user", forbid_unknown_fields=True):
    content: Content
    name: str | None = None
    cache_control: Any = None


class AssistantMessage(Struct, tag_field="role", tag="assistant", forbid_unknown_fields=True):
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    # What the model thought: one of the two names, or both with the same text.
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: Any = None  # the same once more, in pieces
    cache_control: Any = None
    # A reply that is sent back carries these; only their empty values mean nothing.
    refusal: str | None = None
    audio: Any = None
    function_call: Any = None
    annotations: list[Any] | None = None


class ToolMessage(Struct, tag_field="role", tag="tool", forbid_unknown_fields=True):
    content: Content
    tool_call_id: str
    name: str | None = None
    cache_control: Any = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # a server may leave obfuscation out
    continuous_usage_stats: bool | None = None  # usage so far on every chunk


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    pass


class JsonObjectFormat(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    pass


class JsonSchema(Struct, forbid_unknown_fields=True):
    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # where not, oneOf may mean anyOf


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """What the output must be; exactly one of these (vLLM's field)."""

    json: dict[str, Any] | str | None = None  # a JSON schema, or its text
    json_object: bool | None = None
    regex: NonEmptyStr | None = None
    choice: Annotated[list[NonEmptyStr], Meta(min_length=1, max_length=10_000)] | None = None
    grammar: NonEmptyStr | None = None  # in Lark, as llguidance reads it


class GenerationRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields that chat completions and completions share."""

    model: str

    n: Choices | None = None  # answers to one prompt
    max_tokens: Annotated[int, Meta(ge=0)] | None = None  # None: what the context still holds
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[NonEmptyStr], Meta(max_length=128)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopStrings | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool | None = None  # None: special tokens are not shown
    return_token_ids: bool | None = None
    truncate_prompt_tokens: PositiveInt | None = None  # only so many of the prompt's last tokens
    cache_salt: str | None = None  # prefixes are shared among equal ones
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None  # smaller goes first

    # No effect on the answer, by definition.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_sequences(self) -> int:
        """Generated for each prompt; the best of them are the choices."""
        return self.num_choices

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported beside each; None: no log-probabilities."""
        return None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def token_limit(self) -> tuple[int | None, str]:
        """The most tokens to generate, and the field that says so."""
        return self.max_tokens, "max_tokens"


class ChatCompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    messages: Messages
    max_completion_tokens: PositiveInt | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None  # None: "auto"
    parallel_tool_calls: bool | None = None  # False: generation ends with the first call
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None  # None: unless the last message is continued
    continue_final_message: bool | None = None  # the answer goes on where that one ends
    reasoning_effort: Effort | None = None  # no effect on models that do not know it
    thinking_token_budget: Annotated[int, Meta(ge=0)] | None = None  # then reasoning is closed

    # Not supported yet: request_decoder.REFUSED.
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    prompt: TextsOrIds
    max_tokens: Annotated[int, Meta(ge=0)] | None = 16
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None  # the prompt stands in front of the answer
    suffix: str | None = None  # what follows on the answer, which fills the gap
    best_of: Choices | None = None  # so many are generated; the n likeliest are the choices
    add_special_tokens: bool | None = None  # None: those that the tokenizer adds

    @property
    def num_sequences(self) -> int:
        return max(self.best_of or 1, self.num_choices)

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per sequence. Raises :class:`ApiError` where the list mixes forms."""
        return texts_or_ids(self.prompt, "prompt", MAX_PROMPTS)


def texts_or_ids(value: TextsOrIds, field: str, most: int) -> list[str | list[int]]:
    """One text, or token ids, for each prompt. Raises :class:`ApiError` where the list mixes
    forms or has more than ``most`` entries."""
    if isinstance(value, str):
        return [value]
    forms = {type(item) for item in value}
    if len(forms) > 1:
        raise invalid(
            field, f"{field} is a string, strings, token ids or lists of token ids, not a mix."
        )
    if forms == {int}:
        return [[item for item in value if isinstance(item, int)]]
    if len(value) > most:
        raise invalid(field, f"{field} has {len(value)} entries; send {most}.")
    return [item for item in value if not isinstance(item, int)]


# Of a chat, that a :class:`TokenizeRequest` takes beside messages.
CHAT_FIELDS: Final = (
    "tools",
    "chat_template_kwargs",
    "enable_thinking",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
)


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of ``prompt`` and ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # of a prompt; None: as a completion would

    # CHAT_FIELDS
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def chat(self, model: str) -> ChatCompletionRequest | None:
        """The chat whose prompt is wanted; None: that of ``prompt`` is."""
        if self.messages is None:
            return None
        given = {name: getattr(self, name) for name in CHAT_FIELDS}
        return ChatCompletionRequest(model=model, messages=self.messages, **given)


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_DETOKENIZED)]
