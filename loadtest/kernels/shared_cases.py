"""Decode attention of rows that begin with the same tokens: read once, or by each row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from quire.kernels.decode_plan import DecodePlan, default_settings, plan_on_device
from quire.kernels.paged_attention import paged_attention
from quire.kernels.paged_decode import paged_decode
from quire.kernels.ragged import DecodeGroup, RaggedBatch, SharedRun
from quire.kernels.shared_context import attend_shared, plan_shared
from quire.loadtest.kernels.case import Case, Profile
from quire.loadtest.kernels.paged_inputs import BLOCK_SIZE, Heads, PagedContexts, contiguous

_sdpa = mx.fast.scaled_dot_product_attention


class _Size(NamedTuple):
    rows: int
    context: int  # tokens that all rows begin with; the whole blocks of them are shared
    own: int  # tokens of each row behind them

    @property
    def shared_blocks(self) -> int:
        return self.context // BLOCK_SIZE

    @property
    def length(self) -> int:
        return self.context + self.own


_SIZES = {
    "gpu": (_Size(64, 780, 128), _Size(16, 4096, 256), _Size(8, 1024, 128)),
    "cpu": (_Size(8, 1024, 128), _Size(4, 256, 64)),
}


def shared_cases(profile: Profile) -> Iterator[Case]:
    sizes = _SIZES["gpu" if profile.gpu else "cpu"]
    for size in sizes[-1:] if profile.quick else sizes:
        yield _case(profile, size)


class _Inputs:
    """One step's queries, with their contexts in pages and contiguous."""

    def __init__(self, heads: Heads, dtype: mx.Dtype, size: _Size, seed: int) -> None:
        self.pages = PagedContexts([size.length] * size.rows, heads, dtype, seed)
        tables = self.pages.padded_tables
        tables[:, : size.shared_blocks] = tables[0, : size.shared_blocks]
        shape = (size.rows, heads.queries, 1, heads.dim)
        self.queries = mx.random.normal(shape, dtype, key=mx.random.key(seed + 1000))
        self.tables = mx.array(tables)
        keys, values = self.pages.gather(self.tables)
        self.keys, self.values = contiguous(
            (keys[:, :, : size.length], values[:, :, : size.length])
        )
        mx.eval(self.queries, self.tables, self.pages.written)
        run = SharedRun(0, size.rows, size.shared_blocks * BLOCK_SIZE)
        # By whether contexts are shared. The layers of a step have these in common: they are no
        # part of what is timed.
        self.plans = {
            True: _plan(self.pages, heads, [run]),
            False: _plan(self.pages, heads, []),
        }
        self.batches = {
            is_shared: RaggedBatch([DecodeGroup(0, self.pages.lengths, tables, num_blocks)], [])
            for is_shared, num_blocks in ((True, size.shared_blocks), (False, 0))
        }


def _plan(pages: PagedContexts, heads: Heads, runs: list[SharedRun]) -> DecodePlan:
    shared, own = None, pages.lengths
    if runs:
        shared = plan_shared(runs, len(pages.lengths), heads.queries, heads.keys)
        own = pages.lengths - shared.num_tokens
    settings = default_settings(own, None, heads.keys, heads.queries // heads.keys)
    return plan_on_device(pages.lengths, None, settings, shared)


def _chain(inputs: _Inputs, result: mx.array) -> _Inputs:
    """The same contexts with the result of another call, (B, heads, 1, dim), as queries."""
    chained = copy.copy(inputs)
    chained.queries = result
    return chained


def _case(profile: Profile, size: _Size) -> Case:
    heads = Heads(profile.gpu)
    dtype = profile.dtype

    def sdpa(x: _Inputs) -> mx.array:
        return _sdpa(x.queries, x.keys, x.values, scale=heads.scale)

    def kernels(is_shared: bool, x: _Inputs) -> mx.array:
        pages = x.pages
        decoding = x.queries, pages.keys, pages.values, x.tables, x.plans[is_shared]
        shared = attend_shared(*decoding, scale=heads.scale, written=pages.written)
        return paged_decode(*decoding, scale=heads.scale, written=pages.written, shared=shared)

    def reference(is_shared: bool, x: _Inputs) -> mx.array:
        batch = x.batches[is_shared]
        return paged_attention(x.queries, x.pages.keys, x.pages.values, batch, scale=heads.scale)

    ours = kernels if profile.gpu else reference
    rows_bytes = heads.row_bytes(size.rows, dtype)
    whole = heads.kv_bytes(size.rows * size.length, dtype)
    saved = (size.rows - 1) * size.shared_blocks * BLOCK_SIZE
    return Case(
        operation="shared_context",
        name=f"{size.rows} x ({size.context} + {size.own})",
        labels=size._asdict(),
        inputs=partial(_Inputs, heads, dtype, size),
        variants={
            "sdpa, contiguous": sdpa,
            "each": partial(ours, False),
            "together": partial(ours, True),
        },
        chain=_chain,
        baselines=("sdpa, contiguous", "each"),
        # Caches may spare `each` from reading what is shared from memory again.
        bytes_moved=whole - heads.kv_bytes(saved, dtype) + rows_bytes,
        variant_bytes={"sdpa, contiguous": whole + rows_bytes},
        flops=4 * size.rows * size.length * heads.queries * heads.dim,
        memory=5 * whole,
    )
