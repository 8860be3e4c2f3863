"""Decode attention that reads KV pages where they lie, on Metal and CUDA.

The contexts of a step are cut into work items of about equal length, however uneven they are, and
the items' partial results are merged by a second kernel (flash decoding: Dao et al., 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.decode_plan import DecodePlan
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue, float_bits
from quire.kernels.heads import Scoring
from quire.kernels.page_arrays import ExtraScores, PageArrays
from quire.kernels.rotate import HeadNorms, ProjectedRows, Rotary

# Query heads that share each load of a key; more than these take another threadgroup. A lane of an
# Apple GPU has 128 registers, which queries and sums of more heads would not leave room in.
_MAX_GROUP, _MAX_GROUP_ON_METAL = 8, 4
# Of wider heads a lane has twice as many values: half as many heads, and fewer loads under way.
_WIDE = 256
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
        "extra_queries",
        "extra_pages",
        "fence",
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


def fits_lanes(head_dims: tuple[int, int], dtype: mx.Dtype, block_size: int) -> bool:
    """Whether the keys that a simdgroup loads at a time lie in one block."""
    return 32 // _lanes(head_dims, dtype) <= block_size


def paged_decode(
    queries: mx.array,
    pages: PageArrays,
    block_tables: mx.array,
    plan: DecodePlan,
    scoring: Scoring,
    *,
    shared: Partials | None = None,
    extra: ExtraScores | None = None,
) -> mx.array:
    """Attention of one query per row over its sequence's pages, which have its own token.

    Args:
        queries: (B, heads, 1, key_dim) in the dtype of the pages.
        block_tables: (B, max_blocks) int32. Entries of whole blocks in front of a window are looked
            up too, and must be ids of blocks; entries behind a context are not.
        scoring: with the window that ``plan`` was made for.
        shared: results of ``plan.shared_items``.
        extra: further scores, which are not scaled again.

    Returns:
        (B, heads, 1, value_dim) in the dtype of ``queries``; zeros for rows without context.
    """
    rows = _Rows(queries, queries.shape[1])
    return _attend(rows, pages, block_tables, plan, scoring, shared, extra)


def rotate_and_decode(
    projected: ProjectedRows,
    pages: PageArrays,
    block_tables: mx.array,
    plan: DecodePlan,
    scoring: Scoring,
    rotary: Rotary,
    norms: HeadNorms | None,
) -> mx.array:
    """:func:`quire.kernels.rotate.rotate_and_write` and :func:`paged_decode` in one launch.

    The rows share nothing that ``plan`` would have read together, and their newest tokens are in
    the plan but not yet in the pages.

    Returns:
        (B, heads, 1, head_dim) in the dtype of ``projected.qkv``.
    """
    kv_heads, _, head_dim = pages.keys.shape[1:]
    rows = _Rows(
        projected.qkv,
        projected.num_heads(kv_heads, head_dim),
        (
            projected.positions,
            projected.slot_mapping,
            rotary.inverse_frequencies,
            None if norms is None else norms.query,
            None if norms is None else norms.key,
        ),
        {
            "ROTATE": True,
            "GATED": projected.gated,
            "ROTARY": rotary.dims,
            "TRADITIONAL": rotary.traditional,
            "FACTOR": rotary.factor_bits(projected.qkv.dtype),
            "HAS_NORMS": norms is not None,
            "EPS": float_bits(norms.eps if norms is not None else 0.0),
        },
    )
    return _attend(rows, pages, block_tables, plan, scoring)


class _Rows(NamedTuple):
    """Queries, or rows from which the kernel itself makes queries, keys and values.

    Attributes:
        array: (B, heads, 1, key_dim), or as in :class:`ProjectedRows`.
        rotation: positions, slot_mapping, inverse_frequencies, query_norm and key_norm.
        template: what the kernel does with them.
    """

    array: mx.array
    heads: int
    rotation: tuple[mx.array | None, ...] = (None,) * 5
    template: dict[str, TemplateValue] = {  # noqa: RUF012
        "ROTATE": False,
        "GATED": False,
        "ROTARY": 0,
        "TRADITIONAL": False,
        "FACTOR": 0,
        "HAS_NORMS": False,
        "EPS": 0,
    }


def _attend(
    rows: _Rows,
    pages: PageArrays,
    block_tables: mx.array,
    plan: DecodePlan,
    scoring: Scoring,
    shared: Partials | None = None,
    extra: ExtraScores | None = None,
) -> mx.array:
    (kv_heads, block_size, key_dim), value_dim = pages.keys.shape[1:], pages.values.shape[3]
    heads, dtype = rows.heads, rows.array.dtype
    per_kv = heads // kv_heads
    extra_dim = 0 if extra is None else extra.queries.shape[3]
    max_group, max_loads = _limits((key_dim, value_dim, extra_dim), dtype)
    tiles = -(-per_kv // max_group)
    num_rows, num_items = block_tables.shape[0], plan.items.shape[0]
    direct = plan.first_items is None
    template: dict[str, TemplateValue] = {
        "T": dtype,
        "OUT": dtype if direct else mx.float32,
        "DK": key_dim,
        "DV": value_dim,
        "KV_HEADS": kv_heads,
        "HEADS_PER_KV": per_kv,
        "GROUP": -(-per_kv // tiles),
        "BLOCK_SIZE": block_size,
        "SIMDGROUPS": plan.simdgroups,
        "UNROLL_KEYS": min(plan.unroll_keys, _lanes((key_dim, value_dim), dtype), max_loads),
        "DIRECT": direct,
        "HAS_SINKS": scoring.sinks is not None,
        "SCALE": float_bits(scoring.scale),
        "SOFTCAP": float_bits(scoring.softcap or 0.0),
        "EXTRA": extra_dim,
        **rows.template,
    }
    partials = shared or (None, None)
    context = pages.keys, pages.values, block_tables, plan.items, scoring.sinks
    output, stats = _decode(
        [
            rows.array,
            *context,
            *partials,
            *(extra or (None, None)),
            pages.needed_fence(),
            *rows.rotation,
        ],
        template=template,
        groups=(num_items, kv_heads, tiles),
        threads=32 * plan.simdgroups,
        output_shapes=[
            (num_rows, heads, 1, value_dim) if direct else (num_items, heads, value_dim),
            (1,) if direct else (num_items, heads, 2),
        ],
        output_dtypes=[dtype if direct else mx.float32, mx.float32],
    )
    if plan.first_items is None:
        return output
    own = Partials(output, stats)
    return merge_items(own, plan.first_items, scoring.sinks, dtype, plan.items, shared)


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
            sinks,
            items,
            *(shared or (None, None)),
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


def _limits(dims: tuple[int, int, int], dtype: mx.Dtype) -> tuple[int, int]:
    """Query heads of a threadgroup, and loads of keys under way in a lane, for its registers."""
    on_metal = mx.metal.is_available()
    group = _MAX_GROUP_ON_METAL if on_metal else _MAX_GROUP
    if max(dims) <= _WIDE:
        return group, 32
    loads = (4 if on_metal else 8) // dtype.size
    return group // 2, max(1, loads // 2) if dims[2] else loads


def _lanes(head_dims: tuple[int, int], dtype: mx.Dtype) -> int:
    """Lanes that load one key together, 16 bytes each."""
    packs = max(head_dims) * dtype.size // 16
    return min(32, 1 << (packs - 1).bit_length())
