from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.loadtest.records import RequestError, RequestRecord
from quire.loadtest.stats import Distribution, percentile, summarize

FLOATS = st.floats(0, 1e9, allow_nan=False)


@given(st.lists(FLOATS, min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    expected = float(np.percentile(values, q))
    assert percentile(sorted(values), q) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("values", "q"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentiles_of_nothing_are_refused(values: list[float], q: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, q)


def test_a_distribution_does_not_need_sorted_values() -> None:
    found = Distribution.of([3.0, 1.0, 2.0])
    assert found is not None
    assert (found.count, found.mean, found.p50, found.max) == (3, 2.0, 2.0, 3.0)
    assert Distribution.of([]) is None


def _record(
    chunks: list[float], tokens: int | None = None, error: RequestError | None = None
) -> RequestRecord:
    return RequestRecord(
        index=0,
        client=0,
        turn=0,
        prompt_chars=5,
        max_tokens=9,
        chunk_ms=chunks,
        end_ms=100.0,
        prompt_tokens=None if tokens is None else 10,
        completion_tokens=tokens,
        error=error,
    )


def test_figures_of_a_run() -> None:
    records = [_record([10.0, 12.0, 16.0], 3), _record([20.0, 21.0], 4)]
    records[0].cached_tokens = 6
    summary = summarize(records, wall_s=2.0, requests_planned=2)
    assert summary.tokens_counted_from == "usage"
    assert summary.output_tokens == 7  # the usage block, not the number of chunks
    assert summary.output_tokens_per_s == pytest.approx(3.5)
    assert summary.total_tokens_per_s == pytest.approx(13.5)
    assert summary.requests_per_s == pytest.approx(1.0)
    assert summary.cached_prompt_tokens == 6
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.p50 == pytest.approx(15.0)
    assert summary.itl_ms is not None
    assert (summary.itl_ms.count, summary.itl_ms.max) == (3, 4.0)
    assert summary.tpot_ms is not None
    assert summary.tpot_ms.max == pytest.approx(3.0)
    assert summary.tpot_ms.mean == pytest.approx((3.0 + 1 / 3) / 2)
    assert summary.e2e_ms is not None
    assert summary.e2e_ms.p50 == pytest.approx(100.0)


def test_one_answer_without_usage_makes_the_run_count_chunks() -> None:
    summary = summarize([_record([1.0, 2.0], 5), _record([1.0])], 1.0, 2)
    assert summary.tokens_counted_from == "chunks"
    assert summary.output_tokens == 3
    assert summary.prompt_tokens is None
    assert summary.total_tokens_per_s is None


def test_failed_requests_count_as_errors_only() -> None:
    records = [
        _record([1.0, 2.0], 2),
        _record([1.0, 500.0], 9, RequestError("truncated", "cut")),
        _record([], error=RequestError("http", "loading", 503)),
        _record([], error=RequestError("http", "full", 429)),
        _record([], error=RequestError("http", "loading", 503)),
    ]
    summary = summarize(records, 1.0, requests_planned=6)
    assert (summary.requests_planned, summary.requests_completed) == (6, 1)
    assert summary.errors == {"truncated": 1, "http 503": 2, "http 429": 1}
    assert summary.output_tokens == 2
    assert summary.itl_ms is not None
    assert summary.itl_ms.max == pytest.approx(1.0)


def test_a_run_in_which_all_fails_has_no_latencies() -> None:
    summary = summarize([_record([], error=RequestError("connect", "refused"))], 0.5, 1)
    assert summary.output_tokens_per_s == 0
    assert summary.ttft_ms is summary.itl_ms is summary.tpot_ms is summary.e2e_ms is None
