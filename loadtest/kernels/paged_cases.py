"""Attention over pages: decodes, decodes that begin alike, and prompt chunks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.attention import attend
from quire.kernels.attention_problem import Pages
from quire.kernels.choice.timing import Function
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_decode_spec import PAGED_DECODE, DecodeProblem, DecodeShape
from quire.kernels.ragged import PromptChunk, RaggedBatch
from quire.kernels.shared_context_spec import SHARED_CONTEXT, SharedProblem, SharedShape
from quire.loadtest.kernels.case import Case, Profile, specified_variants

# Bound before anything wraps the attribute of the module.
_sdpa = mx.fast.scaled_dot_product_attention

_BLOCK_SIZE = 16
_CONTIGUOUS, _GATHERED = "sdpa, contiguous", "gather + sdpa"


class Heads(NamedTuple):
    """Head counts and sizes of an attention layer."""

    queries: int
    keys: int
    dim: int

    @classmethod
    def of(cls, profile: Profile) -> Heads:
        """Qwen3-8B's on GPUs, a quarter of them on the CPU."""
        return cls(32, 8, 128) if profile.gpu else cls(8, 4, 64)

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """As shapes of attention have them."""
        return self.queries, self.keys, self.dim, self.dim, _BLOCK_SIZE

    def kv_bytes(self, tokens: int, dtype: mx.Dtype) -> int:
        return 2 * tokens * self.keys * self.dim * dtype.size

    def row_bytes(self, rows: int, dtype: mx.Dtype) -> int:
        """Queries read and outputs written."""
        return 2 * rows * self.queries * self.dim * dtype.size


_EVEN = {
    "gpu": ((64, 4096), (64, 1024), (16, 4096), (8, 1024), (1, 32768), (1, 4096)),
    "cpu": ((8, 1024), (8, 256), (2, 1024), (1, 4096)),
}


def decode_cases(profile: Profile) -> Iterator[Case]:
    """Equal contexts at several batch sizes, then uneven ones in one batch."""
    sizes = _EVEN["gpu" if profile.gpu else "cpu"]
    for batch, context in sizes[-1:] if profile.quick else sizes:
        labels: dict[str, int | str] = {"batch": batch, "context": context}
        yield _decode(profile, f"{batch} x {context}", labels, [context] * batch)
    if profile.quick:
        return
    batch, typical, longest = (64, 1024, 32768) if profile.gpu else (8, 256, 2048)
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(typical), 0.7, batch)).astype(int).clip(16, 8 * typical)
    labels = {"batch": batch, "context": "lognormal", "longest": int(lengths.max())}
    yield _decode(profile, f"{batch} x lognormal({typical})", labels, lengths.tolist())
    labels = {"batch": batch, "context": typical, "longest": longest}
    uneven = [typical] * (batch - 1) + [longest]
    yield _decode(profile, f"{batch - 1} x {typical} + {longest}", labels, uneven)


class _Contiguous:
    """The contexts of a problem as an unpaged cache would hold them, padded to the longest."""

    def __init__(self, pages: Pages) -> None:
        self.keys, self.values = pages.contiguous()
        lengths = np.array(pages.lengths)[:, None]
        self.mask: mx.array | None = None
        if lengths.min() < lengths.max():
            self.mask = mx.array((np.arange(lengths.max()) < lengths)[:, None, None])

    def attend(self, pages: Pages) -> list[mx.array]:
        return [_sdpa(pages.queries, self.keys, self.values, scale=pages.scale, mask=self.mask)]


class _Decodes(DecodeProblem):
    def __init__(self, shape: DecodeShape, lengths: list[int], dtype: mx.Dtype, seed: int) -> None:
        super().__init__(shape, lengths, dtype, seed)
        self.contiguous = _Contiguous(self.pages)


class _SharedDecodes(SharedProblem):
    def __init__(self, shape: SharedShape, dtype: mx.Dtype, seed: int) -> None:
        super().__init__(shape, dtype, seed, False)
        self.contiguous = _Contiguous(self.pages)


def _by_sdpa(x: _Decodes | _SharedDecodes) -> list[mx.array]:
    return x.contiguous.attend(x.pages)


def _gathered(pages: Pages, tables: mx.array, length: int) -> Iterator[mx.array]:
    """Keys and values of (B, n) blocks, (B, kv_heads, length, dim)."""
    for array in (pages.keys, pages.values):
        yield array[tables].swapaxes(1, 2).flatten(2, 3)[:, :, :length]


def _gather_sdpa(x: _Decodes) -> list[mx.array]:
    pages = x.pages
    keys, values = _gathered(pages, x.tables, max(pages.lengths))
    return [_sdpa(pages.queries, keys, values, scale=pages.scale, mask=x.contiguous.mask)]


def _decode(profile: Profile, name: str, labels: dict[str, int | str], lengths: list[int]) -> Case:
    heads, dtype = Heads.of(profile), profile.dtype
    kv_bytes = heads.kv_bytes(sum(lengths), dtype)
    shape = DecodeShape(len(lengths), round(sum(lengths) / len(lengths)), *heads.numbers)
    ours, label = specified_variants(profile, PAGED_DECODE, shape)
    return Case(
        operation="paged_decode",
        name=name,
        labels={**labels, **label},
        inputs=partial(_Decodes, shape, lengths, dtype),
        variants={_CONTIGUOUS: _by_sdpa, _GATHERED: _gather_sdpa, **ours},
        baselines=(_CONTIGUOUS, _GATHERED),
        bytes_moved=kv_bytes + heads.row_bytes(len(lengths), dtype),
        flops=4 * sum(lengths) * heads.queries * heads.dim,
        memory=kv_bytes + 4 * heads.kv_bytes(len(lengths) * max(lengths), dtype),
    )


class _Size(NamedTuple):
    rows: int
    context: int  # tokens that all rows begin with; the whole blocks of them are shared
    own: int  # tokens of each row behind them


_SHARED = {
    "gpu": (_Size(64, 780, 128), _Size(16, 4096, 256), _Size(8, 1024, 128)),
    "cpu": (_Size(8, 1024, 128), _Size(4, 256, 64)),
}


def shared_cases(profile: Profile) -> Iterator[Case]:
    """Read once, or by each row."""
    heads, dtype = Heads.of(profile), profile.dtype
    sizes = _SHARED["gpu" if profile.gpu else "cpu"]
    for size in sizes[-1:] if profile.quick else sizes:
        shape = SharedShape(*size, *heads.numbers)
        ours, label = specified_variants(profile, SHARED_CONTEXT, shape)
        common = size.context // _BLOCK_SIZE * _BLOCK_SIZE
        tokens = size.rows * (common + size.own)
        whole, rows = heads.kv_bytes(tokens, dtype), heads.row_bytes(size.rows, dtype)
        yield Case(
            operation="shared_context",
            name=f"{size.rows} x ({size.context} + {size.own})",
            labels={**size._asdict(), **label},
            inputs=partial(_SharedDecodes, shape, dtype),
            variants={_CONTIGUOUS: _by_sdpa, **ours},
            baselines=(_CONTIGUOUS,),
            # Caches may spare `per_row` from reading what is shared from memory again.
            bytes_moved=whole - heads.kv_bytes((size.rows - 1) * common, dtype) + rows,
            variant_bytes={_CONTIGUOUS: whole + rows},
            flops=4 * tokens * heads.queries * heads.dim,
            memory=5 * whole,
        )


class _Ragged(NamedTuple):
    chunks: int
    rows: int  # of each chunk
    prefix: int  # tokens before each chunk, cached


_PROMPTS = {
    "gpu": (_Ragged(8, 256, 0), _Ragged(1, 2048, 0), _Ragged(4, 512, 4096), _Ragged(8, 64, 4096)),
    "cpu": (_Ragged(4, 64, 0), _Ragged(1, 256, 0), _Ragged(2, 64, 512), _Ragged(2, 16, 512)),
}


def prompt_cases(profile: Profile) -> Iterator[Case]:
    """Whole prompts, together and alone, and chunks over a cached prefix, in one ragged batch."""
    heads, dtype = Heads.of(profile), profile.dtype
    sizes = _PROMPTS["gpu" if profile.gpu else "cpu"]
    for size in sizes[-1:] if profile.quick else sizes:
        length, rows = size.prefix + size.rows, size.chunks * size.rows
        moved = heads.kv_bytes(size.chunks * length, dtype) + heads.row_bytes(rows, dtype)
        seen = size.chunks * sum(range(size.prefix + 1, length + 1))
        yield Case(
            operation="prompt_attention",
            name=f"{size.chunks} x {size.rows}" + (f" after {size.prefix}" if size.prefix else ""),
            labels={"chunks": size.chunks, "rows": size.rows, "prefix": size.prefix},
            inputs=partial(_Prompts, size, heads, profile),
            variants=_PROMPT_VARIANTS,
            baselines=(_CONTIGUOUS, _GATHERED),
            bytes_moved=moved,
            flops=4 * seen * heads.queries * heads.dim,
            memory=4 * moved,
        )


class _Prompts:
    def __init__(self, size: _Ragged, heads: Heads, profile: Profile, seed: int) -> None:
        length, rows = size.prefix + size.rows, size.chunks * size.rows
        shape = DecodeShape(rows, length, *heads.numbers)
        pages = self.pages = Pages(shape, [length] * size.chunks, profile.dtype, seed, rows)
        self.length = length
        self.tables = [mx.array(table[None]) for table in pages.tables]
        keys, values = pages.contiguous()
        self.contexts = [
            (mx.contiguous(keys[i : i + 1]), mx.contiguous(values[i : i + 1]))
            for i in range(size.chunks)
        ]
        firsts = range(0, rows + 1, size.rows)
        self.rows = [slice(first, end) for first, end in pairwise(firsts)]
        chunks = [
            PromptChunk(first, size.rows, length, table)
            for first, table in zip(firsts, pages.tables, strict=False)
        ]
        # The layers of a step share it, and the plans it keeps.
        self.batch = RaggedBatch([], chunks)
        # The rows' own keys and values, as the model has just computed them: (T, kv_heads, 1, dim).
        new = [
            mx.contiguous(x[:, :, size.prefix :].swapaxes(1, 2).flatten(0, 1)[:, :, None])
            for x in (keys, values)
        ]
        self.arrays = PageArrays(
            pages.keys, pages.values, pages.written if profile.gpu else None, *new
        )
        mx.eval(self.contexts, new)

    def chained(self, result: Sequence[mx.array]) -> _Prompts:
        other = copy.copy(self)
        other.pages = self.pages.asked(result[0])
        return other

    def per_chunk(self, contexts: Sequence[Sequence[mx.array]]) -> list[mx.array]:
        outputs = []
        for rows, (keys, values) in zip(self.rows, contexts, strict=True):
            queries = self.pages.queries[rows].transpose(2, 1, 0, 3)
            output = _sdpa(queries, keys, values, scale=self.pages.scale, mask="causal")
            outputs.append(output.transpose(2, 1, 0, 3))
        return [outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)]

    def gathered(self) -> list[mx.array]:
        contexts = [list(_gathered(self.pages, table, self.length)) for table in self.tables]
        return self.per_chunk(contexts)


_PROMPT_VARIANTS: dict[str, Function] = {
    _CONTIGUOUS: lambda x: x.per_chunk(x.contexts),
    _GATHERED: lambda x: x.gathered(),
    "quire": lambda x: [attend(x.pages.queries, x.arrays, x.batch, scale=x.pages.scale)],
}
