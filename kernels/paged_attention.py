"""Attention over KV pages in plain MLX: what the CPU runs, and the reference for every kernel.

Pages have shape (num_blocks, kv_heads, block_size, head_dim). Decodes read whole blocks as they
lie, one small matrix product per (sequence, block, head), with no transpose and no copy beyond the
gather. Prompt chunks gather their context once.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from quire.kernels.exponential import LOG2_E, exp2_difference
from quire.kernels.heads import Scoring
from quire.kernels.page_arrays import ExtraScores, PageArrays
from quire.kernels.ragged import MASKED, PromptChunk, RaggedBatch

# Bound before anything wraps the attribute of the module.
_sdpa: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention

# On the CPU prompts are cut into tiles of query rows. Each computes scores only for the keys its
# last row can see, so small tiles skip nearly half of a causal square; and a tile's scores stay in
# the cache from one pass over them to the next.
_TILE_SCORES = 1 << 18
_TILE_ROWS = range(8, 65)


def paged_attention(
    queries: mx.array,
    pages: PageArrays,
    batch: RaggedBatch,
    scoring: Scoring,
    extra: ExtraScores | None = None,
) -> mx.array:
    """Causal attention of every row over its own sequence's pages.

    Args:
        queries: (T, heads, 1, head_dim); decode rows first, then the chunks, as in ``batch``.
        extra: further scores, see :class:`ExtraScores`.

    Returns:
        (T, heads, 1, value_dim) in the dtype of ``queries``.
    """
    key_parts = [pages.keys]
    if extra is not None:
        # The scores of both parts are one dot product over concatenated vectors.
        queries = mx.concatenate([queries * scoring.scale, extra.queries], axis=-1)
        scoring = scoring._replace(scale=1.0)
        key_parts.append(extra.key_pages)
    parts = []
    for group in batch.groups:
        tables, bias = group.view(scoring.window, pages.keys.shape[2])
        rows = queries[group.first_row : group.first_row + group.num_rows]
        keys = _gather(key_parts, tables)
        shared = None
        if (blocks := group.shared_blocks(scoring.window)) is not None:
            shared = _join(_gather(key_parts, blocks)), _join(pages.values[blocks])
        parts.append(_decode(rows, keys, pages.values[tables], bias, scoring, shared))
    for chunk in batch.chunks:
        rows = queries[chunk.first_row : chunk.first_row + chunk.num_rows]
        parts += _prompt(rows, key_parts, pages.values, chunk, scoring)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _prompt(
    queries: mx.array,  # (n, heads, 1, head_dim)
    key_parts: list[mx.array],  # pages whose rows follow each other in a key
    value_pages: mx.array,
    chunk: PromptChunk,
    scoring: Scoring,
) -> list[mx.array]:
    # The specification tries out functions of this module.
    from quire.kernels.choice.selection import select
    from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptShape
    from quire.kernels.prompt_plan import PromptVariant

    kv_heads, block_size = key_parts[0].shape[1:3]
    shape = PromptShape(
        rows=chunk.num_rows,
        context=chunk.context_length,
        heads=queries.shape[1],
        kv_heads=kv_heads,
        key_dim=queries.shape[3],
        value_dim=value_pages.shape[3],
        block_size=block_size,
        from_start=chunk.start == 0,
        window=scoring.window is not None,
        sinks=scoring.sinks is not None,
        softcap=scoring.softcap is not None,
    )
    choice = select(PROMPT_ATTENTION, shape, key_parts[0].dtype)
    attend = prompt_tiles if choice.variant is PromptVariant.SDPA_TILED else prompt_sdpa
    first = chunk.first_block(chunk.start, scoring.window, block_size)
    blocks = chunk.blocks_from(first)
    keys, values = _join(_gather(key_parts, blocks)), _join(value_pages[blocks])
    return attend(queries, keys, values, chunk, first * block_size, scoring)


def _decode(
    queries: mx.array,  # (B, heads, 1, head_dim)
    keys: mx.array,  # (B, n, kv_heads, block_size, head_dim)
    values: mx.array,  # (B, n, kv_heads, block_size, value_dim)
    bias: mx.array,  # (B, n, 1, 1, block_size)
    scoring: Scoring,
    shared: tuple[mx.array, mx.array] | None,  # keys and values, (1, kv_heads, s, dim)
) -> mx.array:
    rows, heads, _, head_dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries * (scoring.scale * LOG2_E)
    grouped = grouped.reshape(rows, 1, kv_heads, heads // kv_heads, head_dim)
    scores = _capped(grouped @ keys.swapaxes(-1, -2), scoring) + bias
    peak = scores.max(axis=(1, 4), keepdims=True)
    if scoring.sinks is not None:
        sink = _log2(scoring.sinks).reshape(1, 1, kv_heads, -1, 1)
        peak = mx.maximum(peak, sink)
    if shared is not None:
        shared_keys, shared_values = shared
        # What all rows see is one matrix product per key head (cascade attention: Juravsky et al.,
        # Hydragen, 2024), merged with each row's own part under a common peak.
        flat = grouped.swapaxes(0, 2).reshape(1, kv_heads, -1, head_dim)
        shared_scores = _capped(flat @ shared_keys.swapaxes(-1, -2), scoring)
        shared_peak = _rows_first(shared_scores.max(axis=3, keepdims=True), grouped.shape)
        peak = mx.maximum(peak, shared_peak)
    weights = exp2_difference(scores, peak)
    total = weights.sum(axis=(1, 4), keepdims=True)
    output = (weights.astype(values.dtype) @ values).sum(axis=1, keepdims=True)
    if shared is not None:
        flat_peak = peak.swapaxes(0, 2).reshape(1, kv_heads, -1, 1)
        weights = exp2_difference(shared_scores, flat_peak)
        total = total + _rows_first(weights.sum(axis=3, keepdims=True), grouped.shape)
        output = output + _rows_first(weights.astype(values.dtype) @ shared_values, grouped.shape)
    if scoring.sinks is not None:
        total = total + exp2_difference(sink, peak)
    output = (output / total).astype(queries.dtype)
    return output.reshape(rows, heads, 1, -1)


def _rows_first(flat: mx.array, grouped: tuple[int, ...]) -> mx.array:
    """(1, kv_heads, B * group, n) -> (B, 1, kv_heads, group, n)."""
    rows, _, kv_heads, group, _ = grouped
    return flat.reshape(kv_heads, 1, rows, group, -1).swapaxes(0, 2)


def prompt_tiles(
    queries: mx.array,  # (n, heads, 1, head_dim)
    keys: mx.array,  # (1, kv_heads, num_keys, head_dim), from position first_key on
    values: mx.array,  # (1, kv_heads, num_keys, value_dim)
    chunk: PromptChunk,
    first_key: int,
    scoring: Scoring,
) -> list[mx.array]:
    """One chunk in tiles of query rows, in MLX operations; see :func:`prompt_sdpa`."""
    num_rows, heads, _, head_dim = queries.shape
    kv_heads = keys.shape[1]
    # The query heads that share a key head are rows of one matrix product.
    grouped = (queries * (scoring.scale * LOG2_E)).transpose(2, 1, 0, 3)
    grouped = grouped.reshape(kv_heads, heads // kv_heads, num_rows, head_dim)
    sink = None if scoring.sinks is None else _log2(scoring.sinks).reshape(kv_heads, -1, 1, 1)
    window = scoring.window
    span = keys.shape[2] if window is None else min(keys.shape[2], window)
    tile_rows = _TILE_SCORES // (heads * span)
    tile_rows = max(_TILE_ROWS.start, min(tile_rows // 8 * 8, _TILE_ROWS.stop - 1))
    outputs = []
    for row in range(0, num_rows, tile_rows):
        tile = grouped[:, :, row : row + tile_rows]
        rows = range(chunk.start + row, chunk.start + row + tile.shape[2])
        first = first_key if window is None else max(first_key, rows.start - window + 1)
        visible = range(first, rows.stop)
        part = slice(first - first_key, rows.stop - first_key)
        folded = tile.reshape(1, kv_heads, -1, head_dim)
        scores = _capped(folded @ keys[:, :, part].swapaxes(-1, -2), scoring)
        scores = scores.reshape(*tile.shape[:3], -1) + chunk.bias(rows, visible, window)
        peak = scores.max(axis=3, keepdims=True)
        if sink is not None:
            peak = mx.maximum(peak, sink)
        weights = exp2_difference(scores, peak)
        total = weights.sum(axis=3, keepdims=True)
        if sink is not None:
            total = total + exp2_difference(sink, peak)
        weights = weights.astype(values.dtype).reshape(1, kv_heads, -1, len(visible))
        output = (weights @ values[:, :, part]).reshape(*tile.shape[:3], -1) / total
        output = output.astype(queries.dtype).reshape(heads, tile.shape[2], 1, -1)
        outputs.append(output.swapaxes(0, 1))
    return outputs


def prompt_sdpa(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    chunk: PromptChunk,
    first_key: int,
    scoring: Scoring,
) -> list[mx.array]:
    """One chunk through MLX's fused attention.

    Args:
        queries: (n, heads, 1, head_dim)
        keys, values: (1, kv_heads, num_keys, dim), from position ``first_key`` on.

    Returns:
        One array, (n, heads, 1, value_dim).
    """
    num_keys = chunk.context_length - first_key
    mask: mx.array | str = "causal"
    window = scoring.window
    if window is not None and num_keys > window:
        rows = range(chunk.start, chunk.context_length)
        mask = chunk.bias(rows, range(first_key, chunk.context_length), window) > MASKED / 2
    output = _sdpa(
        queries.transpose(2, 1, 0, 3),
        keys[:, :, :num_keys],
        values[:, :, :num_keys],
        scale=scoring.scale,
        mask=mask,
        sinks=scoring.sinks,
    )
    return [output.transpose(2, 1, 0, 3)]


def _capped(scores: mx.array, scoring: Scoring) -> mx.array:
    """Scores in units of log2, as float32, within the soft-cap if there is one."""
    scores = scores.astype(mx.float32)
    if scoring.softcap is None:
        return scores
    cap = scoring.softcap * LOG2_E
    return cap * mx.tanh(scores / cap)


def _log2(sinks: mx.array) -> mx.array:
    return sinks.astype(mx.float32) * LOG2_E


def _gather(pages: list[mx.array], blocks: mx.array) -> mx.array:
    gathered = [part[blocks] for part in pages]
    return gathered[0] if len(gathered) == 1 else mx.concatenate(gathered, axis=-1)


def _join(blocks: mx.array) -> mx.array:
    """(n, kv_heads, block_size, dim) blocks -> (1, kv_heads, n * block_size, dim)."""
    count, kv_heads, block_size, dim = blocks.shape
    return blocks.swapaxes(0, 1).reshape(1, kv_heads, count * block_size, dim)
