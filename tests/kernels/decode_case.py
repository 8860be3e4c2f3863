"""A decode step over pages, small enough to simulate, and attention written out in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.decode_plan import DecodePlan, plan_items
from quire.kernels.heads import Scoring
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_decode import paged_decode

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
# Of the largest value of a head's output.
LIMITS = {F32: 1e-5, F16: 2e-3, BF16: 1e-2}
# An id far outside of any pool.
GARBAGE = 1 << 30

Float64Array = npt.NDArray[np.float64]


def to_float64(array: mx.array) -> Float64Array:
    return np.array(array.astype(F32)).astype(np.float64)


@dataclass(frozen=True)
class DecodeCase:
    """Rows of ``lengths`` tokens each.

    Every slot that belongs to no token is NaN, table entries beyond a context are ids of no block,
    and those that the window hides are block 0, which is nobody's.
    """

    dtype: mx.Dtype = F32
    dims: tuple[int, int] = (64, 64)
    group: int = 2
    block_size: int = 8
    simdgroups: int = 2
    unroll_keys: int = 2
    direct: bool = True  # one work item a row
    sinks: bool = False
    softcap: float | None = None
    window: int | None = None
    lengths: tuple[int, ...] = (0, 1, 16, 75)
    split: int = 32
    kv_heads: int = 2
    magnitude: float = 1.0  # of the scores
    seed: int = 0

    def __str__(self) -> str:
        dims = "x".join(map(str, self.dims))
        return f"{str(self.dtype)[9:]}-{dims}-group{self.group}-block{self.block_size}"

    @property
    def scale(self) -> float:
        return float(self.dims[0] ** -0.5)

    @cached_property
    def _tokens(self) -> list[tuple[mx.array, mx.array]]:
        """Each row's keys and values, (length, kv_heads, dim)."""
        rng = np.random.default_rng(self.seed)
        return [
            (
                mx.array(rng.normal(size=(n, self.kv_heads, self.dims[0]))).astype(self.dtype),
                mx.array(rng.normal(size=(n, self.kv_heads, self.dims[1]))).astype(self.dtype),
            )
            for n in self.lengths
        ]

    @cached_property
    def _queries(self) -> tuple[mx.array, mx.array | None]:
        rng = np.random.default_rng(self.seed + 1)
        heads = self.kv_heads * self.group
        queries = rng.normal(0, self.magnitude, (len(self.lengths), heads, 1, self.dims[0]))
        sinks = mx.array(rng.normal(size=heads).astype(np.float32)) if self.sinks else None
        return mx.array(queries).astype(self.dtype), sinks

    def _pages(self) -> tuple[mx.array, mx.array, mx.array]:
        """Key pages, value pages and block tables."""
        size = self.block_size
        needed = [-(-n // size) for n in self.lengths]
        num_blocks = sum(needed) + 2
        ids = np.random.default_rng(self.seed + 2).permutation(np.arange(1, num_blocks))
        tables = np.full((len(self.lengths), max(needed) + 1), GARBAGE, np.int32)
        pages = [
            np.full((num_blocks, self.kv_heads, size, dim), np.nan, np.float32) for dim in self.dims
        ]
        for row, tokens in enumerate(self._tokens):
            n = self.lengths[row]
            for position in range(n):
                index = position // size
                if self.window is not None and (index + 1) * size <= n - self.window:
                    tables[row, index] = 0
                    continue
                block = ids[sum(needed[:row]) + index]
                tables[row, index] = block
                for array, given in zip(pages, tokens, strict=True):
                    array[block, :, position % size] = np.array(given[position].astype(F32))
        keys, values = (mx.array(array).astype(self.dtype) for array in pages)
        return keys, values, mx.array(tables)

    def plan(self) -> DecodePlan:
        lengths = np.array(self.lengths, np.int32)
        settings = self.simdgroups, self.unroll_keys
        if not self.direct:
            items, first_items = plan_items(lengths, self.window, self.split)
            return DecodePlan(mx.array(items), mx.array(first_items), *settings)
        begin = np.maximum(lengths - (self.window or GARBAGE), 0)
        items = np.stack([np.arange(len(lengths)), begin, lengths, 0 * lengths], axis=1)
        return DecodePlan(mx.array(items.astype(np.int32)), None, *settings)

    def run(self) -> mx.array:
        keys, values, tables = self._pages()
        queries, sinks = self._queries
        return paged_decode(
            queries,
            PageArrays(keys, values, mx.zeros((1,), mx.int32)),
            tables,
            self.plan(),
            Scoring(self.scale, self.window, sinks, self.softcap),
        )

    def expected(self) -> Float64Array:
        """(rows, heads, 1, value_dim)"""
        all_queries, sinks = self._queries
        output = np.zeros((*all_queries.shape[:3], self.dims[1]))
        for row, (keys, values) in enumerate(map(to_float64, each) for each in self._tokens):
            visible = slice(max(0, len(keys) - (self.window or len(keys))), len(keys))
            for head in range(all_queries.shape[1]) if len(keys) else ():
                query = to_float64(all_queries[row, head, 0])
                scores = keys[visible, head // self.group] @ query * self.scale
                if self.softcap is not None:
                    scores = self.softcap * np.tanh(scores / self.softcap)
                sink = -np.inf if sinks is None else sinks[head].item()
                peak = max(scores.max(), sink)
                weights = np.exp(scores - peak)
                weights /= weights.sum() + np.exp(sink - peak)
                output[row, head, 0] = weights @ values[visible, head // self.group]
        return output

    def check(self, result: mx.array | None = None) -> None:
        """Fail unless the result, by default that of running it, is near enough to float64."""
        result = self.run() if result is None else result
        assert result.dtype == self.dtype
        computed, expected = to_float64(result), self.expected()
        assert computed.shape == expected.shape
        largest = np.abs(expected).max(axis=-1, keepdims=True)
        error = np.abs(computed - expected)
        # Rows without context are zeros; NaN is no number below the limit.
        limit = LIMITS[self.dtype] * max(1.0, self.magnitude)
        wrong = ~(error <= limit * largest)
        assert not wrong.any(), (
            f"{wrong.sum()} of {wrong.size} values are wrong, in the rows "
            f"{np.unique(np.nonzero(wrong)[0])}, by up to {np.nanmax(error / largest.clip(1e-9))}"
        )
