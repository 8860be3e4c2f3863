"""The pages themselves: one key and one value array per layer, allocated once."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from quire.kernels.choice.spec import dtype_name
from quire.kernels.paged_decode_spec import PAGED_DECODE, DecodeShape, DecodeVariant


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

    def fits_kernels(self, block_size: int) -> bool:
        """Whether the GPU kernels can read and write pages of this shape."""
        if self.key_dtype != self.value_dtype or self.key_heads != self.value_heads:
            return False
        dims = self.key_dim, self.value_dim
        shape = DecodeShape(1, 1, self.key_heads, self.key_heads, *dims, block_size)
        kernel = PAGED_DECODE.variants[DecodeVariant.PAGED_KERNEL]
        return any(
            kernel.supports(shape, dtype_name(self.key_dtype), device) for device in kernel.devices
        )


class LayerPages:
    """Keys and values of one layer, each (num_blocks, heads, block_size, dim).

    Where MLX writes them the arrays are replaced: hold no view of them across a step, or it must
    copy the whole pool before it can write.
    """

    __slots__ = ("keys", "values", "windowed")

    def __init__(
        self, shape: PageShape, num_blocks: int, block_size: int, *, windowed: bool = False
    ) -> None:
        """``windowed``: blocks are those of sliding windows."""
        self.windowed = windowed
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
