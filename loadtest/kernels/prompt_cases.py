"""Attention of prompt chunks over pages: several sequences in one ragged batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from quire.kernels.attention import attend
from quire.kernels.page_arrays import PageArrays
from quire.kernels.ragged import PromptChunk, RaggedBatch
from quire.loadtest.kernels.case import Case, Profile
from quire.loadtest.kernels.paged_inputs import Heads, PagedContexts, contiguous

_sdpa = mx.fast.scaled_dot_product_attention


class _Ragged(NamedTuple):
    chunks: int
    rows: int  # of each chunk
    prefix: int  # tokens before each chunk, cached


_SIZES = {
    "gpu": (_Ragged(8, 256, 0), _Ragged(1, 2048, 0), _Ragged(4, 512, 4096), _Ragged(8, 64, 4096)),
    "cpu": (_Ragged(4, 64, 0), _Ragged(1, 256, 0), _Ragged(2, 64, 512), _Ragged(2, 16, 512)),
}


def prompt_cases(profile: Profile) -> Iterator[Case]:
    """Whole prompts, together and alone, and chunks over a cached prefix."""
    sizes = _SIZES["gpu" if profile.gpu else "cpu"]
    for size in sizes[-1:] if profile.quick else sizes:
        yield _case(profile, size)


class _Inputs:
    def __init__(self, heads: Heads, dtype: mx.Dtype, size: _Ragged, gpu: bool, seed: int) -> None:
        length = size.prefix + size.rows
        self.pages = PagedContexts([length] * size.chunks, heads, dtype, seed)
        rows = size.chunks * size.rows
        shape = (rows, heads.queries, 1, heads.dim)
        self.queries = mx.random.normal(shape, dtype, key=mx.random.key(seed + 1000))
        self.tables = [mx.array(table[None]) for table in self.pages.tables]
        gathered = [self.pages.gather(table) for table in self.tables]
        self.contexts = [contiguous((k[:, :, :length], v[:, :, :length])) for k, v in gathered]
        chunks = [
            PromptChunk(index * size.rows, size.rows, length, table)
            for index, table in enumerate(self.pages.tables)
        ]
        self.batch = RaggedBatch([], chunks)
        # The rows' own keys and values, as the model has just computed them: (T, kv_heads, 1, dim).
        new_keys, new_values = (
            mx.contiguous(
                mx.concatenate(
                    [pair[i][0, :, size.prefix :] for pair in self.contexts], axis=1
                ).swapaxes(0, 1)[:, :, None]
            )
            for i in range(2)
        )
        written = self.pages.written if gpu else None
        self.arrays = PageArrays(self.pages.keys, self.pages.values, written, new_keys, new_values)
        mx.eval(self.queries, self.arrays.keys, self.arrays.values, new_keys, new_values)


def _chain(inputs: _Inputs, result: mx.array) -> _Inputs:
    """The same contexts with the result of another call, (T, heads, 1, dim), as queries."""
    chained = copy.copy(inputs)
    chained.queries = result
    return chained


def _case(profile: Profile, size: _Ragged) -> Case:
    heads = Heads(profile.gpu)
    dtype = profile.dtype
    length = size.prefix + size.rows

    def per_chunk(x: _Inputs, contexts: list[tuple[mx.array, mx.array]]) -> mx.array:
        outputs = []
        for index, (keys, values) in enumerate(contexts):
            rows = x.queries[index * size.rows : (index + 1) * size.rows]
            output = _sdpa(
                rows.transpose(2, 1, 0, 3),
                keys[:, :, :length],
                values[:, :, :length],
                scale=heads.scale,
                mask="causal",
            )
            outputs.append(output.transpose(2, 1, 0, 3))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def sdpa(x: _Inputs) -> mx.array:
        return per_chunk(x, x.contexts)

    def gather_sdpa(x: _Inputs) -> mx.array:
        return per_chunk(x, [x.pages.gather(table) for table in x.tables])

    def chosen(x: _Inputs) -> mx.array:
        return attend(x.queries, x.arrays, x.batch, scale=heads.scale)

    rows = size.chunks * size.rows
    keys_seen = size.chunks * sum(range(size.prefix + 1, length + 1))
    name = f"{size.chunks} x {size.rows}" + (f" after {size.prefix}" if size.prefix else "")
    moved = heads.kv_bytes(size.chunks * length, dtype) + heads.row_bytes(rows, dtype)
    return Case(
        operation="prompt_attention",
        name=name,
        labels={"chunks": size.chunks, "rows": size.rows, "prefix": size.prefix},
        inputs=partial(_Inputs, heads, dtype, size, profile.gpu),
        variants={"sdpa, contiguous": sdpa, "gather + sdpa": gather_sdpa, "quire": chosen},
        chain=_chain,
        baselines=("sdpa, contiguous", "gather + sdpa"),
        bytes_moved=moved,
        flops=4 * keys_seen * heads.queries * heads.dim,
        memory=4 * moved,
    )
