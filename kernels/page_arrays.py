"""A layer's keys and values as one step sees them."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class PageArrays(NamedTuple):
    """Pages, and what orders kernels that write them in place.

    MLX does not know that such a kernel changes its inputs. So each write gives out a fence, an
    array that whoever reads the pages afterwards takes as an input, and takes in an output of
    whoever read them before. MLX computes only what somebody asks for: a write whose fence nobody
    takes is not made.

    Attributes:
        keys: (num_blocks, kv_heads, block_size, key_dim)
        values: (num_blocks, kv_heads, block_size, value_dim)
        fence: (1,) of the kernel that used the pages last; None if MLX itself knows of all writes.
        new_keys: (T, kv_heads, 1, key_dim), the rows written in this step, if they are kept.
        new_values: (T, kv_heads, 1, value_dim)
    """

    keys: mx.array
    values: mx.array
    fence: mx.array | None = None
    new_keys: mx.array | None = None
    new_values: mx.array | None = None

    def needed_fence(self) -> mx.array:
        """The fence, of pages that kernels write."""
        assert self.fence is not None, "kernels read and write these pages only in order"
        return self.fence


class ExtraScores(NamedTuple):
    """A second pair of queries and key pages whose scores are added (MLA's rotary part)."""

    queries: mx.array  # (T, heads, 1, extra_dim), scaled already
    key_pages: mx.array  # (num_blocks, kv_heads, block_size, extra_dim)
