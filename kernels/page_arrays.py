"""A layer's keys and values as one step sees them."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class PageArrays(NamedTuple):
    keys: mx.array  # (num_blocks, kv_heads, block_size, key_dim)
    values: mx.array  # (num_blocks, kv_heads, block_size, value_dim)
    written: mx.array | None  # token of the in-place write; None if MLX knows of the write
    new_keys: mx.array | None = None  # (T, kv_heads, 1, key_dim), the rows written in this step
    new_values: mx.array | None = None  # (T, kv_heads, 1, value_dim)
