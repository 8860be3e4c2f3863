"""Norms, rotary embeddings and page writes of a step's queries, keys and values in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.gpu_kernel import GpuKernel, float_bits
from quire.kernels.page_arrays import PageArrays

_SIMDGROUPS = 4

_rotate = GpuKernel(
    "rotate_and_write",
    inputs=(
        "qkv",
        "key_pages",
        "value_pages",
        "positions",
        "slot_mapping",
        "inverse_frequencies",
        "query_norm",
        "key_norm",
        "fence",
    ),
    outputs=("queries", "keys", "values", "new_fence"),
    headers=("rotary",),
)


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings of the first ``dims`` values of a head."""

    inverse_frequencies: mx.array  # (dims / 2,) float32, radians per position
    dims: int
    traditional: bool  # pairs are neighbours, not halves
    factor: float = 1.0  # of the values that are turned

    def factor_bits(self, dtype: mx.Dtype) -> int:
        """The factor as the kernels take it, in the precision of ``dtype``; 0: they need none."""
        if self.factor == 1:
            return 0
        return float_bits(float(np.array(mx.array(self.factor, dtype).astype(mx.float32))))


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms over each head of queries and keys."""

    query: mx.array  # (head_dim,)
    key: mx.array  # (head_dim,)
    eps: float


class ProjectedRows(NamedTuple):
    """Rows of a step as a layer's projections give them, and where they go.

    Attributes:
        qkv: (T, (heads + 2 * kv_heads) * head_dim), heads of queries, then keys, then values.
        positions: (T,) int32
        slot_mapping: (T,) int32, block * block_size + offset.
        gated: each head of queries is followed by another one, of what is not read here.
    """

    qkv: mx.array
    positions: mx.array
    slot_mapping: mx.array
    gated: bool = False

    def num_heads(self, kv_heads: int, head_dim: int) -> int:
        """Of queries."""
        heads = self.qkv.shape[1] // head_dim - 2 * kv_heads
        return heads // 2 if self.gated else heads


def rotate_and_write(
    projected: ProjectedRows,
    pages: PageArrays,
    rotary: Rotary,
    norms: HeadNorms | None,
    *,
    keep_rows: bool,
) -> tuple[mx.array, PageArrays]:
    """What a standard attention layer does between its projections and attention.

    Args:
        pages: written in place, with the fence of whoever read them last.
        keep_rows: return the new keys and values too.

    Returns:
        Queries, (T, heads, 1, head_dim), and the pages with the fence of this write.
    """
    qkv = projected.qkv
    assert qkv.dtype == pages.keys.dtype == pages.values.dtype, "pages of another type"
    kv_heads, block_size, head_dim = pages.keys.shape[1:]
    rows = qkv.shape[0]
    heads = projected.num_heads(kv_heads, head_dim)
    all_heads = heads + 2 * kv_heads
    kept = (rows, kv_heads, 1, head_dim) if keep_rows else (1,)
    queries, keys, values, fence = _rotate(
        [
            qkv,
            pages.keys,
            pages.values,
            projected.positions,
            projected.slot_mapping,
            rotary.inverse_frequencies,
            None if norms is None else norms.query,
            None if norms is None else norms.key,
            pages.needed_fence(),
        ],
        template={
            "T": qkv.dtype,
            "D": head_dim,
            "ROTARY": rotary.dims,
            "TRADITIONAL": rotary.traditional,
            "FACTOR": rotary.factor_bits(qkv.dtype),
            "HAS_NORMS": norms is not None,
            "EPS": float_bits(norms.eps if norms is not None else 0.0),
            "HEADS_Q": heads,
            "HEADS_KV": kv_heads,
            "GATED": projected.gated,
            "BLOCK_SIZE": block_size,
            "SIMDGROUPS": _SIMDGROUPS,
            "KEEP_ROWS": keep_rows,
        },
        groups=(-(-rows * all_heads // _SIMDGROUPS), 1, 1),
        threads=32 * _SIMDGROUPS,
        output_shapes=[(rows, heads, 1, head_dim), kept, kept, (1,)],
        output_dtypes=[qkv.dtype, qkv.dtype, qkv.dtype, mx.int32],
    )
    if not keep_rows:
        return queries, PageArrays(pages.keys, pages.values, fence)
    return queries, PageArrays(pages.keys, pages.values, fence, keys, values)
