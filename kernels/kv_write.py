"""Writing new keys and values into their pages."""

from __future__ import annotations

import mlx.core as mx


class Slots:
    """Where each row of a step goes: slot ``offset`` of block ``block``, in every layer.

    Args:
        blocks: (T,) int32
        offsets: (T,) int32, below the block size
    """

    def __init__(self, blocks: mx.array, offsets: mx.array) -> None:
        self._blocks = blocks[:, None]
        self._offsets = offsets[:, None]
        self._heads: dict[int, mx.array] = {}

    def write(self, pages: mx.array, rows: mx.array) -> None:
        """Set the slots of ``pages`` (num_blocks, kv_heads, block_size, dim) to ``rows``.

        ``rows`` is (T, kv_heads, 1, dim). MLX writes in place if nothing else refers to the page
        array, and copies the whole pool otherwise: callers keep no second reference.
        """
        num_heads = pages.shape[1]
        if num_heads not in self._heads:
            self._heads[num_heads] = mx.arange(num_heads)[None]
        pages[self._blocks, self._heads[num_heads], self._offsets] = rows[:, :, 0]


def copy_blocks(pages: mx.array, sources: mx.array, targets: mx.array) -> None:
    """Copy whole blocks within ``pages``; ``sources`` and ``targets`` are (n,) int32."""
    pages[targets] = pages[sources]
