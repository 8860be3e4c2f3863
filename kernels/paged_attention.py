"""Attention over KV pages in plain MLX: what the CPU runs, and the reference for every kernel.

Pages have shape (num_blocks, kv_heads, block_size, head_dim). Decodes read whole blocks as they
lie, one small matrix product per (sequence, block, head), with no transpose and no copy beyond the
gather. Prompt chunks gather their context once and use MLX's own attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# Bound before anything wraps the attribute of the module.
_sdpa: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention

# Scores of one prompt tile are kept below this, so that attention adds little to peak memory.
_MAX_SCORE_ELEMENTS = 1 << 22
_MAX_TILE_ROWS = 256
_MIN_TILE_ROWS = 16


class ExtraScores(NamedTuple):
    """A second pair of queries and key pages whose scores are added (MLA's rotary part)."""

    queries: mx.array  # (T, heads, 1, extra_dim), scaled already
    key_pages: mx.array  # (num_blocks, kv_heads, block_size, extra_dim)


@dataclass
class DecodeGroup:
    """Rows with one query each and contexts of similar length."""

    first_row: int
    context_lengths: npt.NDArray[np.int32]  # (B,), the row's own token included
    block_tables: npt.NDArray[np.int32]  # (B, max_blocks), padded with the scratch block
    _views: dict[int | None, tuple[mx.array, mx.array]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.context_lengths)

    def view(self, window: int | None, block_size: int) -> tuple[mx.array, mx.array]:
        """Block tables (B, n) and visibility (B, n, 1, 1, block_size), cut to the window.

        Made once per step and window; all layers share them.
        """
        if window not in self._views:
            self._views[window] = self._make_view(window, block_size)
        return self._views[window]

    def _make_view(self, window: int | None, block_size: int) -> tuple[mx.array, mx.array]:
        lengths = self.context_lengths[:, None]
        tables = self.block_tables
        columns = np.arange(tables.shape[1], dtype=np.int32)[None]
        if window is not None:
            # W keys touch at most this many blocks, wherever they start.
            touched = min(tables.shape[1], -(-(window - 1) // block_size) + 1)
            first = np.maximum(lengths - window, 0) // block_size
            columns = np.minimum(first + np.arange(touched, dtype=np.int32), tables.shape[1] - 1)
            tables = np.take_along_axis(tables, columns, axis=1)
            # Clamped columns repeat the last block; positions below keep them from counting twice.
            columns = first + np.arange(touched, dtype=np.int32)
        positions = columns[:, :, None] * block_size + np.arange(block_size, dtype=np.int32)
        visible = positions < lengths[:, :, None]
        if window is not None:
            visible &= positions >= lengths[:, :, None] - window
        return mx.array(tables), mx.array(visible[:, :, None, None, :])


@dataclass
class PromptChunk:
    """Consecutive rows of one sequence, each attending to itself and everything before it."""

    first_row: int
    num_rows: int
    context_length: int  # of the last row, itself included
    block_ids: npt.NDArray[np.int32]  # covers the context
    _tables: dict[tuple[int, int], mx.array] = field(default_factory=dict)
    _masks: dict[tuple[int, int, int], mx.array] = field(default_factory=dict)

    def blocks(self, first: int, last: int) -> mx.array:
        """Block ids first..last-1 as an array, made once per step."""
        if (first, last) not in self._tables:
            self._tables[first, last] = mx.array(self.block_ids[first:last])
        return self._tables[first, last]

    def window_mask(self, rows: range, first_key: int, window: int) -> mx.array:
        """(rows, keys) visibility for query positions ``rows`` and keys from ``first_key`` on."""
        key = (rows.start, first_key, window)
        if key not in self._masks:
            queries = np.arange(rows.start, rows.stop)[:, None]
            keys = np.arange(first_key, rows.stop)[None]
            self._masks[key] = mx.array((keys <= queries) & (keys > queries - window))
        return self._masks[key]


@dataclass
class RaggedBatch:
    """Which rows of a flattened step belong together; shared by all layers of the step."""

    groups: list[DecodeGroup]
    chunks: list[PromptChunk]


def paged_attention(
    queries: mx.array,
    key_pages: mx.array,
    value_pages: mx.array,
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
    extra: ExtraScores | None = None,
) -> mx.array:
    """Causal attention of every row over its own sequence's pages.

    Args:
        queries: (T, heads, 1, head_dim); decode rows first, then the chunks, as in ``batch``.
        key_pages: (num_blocks, kv_heads, block_size, head_dim)
        value_pages: (num_blocks, kv_heads, block_size, value_dim)
        window: each row sees the last ``window`` tokens, itself included; None sees all.
        sinks: (heads,) logits that take part in the softmax but have no value.
        extra: further scores, see :class:`ExtraScores`.

    Returns:
        (T, heads, 1, value_dim) in the dtype of ``queries``.
    """
    if extra is not None:
        # The scores of both parts are one dot product over concatenated vectors.
        queries = mx.concatenate([queries * scale, extra.queries], axis=-1)
        scale = 1.0
    key_parts = [key_pages] if extra is None else [key_pages, extra.key_pages]
    parts = [
        _decode(
            queries[group.first_row : group.first_row + group.num_rows],
            key_parts,
            value_pages,
            *group.view(window, key_pages.shape[2]),
            scale,
            sinks,
        )
        for group in batch.groups
    ]
    for chunk in batch.chunks:
        parts += _prompt(queries, key_parts, value_pages, chunk, scale, window, sinks)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _decode(
    queries: mx.array,
    key_parts: list[mx.array],
    value_pages: mx.array,
    tables: mx.array,
    visible: mx.array,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    rows, heads, _, head_dim = queries.shape
    kv_heads = value_pages.shape[1]
    grouped = (queries * scale).reshape(rows, 1, kv_heads, heads // kv_heads, head_dim)
    keys = _gather(key_parts, tables)  # (B, n, kv_heads, block_size, head_dim)
    scores = (grouped @ keys.swapaxes(-1, -2)).astype(mx.float32)
    scores = mx.where(visible, scores, -mx.inf)
    peak = scores.max(axis=(1, 4), keepdims=True)
    if sinks is not None:
        sink = sinks.astype(mx.float32).reshape(1, 1, kv_heads, -1, 1)
        peak = mx.maximum(peak, sink)
    weights = mx.exp(scores - peak)
    total = weights.sum(axis=(1, 4), keepdims=True)
    if sinks is not None:
        total = total + mx.exp(sink - peak)
    output = (weights.astype(queries.dtype) @ value_pages[tables]).sum(axis=1, keepdims=True)
    output = output / total.astype(output.dtype)
    return output.reshape(rows, heads, 1, -1)


def _prompt(
    queries: mx.array,
    key_parts: list[mx.array],
    value_pages: mx.array,
    chunk: PromptChunk,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
) -> list[mx.array]:
    """Tiles of query rows, each over the keys that its last row can see."""
    block_size = value_pages.shape[2]
    heads = queries.shape[1]
    start = chunk.context_length - chunk.num_rows
    span = chunk.context_length if window is None else min(chunk.context_length, window)
    tile = _MAX_SCORE_ELEMENTS // (heads * span) // _MIN_TILE_ROWS * _MIN_TILE_ROWS
    tile = max(_MIN_TILE_ROWS, min(_MAX_TILE_ROWS, tile))
    outputs = []
    for first in range(start, chunk.context_length, tile):
        positions = range(first, min(first + tile, chunk.context_length))
        first_block = 0 if window is None else max(0, first - window + 1) // block_size
        blocks = chunk.blocks(first_block, -(-positions.stop // block_size))
        first_key = first_block * block_size
        mask: mx.array | str = "causal"
        if window is not None and positions.stop - first_key > window:
            mask = chunk.window_mask(positions, first_key, window)
        row = chunk.first_row + first - start
        tile_queries = queries[row : row + len(positions)].transpose(2, 1, 0, 3)
        num_keys = positions.stop - first_key
        output = _sdpa(
            tile_queries,
            _contiguous(_gather(key_parts, blocks), num_keys),
            _contiguous(value_pages[blocks], num_keys),
            scale=scale,
            mask=mask,
            sinks=sinks,
        )
        outputs.append(output.transpose(2, 1, 0, 3))
    return outputs


def _gather(pages: list[mx.array], blocks: mx.array) -> mx.array:
    gathered = [part[blocks] for part in pages]
    return gathered[0] if len(gathered) == 1 else mx.concatenate(gathered, axis=-1)


def _contiguous(blocks: mx.array, num_tokens: int) -> mx.array:
    """(n, kv_heads, block_size, dim) blocks -> (1, kv_heads, num_tokens, dim)."""
    count, kv_heads, block_size, dim = blocks.shape
    joined = blocks.transpose(1, 0, 2, 3).reshape(1, kv_heads, count * block_size, dim)
    return joined[:, :, :num_tokens]
