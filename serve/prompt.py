"""Messages and prompts to token ids: the model's chat template, in a sandbox, and its tokenizer.

The template comes from the model's own files, never from a request, and still runs in jinja2's
sandbox, since downloading a model should not be enough to run its code. It also runs in a helper
process: see :mod:`quire.serve.template_helpers`.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, NamedTuple, NoReturn, Protocol

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.serve.errors import invalid
from quire.serve.protocol import AssistantMessage, Content, DeveloperMessage, Message
from quire.serve.text_encoder import TextEncoder


class _GenerationBlock(Extension):
    """``{% generation %}`` marks an assistant's turn for training; here it is transparent."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - the base class declares it this way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def check_syntax(source: str) -> None:
    """Raise ``jinja2.TemplateSyntaxError`` for a template that cannot be read.

    Nothing of the template runs; to compile it would, since jinja2 computes constants then.
    """
    _environment().parse(source)


class ChatTemplate:
    """A compiled chat template. Raises ``jinja2.TemplateSyntaxError`` if it does not compile.

    ``special_tokens`` are variables of the template: bos_token, eos_token and so on.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, object]) -> None:
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt up to where the assistant speaks. Raises :class:`ApiError` (400)."""
        turns = [self._turn(message, index) for index, message in enumerate(messages)]
        try:
            return self._render(turns)
        except MemoryError:  # the process that this runs in is at its end
            raise
        except Exception as error:
            # Whatever the model's template raises, it raises about these messages.
            raise invalid(
                "messages", f"The model's chat template refuses these messages: {error}"
            ) from error

    def _render(self, turns: Sequence[Mapping[str, Any]]) -> str:
        return self._template.render(
            messages=turns,
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **self._special_tokens,
        )

    def _turn(self, message: Message, index: int) -> dict[str, Any]:
        """A message as templates expect it: a plain dict with text content and no absent keys."""
        turn: dict[str, Any] = msgspec.to_builtins(message)
        turn = {key: value for key, value in turn.items() if value is not None}
        turn.pop("annotations", None)
        turn["content"] = _text_of(message.content)
        if isinstance(message, DeveloperMessage) and not self._knows_developer:
            turn["role"] = "system"
        if isinstance(message, AssistantMessage) and message.tool_calls:
            style = self._tool_call_style
            turn["content"] = turn["content"] or style.no_content
            for number, call in enumerate(turn["tool_calls"]):
                param = f"messages[{index}].tool_calls[{number}].function.arguments"
                arguments = _parse_arguments(call["function"]["arguments"], param)
                if style.parsed_arguments:
                    call["function"]["arguments"] = arguments
        return turn

    @functools.cached_property
    def _tool_call_style(self) -> _ToolCallStyle:
        """The first way of writing a tool call that this template takes and shows.

        Templates differ: some write the arguments out as JSON themselves, some append them as
        text; some fail or print None where the content is null, some look for the null.
        """
        for style in _TOOL_CALL_STYLES:
            arguments: object = {"city": "Rome"} if style.parsed_arguments else '{"city": "Rome"}'
            function = {"name": "weather", "arguments": arguments}
            call = {"id": "a1b2c3d4e", "type": "function", "function": function}
            try:
                text = self._render(
                    [
                        {"role": "user", "content": "?"},
                        {"role": "assistant", "content": style.no_content, "tool_calls": [call]},
                        {"role": "tool", "content": "sunny", "tool_call_id": call["id"]},
                    ]
                )
            except MemoryError:
                raise
            except Exception:  # it does not take this style
                continue
            if "Rome" in text and "None" not in text:
                return style
        return _ToolCallStyle(no_content="", parsed_arguments=True)


class _ToolCallStyle(NamedTuple):
    no_content: str | None  # where a turn has tool calls and no text
    parsed_arguments: bool  # an object, not JSON text


_TOOL_CALL_STYLES: Final = tuple(
    _ToolCallStyle(no_content, parsed_arguments)
    for parsed_arguments in (True, False)
    for no_content in (None, "")
)


def _text_of(content: Content | None) -> str | None:
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content


def _parse_arguments(text: str, param: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise invalid(param, f"{param} must be a JSON object, as text.") from None


def check_length(
    encoder: TextEncoder, text: str, max_model_len: int | None, prompt_field: str
) -> None:
    """Raise :class:`ApiError` (400) if ``text`` cannot fit the context, without reading it.

    ``max_model_len`` None lets every text pass.
    """
    if max_model_len is not None and (fewest := encoder.fewest_tokens(text)) >= max_model_len:
        raise invalid(
            prompt_field,
            f"This model holds {max_model_len} tokens of prompt and answer together; "
            f"{prompt_field} has at least {fewest} by its length alone. Shorten it.",
            code="context_length_exceeded",
        )


class Renderer(AbstractAsyncContextManager["Renderer"], Protocol):
    """Renders messages with one model's chat template, while its context lasts."""

    async def render(self, messages: Sequence[Message]) -> str:
        """The prompt up to where the assistant speaks. Raises :class:`ApiError`."""
        ...


async def encode_chat(
    encoder: TextEncoder,
    template: Renderer | None,
    messages: Sequence[Message],
    max_model_len: int | None = None,
) -> list[int]:
    """Token ids of a rendered chat. Raises :class:`ApiError`."""
    if template is None:
        raise invalid(
            "messages", "This model has no chat template; send a prompt to /v1/completions."
        )
    text = await template.render(messages)
    check_length(encoder, text, max_model_len, "messages")
    # The template writes the special tokens itself.
    [token_ids] = await encoder.encode([text], add_special_tokens=False)
    return token_ids


async def encode_texts(
    encoder: TextEncoder,
    texts: Sequence[str],
    max_model_len: int | None = None,
    *,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """Token ids of each text. Raises :class:`ApiError` (400)."""
    for text in texts:
        check_length(encoder, text, max_model_len, "prompt")
    return await encoder.encode(texts, add_special_tokens=add_special_tokens)
