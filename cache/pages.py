"""The pages themselves: one key and one value array per layer, allocated once."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from quire.kernels.choice.spec import dtype_name
from quire.kernels.kv_write import Slots, scatter, write_in_place
from quire.kernels.page_arrays import PageArrays
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

    Written in place by a kernel, or by an MLX scatter that replaces the arrays. In the second case
    hold no view of them across a step, or MLX must copy the whole pool before it can write.
    """

    __slots__ = ("_in_place", "_new", "_written", "keys", "values")

    def __init__(
        self, shape: PageShape, num_blocks: int, block_size: int, *, in_place: bool = False
    ) -> None:
        self.keys = mx.zeros(
            (num_blocks, shape.key_heads, block_size, shape.key_dim), shape.key_dtype
        )
        self.values = mx.zeros(
            (num_blocks, shape.value_heads, block_size, shape.value_dim), shape.value_dtype
        )
        self._in_place = in_place
        self._written: mx.array | None = None
        self._new: tuple[mx.array | None, mx.array | None] = None, None
        mx.eval(self.keys, self.values)

    @property
    def nbytes(self) -> int:
        return int(self.keys.nbytes + self.values.nbytes)

    def write(self, slots: Slots, keys: mx.array, values: mx.array, *, keep_rows: bool) -> None:
        """Write (T, heads, 1, dim) rows into their slots.

        ``keep_rows``: attention may read the new rows from :attr:`arrays` instead of the pages.
        """
        if self._in_place:
            keys, values = keys.astype(self.keys.dtype), values.astype(self.values.dtype)
            written = write_in_place(
                self.keys, self.values, keys, values, slots, keep_rows=keep_rows
            )
            self._written = written.token
            self._new = written.keys, written.values
        else:
            scatter(self.keys, keys, slots)
            scatter(self.values, values, slots)

    @property
    def arrays(self) -> PageArrays:
        """What attention reads in this step, after the write."""
        return PageArrays(self.keys, self.values, self._written, *self._new)
