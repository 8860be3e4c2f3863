"""Attention over pages: kernels where the pages were written in place, MLX operations elsewhere."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import ExtraScores, paged_attention
from quire.kernels.paged_decode import paged_decode
from quire.kernels.prompt_attention import plan_prompts, prompt_attention
from quire.kernels.ragged import PromptChunk, PromptPlan, RaggedBatch
from quire.kernels.selection import select
from quire.kernels.shapes import PromptShape


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
    output = None
    if batch.decodes is not None:
        output = paged_decode(
            queries[: batch.decodes.num_rows],
            pages.keys,
            pages.values,
            batch.decodes.block_tables,
            batch.decodes.plans[window],
            scale=scale,
            written=pages.written,
            sinks=sinks,
        )
    if batch.chunks:
        plan = _prompt_plan(batch, window, queries, pages, sinks is not None)
        output = prompt_attention(
            queries, pages, plan, scale=scale, window=window, sinks=sinks, before=output
        )
    assert output is not None, "a step without rows"
    return output.astype(dtype)


def _prompt_plan(
    batch: RaggedBatch, window: int | None, queries: mx.array, pages: PageArrays, has_sinks: bool
) -> PromptPlan:
    """Made once per step and window; all layers share it."""
    if window not in batch.prompt_plans:
        heads, key_dim = queries.shape[1], queries.shape[3]
        kv_heads, block_size = pages.keys.shape[1:3]

        def is_padded(chunk: PromptChunk) -> bool:
            shape = PromptShape(
                rows=chunk.num_rows,
                context=chunk.context_length,
                heads=heads,
                kv_heads=kv_heads,
                key_dim=key_dim,
                value_dim=pages.values.shape[3],
                block_size=block_size,
                from_start=chunk.start == 0,
                window=window is not None,
                sinks=has_sinks,
            )
            return select("prompt_attention", shape, pages.keys.dtype).variant == "padded"

        num_decodes = 0 if batch.decodes is None else batch.decodes.num_rows
        batch.prompt_plans[window] = plan_prompts(
            batch.chunks, window, block_size, is_padded, num_before=num_decodes
        )
    return batch.prompt_plans[window]
