"""Decode attention that reads KV pages where they lie, on Metal and CUDA.

The contexts of a step are cut into work items of about equal length, however uneven they are, and
the items' partial results are merged by a second kernel (flash decoding: Dao et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.gpu_kernel import GpuKernel, float_bits

Int32Array = npt.NDArray[np.int32]

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_BLOCK_SIZES = (8, 16, 32)
_MAX_HEAD_DIM = 256
# Query heads that share each load of a key; more than these take another threadgroup.
_MAX_GROUP = 8
_MERGE_SIMDGROUPS = 8
# Two for each of an H200's processors; four times as many where contexts are uneven, or the long
# rows' items are still running when all others have ended.
_WANTED_THREADGROUPS = 256
_UNEVEN = 1.5  # longest context over the mean
_UNEVEN_FACTOR = 4
_MIN_SPLIT, _MAX_SPLIT = 128, 4096  # tokens
_ONE_ITEM = 1024  # tokens of a context that one or two rows leave uncut
# With so many rows times key heads none is cut, as long as contexts are much the same.
_FILLING_THREADGROUPS = 128
_EVEN = 1.25
_UNCUT = 1 << 30

_decode = GpuKernel(
    "paged_decode",
    inputs=(
        "queries",
        "key_pages",
        "value_pages",
        "block_tables",
        "items",
        "sinks",
        "written",
    ),
    outputs=("output", "stats"),
    headers=("tile", "reduce_scatter"),
)
_merge = GpuKernel(
    "paged_merge", inputs=("partials", "stats", "first_items", "sinks"), outputs=("output",)
)


class DecodeSettings(NamedTuple):
    """What may be tuned; any values give the same result but for rounding."""

    simdgroups: int = 4  # of a threadgroup
    unroll_keys: int = 4  # loads of keys under way in each lane, a power of two
    split: int = 512  # tokens of one work item


@dataclass(frozen=True)
class DecodePlan:
    """How the rows of a step are cut into work items.

    Attributes:
        items: (N, 3) int32: row, first token and end of each item, those of a row together.
        first_items: (B + 1,) int32, where each row's items begin; None if item i is row i.
    """

    items: mx.array
    first_items: mx.array | None
    settings: DecodeSettings


def supports(
    kv_heads: tuple[int, int], head_dims: tuple[int, int], dtype: mx.Dtype, block_size: int
) -> bool:
    """Whether the kernels can attend to pages of these shapes; each pair is for keys and values."""
    if dtype not in _DTYPES or block_size not in _BLOCK_SIZES or kv_heads[0] != kv_heads[1]:
        return False
    vector = 16 // dtype.size
    fitting = all(dim % vector == 0 and dim <= _MAX_HEAD_DIM for dim in head_dims)
    return fitting and 32 // _lanes(head_dims, dtype) <= block_size


def default_settings(
    context_lengths: Int32Array, window: int | None, kv_heads: int, group: int
) -> DecodeSettings:
    """Settings that did well on an H200 over a wide range of shapes.

    Nothing is known of Metal yet: there fewer loads are under way, which takes fewer registers.

    Args:
        context_lengths: (B,) int32
        group: query heads per key head.
    """
    lengths = context_lengths if window is None else np.minimum(context_lengths, window)
    unroll = 8 if group <= 4 and not mx.metal.is_available() else 4
    if len(lengths) <= 2 and lengths.max() <= _ONE_ITEM:
        # The host is the limit: no second kernel, and all the simdgroups that find registers.
        return DecodeSettings(simdgroups=8, unroll_keys=unroll, split=_ONE_ITEM)
    unevenness = lengths.max() / max(1.0, lengths.mean())
    threadgroups = len(lengths) * kv_heads
    if threadgroups >= _FILLING_THREADGROUPS and unevenness <= _EVEN:
        per_processor = threadgroups // _FILLING_THREADGROUPS
        simdgroups = 8 if per_processor < 2 else 4 if per_processor < 4 else 2
        return DecodeSettings(simdgroups, unroll, _UNCUT)
    wanted = _WANTED_THREADGROUPS * (_UNEVEN_FACTOR if unevenness > _UNEVEN else 1)
    tokens = max(1, int(lengths.sum()) * kv_heads // wanted)
    split = 1 << (tokens - 1).bit_length()
    return DecodeSettings(4, unroll, min(max(split, _MIN_SPLIT), _MAX_SPLIT))


def plan_items(
    context_lengths: Int32Array, window: int | None, split: int
) -> tuple[Int32Array, Int32Array]:
    """Cut contexts, or the ends of them that a window shows, into items of at most ``split``.

    Args:
        context_lengths: (B,) int32, 0 for padding rows.

    Returns:
        items (N, 3) and first_items (B + 1,), as in :class:`DecodePlan`.
    """
    begin = np.zeros_like(context_lengths)
    if window is not None:
        begin = np.maximum(context_lengths - window, 0)
    counts = -(-(context_lengths - begin) // split)
    first_items = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=first_items[1:])
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    starts = begin[rows] + (np.arange(len(rows)) - first_items[rows]) * split
    ends = np.minimum(starts + split, context_lengths[rows])
    items = np.stack([rows, starts, ends], axis=1).astype(np.int32)
    return items, first_items


def is_one_per_row(items: Int32Array, first_items: Int32Array) -> bool:
    """Whether item i is all of row i, so that there is nothing to merge."""
    return len(items) == len(first_items) - 1 and bool((np.diff(first_items) == 1).all())


def paged_decode(
    queries: mx.array,
    key_pages: mx.array,
    value_pages: mx.array,
    block_tables: mx.array,
    plan: DecodePlan,
    *,
    scale: float,
    written: mx.array,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """Attention of one query per row over its sequence's pages.

    Args:
        queries: (B, heads, 1, key_dim) in the dtype of the pages.
        key_pages: (num_blocks, kv_heads, block_size, key_dim)
        value_pages: (num_blocks, kv_heads, block_size, value_dim)
        block_tables: (B, max_blocks) int32. Entries of whole blocks in front of a window are looked
            up too, and must be ids of blocks; entries behind a context are not.
        written: output of whatever wrote the pages last, so that it is done before.
        sinks: (heads,) logits that take part in the softmax but have no value.
        softcap: scores become softcap * tanh(score / softcap).

    Returns:
        (B, heads, 1, value_dim) in the dtype of ``queries``; zeros for rows without context.
    """
    rows, heads, _, key_dim = queries.shape
    kv_heads, block_size = key_pages.shape[1:3]
    value_dim = value_pages.shape[3]
    per_kv = heads // kv_heads
    tiles = -(-per_kv // _MAX_GROUP)
    num_items = plan.items.shape[0]
    direct = plan.first_items is None
    settings = plan.settings
    lanes = _lanes((key_dim, value_dim), queries.dtype)
    template: dict[str, int | bool | mx.Dtype] = {
        "T": queries.dtype,
        "OUT": queries.dtype if direct else mx.float32,
        "DK": key_dim,
        "DV": value_dim,
        "KV_HEADS": kv_heads,
        "HEADS_PER_KV": per_kv,
        "GROUP": -(-per_kv // tiles),
        "BLOCK_SIZE": block_size,
        "SIMDGROUPS": settings.simdgroups,
        "UNROLL_KEYS": min(settings.unroll_keys, lanes),
        "DIRECT": direct,
        "HAS_SINKS": sinks is not None,
        "SCALE": float_bits(scale),
        "SOFTCAP": float_bits(softcap or 0.0),
    }
    output, stats = _decode(
        [
            queries,
            key_pages,
            value_pages,
            block_tables,
            plan.items,
            plan.items if sinks is None else sinks,
            written,
        ],
        template=template,
        groups=(num_items, kv_heads, tiles),
        threads=32 * settings.simdgroups,
        output_shapes=[
            (rows, heads, 1, value_dim) if direct else (num_items, heads, value_dim),
            (1,) if direct else (num_items, heads, 2),
        ],
        output_dtypes=[queries.dtype if direct else mx.float32, mx.float32],
    )
    if plan.first_items is None:
        return output
    return merge_items(output, stats, plan.first_items, sinks, queries.dtype)


def merge_items(
    partials: mx.array,
    stats: mx.array,
    first_items: mx.array,
    sinks: mx.array | None,
    dtype: mx.Dtype,
) -> mx.array:
    """Attention of rows whose contexts were cut.

    Args:
        partials: (N, heads, ..., value_dim) float32, weighed values of each part, those of a row
            together.
        stats: (N, heads, 2) float32, the part's highest score in units of log2, and its weights'
            sum.
        first_items: (B + 1,) int32, where each row's parts begin.
        sinks: (heads,) logits that take part in the softmax but have no value.

    Returns:
        (B, heads, 1, value_dim) of ``dtype``.
    """
    rows, heads, value_dim = first_items.shape[0] - 1, partials.shape[1], partials.shape[-1]
    (merged,) = _merge(
        [partials, stats, first_items, first_items if sinks is None else sinks],
        template={
            "T": dtype,
            "HEADS": heads,
            "DV": value_dim,
            "SIMDGROUPS": _MERGE_SIMDGROUPS,
            "HAS_SINKS": sinks is not None,
        },
        groups=(rows * heads, 1, 1),
        threads=32 * _MERGE_SIMDGROUPS,
        output_shapes=[(rows, heads, 1, value_dim)],
        output_dtypes=[dtype],
    )
    return merged


def _lanes(head_dims: tuple[int, int], dtype: mx.Dtype) -> int:
    """Lanes that load one key together, 16 bytes each."""
    packs = max(head_dims) * dtype.size // 16
    return min(32, 1 << (packs - 1).bit_length())
