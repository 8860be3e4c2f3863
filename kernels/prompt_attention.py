"""Prefill attention: that of a step's prompt chunks, over pages that kernels have written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from quire.kernels.gather_rows import join_rows, take_rows
from quire.kernels.heads import Scoring
from quire.kernels.kv_write import gather_context
from quire.kernels.page_arrays import ExtraScores, PageArrays
from quire.kernels.paged_attention import prompt_sdpa, prompt_tiles
from quire.kernels.paged_prompt import paged_prompt
from quire.kernels.prompt_plan import PaddedChunks, PromptPlan
from quire.kernels.ragged import PromptChunk

# MLX's attention has no fused form for wider keys, and keeps all scores of a call.
_MAX_FUSED_DIM = 128
_MAX_SCORES = 1 << 27
_ALIGNED = 64  # rows of a piece: products of odd numbers of keys have slower kernels on CUDA

_sdpa: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention


def prompt_attention(
    queries: mx.array,
    pages: PageArrays,
    plan: PromptPlan,
    scoring: Scoring,
    *,
    before: mx.array | None = None,
    extra: ExtraScores | None = None,
) -> mx.array:
    """Causal attention of all prompt rows of a step over their own sequences.

    Args:
        queries: (T, heads, 1, key_dim), all rows of the step.
        pages: that kernels have written.
        scoring: with the window that ``plan`` was made for.
        before: (num_before, heads, 1, value_dim), results of the rows in front, if there are any.
        extra: further scores, of chunks that go alone.

    Returns:
        (rows, heads, 1, value_dim), those in front and the prompt rows in the order of the step.
    """
    outputs = []
    if plan.tiled is not None:
        outputs.append(paged_prompt(queries, pages, plan.tiled, scoring))
    outputs += [_attend_padded(queries, pages, chunks, scoring) for chunks in plan.padded]
    for chunk in plan.alone:
        outputs += _attend_alone(queries, pages, chunk, scoring, extra)
    output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    if plan.order is None:
        assert before is None, "a plan made without the rows in front"
        return output
    if before is None:
        return take_rows([output], plan.order)[0]
    return join_rows(before, output, plan.order)


def _attend_alone(
    queries: mx.array,
    pages: PageArrays,
    chunk: PromptChunk,
    scoring: Scoring,
    extra: ExtraScores | None,
) -> list[mx.array]:
    rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
    queries = queries[rows]
    if extra is not None:
        pages = pages._replace(values=extra.key_pages)
    if chunk.start == 0 and pages.new_keys is not None and pages.new_values is not None:
        # All it can see was computed in this very step.
        first = 0
        keys = pages.new_keys[rows].transpose(2, 1, 0, 3)
        values = pages.new_values[rows].transpose(2, 1, 0, 3)
    else:
        block_size = pages.keys.shape[2]
        first_block = chunk.first_block(chunk.start, scoring.window, block_size)
        first = first_block * block_size
        keys, values = gather_context(pages, chunk.blocks_from(first_block)[None])
    if extra is not None:
        # The scores of both parts are one dot product over concatenated vectors.
        queries = mx.concatenate([queries * scoring.scale, extra.queries[rows]], axis=-1)
        keys, values = mx.concatenate([keys, values], axis=-1), keys
        scoring = scoring._replace(scale=1.0)
    if scoring.softcap is not None:
        return prompt_tiles(queries, keys, values, chunk, first, scoring)
    attend: Callable[..., list[mx.array]] = partial(prompt_sdpa, first_key=first, scoring=scoring)
    if extra is not None and scoring.window is None and scoring.sinks is None:
        attend = _latent_attention
    outputs = []
    at_once = chunk.num_rows
    if keys.shape[3] > _MAX_FUSED_DIM:
        at_once = max(1, _MAX_SCORES // (queries.shape[1] * keys.shape[2]))
        at_once -= at_once % _ALIGNED if at_once > _ALIGNED else 0
    for row in range(0, chunk.num_rows, at_once):
        piece = chunk.part(row, min(at_once, chunk.num_rows - row))
        outputs += attend(queries[row : row + piece.num_rows], keys, values, piece)
    return outputs


def _latent_attention(
    queries: mx.array, keys: mx.array, values: mx.array, chunk: PromptChunk
) -> list[mx.array]:
    """Rows of one sequence over all of its keys, which all heads share.

    MLX has no fused attention of such widths; its own steps read and write all scores once more for
    the mask. Here the product of queries and keys begins from it.

    Args:
        queries: (n, heads, 1, dim), scaled
        keys, values: (1, 1, num_keys, dim), from the first position on

    Returns:
        One array, (n, heads, 1, value_dim).
    """
    num_keys = chunk.context_length
    visible = mx.arange(num_keys) <= mx.arange(chunk.start, num_keys)[:, None]
    bias = mx.where(visible, 0.0, -mx.inf).astype(queries.dtype)
    keys, values = keys[:, :, :num_keys], values[:, :, :num_keys]
    scores = mx.addmm(bias, queries.transpose(2, 1, 0, 3), keys.swapaxes(2, 3))
    output = mx.softmax(scores, axis=-1, precise=True) @ values
    return [output.transpose(2, 1, 0, 3)]


def _attend_padded(
    queries: mx.array, pages: PageArrays, chunks: PaddedChunks, scoring: Scoring
) -> mx.array:
    if chunks.is_fresh and pages.new_keys is not None and pages.new_values is not None:
        queries, keys, values = _batch([queries, pages.new_keys, pages.new_values], chunks)
    else:
        (queries,) = _batch([queries], chunks)
        keys, values = gather_context(pages, chunks.block_ids)
    if chunks.is_fresh:
        # Whole blocks may hold more than the rows; causal attention aligns both at the end.
        keys, values = keys[:, :, : chunks.num_rows], values[:, :, : chunks.num_rows]
    output = _sdpa(
        queries,
        keys,
        values,
        scale=scoring.scale,
        mask="causal" if chunks.visible is None else chunks.visible,
        sinks=scoring.sinks,
    )
    rows = chunks.count * chunks.num_rows
    return output.transpose(0, 2, 1, 3).reshape(rows, queries.shape[1], 1, -1)


def _batch(arrays: list[mx.array], chunks: PaddedChunks) -> list[mx.array]:
    """Rows (T, heads, 1, dim) of the step -> (B, heads, n, dim)."""
    if chunks.rows is None:
        last = chunks.first_row + chunks.count * chunks.num_rows
        rows = [
            array if last - chunks.first_row == len(array) else array[chunks.first_row : last]
            for array in arrays
        ]
    else:
        rows = take_rows(arrays, chunks.rows)
    shape = chunks.count, chunks.num_rows
    return [x.reshape(*shape, x.shape[1], x.shape[3]).transpose(0, 2, 1, 3) for x in rows]
