"""Prompt chunks brought to attention alone or padded together give the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import paged_prompt as tiles
from quire.kernels import prompt_attention as prompts
from quire.kernels.heads import Heads, Scoring
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import paged_attention
from quire.kernels.paged_prompt import TiledChunks
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptProblem, PromptShape
from quire.kernels.prompt_plan import PromptVariant, plan_prompts
from quire.kernels.ragged import PromptChunk, RaggedBatch
from quire.kernels.tree import to_device

BLOCK, HEADS, KV_HEADS, DIM = 8, 4, 2, 16
LAYER = Heads(HEADS, KV_HEADS, DIM, DIM, window=None, sinks=False, dtype=mx.float16)


def gather(pages: PageArrays, blocks: mx.array) -> tuple[mx.array, mx.array]:
    """What the kernel does, in MLX."""

    def join(pages: mx.array) -> mx.array:
        found = pages[blocks].swapaxes(1, 2)
        return found.reshape(blocks.shape[0], KV_HEADS, -1, DIM)

    return join(pages.keys), join(pages.values)


def follow_items(
    queries: mx.array, pages: PageArrays, chunks: TiledChunks, scoring: Scoring
) -> mx.array:
    """What the kernels do, item by item, in NumPy."""
    keys, values = (np.array(array).transpose(0, 2, 1, 3) for array in pages[:2])
    results = np.full((chunks.num_results, HEADS, DIM), np.nan)
    peaks, totals = np.zeros((2, chunks.num_results, HEADS))
    for row, count, start, table, begin, end, first, step in np.array(chunks.items).tolist():
        blocks = np.array(chunks.block_tables)[table]
        context = keys[blocks].reshape(-1, KV_HEADS, DIM), values[blocks].reshape(-1, KV_HEADS, DIM)
        for token in range(count):
            low = max(begin, start + token + 1 - (scoring.window or 1 << 30))
            seen = slice(low, max(low, min(end, start + token + 1)))
            for head in range(HEADS):
                k, v = (each[seen, head * KV_HEADS // HEADS] for each in context)
                scores = k @ np.array(queries[row + token, head, 0]) * scoring.scale
                at = first + token * step, head
                peaks[at] = scores.max(initial=-1e30)
                weights = np.exp(scores - peaks[at])
                totals[at], results[at] = weights.sum(), weights @ v
    firsts = range(chunks.num_rows + 1) if chunks.first_items is None else chunks.first_items
    bounds = [int(first) for first in firsts]
    merged = np.zeros((chunks.num_rows, HEADS, 1, DIM), np.float32)
    for row, (low, high) in enumerate(pairwise(bounds)):
        factors = np.exp(peaks[low:high] - peaks[low:high].max(axis=0))
        total = (factors * totals[low:high]).sum(axis=0)
        weighed = (factors[:, :, None] * results[low:high]).sum(axis=0)
        merged[row, :, 0] = weighed / np.where(total > 0, total, 1)[:, None]
    return mx.array(merged)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "paged_prompt", follow_items)
    monkeypatch.setattr(prompts, "gather_context", gather)
    monkeypatch.setattr(prompts, "take_rows", lambda arrays, rows: [x[rows] for x in arrays])
    monkeypatch.setattr(prompts, "join_rows", lambda a, b, rows: mx.concatenate([a, b])[rows])


@contextmanager
def pieces(scores: int) -> Iterator[None]:
    """Attention of chunks that go alone keeps no more scores than those."""
    with (
        mock.patch.object(prompts, "_MAX_FUSED_DIM", 0),
        mock.patch.object(prompts, "_MAX_SCORES", scores),
    ):
        yield


def rows_of(pages: mx.array, chunks: list[PromptChunk], num_rows: int) -> mx.array:
    """(T, kv_heads, 1, dim): what this step has just written to the pages."""
    rows = np.zeros((num_rows, KV_HEADS, 1, DIM), np.float32)
    flat = np.array(pages).transpose(0, 2, 1, 3).reshape(-1, KV_HEADS, DIM)
    for chunk in chunks:
        positions = np.arange(chunk.start, chunk.context_length)
        slots = chunk.block_ids[positions // BLOCK] * BLOCK + positions % BLOCK
        rows[chunk.first_row : chunk.first_row + chunk.num_rows, :, 0] = flat[slots]
    return mx.array(rows)


starts = st.just(0) | st.integers(0, 300)
lengths = st.lists(st.tuples(starts, st.integers(1, 300)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    lengths,
    st.sampled_from([None, 1, 40, 400]),
    st.lists(
        st.sampled_from(
            [PromptVariant.PAGED_KERNEL, PromptVariant.SDPA_PADDED, PromptVariant.SDPA_PER_CHUNK]
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 5),
    st.sampled_from([0, 7]),
    st.booleans(),
    st.sampled_from([mx.float32, mx.bfloat16]),
    st.booleans(),
)
def test_every_row_sees_its_own_context(
    sizes: list[tuple[int, int]],
    window: int | None,
    variants: list[PromptVariant],
    num_before: int,
    num_after: int,
    rows_at_hand: bool,
    planned_dtype: mx.Dtype,
    in_pieces: bool,
) -> None:
    rng = np.random.default_rng(0)
    chunks, row, next_block = [], num_before, 1
    for start, count in sizes:
        num_blocks = -(-(start + count) // BLOCK)
        blocks = np.arange(next_block, next_block + num_blocks, dtype=np.int32)
        next_block += num_blocks
        chunks.append(PromptChunk(row, count, start + count, rng.permutation(blocks)))
        row += count
    keys, values = (
        mx.array(rng.standard_normal((next_block, KV_HEADS, BLOCK, DIM)).astype(np.float32))
        for _ in range(2)
    )
    queries = mx.array(rng.standard_normal((row + num_after, HEADS, 1, DIM)).astype(np.float32))
    before = None
    if num_before:
        before = mx.array(rng.standard_normal((num_before, HEADS, 1, DIM)).astype(np.float32))
    # Whatever mixture of variants is chosen: by the chunk's length.
    plan = plan_prompts(
        chunks,
        LAYER._replace(window=window, dtype=planned_dtype),
        BLOCK,
        lambda chunk: variants[chunk.num_rows % len(variants)],
        num_before=num_before,
        num_padding_rows=num_after,
    )
    plan = to_device(plan)
    new = (rows_of(keys, chunks, row), rows_of(values, chunks, row))
    at_hand = new if rows_at_hand else (None, None)
    pages = PageArrays(keys, values, mx.zeros((1,)), *at_hand)
    scoring = Scoring(0.3, window)
    with pieces(HEADS * 1000) if in_pieces else nullcontext():
        got = prompts.prompt_attention(queries, pages, plan, scoring, before=before)
    expected = paged_attention(queries, pages, RaggedBatch([], chunks), scoring)
    if before is not None:
        expected = mx.concatenate([before, expected])
    assert got.shape == (row + num_after, HEADS, 1, DIM)
    assert mx.abs(got[:row] - expected).max().item() < 1e-5


@pytest.mark.parametrize(
    ("rows", "start", "at_once", "expected_rows"),
    [
        (21, 0, 8, [8, 8, 5]),
        (21, 31, 8, [8, 8, 5]),
        (150, 16, 70, [64, 64, 22]),  # products of odd numbers of keys are slow
    ],
)
def test_latent_attention_goes_in_pieces(
    rows: int, start: int, at_once: int, expected_rows: list[int]
) -> None:
    shape = PromptShape(rows, rows + start, 5, 1, 32, 32, 8, from_start=start == 0, extra_dim=16)
    num_keys = rows if start == 0 else -(-shape.context // 16) * 16
    problem = PromptProblem(shape, mx.float32, 0, ragged=False)
    variant = PROMPT_ATTENTION.variants[PromptVariant.SDPA_PIECES]
    with (
        mock.patch.object(prompts, "gather_context", gather_latent),
        pieces(5 * num_keys * at_once),
        mock.patch.object(prompts, "_latent_attention", wraps=prompts._latent_attention) as calls,
    ):
        (found,) = variant.run(problem, {})
    assert [len(call.args[0]) for call in calls.call_args_list] == expected_rows
    (expected,) = problem.expected()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def gather_latent(pages: PageArrays, blocks: mx.array) -> tuple[mx.array, mx.array]:
    keys, values = (array[blocks[0]].swapaxes(0, 1).flatten(1, 2)[None] for array in pages[:2])
    return keys, values


def test_short_chunks_of_many_lengths_are_one_batch() -> None:
    counts = [100, 412, 256, 37, 475, 300, 212, 256]
    starts = np.cumsum([0, *counts])
    chunks = [
        PromptChunk(int(first), n, n, np.zeros(-(-n // BLOCK), np.int32))
        for first, n in zip(starts[:-1], counts, strict=True)
    ]
    plan = plan_prompts(chunks, LAYER, BLOCK, lambda _: PromptVariant.SDPA_PADDED)
    assert len(plan.padded) == 1
    assert not plan.alone


def test_a_long_aligned_chunk_goes_alone() -> None:
    chunk = PromptChunk(0, 2048, 4096, np.zeros(512, np.int32))
    plan = plan_prompts([chunk], LAYER, BLOCK, lambda _: PromptVariant.SDPA_PADDED)
    assert plan.alone == [chunk]
    assert plan.order is None


def test_a_short_chunk_after_a_long_context_fills_the_device() -> None:
    chunk = PromptChunk(0, 3, 9000, np.arange(1, 1126, dtype=np.int32))
    heads = LAYER._replace(heads=32, kv_heads=8)
    tiled = tiles.tile_chunks([chunk], heads)
    assert tiled.first_items is not None
    assert tiled.items.shape[0] * 8 >= 128
    many = [PromptChunk(i * 64, 64, 4096, np.arange(512, dtype=np.int32)) for i in range(40)]
    assert tiles.tile_chunks(many, heads).first_items is None
