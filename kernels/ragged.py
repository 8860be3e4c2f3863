"""Which rows of a flattened step belong together, for attention in MLX operations.

The classes are nodes of a :mod:`quire.kernels.tree`: their arrays are numpy's while a step is
planned and MLX's while it runs. What all layers of a step share is made once, and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.tree import Array

# Added to the scores of keys that a row must not see. Finite, so that a row that sees nothing at
# all gives a finite result instead of NaN.
MASKED = -1e30


@dataclass
class DecodeGroup:
    """Rows with one query each and contexts of similar length.

    The rows may have their first blocks in common; those are read once for all of them.
    """

    first_row: int
    context_lengths: Array  # (B,) int32, the row's own token included
    block_tables: Array  # (B, max_blocks) int32, padded with the scratch block
    num_shared_blocks: int = 0  # leading columns of block_tables, full and equal in all rows
    views: dict[int | None, tuple[Array, Array]] = field(default_factory=dict)  # by window

    @property
    def num_rows(self) -> int:
        return len(self.context_lengths)

    def view(self, window: int | None, block_size: int) -> tuple[mx.array, mx.array]:
        """Block tables (B, n) and score biases (B, n, 1, 1, block_size), cut to the window.

        Without a window they leave out the shared blocks. Made on the host, as :meth:`make_view`
        does before a step is uploaded, and else here.
        """
        if window not in self.views:
            self.make_view(window, block_size)
        tables, bias = map(as_mlx, self.views[window])
        self.views[window] = tables, bias
        return tables, bias

    def make_view(self, window: int | None, block_size: int) -> None:
        lengths, tables = np.array(self.context_lengths)[:, None], np.array(self.block_tables)
        if window is None:
            columns = np.arange(self.num_shared_blocks, tables.shape[1], dtype=np.int32)[None]
            tables = tables[:, self.num_shared_blocks :]
        else:
            # W keys touch at most this many blocks, wherever they start.
            touched = min(tables.shape[1], -(-(window - 1) // block_size) + 1)
            columns = np.maximum(lengths - window, 0) // block_size
            columns = columns + np.arange(touched, dtype=np.int32)
            # Columns behind the last block repeat it; their positions keep it from counting twice.
            tables = np.take_along_axis(tables, np.minimum(columns, tables.shape[1] - 1), axis=1)
        positions = columns[:, :, None] * block_size + np.arange(block_size, dtype=np.int32)
        visible = positions < lengths[:, :, None]
        if window is not None:
            visible &= positions >= lengths[:, :, None] - window
        bias = np.where(visible, np.float32(0), np.float32(MASKED))
        self.views[window] = tables, bias[:, :, None, None, :]

    def shared_blocks(self, window: int | None) -> mx.array | None:
        """Ids of the blocks that every row sees whole, unless a window hides part of them."""
        if window is not None or not self.num_shared_blocks:
            return None
        return as_mlx(self.block_tables)[0, : self.num_shared_blocks]


class SharedRun(NamedTuple):
    """Rows side by side whose contexts begin with the same blocks."""

    first_row: int
    num_rows: int
    num_tokens: int  # that they share, of whole blocks; each row has more


@dataclass
class PromptChunk:
    """Consecutive rows of one sequence, each attending to itself and everything before it."""

    first_row: int
    num_rows: int
    context_length: int  # of the last row, itself included
    block_ids: Array  # (n,) int32, covers the context
    _biases: dict[tuple[int, int, int, int | None], mx.array] = field(
        default_factory=dict, init=False
    )

    @property
    def start(self) -> int:
        """Position of the first row."""
        return self.context_length - self.num_rows

    def part(self, row: int, num_rows: int) -> PromptChunk:
        """``num_rows`` of its rows, from the ``row``-th on."""
        end = self.start + row + num_rows
        return PromptChunk(self.first_row + row, num_rows, end, self.block_ids)

    def first_block(self, position: int, window: int | None, block_size: int) -> int:
        """The first block that the row at ``position`` can see."""
        return 0 if window is None else max(0, position - window + 1) // block_size

    def blocks_from(self, first: int) -> mx.array:
        """Block ids from the ``first`` on."""
        return as_mlx(self.block_ids)[first:]

    def bias(self, rows: range, keys: range, window: int | None) -> mx.array:
        """(rows, keys) score biases for query positions ``rows`` and key positions ``keys``."""
        key = (rows.start, keys.start, keys.stop, window)
        if key not in self._biases:
            queries = mx.arange(rows.start, rows.stop)[:, None]
            positions = mx.arange(keys.start, keys.stop)[None]
            visible = positions <= queries
            if window is not None:
                visible = visible & (positions > queries - window)
            self._biases[key] = mx.where(visible, 0.0, MASKED)
        return self._biases[key]


@dataclass
class RaggedBatch:
    """The rows of a step: decodes first, as groups, then chunks of prompts."""

    groups: list[DecodeGroup]
    chunks: list[PromptChunk]


def as_mlx(array: Array) -> mx.array:
    return array if isinstance(array, mx.array) else mx.array(np.asarray(array))
