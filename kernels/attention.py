"""Attention over pages: kernels where the pages were written in place, MLX operations elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.kv_write import gather_context
from quire.kernels.paged_attention import ExtraScores, paged_attention, prompt_sdpa
from quire.kernels.paged_decode import paged_decode
from quire.kernels.ragged import PromptChunk, RaggedBatch


class PageArrays(NamedTuple):
    """What attention sees of a layer's pages in one step."""

    keys: mx.array  # (num_blocks, kv_heads, block_size, key_dim)
    values: mx.array  # (num_blocks, kv_heads, block_size, value_dim)
    written: mx.array | None  # token of the in-place write; None if MLX knows of the write
    new_keys: mx.array | None  # (T, kv_heads, 1, key_dim), the rows written in this step
    new_values: mx.array | None  # (T, kv_heads, 1, value_dim)


def attend(
    queries: mx.array,
    pages: PageArrays,
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
    extra: ExtraScores | None = None,
) -> mx.array:
    """Causal attention of every row over its own sequence's pages.

    Arguments and result are those of :func:`paged_attention`. ``extra`` cannot be combined with
    pages written in place.
    """
    if pages.written is None:
        return paged_attention(
            queries,
            pages.keys,
            pages.values,
            batch,
            scale=scale,
            window=window,
            sinks=sinks,
            extra=extra,
        )
    assert extra is None, "layers with extra scores are not written in place"
    dtype = queries.dtype
    queries = queries.astype(pages.keys.dtype)
    parts = []
    if batch.decodes is not None:
        parts.append(
            paged_decode(
                queries[: batch.decodes.num_rows],
                pages.keys,
                pages.values,
                batch.decodes.block_tables,
                batch.decodes.plans[window],
                scale=scale,
                written=pages.written,
                sinks=sinks,
            )
        )
    for chunk in batch.chunks:
        first, keys, values = _context(pages, pages.written, chunk, window)
        rows = queries[chunk.first_row : chunk.first_row + chunk.num_rows]
        parts += prompt_sdpa(rows, keys, values, chunk, first, scale, window, sinks)
    output = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    return output.astype(dtype)


def _context(
    pages: PageArrays, written: mx.array, chunk: PromptChunk, window: int | None
) -> tuple[int, mx.array, mx.array]:
    """First position, keys and values (1, kv_heads, n, dim) of what a chunk's rows can see."""
    if chunk.start == 0 and pages.new_keys is not None and pages.new_values is not None:
        # All of it was computed in this very step.
        rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
        return (
            0,
            pages.new_keys[rows].transpose(2, 1, 0, 3),
            pages.new_values[rows].transpose(2, 1, 0, 3),
        )
    block_size = pages.keys.shape[2]
    first = chunk.first_block(chunk.start, window, block_size)
    keys, values = gather_context(pages.keys, pages.values, chunk.blocks_from(first), written)
    return first * block_size, keys, values
