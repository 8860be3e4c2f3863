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

from quire.serve.errors import invalid
from quire.serve.openai_protocol import Message
from quire.serve.parsers.names import SWITCHES
from quire.serve.prompt_length import LengthLimit, length_limit
from quire.serve.raw_body import LargeMessages
from quire.serve.template_style import TemplateStyle, probe
from quire.serve.text_encoder import TextEncoder
from quire.serve.turns import turns_of
from quire.serve.written_calls import writer_of

_MAX_OPENINGS: Final = 64  # kept, one for each combination of switches

# How a prompt ends: where the assistant is to answer, in the last message, or behind it.
Ending = Literal["answer", "continued", "closed"]
_CONTINUED: Final = "\N{OBJECT REPLACEMENT CHARACTER}quire goes on here"


class Rendered(Struct, frozen=True):
    text: str  # the prompt up to where the assistant speaks
    opening: str = ""  # what the assistant goes on from, written by the template or a client
    ignored: Sequence[str] = ()  # parts of a large body that were passed over


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


def switches_read(source: str) -> tuple[str, ...]:
    """The switches of reasoning that a template reads. Nothing of it runs."""
    names = _environment().parse(source).find_all(nodes.Name)
    read = {name.name for name in names if name.ctx == "load"}
    return tuple(switch for switch in SWITCHES if switch in read)


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


class Renderer(AbstractAsyncContextManager["Renderer"], Protocol):
    """Renders messages with one model's chat template, while its context lasts."""

    source: str

    async def render(
        self,
        messages: Sequence[Message] | LargeMessages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, Any] | None = None,
        ending: Ending = "answer",
    ) -> Rendered:
        """``switches`` are further variables of the template. Raises :class:`ApiError`."""
        ...


class ChatPrompt(Struct, frozen=True):
    token_ids: list[int]
    opening: str  # as in :class:`Rendered`
    ignored: Sequence[str] = ()


async def render_chat(
    template: Renderer | None,
    messages: Sequence[Message] | LargeMessages,
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
    encoder: TextEncoder, rendered: Rendered, limit: LengthLimit, salt: str = ""
) -> ChatPrompt:
    """The prompt of a chat; ``salt`` tells apart who shares cached work. Raises
    :class:`ApiError`."""
    limit.check(rendered.text, "messages")
    token_ids = await encoder.encode_conversation(rendered.text, salt)
    return ChatPrompt(token_ids, rendered.opening, rendered.ignored)


async def encode_texts(
    encoder: TextEncoder,
    texts: Sequence[str],
    max_model_len: int | None = None,
    *,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """Token ids of each text. Raises :class:`ApiError` (400)."""
    limit = length_limit(encoder, max_model_len)
    for text in texts:
        limit.check(text, "prompt")
    return await encoder.encode(texts, add_special_tokens=add_special_tokens)
