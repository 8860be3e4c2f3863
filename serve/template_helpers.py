"""Chat templates in helper processes: downloading a model must not be enough to stop the server.

A few characters of a template can loop for ever or ask for all the memory there is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jinja2
import msgspec

from quire.serve.errors import ApiError, invalid
from quire.serve.helper_answers import Wording, answer_of
from quire.serve.helper_process import Refused
from quire.serve.helpers import HelperLimits, HelperPool
from quire.serve.openai_protocol import Message
from quire.serve.prompt import ChatTemplate, Ending, Rendered
from quire.serve.prompt_length import LengthLimit, details_of
from quire.serve.raw_body import LARGE_BODY, LargeMessages

# Conversations of 32 MiB take a second or two, for which no short one waits.
LIMITS: Final = HelperLimits(
    processes=2, waiting=256, seconds=10.0, memory=1 << 30, reserved=LARGE_BODY
)

_WORDING: Final = Wording(
    "messages",
    "Too many chats wait to be rendered",
    "The model's chat template could not render these messages",
    "The model's chat template cannot be used",
)


class _Setup(msgspec.Struct, frozen=True):
    source: str
    special_tokens: dict[str, str]


class _Large(msgspec.Struct, frozen=True):
    """Where the messages are in a body: see :class:`quire.serve.raw_body.LargeMessages`."""

    kind: str
    previous: list[dict[str, Any]]
    limit: LengthLimit | None


class _Chat(msgspec.Struct, frozen=True):
    messages: list[Message] | None  # None: those of a large body
    large: _Large | None
    tools: list[dict[str, Any]] | None
    switches: dict[str, Any]
    ending: Ending


def make_renderer(config: Any) -> Callable[..., list[Any]]:
    """The handler of helper processes: messages to a prompt, and what opens the answer."""
    setup = msgspec.convert(config, _Setup)

    @functools.cache
    def template() -> ChatTemplate:
        # Inside a job, whose time and memory are limited: compiling computes constants.
        return ChatTemplate(setup.source, setup.special_tokens)

    def render(request: Any, body: bytes = b"") -> list[Any]:
        chat = msgspec.convert(request, _Chat)
        messages: Sequence[Message] = chat.messages or []
        ignored: Sequence[str] = ()
        try:
            if chat.large is not None:
                messages, ignored = _messages_in(body, chat.large)
            rendered = template().render(messages, chat.tools, chat.switches, chat.ending)
            if chat.large is not None and chat.large.limit is not None:
                # What cannot fit is not even sent back.
                chat.large.limit.check(rendered.text, "messages")
            return [rendered.text, rendered.opening, ignored]
        except jinja2.TemplateError as error:
            broken = invalid("messages", f"The model's chat template is broken: {error}")
            raise Refused(details_of(broken)) from None
        except ApiError as error:
            raise Refused(details_of(error)) from None

    return render


def _messages_in(body: bytes, large: _Large) -> tuple[Sequence[Message], Sequence[str]]:
    """Raises :class:`ApiError` (400)."""
    # Only the helpers that get such bodies need all protocols.
    from quire.serve.request_kinds import KINDS

    kind = KINDS[large.kind]
    assert kind.messages is not None
    return kind.messages(kind.decode(body), large.previous)


class TemplateHelpers:
    """A :class:`quire.serve.prompt.Renderer` in processes of its own, from start to close.

    ``special_tokens`` are variables of the template: bos_token, eos_token and so on.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], limits: HelperLimits = LIMITS
    ) -> None:
        self.source = source
        setup = _Setup(source, dict(special_tokens))
        self._pool = HelperPool(
            "quire.serve.template_helpers:make_renderer", msgspec.to_builtins(setup), limits
        )

    async def __aenter__(self) -> TemplateHelpers:
        self._pool.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._pool.close()

    async def render(
        self,
        messages: Sequence[Message] | LargeMessages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, Any] | None = None,
        ending: Ending = "answer",
    ) -> Rendered:
        """Raises :class:`ApiError`: 400 for what the template does not take or does not end with,
        503 where too many wait."""
        large = messages if isinstance(messages, LargeMessages) else None
        where = large and {"kind": large.kind, "previous": large.previous, "limit": large.limit}
        request = {
            "messages": messages if large is None else None,
            "large": where,
            "tools": tools,
            "switches": switches or {},
            "ending": ending,
        }
        pieces = large.body.pieces if large else ()
        text, opening, ignored = await answer_of(self._pool, _WORDING, request, pieces)
        return Rendered(text, opening, ignored)
