"""Random contexts in pages, blocks in random order, and the same contexts contiguous."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 16


class Heads:
    """Head counts and sizes of an attention layer: Qwen3-8B's on GPUs, a quarter of them on CPU."""

    def __init__(self, gpu: bool) -> None:
        self.queries, self.keys, self.dim = (32, 8, 128) if gpu else (8, 4, 64)
        self.scale = self.dim**-0.5

    def kv_bytes(self, tokens: int, dtype: mx.Dtype) -> int:
        return 2 * tokens * self.keys * self.dim * dtype.size

    def row_bytes(self, rows: int, dtype: mx.Dtype) -> int:
        """Queries read and outputs written."""
        return 2 * rows * self.queries * self.dim * dtype.size


class PagedContexts:
    """Keys and values of several sequences in one pool of pages.

    Attributes:
        lengths: (B,) int32, tokens of each sequence.
        tables: one (blocks,) int32 array per sequence.
        padded_tables: (B, max_blocks) int32, filled up with block 0, which nobody owns.
        keys, values: pages, (num_blocks, kv_heads, block_size, head_dim).
        written: what an in-place write returns; here nothing is left to wait for.
    """

    def __init__(self, lengths: list[int], heads: Heads, dtype: mx.Dtype, seed: int) -> None:
        self.lengths = np.array(lengths, np.int32)
        counts = -(-self.lengths // BLOCK_SIZE)
        order = np.random.default_rng(seed).permutation(int(counts.sum())).astype(np.int32) + 1
        self.tables: list[npt.NDArray[np.int32]] = np.split(order, np.cumsum(counts)[:-1])
        self.padded_tables = np.zeros((len(lengths), int(counts.max())), np.int32)
        for row, table in enumerate(self.tables):
            self.padded_tables[row, : len(table)] = table
        shape = (len(order) + 1, heads.keys, BLOCK_SIZE, heads.dim)
        keys, values = mx.random.split(mx.random.key(seed))
        self.keys = mx.random.normal(shape, dtype, key=keys)
        self.values = mx.random.normal(shape, dtype, key=values)
        self.written = mx.zeros((1,), mx.int32)

    def gather(self, tables: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of (B, n) blocks, each (B, kv_heads, n * block_size, head_dim)."""
        return _join(self.keys[tables]), _join(self.values[tables])


def _join(blocks: mx.array) -> mx.array:
    rows, count, heads, size, dim = blocks.shape
    return blocks.swapaxes(1, 2).reshape(rows, heads, count * size, dim)


def contiguous(arrays: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
    """Evaluated copies, as an unpaged cache would hold them."""
    copies = mx.contiguous(arrays[0]), mx.contiguous(arrays[1])
    mx.eval(copies)
    return copies
