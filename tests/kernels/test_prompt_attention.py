"""Prompt chunks brought to attention alone or padded together give the same."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import prompt_attention as prompts
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import paged_attention
from quire.kernels.ragged import PromptChunk, RaggedBatch

BLOCK, HEADS, KV_HEADS, DIM = 8, 4, 2, 16


def gather(
    keys: mx.array, values: mx.array, blocks: mx.array, written: mx.array
) -> tuple[mx.array, mx.array]:
    """What the kernel does, in MLX."""

    def join(pages: mx.array) -> mx.array:
        found = pages[blocks].swapaxes(1, 2)
        return found.reshape(blocks.shape[0], KV_HEADS, -1, DIM)

    return join(keys), join(values)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "gather_context", gather)
    monkeypatch.setattr(prompts, "take_rows", lambda arrays, rows: [x[rows] for x in arrays])
    monkeypatch.setattr(prompts, "join_rows", lambda a, b, rows: mx.concatenate([a, b])[rows])


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


@settings(deadline=None, max_examples=40)
@given(
    lengths,
    st.sampled_from([None, 1, 40, 400]),
    st.booleans(),
    st.integers(0, 5),
    st.sampled_from([0, 7]),
    st.booleans(),
)
def test_every_row_sees_its_own_context(
    sizes: list[tuple[int, int]],
    window: int | None,
    pad: bool,
    num_before: int,
    num_after: int,
    rows_at_hand: bool,
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
    plan = prompts.plan_prompts(
        chunks, window, BLOCK, lambda _: pad, num_before=num_before, num_after=num_after
    )
    assert bool(plan.padded) == pad
    new = (rows_of(keys, chunks, row), rows_of(values, chunks, row))
    at_hand = new if rows_at_hand else (None, None)
    pages = PageArrays(keys, values, mx.zeros((1,)), *at_hand)
    got = prompts.prompt_attention(
        queries, pages, plan, scale=0.3, window=window, sinks=None, before=before
    )
    expected = paged_attention(
        queries, keys, values, RaggedBatch([], chunks), scale=0.3, window=window
    )
    if before is not None:
        expected = mx.concatenate([before, expected])
    assert got.shape == (row + num_after, HEADS, 1, DIM)
    assert mx.abs(got[:row] - expected).max().item() < 1e-5


def test_short_chunks_of_many_lengths_are_one_batch() -> None:
    counts = [100, 412, 256, 37, 475, 300, 212, 256]
    starts = np.cumsum([0, *counts])
    chunks = [
        PromptChunk(int(first), n, n, np.zeros(-(-n // BLOCK), np.int32))
        for first, n in zip(starts[:-1], counts, strict=True)
    ]
    plan = prompts.plan_prompts(chunks, None, BLOCK, lambda _: True)
    assert len(plan.padded) == 1
    assert not plan.alone


def test_a_long_aligned_chunk_goes_alone() -> None:
    chunk = PromptChunk(0, 2048, 4096, np.zeros(512, np.int32))
    plan = prompts.plan_prompts([chunk], None, BLOCK, lambda _: True)
    assert plan.alone == [chunk]
    assert plan.order is None
