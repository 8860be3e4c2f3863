"""JSON bytes to a checked request: rules that span fields, and refusals that name the field.

What one field may be stands in its type; what msgspec finds wrong is told as OpenAI's service does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Final, Generic, TypeVar

import msgspec
from msgspec import Struct

from quire.serve.errors import ApiError, invalid
from quire.serve.openai_protocol import (
    CHAT_FIELDS,
    AssistantMessage,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
    TokenizeRequest,
)
from quire.serve.thinking import check_switches
from quire.serve.tools import check_tools

# Fields that would change the answer and are not supported yet, with the values, besides null,
# that ask for nothing.
REFUSED: Final[Mapping[str, tuple[object, ...]]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}


def _refuse_unsupported(body: GenerationRequest) -> None:
    for field, harmless in REFUSED.items():
        value = getattr(body, field, None)
        # Types must agree too: 0 == False in Python, and logprobs=0 asks for something.
        if value is None or any(value == off and type(value) is type(off) for off in harmless):
            continue
        raise invalid(field, f"{field}={_brief(value)} is not supported yet; leave {field} out.")


def _refuse_in_messages(messages: list[Message]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, AssistantMessage):
            continue
        for field in ("refusal", "audio", "function_call"):
            if getattr(message, field) is not None:
                param = f"messages[{i}].{field}"
                raise invalid(param, f"{param} is not supported yet; leave it out.")
        said = message.tool_calls or message.reasoning_content or message.reasoning
        if message.content is None and not said:
            param = f"messages[{i}].content"
            raise invalid(param, f"{param} may be null only beside tool_calls.")


def _check(body: Struct) -> None:
    """The rules that span fields. Raises :class:`ApiError`."""
    if isinstance(body, GenerationRequest):
        _refuse_unsupported(body)
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options", "stream_options is only allowed with stream=true.")
        _check_tokens(body)
    if isinstance(body, ChatCompletionRequest):
        _check_chat(body)
    if isinstance(body, CompletionRequest):
        _check_completion(body)
    if isinstance(body, TokenizeRequest):
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "Send either prompt or messages.")
        if (chat := body.chat("")) is not None:
            _check_chat(chat)
        for field in CHAT_FIELDS if chat is None else ("add_special_tokens",):
            if getattr(body, field) is not None:
                wanted, other = (
                    ("messages", "a prompt") if chat is None else ("a prompt", "messages")
                )
                raise invalid(field, f"{field} is for {wanted}, not for {other}.")


def _check_tokens(body: GenerationRequest) -> None:
    limit, field = body.token_limit
    if limit == 0 and not getattr(body, "echo", None):
        raise invalid(field, f"{field}: Expected `int` >= 1.")
    if body.allowed_token_ids is not None and body.bad_words:
        raise invalid("allowed_token_ids", "Send either allowed_token_ids or bad_words.")


def _check_chat(body: ChatCompletionRequest) -> None:
    _refuse_in_messages(body.messages)
    check_tools(body.tools, body.tool_choice)
    check_switches(body.chat_template_kwargs)
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise invalid(
            "max_tokens", "max_tokens and max_completion_tokens differ; send the latter only."
        )
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs=true.")
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise invalid(
                "add_generation_prompt",
                "add_generation_prompt and continue_final_message exclude each other.",
            )
        last = body.messages[-1]
        if not isinstance(last, AssistantMessage) or last.tool_calls or not last.content:
            raise invalid(
                "continue_final_message",
                "continue_final_message needs a last message of the assistant, with content.",
            )


def _check_completion(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of < body.num_choices:
        raise invalid("best_of", f"best_of is {body.best_of}, fewer than n, {body.num_choices}.")
    if body.num_sequences > body.num_choices and body.stream:
        raise invalid("best_of", "best_of is only known at the end; it cannot be streamed.")
    if body.suffix and body.echo:
        raise invalid("suffix", "suffix and echo exclude each other.")


def _brief(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 40 else text[:37] + "..."


_NAMED = re.compile(r"Object (contains unknown|missing required) field `(.*)`$", re.DOTALL)
_LONGEST_FIELD = 64  # that is compared with those there are
_CLOSE = 0.8  # 1: equal
_INDEX = re.compile(r"\[[^]]*\]")
# By the field that holds objects with a type.
_TYPES: Final = {
    "content": "only text",
    "tools": "only function",
    "tool_calls": "only function",
    "response_format": "text, json_object or json_schema",
    "format": "text, json_object or json_schema",
}
# What others, or other APIs of this server, call what there is.
_OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "max_tokens": ("max_output_tokens",),
    "max_completion_tokens": ("max_tokens", "max_output_tokens"),
    "max_new_tokens": ("max_tokens", "max_output_tokens"),
    "n_predict": ("max_tokens", "max_output_tokens"),
    "stop": ("stop_sequences",),
    "repeat_penalty": ("repetition_penalty",),
    "response_format": ("text.format", "structured_outputs.json"),
    "guided_json": ("structured_outputs.json", "text.format"),
    "guided_regex": ("structured_outputs.regex",),
    "guided_choice": ("structured_outputs.choice",),
    "guided_grammar": ("structured_outputs.grammar",),
}
_AT = re.compile(r"^(.*) - at `(?:key` in `)?\$\.?(.*)`$", re.DOTALL)


def _from_validation(error: msgspec.ValidationError, kind: type[Struct]) -> ApiError:
    """msgspec's message and JSON path as a message and OpenAI's ``param``."""
    message = str(error)
    at = _AT.match(message)
    reason, path = (at[1], at[2]) if at else (message, "")
    if named := _NAMED.match(reason):
        param = f"{path}.{named[2]}" if path else named[2]
        if named[1].startswith("missing"):
            return invalid(param, f"{param} is required.")
        close = None if path else _meant(param, kind.__struct_fields__)
        advice = f"did you mean {close}?" if close else "leave it out."
        return invalid(param, f"{param} is not a field this server knows; {advice}")
    if not path:
        return invalid(None, f"The body must be a JSON object: {reason}.")
    if path.endswith(".type") and reason.startswith("Invalid value"):
        [*_, owner] = _INDEX.sub("", path).split(".")[:-1] or [""]
        if (types := _TYPES.get(owner)) is not None:
            return invalid(path, f"{path}: {types} is supported. {reason}.")
    return invalid(path, f"{path}: {reason}.")


def _meant(param: str, fields: Sequence[str]) -> str | None:
    """Which of ``fields``, or what in one of them, ``param`` probably stands for."""
    for other in _OTHER_NAMES.get(param, ()):
        if other.partition(".")[0] in fields:
            return other
    if len(param) >= _LONGEST_FIELD:
        return None
    close = difflib.get_close_matches(param, fields, n=1, cutoff=_CLOSE)
    return close[0] if close else None


T = TypeVar("T", bound=Struct)


class RequestDecoder(Generic[T]):
    """JSON bytes to a checked request of one type."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)

    def decode(self, body: bytes) -> T:
        """Raises :class:`ApiError` (400) for anything that is not a valid request."""
        try:
            request = self._decoder.decode(body)
            _check(request)
        except msgspec.ValidationError as error:
            raise _from_validation(error, self._kind) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise invalid(None, f"The body is not valid JSON: {error}.") from None
        except RecursionError:
            raise invalid(None, "The body's JSON is nested too deeply.") from None
        return request
