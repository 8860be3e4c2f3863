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
from typing import Any, Final, Literal, NoReturn, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Struct

from quire.serve.errors import ApiError, invalid
from quire.serve.protocol import Message
from quire.serve.template_style import TemplateStyle, probe
from quire.serve.text_encoder import TextEncoder
from quire.serve.turns import turns_of
from quire.serve.written_calls import writer_of

_MAX_OPENINGS: Final = 64  # kept, one for each combination of switches

MAX_UNLIMITED_TEXT: Final = 4 * 2**20  # characters; to read one takes 150 bytes of memory
_MOST_CHARACTERS_PER_TOKEN: Final = 64

# How a prompt ends: where the assistant is to answer, in the last message, or behind it.
Ending = Literal["answer", "continued", "closed"]
_CONTINUED: Final = "\N{OBJECT REPLACEMENT CHARACTER}quire goes on here"


class Rendered(Struct, frozen=True):
    text: str  # the prompt up to where the assistant speaks
    opening: str = ""  # what the assistant goes on from, written by the template or a client


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
        self.source = source
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)
        self._openings: dict[str, str] = {}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, Any] | None = None,
        ending: Ending = "answer",
    ) -> Rendered:
        """The prompt up to where the assistant speaks. Raises :class:`ApiError` (400).

        ``switches`` are further variables of the template.
        """
        turns = turns_of(messages, self._style, writer_of(self.source))
        if ending == "continued":
            content: str = turns[-1]["content"] or ""
            turns[-1]["content"] = content + _CONTINUED
        try:
            text = self._render(turns, tools, switches, add_generation_prompt=ending == "answer")
        except MemoryError:  # the process that this runs in is at its end
            raise
        except Exception as error:
            # Whatever the model's template raises, it raises about these messages.
            raise invalid(
                "messages", f"The model's chat template refuses these messages: {error}"
            ) from error
        if ending == "answer":
            return Rendered(text, self.opening(switches or {}))
        if ending == "closed":
            return Rendered(text)
        text, found, _ = text.rpartition(_CONTINUED)
        if not found:
            raise invalid(
                "continue_final_message", "The model's chat template does not show that message."
            )
        return Rendered(text, content)

    def opening(self, switches: Mapping[str, Any]) -> str:
        """What the template writes for the assistant to go on from, its header included."""
        key = repr(sorted(switches.items()))
        if key not in self._openings:
            if len(self._openings) >= _MAX_OPENINGS:
                self._openings.clear()
            turns = [{"role": "user", "content": "?"}]
            try:
                whole = self._render(turns, None, switches)
                without = self._render(turns, None, switches, add_generation_prompt=False)
            except MemoryError:
                raise
            except Exception:  # it will say so about the real messages, too
                return ""
            self._openings[key] = whole.removeprefix(without)
        return self._openings[key]

    @functools.cached_property
    def _style(self) -> TemplateStyle:
        return probe(self.source, self._render)

    def _render(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        variables = {**(switches or {}), **self._special_tokens}
        return self._template.render(
            variables,
            messages=turns,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=None,
        )


def check_length(
    encoder: TextEncoder, text: str, max_model_len: int | None, prompt_field: str
) -> None:
    """Raise :class:`PromptTooLong` if ``text`` cannot fit the context, without reading it.

    ``max_model_len`` None: there is no context to fit, and only what would take too much memory to
    read is refused.
    """
    if max_model_len is None:
        if len(text) > MAX_UNLIMITED_TEXT:
            raise invalid(
                prompt_field,
                f"{prompt_field} has {len(text)} characters; send {MAX_UNLIMITED_TEXT} at a time.",
            )
        return
    # Nobody's tokens are that long on average, though some may be.
    fewest = max(encoder.fewest_tokens(text), len(text) // _MOST_CHARACTERS_PER_TOKEN)
    if fewest >= max_model_len:
        raise PromptTooLong(prompt_field, fewest, max_model_len)


class PromptTooLong(ApiError):
    """400, of a text whose length tells that it has ``fewest`` tokens or more."""

    def __init__(self, prompt_field: str, fewest: int, max_model_len: int) -> None:
        super().__init__(
            400,
            f"This model holds {max_model_len} tokens of prompt and answer together; "
            f"{prompt_field} has at least {fewest} by its length alone. Shorten it.",
            param=prompt_field,
            code="context_length_exceeded",
        )
        self.fewest = fewest


class Renderer(AbstractAsyncContextManager["Renderer"], Protocol):
    """Renders messages with one model's chat template, while its context lasts."""

    source: str

    async def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, Any] | None = None,
        ending: Ending = "answer",
    ) -> Rendered:
        """``switches`` are further variables of the template. Raises :class:`ApiError`."""
        ...


class ChatPrompt(Struct, frozen=True):
    token_ids: list[int]
    opening: str  # as in :class:`Rendered`


async def render_chat(
    template: Renderer | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    switches: Mapping[str, Any] | None = None,
    ending: Ending = "answer",
) -> Rendered:
    """The prompt of a chat, as text. Raises :class:`ApiError`."""
    if template is None:
        raise invalid(
            "messages", "This model has no chat template; send a prompt to /v1/completions."
        )
    return await template.render(messages, tools, switches, ending)


async def encode_chat(
    encoder: TextEncoder, rendered: Rendered, max_model_len: int | None = None
) -> ChatPrompt:
    """The prompt of a chat. Raises :class:`ApiError`."""
    check_length(encoder, rendered.text, max_model_len, "messages")
    # The template writes the special tokens itself.
    [token_ids] = await encoder.encode([rendered.text], add_special_tokens=False)
    return ChatPrompt(token_ids, rendered.opening)


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
