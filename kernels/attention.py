"""Attention over pages: kernels where the pages were written in place, MLX operations elsewhere."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.choice.selection import select
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import ExtraScores, paged_attention
from quire.kernels.paged_decode import paged_decode
from quire.kernels.prompt_attention import PromptVariant, plan_prompts, prompt_attention
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptShape
from quire.kernels.ragged import PromptPlan, RaggedBatch
from quire.kernels.shared_context import attend_shared


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
        plan = batch.decodes.plans[window]
        decoding = (
            queries[: batch.decodes.num_rows],
            pages.keys,
            pages.values,
            batch.decodes.block_tables,
            plan,
        )
        shared = attend_shared(*decoding, scale=scale, written=pages.written)
        output = paged_decode(
            *decoding, scale=scale, written=pages.written, sinks=sinks, shared=shared
        )
    if batch.chunks or batch.prompt_plans:
        if window not in batch.prompt_plans:
            shape = prompt_shape(queries, pages, window is not None, sinks is not None)
            batch.prompt_plans[window] = plan_batch(batch, window, shape, pages.keys.dtype)
        output = prompt_attention(
            queries,
            pages,
            batch.prompt_plans[window],
            scale=scale,
            window=window,
            sinks=sinks,
            before=output,
        )
    assert output is not None, "a step without rows"
    return output.astype(dtype)


def prompt_shape(
    queries: mx.array, pages: PageArrays, has_window: bool, has_sinks: bool
) -> PromptShape:
    """What a layer's prompt chunks have in common; :func:`plan_batch` fills in the rest."""
    kv_heads, block_size, key_dim = pages.keys.shape[1:]
    return PromptShape(
        rows=1,
        context=1,
        heads=queries.shape[1],
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=pages.values.shape[3],
        block_size=block_size,
        window=has_window,
        sinks=has_sinks,
    )


def prompt_variant(
    num_rows: int, context: int, layer: PromptShape, dtype: mx.Dtype
) -> PromptVariant:
    """How the attention of a chunk is computed."""
    shape = layer._replace(rows=num_rows, context=context, from_start=num_rows == context)
    return select(PROMPT_ATTENTION, shape, dtype).variant


def plan_batch(
    batch: RaggedBatch, window: int | None, layer: PromptShape, dtype: mx.Dtype
) -> PromptPlan:
    """How the chunks of a step are brought to attention; once for all layers of a window."""
    return plan_prompts(
        batch.chunks,
        window,
        layer,
        lambda chunk: prompt_variant(chunk.num_rows, chunk.context_length, layer, dtype),
        dtype=dtype,
        num_before=batch.num_decodes,
        num_after=batch.num_after,
    )
