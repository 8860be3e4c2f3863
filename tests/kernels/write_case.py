"""Page writes and reads small enough to simulate, and what they should leave."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from decode_case import Float64Array, to_float64

from quire.kernels.kv_write import gather_context, write_in_place
from quire.kernels.page_arrays import PageArrays


@dataclass(frozen=True)
class WriteCase:
    """Rows written into random slots of pages full of other numbers, and some blocks read back."""

    dtype: mx.Dtype
    block_size: int
    keys: tuple[int, int]  # heads, head size
    values: tuple[int, int]
    rows: int

    def __str__(self) -> str:
        return f"{str(self.dtype)[9:]}-block{self.block_size}-{self.rows}rows"

    def run(self) -> tuple[list[mx.array], list[Float64Array]]:
        """Pages, contexts and new rows afterwards, and what they should be."""
        rng = np.random.default_rng(self.rows)

        def normal(*shape: int) -> mx.array:
            array = mx.array(rng.normal(size=shape)).astype(self.dtype)
            mx.eval(array)
            return array

        size, num_blocks = self.block_size, 8
        pages = [normal(num_blocks, heads, size, dim) for heads, dim in (self.keys, self.values)]
        new = [normal(self.rows, heads, 1, dim) for heads, dim in (self.keys, self.values)]
        mapping = rng.permutation(num_blocks * size)[: self.rows].astype(np.int32)
        blocks = rng.permutation(num_blocks)[:5].astype(np.int32)
        expected = [to_float64(page) for page in pages]
        for page, rows in zip(expected, new, strict=True):
            page[mapping // size, :, mapping % size] = to_float64(rows)[:, :, 0]
        for page in expected[:2]:
            context = page[blocks].swapaxes(0, 1)
            expected.append(context.reshape(1, context.shape[0], -1, context.shape[-1]))

        before = PageArrays(pages[0], pages[1], mx.array([1]))
        kept = write_in_place(before, new[0], new[1], mx.array(mapping), keep_rows=True)
        assert kept.new_keys is not None
        assert kept.new_values is not None
        contexts = gather_context(kept, mx.array(blocks)[None])
        expected += [to_float64(rows) for rows in new]
        return [*pages, *contexts, kept.new_keys, kept.new_values], expected

    def check(self) -> None:
        result, expected = self.run()
        for array, wanted in zip(result, expected, strict=True):
            np.testing.assert_array_equal(to_float64(array), wanted)
