"""Attention over pages: kernels where the pages were written in place, MLX operations elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.paged_attention import ExtraScores, paged_attention
from quire.kernels.paged_decode import paged_decode
from quire.kernels.prompt_attention import PromptPages, plan_prompts, prompt_attention
from quire.kernels.ragged import PromptPlan, RaggedBatch


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
    if batch.chunks:
        prompt_pages = PromptPages(
            pages.keys, pages.values, pages.written, pages.new_keys, pages.new_values
        )
        plan = _prompt_plan(batch, window, pages.keys.shape[2])
        parts.append(
            prompt_attention(queries, prompt_pages, plan, scale=scale, window=window, sinks=sinks)
        )
    output = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    return output.astype(dtype)


def _prompt_plan(batch: RaggedBatch, window: int | None, block_size: int) -> PromptPlan:
    """Made once per step and window; all layers share it."""
    if window not in batch.prompt_plans:
        pad = pads_prompts()
        batch.prompt_plans[window] = plan_prompts(batch.chunks, window, block_size, pad=pad)
    return batch.prompt_plans[window]


def pads_prompts() -> bool:
    """Whether chunks of similar lengths go to attention together, padded."""
    return mx.cuda.is_available()
