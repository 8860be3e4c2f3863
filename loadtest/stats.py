"""From request records to the figures people compare."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from quire.loadtest.records import RequestRecord


def percentile(ordered: Sequence[float], q: float) -> float:
    """The ``q``-th percentile (0-100) of ascending values, linear between neighbours.

    This is numpy's default definition. Raises ValueError for no values or ``q`` out of range.
    """
    if not ordered:
        raise ValueError("percentile of no values")
    if not 0 <= q <= 100:
        raise ValueError(f"a percentile lies between 0 and 100, not {q}")
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


class Median(NamedTuple):
    """A median and an interval that holds the true one with 95% probability or more."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Median:
        """By the order of the values alone, whatever their distribution (the sign test's interval).

        Of fewer than six values no interval has 95%: it is that of all of them.
        """
        ordered = sorted(values)
        count = len(ordered)
        tail, rank = 0.5**count, 0
        while rank + 1 < count / 2 and tail + math.comb(count, rank + 1) * 0.5**count <= 0.025:
            rank += 1
            tail += math.comb(count, rank) * 0.5**count
        return cls(percentile(ordered, 50), ordered[rank], ordered[-1 - rank])

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Distribution(msgspec.Struct, frozen=True):
    """Summary of one kind of latency, in milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None where there are no values: a missing figure is not a zero."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            count=len(ordered),
            mean=math.fsum(ordered) / len(ordered),
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p99=percentile(ordered, 99),
            max=ordered[-1],
        )


class LoadSummary(msgspec.Struct, frozen=True):
    """Figures of one run. Tokens and latencies count completed requests only."""

    requests_planned: int
    requests_completed: int
    errors: dict[str, int]
    wall_s: float  # first request sent to last stream ended
    tokens_counted_from: Literal["usage", "chunks"]
    output_tokens: int
    prompt_tokens: int | None  # None where the server gives no usage
    cached_prompt_tokens: int | None
    output_tokens_per_s: float
    total_tokens_per_s: float | None
    requests_per_s: float
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    tpot_ms: Distribution | None  # per request: (last - first chunk) / (output tokens - 1)
    e2e_ms: Distribution | None
    # Of later turns, what had been the prompt of the turn before: a prefix cache can know it.
    repeated_prompt_tokens: int | None = None
    # That another request had computed before, in whole blocks; None: not counted.
    cacheable_prompt_tokens: int | None = None


def _repeated(records: Iterable[RequestRecord]) -> int:
    prompts = {(record.index, record.turn): record.prompt_tokens or 0 for record in records}
    return sum(prompts.get((index, turn - 1), 0) for index, turn in prompts)


def _time_per_output_token(record: RequestRecord, tokens: int) -> float | None:
    if tokens < 2 or len(record.chunk_ms) < 2:
        return None
    return (record.chunk_ms[-1] - record.chunk_ms[0]) / (tokens - 1)


def summarize(
    records: Sequence[RequestRecord], wall_s: float, requests_planned: int
) -> LoadSummary:
    """Reduce one run's records; ``wall_s`` is the duration of the whole run in seconds."""
    done = [record for record in records if record.error is None]
    counts = [record.completion_tokens for record in done]
    # One way of counting for the whole run: a mixture would compare with nothing.
    from_usage = all(count is not None for count in counts) and bool(done)
    tokens = [
        record.completion_tokens or 0 if from_usage else len(record.chunk_ms) for record in done
    ]
    prompt_tokens = sum(record.prompt_tokens or 0 for record in done) if from_usage else None
    cached = [record.cached_tokens for record in done if record.cached_tokens is not None]
    known = [record.cacheable_tokens for record in done if record.cacheable_tokens is not None]
    output_tokens = sum(tokens)
    per_s = 1 / wall_s if wall_s > 0 else 0.0
    tpot = (_time_per_output_token(record, n) for record, n in zip(done, tokens, strict=True))
    return LoadSummary(
        requests_planned=requests_planned,
        requests_completed=len(done),
        errors=dict(Counter(record.error.label for record in records if record.error)),
        wall_s=wall_s,
        tokens_counted_from="usage" if from_usage else "chunks",
        output_tokens=output_tokens,
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=sum(cached) if cached else None,
        output_tokens_per_s=output_tokens * per_s,
        total_tokens_per_s=(
            None if prompt_tokens is None else (output_tokens + prompt_tokens) * per_s
        ),
        requests_per_s=len(done) * per_s,
        ttft_ms=Distribution.of(r.ttft_ms for r in done if r.ttft_ms is not None),
        itl_ms=Distribution.of(gap for record in done for gap in record.gaps_ms),
        tpot_ms=Distribution.of(value for value in tpot if value is not None),
        e2e_ms=Distribution.of(record.end_ms for record in done),
        repeated_prompt_tokens=_repeated(done) if from_usage else None,
        cacheable_prompt_tokens=sum(known) if known else None,
    )


def number(value: float | None) -> str:
    """Three significant digits or a whole number; a dash for a figure that is missing."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
