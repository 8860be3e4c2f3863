"""Prompt chunks over pages, small enough to simulate, and attention written out in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from unittest import mock

import mlx.core as mx
import numpy as np
from decode_case import BF16, F32, GARBAGE, LIMITS, Float64Array, to_float64

from quire.kernels import paged_prompt as module
from quire.kernels.heads import Heads, Scoring
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_prompt import paged_prompt, tile_chunks
from quire.kernels.ragged import PromptChunk


@dataclass(frozen=True)
class PromptCase:
    """Chunks of (tokens before, rows) each, after ``num_before`` rows of something else.

    Every slot that belongs to no token is NaN, and table entries that a window hides are ids of no
    block.
    """

    dtype: mx.Dtype = BF16
    dims: tuple[int, int] = (64, 64)
    group: int = 2
    block_size: int = 16
    sinks: bool = False
    window: int | None = None
    chunks: tuple[tuple[int, int], ...] = ((0, 5), (40, 33), (7, 1))
    part: int | None = None  # tokens that contexts are cut into; None: they are not
    num_before: int = 3
    num_after: int = 0
    kv_heads: int = 2
    stages: int = 1  # two on CUDA

    def __str__(self) -> str:
        dims = "x".join(map(str, self.dims))
        return f"{str(self.dtype)[9:]}-{dims}-group{self.group}-block{self.block_size}"

    @cached_property
    def _tokens(self) -> list[tuple[mx.array, mx.array]]:
        """Each chunk's keys and values, (context, kv_heads, dim)."""
        rng = np.random.default_rng(0)
        return [
            (
                mx.array(rng.normal(size=(sum(c), self.kv_heads, self.dims[0]))).astype(self.dtype),
                mx.array(rng.normal(size=(sum(c), self.kv_heads, self.dims[1]))).astype(self.dtype),
            )
            for c in self.chunks
        ]

    @cached_property
    def _queries(self) -> tuple[mx.array, mx.array | None]:
        rng = np.random.default_rng(1)
        heads = self.kv_heads * self.group
        rows = self.num_before + sum(count for _, count in self.chunks) + self.num_after
        queries = rng.normal(0, 2.0, (rows, heads, 1, self.dims[0]))
        sinks = mx.array(rng.normal(size=heads)).astype(F32) if self.sinks else None
        return mx.array(queries).astype(self.dtype), sinks

    def _paged(self) -> tuple[mx.array, mx.array, list[PromptChunk]]:
        size = self.block_size
        needed = [-(-sum(chunk) // size) for chunk in self.chunks]
        ids = np.random.default_rng(2).permutation(np.arange(1, sum(needed) + 1)).astype(np.int32)
        pages = [
            np.full((sum(needed) + 1, self.kv_heads, size, dim), np.nan, np.float32)
            for dim in self.dims
        ]
        chunks, row = [], self.num_before
        for index, (start, count) in enumerate(self.chunks):
            blocks = ids[sum(needed[:index]) : sum(needed[: index + 1])].copy()
            for array, given in zip(pages, self._tokens[index], strict=True):
                values = np.array(given.astype(F32))
                for position in range(start + count):
                    array[blocks[position // size], :, position % size] = values[position]
            if self.window is not None:
                blocks[: max(0, start - self.window + 1) // size] = GARBAGE
            chunks.append(PromptChunk(row, count, start + count, blocks))
            row += count
        keys, values = (mx.array(array).astype(self.dtype) for array in pages)
        return keys, values, chunks

    def run(self) -> mx.array:
        keys, values, chunks = self._paged()
        queries, sinks = self._queries
        cut = 1 if self.part is None else GARBAGE
        with (
            mock.patch.object(module, "_WANTED_THREADGROUPS", cut),
            mock.patch.object(module, "_MAX_PARTS", GARBAGE),
            mock.patch.object(module, "_MIN_PART", self.part or 1),
        ):
            heads = Heads(
                queries.shape[1],
                self.kv_heads,
                *self.dims,
                window=self.window,
                sinks=self.sinks,
                dtype=self.dtype,
            )
            tiled = tile_chunks(chunks, heads, self.num_after)
        assert (tiled.first_items is None) == (self.part is None)
        with mock.patch.object(module, "_num_stages", return_value=self.stages):
            pages = PageArrays(keys, values, mx.zeros((1,), mx.int32))
            scoring = Scoring(self.dims[0] ** -0.5, self.window, sinks)
            return paged_prompt(queries, pages, tiled, scoring)

    def expected(self) -> Float64Array:
        """(rows, heads, 1, value_dim); zeros for the rows behind the chunks."""
        all_queries, sinks = self._queries
        heads = all_queries.shape[1]
        rows = []
        for (start, count), tokens in zip(self.chunks, self._tokens, strict=True):
            keys, values = map(to_float64, tokens)
            for position in range(start, start + count):
                query = to_float64(all_queries[self.num_before + len(rows), :, 0])
                seen = slice(max(0, position + 1 - (self.window or GARBAGE)), position + 1)
                row = np.zeros((heads, 1, self.dims[1]))
                for head in range(heads):
                    scores = keys[seen, head // self.group] @ query[head] * self.dims[0] ** -0.5
                    sink = -np.inf if sinks is None else sinks[head].item()
                    peak = max(scores.max(), sink)
                    weights = np.exp(scores - peak)
                    weights /= weights.sum() + np.exp(sink - peak)
                    row[head, 0] = weights @ values[seen, head // self.group]
                rows.append(row)
        rows += [np.zeros((heads, 1, self.dims[1]))] * self.num_after
        return np.stack(rows)

    def check(self) -> None:
        """Fail unless the result is near enough to float64."""
        result = self.run()
        assert result.dtype == self.dtype
        computed, expected = to_float64(result), self.expected()
        assert computed.shape == expected.shape
        largest = np.abs(expected).max(axis=-1, keepdims=True)
        wrong = ~(np.abs(computed - expected) <= LIMITS[self.dtype] * largest)
        assert not wrong.any(), f"{wrong.sum()} of {wrong.size} values are wrong"
