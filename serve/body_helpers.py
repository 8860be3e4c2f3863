"""Large bodies in helper processes: to decode 32 MiB would hold up every stream for a second.

A helper decodes and checks a body, and hands back the request without its prompt. Which model is
wanted is known then, and whether it takes the request; only after that the prompt is looked at,
again in a helper, which gets the same bytes: here, or with the model's chat template in
:mod:`quire.serve.template_helpers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec
from starlette.requests import Request

from quire.serve.disconnect import unless_disconnected
from quire.serve.errors import ApiError, invalid
from quire.serve.helper_answers import Wording, answer_of
from quire.serve.helper_process import Refused
from quire.serve.helpers import HelperLimits, HelperPool
from quire.serve.middleware import read_json
from quire.serve.prompt_length import LengthLimit, details_of
from quire.serve.raw_body import LARGE_BODY, LargeMessages, RawBody
from quire.serve.request_kinds import KINDS, RequestKind

# One, started for the first large body: few servers ever see two at once.
LIMITS: Final = HelperLimits(processes=1, waiting=256, seconds=10.0, memory=1 << 30, eager=False)

_UNREAD: Final = "The body could not be read"
_WORDING: Final = Wording(None, "Too many large bodies wait", _UNREAD, _UNREAD)
# Of a request without its prompt: this process decodes it.
_MAX_REST: Final = 2 * 2**20

T = TypeVar("T", bound=msgspec.Struct)
Texts = Sequence[str | list[int]]


class _Job(msgspec.Struct, frozen=True):
    kind: str
    part: Literal["rest", "texts"]
    limit: LengthLimit | None = None  # of each text
    field: str = ""  # that has the texts, for errors


def make_reader(config: None) -> Callable[[Any, bytes], Any]:
    """The handler of helper processes: a body to a request without its prompt, or to its texts."""

    def read(request: Any, body: bytes = b"") -> Any:
        job = msgspec.convert(request, _Job)
        kind = KINDS[job.kind]
        try:
            whole = kind.decode(body)
            if job.part == "rest":
                return _rest(kind.without_prompt(whole))
            assert kind.texts is not None
            texts = kind.texts(whole)
            for text in texts:
                if job.limit is not None and isinstance(text, str):
                    job.limit.check(text, job.field)
            return texts
        except ApiError as error:
            raise Refused(details_of(error)) from None

    return read


def _rest(request: msgspec.Struct) -> msgspec.Raw:
    rest = msgspec.json.encode(request)
    if len(rest) > _MAX_REST:
        raise invalid(
            None, f"The fields beside the prompt have {len(rest)} bytes; {_MAX_REST} are allowed."
        )
    return msgspec.Raw(rest)


class BodyHelpers:
    """Helper processes that read bodies, from start to close."""

    def __init__(self, limits: HelperLimits = LIMITS) -> None:
        self._pool = HelperPool("quire.serve.body_helpers:make_reader", None, limits)

    async def __aenter__(self) -> BodyHelpers:
        self._pool.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._pool.close()

    async def rest(self, kind: RequestKind[T], body: RawBody) -> T:
        """The checked request with a stand-in for its prompt.

        Raises :class:`ApiError`: what decoding it here would raise, and 503 where too many wait.
        """
        rest = await self._call(_Job(kind.name, "rest"), body)
        return msgspec.convert(rest, kind.type, str_keys=True)

    async def texts(
        self, kind: RequestKind[T], body: RawBody, limit: LengthLimit, field: str
    ) -> Texts:
        """Its prompts, each within ``limit``. Raises :class:`ApiError` as :meth:`rest` does."""
        texts: Texts = await self._call(_Job(kind.name, "texts", limit, field), body)
        return texts

    async def _call(self, job: _Job, body: RawBody) -> Any:
        return await answer_of(self._pool, _WORDING, job, body.pieces)


@dataclass(frozen=True)
class Received(Generic[T]):
    """A request, whose prompt is a stand-in where it is large."""

    request: T
    kind: RequestKind[T]
    body: RawBody
    is_large: bool = False

    @property
    def messages(self) -> LargeMessages | None:
        """Where the messages are that the request has a stand-in for; None: it has its own."""
        return LargeMessages(self.body, self.kind.name) if self.is_large else None


class RequestReader(Generic[T]):
    """Reads the requests of one API."""

    def __init__(self, kind: RequestKind[T], helpers: BodyHelpers | None) -> None:
        """``helpers`` None: bodies of all sizes are decoded in this process."""
        self._kind = kind
        self._helpers = helpers

    async def read(self, request: Request) -> Received[T]:
        """Raises :class:`ApiError` and :class:`ClientDisconnect`."""
        body = await read_json(request)
        if self._helpers is None or body.size < LARGE_BODY:
            return Received(self._kind.decode(body.whole()), self._kind, body)
        rest = await unless_disconnected(request, self._helpers.rest(self._kind, body))
        return Received(rest, self._kind, body, is_large=True)

    def after(self, received: Received[T], num_bytes: int) -> Received[T]:
        """The same; large if it is so together with ``num_bytes`` of a conversation before it."""
        if self._helpers is None or num_bytes + received.body.size < LARGE_BODY:
            return received
        return replace(received, request=self._kind.without_prompt(received.request), is_large=True)

    async def texts(self, received: Received[T], limit: LengthLimit, field: str) -> Texts:
        """The prompts, those of a large body each within ``limit``. Raises :class:`ApiError`."""
        if not received.is_large:
            assert self._kind.texts is not None
            return self._kind.texts(received.request)
        assert self._helpers is not None
        return await self._helpers.texts(self._kind, received.body, limit, field)
