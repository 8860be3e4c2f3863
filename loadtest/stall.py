"""How long running streams stand still while a long prompt is taken in."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from random import Random

import msgspec

from quire.loadtest import environment
from quire.loadtest.chat import Answer, ServerError, Target, stream_chat
from quire.loadtest.records import RequestRecord
from quire.loadtest.results import StallResult
from quire.loadtest.stats import Distribution
from quire.loadtest.workloads import WorkloadSpec, conversations, words

_STREAM_PROMPT_CHARS = 64
_LONG_MAX_TOKENS = 2
_POLL_SECONDS = 0.01


class StallOptions(msgspec.Struct, frozen=True):
    streams: int = 8
    prompt_chars: int = 4000  # of the long prompt
    max_tokens: int = 2048  # of the running streams, which are closed when all is measured
    settle_chunks: int = 32  # that every stream receives before the long prompt is sent
    seed: int = 0


def _arrivals(record: RequestRecord) -> list[float]:
    return [record.start_ms + ms for ms in record.chunk_ms]


def gaps_between(arrivals: list[float], start: float, end: float) -> list[float]:
    """Gaps between consecutive arrivals, whole, that overlap the interval from start to end."""
    return [b - a for a, b in pairwise(arrivals) if b > start and a < end]


def _check_running(tasks: list[asyncio.Task[Answer]], records: list[RequestRecord]) -> None:
    for task, record in zip(tasks, records, strict=True):
        if task.done():
            why = record.error.message if record.error else f"finish {record.finish_reason}"
            raise ServerError(
                f"a running stream ended too early ({why}); try --ignore-eos or more --max-tokens"
            )


async def _until_all_have(
    count: int, after_ms: float, tasks: list[asyncio.Task[Answer]], records: list[RequestRecord]
) -> None:
    """Wait until every running stream has had ``count`` chunks later than ``after_ms``."""
    while any(
        len(record.chunk_ms) < count or _arrivals(record)[-count] <= after_ms for record in records
    ):
        _check_running(tasks, records)
        await asyncio.sleep(_POLL_SECONDS)


async def measure_stall(target: Target, server: str | None, options: StallOptions) -> StallResult:
    """Start the streams, let them settle, send the long prompt, and compare their gaps.

    Raises ValueError for impossible options, and ServerError where a request fails or a stream
    ends before the long prompt's first token.
    """
    if options.streams < 1 or options.prompt_chars < 1:
        raise ValueError("--streams and --prompt-chars must be at least 1")
    spec = WorkloadSpec(
        requests=options.streams,
        max_tokens=options.max_tokens,
        seed=options.seed,
        prompt_chars=_STREAM_PROMPT_CHARS,
    )
    epoch = time.perf_counter()
    records, tasks = [], []
    for index, conversation in enumerate(conversations(spec)):
        record = _record(index, len(conversation.turns[0]), options.max_tokens)
        records.append(record)
        tasks.append(
            asyncio.create_task(stream_chat(target, _user(conversation.turns[0]), record, epoch))
        )
    long = _record(options.streams, options.prompt_chars, _LONG_MAX_TOKENS)
    long_text = words(Random(f"{options.seed}/stall/long"), options.prompt_chars)
    try:
        await _until_all_have(1, 0.0, tasks, records)
        all_running = max(_arrivals(record)[0] for record in records)
        await _until_all_have(options.settle_chunks, all_running, tasks, records)
        await stream_chat(target, _user(long_text), long, epoch)
        if long.error is not None or long.ttft_ms is None:
            reason = long.error.message if long.error else "no text in the answer"
            raise ServerError(f"the long prompt failed: {reason}")
        first_token = long.start_ms + long.ttft_ms
        # One more chunk of each stream closes the gap that was open at that moment.
        await _until_all_have(1, first_token, tasks, records)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    arrivals = [_arrivals(record) for record in records]
    before = Distribution.of(
        gap for each in arrivals for gap in gaps_between(each, all_running, long.start_ms)
    )
    assert before is not None  # settle_chunks were received by every stream
    longest = [max(gaps_between(each, long.start_ms, first_token)) for each in arrivals]
    return StallResult(
        model=target.model,
        server=server,
        streams=options.streams,
        prompt_chars=options.prompt_chars,
        prompt_tokens=long.prompt_tokens,
        long_ttft_ms=long.ttft_ms,
        gap_before_ms=before,
        longest_gap_ms=max(longest),
        longest_gap_by_stream_ms=longest,
        records=[*records, long],
        environment=environment.describe(),
        command=environment.command_line(),
    )


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _record(index: int, chars: int, max_tokens: int) -> RequestRecord:
    return RequestRecord(
        index=index, client=index, turn=0, prompt_chars=chars, max_tokens=max_tokens, chunk_ms=[]
    )
