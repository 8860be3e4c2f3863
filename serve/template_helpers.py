"""Chat templates in helper processes: downloading a model must not be enough to stop the server.

A few characters of a template can loop for ever or ask for all the memory there is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jinja2
import msgspec

from quire.serve.errors import ApiError, invalid, unavailable
from quire.serve.helper_process import Refused
from quire.serve.helpers import (
    HelperBusy,
    HelperCrashed,
    HelperError,
    HelperLimits,
    HelperOutOfMemory,
    HelperPool,
    HelperRefused,
    HelperTimeout,
)
from quire.serve.prompt import ChatTemplate, Ending, Rendered
from quire.serve.protocol import Message

# Conversations of 32 MiB take a second or two.
LIMITS: Final = HelperLimits(processes=2, waiting=256, seconds=10.0, memory=1 << 30)

_RETRY_AFTER: Final = 1  # seconds, where too many wait to be rendered


class _Setup(msgspec.Struct, frozen=True):
    source: str
    special_tokens: dict[str, str]


class _Chat(msgspec.Struct, frozen=True):
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    switches: dict[str, Any]
    ending: Ending


def make_renderer(config: Any) -> Callable[[Any], list[str]]:
    """The handler of helper processes: messages to a prompt, and what opens the answer."""
    setup = msgspec.convert(config, _Setup)

    @functools.cache
    def template() -> ChatTemplate:
        # Inside a job, whose time and memory are limited: compiling computes constants.
        return ChatTemplate(setup.source, setup.special_tokens)

    def render(request: Any) -> list[str]:
        chat = msgspec.convert(request, _Chat)
        try:
            rendered = template().render(chat.messages, chat.tools, chat.switches, chat.ending)
            return [rendered.text, rendered.opening]
        except ApiError as error:
            raise Refused([error.param, error.message]) from None
        except jinja2.TemplateError as error:
            raise Refused(["messages", f"The model's chat template is broken: {error}"]) from None

    return render


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
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, Any] | None = None,
        ending: Ending = "answer",
    ) -> Rendered:
        """Raises :class:`ApiError`: 400 for what the template does not take or does not end with,
        503 where too many wait."""
        request = msgspec.to_builtins(
            {
                "messages": messages,
                "tools": tools,
                "switches": switches or {},
                "ending": ending,
            }
        )
        try:
            try:
                text, opening = await self._pool.call(request)
            except HelperCrashed:  # perhaps it had died before
                text, opening = await self._pool.call(request)
        except HelperRefused as refused:
            param, message = refused.details
            raise invalid(param, message) from None
        except HelperBusy:
            raise unavailable(
                "Too many chats wait to be rendered; try again.", _RETRY_AFTER
            ) from None
        except (HelperTimeout, HelperOutOfMemory, HelperCrashed) as error:
            message = f"The model's chat template could not render these messages: {error}."
            raise invalid("messages", message) from None
        except HelperError as error:
            raise ApiError(500, f"The model's chat template cannot be used: {error}.") from None
        return Rendered(text, opening)
