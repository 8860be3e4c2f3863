"""Attention over pages against attention written out in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.heads import Scoring
from quire.kernels.kv_write import Slots, scatter
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import ExtraScores, paged_attention
from quire.kernels.ragged import DecodeGroup, PromptChunk, RaggedBatch

FLOAT32_TOLERANCE = 1e-5


class Case:
    """Random contiguous keys and values per sequence, and the same in shuffled pages."""

    def __init__(
        self,
        contexts: list[tuple[int, int]],  # (context length, query rows)
        *,
        block_size: int = 8,
        kv_heads: int = 2,
        group: int = 2,
        head_dim: int = 16,
        value_dim: int | None = None,
        extra_dim: int = 0,
        seed: int = 0,
        dtype: mx.Dtype = mx.float32,
    ) -> None:
        rng = np.random.default_rng(seed)
        value_dim = value_dim or head_dim
        # Decodes first and in order of length, as the runner sorts them.
        contexts = sorted(contexts, key=lambda c: (c[1] > 1, c[0]))
        needed = [-(-length // block_size) for length, _ in contexts]
        num_blocks = sum(needed) + 3
        ids = rng.permutation(np.arange(1, num_blocks))[: sum(needed)].astype(np.int32)
        tables = np.split(ids, np.cumsum(needed)[:-1])

        def pages(dim: int) -> np.ndarray:
            # Garbage where nothing was written: it must not reach any output.
            return np.full((num_blocks, kv_heads, block_size, dim), 1e4)

        self.kp, self.vp, self.ep = pages(head_dim), pages(value_dim), pages(max(1, extra_dim))
        self.heads, self.extra_dim = kv_heads * group, extra_dim
        self.rows: list[tuple[np.ndarray, ...]] = []
        queries, extra_queries = [], []
        decodes: list[tuple[int, np.ndarray]] = []
        chunks = []
        for (length, num_rows), table in zip(contexts, tables, strict=True):
            k = rng.normal(size=(length, kv_heads, head_dim))
            v = rng.normal(size=(length, kv_heads, value_dim))
            e = rng.normal(size=(length, kv_heads, max(1, extra_dim)))
            for p in range(length):
                at = (table[p // block_size], slice(None), p % block_size)
                self.kp[at], self.vp[at], self.ep[at] = k[p], v[p], e[p]
            q = rng.normal(size=(num_rows, self.heads, head_dim))
            eq = rng.normal(size=(num_rows, self.heads, max(1, extra_dim)))
            for row in range(num_rows):
                seen = length - num_rows + row + 1
                self.rows.append((q[row], eq[row], k[:seen], v[:seen], e[:seen]))
            if num_rows == 1:
                decodes.append((length, table))
            else:
                chunks.append(PromptChunk(len(queries), num_rows, length, table))
            queries += list(q)
            extra_queries += list(eq)
        groups = []
        if decodes:
            padded = np.zeros((len(decodes), max(len(t) for _, t in decodes)), np.int32)
            for row, (_, table) in enumerate(decodes):
                padded[row, : len(table)] = table
            groups = [DecodeGroup(0, np.array([n for n, _ in decodes], np.int32), padded)]
        self.batch = RaggedBatch(groups, chunks)
        self.queries = mx.array(np.array(queries)[:, :, None]).astype(dtype)
        self.extra_queries = mx.array(np.array(extra_queries)[:, :, None]).astype(dtype)
        self.dtype = dtype

    def run(
        self, window: int | None = None, sinks: np.ndarray | None = None, scale: float = 0.3
    ) -> np.ndarray:
        def array(values: np.ndarray) -> mx.array:
            return mx.array(values).astype(self.dtype)

        extra = ExtraScores(self.extra_queries, array(self.ep)) if self.extra_dim else None
        out = paged_attention(
            self.queries,
            PageArrays(array(self.kp), array(self.vp)),
            self.batch,
            Scoring(scale, window, None if sinks is None else array(sinks)),
            extra,
        )
        return np.array(out.astype(mx.float32))[:, :, 0]

    def expected(
        self, window: int | None = None, sinks: np.ndarray | None = None, scale: float = 0.3
    ) -> np.ndarray:
        outputs = []
        for q, eq, k, v, e in self.rows:
            first = 0 if window is None else max(0, len(k) - window)
            group = self.heads // k.shape[1]
            per_head = []
            for head in range(self.heads):
                kv = head // group
                scores = scale * (k[first:, kv] @ q[head])
                if self.extra_dim:
                    scores = scores + e[first:, kv] @ eq[head]
                if sinks is not None:
                    scores = np.append(scores, sinks[head])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                per_head.append(weights[: len(k) - first] @ v[first:, kv])
            outputs.append(per_head)
        return np.array(outputs)


def assert_close(case: Case, tolerance: float = FLOAT32_TOLERANCE, **options: object) -> None:
    got, expected = case.run(**options), case.expected(**options)  # type: ignore[arg-type]
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@settings(max_examples=80, deadline=None)
@given(
    contexts=st.lists(
        st.integers(1, 60).flatmap(
            lambda n: st.tuples(st.just(n), st.one_of(st.just(1), st.integers(1, n)))
        ),
        min_size=1,
        max_size=6,
    ),
    block_size=st.sampled_from([1, 4, 8, 16]),
    kv_heads=st.sampled_from([1, 3]),
    group=st.sampled_from([1, 4]),
    dims=st.sampled_from([(16, 16, 0), (24, 8, 0), (16, 16, 4)]),
    window=st.one_of(st.none(), st.integers(1, 40)),
    with_sinks=st.booleans(),
    seed=st.integers(0, 10),
)
def test_any_ragged_batch(
    contexts: list[tuple[int, int]],
    block_size: int,
    kv_heads: int,
    group: int,
    dims: tuple[int, int, int],
    window: int | None,
    with_sinks: bool,
    seed: int,
) -> None:
    head_dim, value_dim, extra_dim = dims
    case = Case(
        contexts,
        block_size=block_size,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        value_dim=value_dim,
        extra_dim=extra_dim,
        seed=seed,
    )
    sinks = np.random.default_rng(seed).normal(size=case.heads) if with_sinks else None
    assert_close(case, window=window, sinks=sinks)


@pytest.mark.parametrize("window", [None, 1, 8, 9, 16, 17, 200])
def test_a_long_prompt_is_tiled_without_a_seam(window: int | None) -> None:
    assert_close(Case([(900, 700), (300, 300), (33, 1)]), window=window)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 5e-3), (mx.bfloat16, 4e-2)])
def test_half_precision(dtype: mx.Dtype, tolerance: float) -> None:
    assert_close(Case([(40, 1), (17, 1), (50, 20)], dtype=dtype), tolerance)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("extra_dim", [0, 4])
def test_a_shared_prefix_is_read_once_with_the_same_result(
    window: int | None, with_sinks: bool, extra_dim: int
) -> None:
    case = Case([(40, 1), (45, 1), (60, 1)], extra_dim=extra_dim)
    # The last sequence's first four blocks become everybody's.
    group = case.batch.groups[0]
    group.block_tables[:, :4] = group.block_tables[2, :4]
    own = case.rows[2]
    case.rows = [
        (
            q,
            eq,
            *(
                np.concatenate([full[:32], part[32:]])
                for full, part in zip(own[2:], kve, strict=True)
            ),
        )
        for q, eq, *kve in case.rows
    ]
    sinks = np.linspace(-1, 2, case.heads) if with_sinks else None
    assert_close(case, window=window, sinks=sinks)
    group.num_shared_blocks = 4
    group.views.clear()
    assert_close(case, window=window, sinks=sinks)


def test_a_window_sees_exactly_its_width() -> None:
    case = Case([(40, 1)], seed=3)
    at_window = case.expected(window=12)
    assert np.abs(case.run(window=12) - at_window).max() < FLOAT32_TOLERANCE
    for other in (11, 13):
        assert np.abs(case.run(window=other) - at_window).max() > 1e-3


def test_writes_reach_their_slots_only() -> None:
    pages = mx.zeros((5, 3, 4, 2))
    rows = mx.arange(2 * 3 * 2, dtype=mx.float32).reshape(2, 3, 1, 2) + 1
    scatter(pages, rows, Slots(mx.array([3 * 4 + 0, 1 * 4 + 2]), block_size=4))
    expected = np.zeros((5, 3, 4, 2), np.float32)
    expected[3, :, 0], expected[1, :, 2] = np.array(rows)[:, :, 0]
    assert np.array_equal(np.array(pages), expected)
