"""What is kept of one request: times, token counts and, where it failed, why."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import msgspec

ErrorKind = Literal[
    "connect",  # no connection could be opened
    "http",  # an answer other than 200
    "stream",  # an error event inside the stream
    "truncated",  # the connection ended before the stream did
    "protocol",  # bytes that are not HTTP, server-sent events or a completion chunk
    "timeout",
]


class RequestError(msgspec.Struct, frozen=True):
    kind: ErrorKind
    message: str
    status: int | None = None  # of the HTTP answer, where there was one

    @property
    def label(self) -> str:
        """The name errors are counted under: ``http 503``, ``truncated``, ..."""
        return f"{self.kind} {self.status}" if self.kind == "http" else self.kind


class RequestRecord(msgspec.Struct):
    """One request as the client saw it. Filled in while the answer arrives."""

    index: int  # position of the conversation in the workload
    client: int
    turn: int
    prompt_chars: int  # of all messages sent
    max_tokens: int
    start_ms: float = 0.0  # since the measurement began
    chunk_ms: list[float] = []  # arrival of each chunk that has tokens, since this request began
    end_ms: float = 0.0  # end of the stream or the failure, since this request began
    prompt_tokens: int | None = None  # from the usage block, as are the two below
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    cacheable_tokens: int | None = None  # see :func:`quire.loadtest.cacheable.count_cacheable`
    finish_reason: str | None = None
    answer_digest: str | None = None  # 16 hex digits; equal answers have equal digests
    error: RequestError | None = None

    @property
    def ttft_ms(self) -> float | None:
        return self.chunk_ms[0] if self.chunk_ms else None

    @property
    def gaps_ms(self) -> list[float]:
        """Times between consecutive text chunks: the inter-token latencies of this stream."""
        return [b - a for a, b in pairwise(self.chunk_ms)]
