"""The pages themselves: one key and one value array per layer, allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from quire.cache.block_table import BlockCopy
from quire.kernels.kv_write import Slots, copy_blocks


@dataclass(frozen=True)
class PageShape:
    """What one layer stores per token, as the model itself showed it."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    key_dtype: mx.Dtype
    value_dtype: mx.Dtype

    @property
    def bytes_per_token(self) -> int:
        keys = self.key_heads * self.key_dim * self.key_dtype.size
        return keys + self.value_heads * self.value_dim * self.value_dtype.size


class LayerPages:
    """Keys and values of one layer, each (num_blocks, heads, block_size, dim).

    The arrays are replaced by every write. Hold no view of them across a step, or MLX must copy the
    whole pool before it can write.
    """

    __slots__ = ("keys", "values")

    def __init__(self, shape: PageShape, num_blocks: int, block_size: int) -> None:
        self.keys = mx.zeros(
            (num_blocks, shape.key_heads, block_size, shape.key_dim), shape.key_dtype
        )
        self.values = mx.zeros(
            (num_blocks, shape.value_heads, block_size, shape.value_dim), shape.value_dtype
        )
        mx.eval(self.keys, self.values)

    @property
    def nbytes(self) -> int:
        return int(self.keys.nbytes + self.values.nbytes)

    def write(self, slots: Slots, keys: mx.array, values: mx.array) -> None:
        """Write (T, heads, 1, dim) rows into their slots."""
        slots.write(self.keys, keys)
        slots.write(self.values, values)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, as a fork asks for."""
        sources = mx.array([c.source for c in copies], mx.int32)
        targets = mx.array([c.target for c in copies], mx.int32)
        copy_blocks(self.keys, sources, targets)
        copy_blocks(self.values, sources, targets)
