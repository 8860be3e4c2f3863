"""Random contexts in pages, attention to them in float64, and what specifications of attention over
pages have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Float64Array, Problem, normal, to_float64, waiting
from quire.kernels.choice.sizes import AttentionSizes
from quire.kernels.choice.spec import Limit, Settings
from quire.kernels.heads import Heads, Scoring
from quire.kernels.page_arrays import ExtraScores, PageArrays

_SOFTCAP = 30.0

# Head sizes of keys and values found in models.
_HEAD_DIMS = (
    *((dim, dim) for dim in (32, 40, 64, 80, 96, 112, 120, 128, 192, 256, 512)),
    (192, 128),
)
# Of the kernels that read pages in packs of 16 bytes.
PAGED_LIMITS: Mapping[str, Limit] = {
    "key_dim": Limit(max=256, multiple_of=8),
    "value_dim": Limit(max=256, multiple_of=8),
    "block_size": Limit(values=(8, 16, 32)),
}
# Of those that wide heads leave registers: a global layer of Gemma 4 has 512.
WIDE_LIMITS: Mapping[str, Limit] = {
    **PAGED_LIMITS,
    "key_dim": Limit(max=512, multiple_of=8),
    "value_dim": Limit(max=512, multiple_of=8),
}
NO_SOFTCAP: Mapping[str, Limit] = {"softcap": Limit(values=(False,))}

T = TypeVar("T", bound=Any)  # a named tuple
Paged = TypeVar("Paged", bound="PagedProblem")

# Bound before anything wraps the attribute of the module.
_sdpa = mx.fast.scaled_dot_product_attention


def surveyed_shapes(common: T) -> dict[str, T]:
    """By name: the shape ``common`` with the head sizes of models, and with each flag it knows."""
    found = {}
    for key_dim, value_dim in _HEAD_DIMS:
        same = key_dim == value_dim
        label = f"head_dim {key_dim}" if same else f"dims {key_dim} and {value_dim}"
        found[label] = common._replace(key_dim=key_dim, value_dim=value_dim)
    for flag in ("window", "sinks", "softcap"):
        if flag in common._fields:
            found[flag] = common._replace(**{flag: True})
    return found


def head_numbers(sizes: AttentionSizes, block_size: int) -> tuple[int, int, int, int, int]:
    """What shapes of attention have in common: heads, kv_heads, key_dim, value_dim, block_size."""
    return sizes.heads, sizes.kv_heads, sizes.key_dim, sizes.value_dim, block_size


def windows(sizes: AttentionSizes) -> tuple[bool, ...]:
    return (False, True) if sizes.window else (False,)


class PagedShape(Protocol):
    """What pages are made from; whatever has no field for a flag does without."""

    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def block_size(self) -> int: ...


def spread(longest: int, count: int, ragged: bool) -> list[int]:
    """Lengths of ``count`` contexts: all ``longest``, or ``ragged``: from 1 up to it."""
    if not ragged:
        return [longest] * count
    lengths: list[int] = np.linspace(1, longest, count).astype(int).tolist()
    return lengths


class Pages:
    """Random keys and values of several sequences, blocks in random order, and queries.

    Attributes:
        keys, values: (num_blocks, kv_heads, block_size, dim); block 0 is nobody's.
        tables: (B, max_blocks) int32, filled up with block 0.
        queries: (rows, heads, 1, key_dim)
        num_bytes: what attention of one row per sequence reads and writes at least.
    """

    def __init__(
        self,
        shape: PagedShape,
        lengths: Sequence[int],
        dtype: mx.Dtype,
        seed: int,
        num_rows: int,
        num_shared_blocks: int = 0,
    ) -> None:
        """The first ``num_shared_blocks`` are the same for all sequences."""
        self.shape, self.lengths = shape, list(lengths)
        random = mx.random.split(mx.random.key(seed), 6)
        counts = -(-np.array(lengths) // shape.block_size) - num_shared_blocks
        num_blocks = 1 + num_shared_blocks + int(counts.sum())
        size = num_blocks, shape.kv_heads, shape.block_size
        self.keys = normal((*size, shape.key_dim), dtype, random[0])
        self.values = normal((*size, shape.value_dim), dtype, random[1])
        self.queries = normal((num_rows, shape.heads, 1, shape.key_dim), dtype, random[2])
        self.extra: ExtraScores | None = None
        if extra_dim := getattr(shape, "extra_dim", 0):
            # The values are the first part of the keys.
            self.values = self.keys
            extra = normal((num_rows, shape.heads, 1, extra_dim), dtype, random[4])
            self.extra = ExtraScores(
                extra * extra_dim**-0.5, normal((*size, extra_dim), dtype, random[5])
            )
            mx.eval(*self.extra)
        blocks = 1 + np.random.default_rng(seed).permutation(num_blocks - 1)
        shared, own = np.split(blocks, [num_shared_blocks])
        self.tables = np.zeros((len(lengths), num_shared_blocks + int(counts.max())), np.int32)
        self.tables[:, :num_shared_blocks] = shared
        for row, table in enumerate(np.split(own, np.cumsum(counts)[:-1])):
            self.tables[row, num_shared_blocks : num_shared_blocks + len(table)] = table
        self.scale = shape.key_dim**-0.5
        has_sinks = getattr(shape, "sinks", False)
        self.sinks = normal((shape.heads,), dtype, random[3]) if has_sinks else None
        self.softcap = _SOFTCAP if getattr(shape, "softcap", False) else None
        self.window = max(1, max(lengths) // 2) if getattr(shape, "window", False) else None
        # Of in-place writes; here nothing is left to wait for.
        self._fence = mx.zeros((1,), mx.int32)
        mx.eval(self._fence)
        self._device_tables = mx.array(self.tables)
        self._visible: mx.array | None = None
        if min(lengths) < max(lengths):
            ends = np.array(lengths)[:, None]
            self._visible = mx.array((np.arange(max(lengths)) < ends)[:, None, None])
        visible = sum(min(n, self.window or n) for n in lengths)
        visible -= num_shared_blocks * shape.block_size * (len(lengths) - 1)
        per_token = shape.kv_heads * (shape.key_dim + shape.value_dim) * dtype.size
        self.num_bytes = visible * per_token + 2 * self.queries.nbytes

    @property
    def arrays(self) -> PageArrays:
        return PageArrays(self.keys, self.values, self._fence)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.scale, self.window, self.sinks, self.softcap)

    @property
    def heads(self) -> Heads:
        shape, has_sinks = self.shape, self.sinks is not None
        dims = shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim
        return Heads(*dims, self.window, has_sinks, self.keys.dtype)

    def asked(self, result: mx.array) -> Pages:
        """The same pages with the result of attention as queries, or queries that wait for it."""
        other = copy.copy(self)
        same = result.shape == self.queries.shape
        other.queries = result if same else waiting(self.queries, [result])
        return other

    @cached_property
    def contiguous(self) -> list[mx.array]:
        """Keys and values as an unpaged cache would hold them, (B, kv_heads, longest, dim)."""
        found = [mx.contiguous(array) for array in self.gathered()]
        mx.eval(found)
        return found

    def gathered(self) -> list[mx.array]:
        """The same by MLX's operations, not yet computed."""
        tables, longest = self._device_tables, max(self.lengths)
        blocks = [pages[tables].swapaxes(1, 2) for pages in (self.keys, self.values)]
        return [array.flatten(2, 3)[:, :, :longest] for array in blocks]

    def by_sdpa(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """MLX's fused attention of the last token of each sequence, or of one sequence's last."""
        if len(self.lengths) > 1 or len(self.queries) == 1:
            return [_sdpa(self.queries, keys, values, scale=self.scale, mask=self._visible)]
        queries = self.queries.transpose(2, 1, 0, 3)
        output = _sdpa(queries, keys, values, scale=self.scale, mask="causal")
        return [output.transpose(2, 1, 0, 3)]

    def _extra_scores(self, sequence: int, rows: range, num_keys: int) -> Float64Array:
        assert self.extra is not None, "pages without further keys"
        queries, pages = to_float64(self.extra)
        keys = pages[self.tables[sequence]].swapaxes(0, 1)
        keys = keys.reshape(keys.shape[0], -1, keys.shape[-1])[:, :num_keys]
        part = queries[rows.start : rows.stop]
        part = part.reshape(len(rows), self.shape.kv_heads, -1, part.shape[-1])
        found: Float64Array = np.einsum("rkgd,knd->rkgn", part, keys)
        return found

    def context(self, sequence: int) -> Iterator[Float64Array]:
        """A sequence's keys and values, (kv_heads, length, dim)."""
        for pages in to_float64([self.keys, self.values]):
            blocks = pages[self.tables[sequence]].swapaxes(0, 1)
            flat = blocks.reshape(blocks.shape[0], -1, blocks.shape[-1])
            yield flat[:, : self.lengths[sequence]]

    def last_rows(self) -> list[Float64Array]:
        """Attention of one row per sequence, its last token: (B, heads, 1, value_dim)."""
        rows = [
            self.attention(i, range(i, i + 1), range(n - 1, n)) for i, n in enumerate(self.lengths)
        ]
        return [np.concatenate(rows)]

    def attention(self, sequence: int, rows: range, positions: range) -> Float64Array:
        """Attention of some query rows at their positions, (rows, heads, 1, value_dim)."""
        keys, values = self.context(sequence)
        (queries,) = to_float64([self.queries[rows.start : rows.stop]])
        shape = self.shape
        grouped = queries.reshape(len(rows), shape.kv_heads, -1, shape.key_dim)
        scores = np.einsum("rkgd,knd->rkgn", grouped, keys) * self.scale
        if self.extra is not None:
            scores += self._extra_scores(sequence, rows, keys.shape[1])
        if self.softcap is not None:
            scores = self.softcap * np.tanh(scores / self.softcap)
        at, key_positions = np.array(positions)[:, None], np.arange(keys.shape[1])[None]
        visible = key_positions <= at
        if self.window is not None:
            visible &= key_positions > at - self.window
        scores = np.where(visible[:, None, None, :], scores, -np.inf)
        if self.sinks is not None:
            sinks = to_float64([self.sinks])[0].reshape(1, shape.kv_heads, -1, 1)
            sinks = np.broadcast_to(sinks, (*scores.shape[:3], 1))
            scores = np.concatenate([scores, sinks], axis=3)
        weights = np.exp(scores - scores.max(axis=3, keepdims=True))
        weights = (weights / weights.sum(axis=3, keepdims=True))[..., : keys.shape[1]]
        output = np.einsum("rkgn,knd->rkgd", weights, values)
        shaped: Float64Array = output.reshape(len(rows), shape.heads, 1, -1)
        return shaped


class PagedProblem(Problem):
    """A chain of calls goes through the queries."""

    pages: Pages

    def chained(self: Paged, result: Sequence[mx.array]) -> Paged:
        other = copy.copy(self)
        other.pages = self.pages.asked(result[0])
        return other


# What others do, for benchmarks: attention to contexts that lie together, or are brought together.
BY_SDPA: Mapping[str, Callable[[PagedProblem, Settings], list[mx.array]]] = {
    "sdpa, contiguous": lambda problem, _: problem.pages.by_sdpa(*problem.pages.contiguous),
    "gather + sdpa": lambda problem, _: problem.pages.by_sdpa(*problem.pages.gathered()),
}

# Pages of a measured shape take no more than this, so that two sets of them fit anywhere.
_MAX_PAGE_BYTES = {"metal": 1 << 30, "cuda": 4 << 30, "cpu": 128 << 20}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def fits_memory(sizes: AttentionSizes, dtype: str, tokens: int, device: DeviceName) -> bool:
    per_token = sizes.kv_heads * (sizes.key_dim + sizes.value_dim) * _BYTES[dtype]
    return tokens * per_token <= _MAX_PAGE_BYTES[device]
