"""Decode attention that reads KV pages where they lie, on Metal and CUDA.

The contexts of a step are cut into work items of about equal length, however uneven they are, and
the items' partial results are merged by a second kernel (flash decoding: Dao et al., 2023).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.decode_plan import DecodePlan
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue, float_bits
from quire.kernels.kv_write import Slots
from quire.kernels.rotate import HeadNorms, Rotary

# Query heads that share each load of a key; more than these take another threadgroup. A lane of an
# Apple GPU has 128 registers, which queries and sums of more heads would not leave room in.
_MAX_GROUP, _MAX_GROUP_ON_METAL = 8, 4
_MERGE_SIMDGROUPS = 8
_decode = GpuKernel(
    "paged_decode",
    inputs=(
        "queries",
        "key_pages",
        "value_pages",
        "block_tables",
        "items",
        "sinks",
        "shared_partials",
        "shared_stats",
        "written",
        "positions",
        "slot_mapping",
        "inverse_frequencies",
        "query_norm",
        "key_norm",
    ),
    outputs=("output", "stats"),
    headers=("tile", "reduce_scatter", "rotary"),
)
_merge = GpuKernel(
    "paged_merge",
    inputs=(
        "partials",
        "stats",
        "first_items",
        "sinks",
        "items",
        "shared_partials",
        "shared_stats",
    ),
    outputs=("output",),
)


class Partials(NamedTuple):
    """Attention to some parts of each row's context, before they are merged.

    Attributes:
        values: (N, heads, 1, value_dim) float32, not divided by the sum of weights.
        stats: (N, heads, 2) float32: highest score in units of log2, sum of weights.
    """

    values: mx.array
    stats: mx.array


@cache
def _no_partials() -> Partials:
    """What stands where no row shares anything; of a size that Metal treats as any other."""
    nothing = mx.array(np.zeros(16, np.float32))
    return Partials(nothing, nothing)


def fits_lanes(head_dims: tuple[int, int], dtype: mx.Dtype, block_size: int) -> bool:
    """Whether the keys that a simdgroup loads at a time lie in one block."""
    return 32 // _lanes(head_dims, dtype) <= block_size


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
    shared: Partials | None = None,
) -> mx.array:
    """Attention of one query per row over its sequence's pages, which have its own token.

    Args:
        queries: (B, heads, 1, key_dim) in the dtype of the pages.
        key_pages: (num_blocks, kv_heads, block_size, key_dim)
        value_pages: (num_blocks, kv_heads, block_size, value_dim)
        block_tables: (B, max_blocks) int32. Entries of whole blocks in front of a window are looked
            up too, and must be ids of blocks; entries behind a context are not.
        written: output of whatever wrote the pages last, so that it is done before.
        sinks: (heads,) logits that take part in the softmax but have no value.
        softcap: scores become softcap * tanh(score / softcap).
        shared: results of ``plan.shared_items``.

    Returns:
        (B, heads, 1, value_dim) in the dtype of ``queries``; zeros for rows without context.
    """
    unrotated = [plan.items] * 5
    return _attend(
        queries,
        (queries.shape[1], queries.shape[3], value_pages.shape[3]),
        key_pages,
        value_pages,
        block_tables,
        plan,
        unrotated,
        {"ROTATE": False, "ROTARY": 0, "TRADITIONAL": False, "HAS_NORMS": False, "EPS": 0},
        scale=scale,
        written=written,
        sinks=sinks,
        softcap=softcap,
        shared=shared,
    )


def rotate_and_decode(
    qkv: mx.array,
    key_pages: mx.array,
    value_pages: mx.array,
    block_tables: mx.array,
    plan: DecodePlan,
    positions: mx.array,
    slots: Slots,
    rotary: Rotary,
    norms: HeadNorms | None,
    *,
    scale: float,
) -> mx.array:
    """:func:`quire.kernels.rotate.rotate_and_write` and :func:`paged_decode` in one launch.

    The rows share nothing that ``plan`` would have read together, and their newest tokens are in
    the plan but not yet in the pages.

    Args:
        qkv: (B, (heads + 2 * kv_heads) * head_dim), as of ``rotate_and_write``.
    """
    assert slots.after is not None, "an in-place write needs the step before to wait for"
    kv_heads, _, head_dim = key_pages.shape[1:]
    frequencies = rotary.inverse_frequencies
    return _attend(
        qkv,
        (qkv.shape[1] // head_dim - 2 * kv_heads, head_dim, head_dim),
        key_pages,
        value_pages,
        block_tables,
        plan,
        [
            positions,
            slots.mapping,
            frequencies,
            frequencies if norms is None else norms.query,
            frequencies if norms is None else norms.key,
        ],
        {
            "ROTATE": True,
            "ROTARY": rotary.dims,
            "TRADITIONAL": rotary.traditional,
            "HAS_NORMS": norms is not None,
            "EPS": float_bits(norms.eps if norms is not None else 0.0),
        },
        scale=scale,
        written=slots.after,
    )


def _attend(
    queries: mx.array,
    heads_and_dims: tuple[int, int, int],
    key_pages: mx.array,
    value_pages: mx.array,
    block_tables: mx.array,
    plan: DecodePlan,
    rotation: list[mx.array],
    rotation_template: dict[str, TemplateValue],
    *,
    scale: float,
    written: mx.array,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    shared: Partials | None = None,
) -> mx.array:
    rows = block_tables.shape[0]
    heads, key_dim, value_dim = heads_and_dims
    kv_heads, block_size = key_pages.shape[1:3]
    per_kv = heads // kv_heads
    tiles = -(-per_kv // (_MAX_GROUP_ON_METAL if mx.metal.is_available() else _MAX_GROUP))
    num_items = plan.items.shape[0]
    direct = plan.first_items is None
    lanes = _lanes((key_dim, value_dim), queries.dtype)
    template: dict[str, TemplateValue] = {
        "T": queries.dtype,
        "OUT": queries.dtype if direct else mx.float32,
        "DK": key_dim,
        "DV": value_dim,
        "KV_HEADS": kv_heads,
        "HEADS_PER_KV": per_kv,
        "GROUP": -(-per_kv // tiles),
        "BLOCK_SIZE": block_size,
        "SIMDGROUPS": plan.simdgroups,
        "UNROLL_KEYS": min(plan.unroll_keys, lanes),
        "DIRECT": direct,
        "HAS_SINKS": sinks is not None,
        "SCALE": float_bits(scale),
        "SOFTCAP": float_bits(softcap or 0.0),
        **rotation_template,
    }
    output, stats = _decode(
        [
            queries,
            key_pages,
            value_pages,
            block_tables,
            plan.items,
            plan.items if sinks is None else sinks,
            *(shared or _no_partials()),
            written,
            *rotation,
        ],
        template=template,
        groups=(num_items, kv_heads, tiles),
        threads=32 * plan.simdgroups,
        output_shapes=[
            (rows, heads, 1, value_dim) if direct else (num_items, heads, value_dim),
            (1,) if direct else (num_items, heads, 2),
        ],
        output_dtypes=[queries.dtype if direct else mx.float32, mx.float32],
    )
    if plan.first_items is None:
        return output
    return merge_items(
        Partials(output, stats),
        plan.first_items,
        sinks,
        queries.dtype,
        items=plan.items,
        shared=shared,
    )


def merge_items(
    partials: Partials,
    first_items: mx.array,
    sinks: mx.array | None,
    dtype: mx.Dtype,
    items: mx.array | None = None,
    shared: Partials | None = None,
) -> mx.array:
    """Attention of rows whose contexts were cut.

    Args:
        partials: of N parts, those of a row together.
        first_items: (B + 1,) int32, where each row's parts begin.
        sinks: (heads,) logits that take part in the softmax but have no value.
        items: of a :class:`DecodePlan`, where they say which rows have more parts in ``shared``.

    Returns:
        (B, heads, 1, value_dim) of ``dtype``.
    """
    rows, (_, heads, *_, value_dim) = first_items.shape[0] - 1, partials.values.shape
    (merged,) = _merge(
        [
            *partials,
            first_items,
            first_items if sinks is None else sinks,
            first_items if items is None else items,
            *(shared or _no_partials()),
        ],
        template={
            "T": dtype,
            "HEADS": heads,
            "DV": value_dim,
            "SIMDGROUPS": _MERGE_SIMDGROUPS,
            "MAY_SHARE": items is not None,
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
