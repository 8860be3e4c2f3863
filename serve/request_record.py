"""What is known of one HTTP request on its way through the server, for its line in the log.

The middleware that makes the record leaves it in a context variable; tasks that are started for the
request inherit it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from quire.engine.messages import GenerateRequest
    from quire.serve.api_keys import ApiKey


MAX_BODY: Final = 8192  # bytes of a logged body


@dataclass(slots=True)
class Tokens:
    """Of all sequences of a request together."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


@dataclass(slots=True)
class RequestRecord:
    """Times are in seconds; ``started`` is on the monotonic clock."""

    id: str  # as in X-Request-Id: the client's word, so nothing is looked up by it
    client: str
    api_key: ApiKey | None = None
    model: str = ""
    error: str = ""  # why it was refused, or failed
    error_code: str = ""  # as in the answer
    body: bytes = b""  # as much as is logged where prompts are
    tokens: Tokens = field(default_factory=Tokens)
    first_sequence: GenerateRequest | None = None  # as it was submitted
    sequences: int = 0
    queue_seconds: float | None = None  # the longest of the sequences
    first_token_seconds: float | None = None  # from submission; the earliest
    finish_reasons: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    at_end: list[Callable[[], None]] = field(default_factory=list)

    def add_times(self, queue: float, first_token: float) -> None:
        self.queue_seconds = max(self.queue_seconds or 0.0, queue)
        earlier = self.first_token_seconds
        self.first_token_seconds = first_token if earlier is None else min(earlier, first_token)

    def add_sequence(self, prompt: int, cached: int, generated: int, reason: str) -> None:
        self.sequences += 1
        self.tokens.prompt += prompt
        self.tokens.cached += cached
        self.tokens.generated += generated
        if reason not in self.finish_reasons:
            self.finish_reasons.append(reason)


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)

begin = _current.set


def current() -> RequestRecord | None:
    """The record of the request that is being answered; None outside of one."""
    return _current.get()


def cache_salt(asked: str | None) -> str:
    """With whom the current request shares cached work: what it asks for, and its key's own."""
    record = _current.get()
    key = None if record is None else record.api_key
    return (asked or "") if key is None else f"{key.cache_salt}:{asked or ''}"


def note_error(message: str, code: str | None) -> None:
    """Why the current request is refused or fails; the first word counts."""
    if (record := _current.get()) is not None and not record.error:
        record.error, record.error_code = message, code or ""
