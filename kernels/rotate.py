"""Norms, rotary embeddings and page writes of a step's queries, keys and values in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel, float_bits
from quire.kernels.kv_write import Slots

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
        "after",
    ),
    outputs=("queries", "keys", "values", "written"),
    headers=("rotary",),
)


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings of the first ``dims`` values of a head."""

    inverse_frequencies: mx.array  # (dims / 2,) float32, radians per position
    dims: int
    traditional: bool  # pairs are neighbours, not halves


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms over each head of queries and keys."""

    query: mx.array  # (head_dim,)
    key: mx.array  # (head_dim,)
    eps: float


@dataclass(frozen=True)
class RotatedRows:
    queries: mx.array  # (T, heads, 1, head_dim)
    keys: mx.array | None  # (T, kv_heads, 1, head_dim), if asked for
    values: mx.array | None
    written: mx.array  # token, (1,) int32


def rotate_and_write(
    qkv: mx.array,
    key_pages: mx.array,
    value_pages: mx.array,
    positions: mx.array,
    slots: Slots,
    rotary: Rotary,
    norms: HeadNorms | None,
    *,
    keep_rows: bool,
) -> RotatedRows:
    """What a standard attention layer does between its projections and attention.

    Args:
        qkv: (T, (heads + 2 * kv_heads) * head_dim), heads of queries, then keys, then values.
        key_pages, value_pages: (num_blocks, kv_heads, block_size, head_dim), written in place;
            see :func:`quire.kernels.kv_write.write_in_place` for what orders the writes.
        positions: (T,) int32
        keep_rows: return the new keys and values too.
    """
    kv_heads, block_size, head_dim = key_pages.shape[1:]
    rows = positions.shape[0]
    all_heads = qkv.shape[1] // head_dim
    heads = all_heads - 2 * kv_heads
    assert slots.after is not None, "an in-place write needs the step before to wait for"
    kept = (rows, kv_heads, 1, head_dim) if keep_rows else (1,)
    frequencies = rotary.inverse_frequencies
    queries, keys, values, written = _rotate(
        [
            qkv,
            key_pages,
            value_pages,
            positions,
            slots.mapping,
            frequencies,
            frequencies if norms is None else norms.query,
            frequencies if norms is None else norms.key,
            slots.after,
        ],
        template={
            "T": qkv.dtype,
            "D": head_dim,
            "ROTARY": rotary.dims,
            "TRADITIONAL": rotary.traditional,
            "HAS_NORMS": norms is not None,
            "EPS": float_bits(norms.eps if norms is not None else 0.0),
            "HEADS_Q": heads,
            "HEADS_KV": kv_heads,
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
        return RotatedRows(queries, None, None, written)
    return RotatedRows(queries, keys, values, written)
