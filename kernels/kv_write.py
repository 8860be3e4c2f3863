"""Writing new keys and values into their pages, and reading whole contexts back."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel

_THREADS = 256

_write = GpuKernel(
    "kv_write",
    inputs=("key_pages", "value_pages", "keys", "values", "slot_mapping", "after"),
    outputs=("written", "kept_keys", "kept_values"),
)
_gather = GpuKernel(
    "gather_pages",
    inputs=("key_pages", "value_pages", "block_ids", "written"),
    outputs=("keys", "values"),
)


class Slots:
    """Where each row of a step goes, in every layer.

    Args:
        mapping: (T,) int32, block * block_size + offset.
        block_size: tokens per block.
        after: an output of the step before, which writes in place must wait for.
    """

    def __init__(self, mapping: mx.array, block_size: int, after: mx.array | None = None) -> None:
        self.mapping = mapping
        self.after = after
        self.block_size = block_size
        self._indices: dict[int, tuple[mx.array, mx.array, mx.array]] = {}

    def indices(self, num_heads: int) -> tuple[mx.array, mx.array, mx.array]:
        """Block (T, 1), head (1, num_heads) and offset (T, 1) of each row, made once per step."""
        if num_heads not in self._indices:
            blocks = (self.mapping // self.block_size)[:, None]
            offsets = (self.mapping % self.block_size)[:, None]
            self._indices[num_heads] = blocks, mx.arange(num_heads)[None], offsets
        return self._indices[num_heads]


def scatter(pages: mx.array, rows: mx.array, slots: Slots) -> None:
    """Set the slots of ``pages`` (num_blocks, kv_heads, block_size, dim) to ``rows``.

    ``rows`` is (T, kv_heads, 1, dim). MLX writes in place if nothing else refers to the page array,
    and copies the whole pool otherwise: callers keep no second reference.
    """
    pages[slots.indices(pages.shape[1])] = rows[:, :, 0]


class WrittenRows(NamedTuple):
    """What a write in place leaves beside the pages.

    A read of the pages takes ``token`` as an input, a read of the new rows alone takes the rows
    here: MLX computes only what somebody asks for, so a write that neither reads is not made.
    """

    token: mx.array  # (1,) int32
    keys: mx.array | None  # (T, kv_heads, 1, dim), if asked for
    values: mx.array | None


def write_in_place(
    key_pages: mx.array,
    value_pages: mx.array,
    keys: mx.array,
    values: mx.array,
    slots: Slots,
    *,
    keep_rows: bool = False,
) -> WrittenRows:
    """Write the rows of both arrays by one kernel, in place whoever else refers to the pages.

    MLX does not know that the pages change. Order comes from real inputs alone: the kernel waits
    for ``slots.after``, and whoever reads the pages takes the result as an input.

    Args:
        key_pages, value_pages: (num_blocks, kv_heads, block_size, dim)
        keys, values: (T, kv_heads, 1, dim) in the dtype of the pages.
        keep_rows: return the new keys and values too.
    """
    dtype = key_pages.dtype
    heads, block_size = key_pages.shape[1:3]
    rows = keys.shape[0]
    per_pack = 16 // dtype.size
    packs = rows * (heads * keys.shape[3] + value_pages.shape[1] * values.shape[3]) // per_pack
    kept = (keys.shape, values.shape) if keep_rows else ((1,), (1,))
    assert slots.after is not None, "an in-place write needs the step before to wait for"
    token, kept_keys, kept_values = _write(
        [key_pages, value_pages, keys, values, slots.mapping, slots.after],
        template={
            "T": dtype,
            "DK": keys.shape[3],
            "DV": values.shape[3],
            "HEADS_K": heads,
            "HEADS_V": value_pages.shape[1],
            "BLOCK_SIZE": block_size,
            "THREADS": _THREADS,
            "KEEP_ROWS": keep_rows,
        },
        groups=(-(-packs // _THREADS), 1, 1),
        threads=_THREADS,
        output_shapes=[(1,), *kept],
        output_dtypes=[mx.int32, dtype, dtype],
    )
    if not keep_rows:
        return WrittenRows(token, None, None)
    return WrittenRows(token, kept_keys, kept_values)


def gather_context(
    key_pages: mx.array, value_pages: mx.array, block_ids: mx.array, written: mx.array
) -> tuple[mx.array, mx.array]:
    """Keys and values of whole blocks as contiguous arrays.

    Args:
        block_ids: (B, n) int32
        written: token of the last write to these pages.

    Returns:
        (B, kv_heads, n * block_size, dim) each.
    """
    dtype = key_pages.dtype
    heads, block_size, key_dim = key_pages.shape[1:]
    value_heads, value_dim = value_pages.shape[1], value_pages.shape[3]
    sequences, tokens = block_ids.shape[0], block_ids.shape[1] * block_size
    packs = sequences * tokens * (heads * key_dim + value_heads * value_dim) * dtype.size // 16
    keys, values = _gather(
        [key_pages, value_pages, block_ids, written],
        template={
            "T": dtype,
            "DK": key_dim,
            "DV": value_dim,
            "HEADS_K": heads,
            "HEADS_V": value_heads,
            "BLOCK_SIZE": block_size,
            "THREADS": _THREADS,
        },
        groups=(-(-packs // _THREADS), 1, 1),
        threads=_THREADS,
        output_shapes=[
            (sequences, heads, tokens, key_dim),
            (sequences, value_heads, tokens, value_dim),
        ],
        output_dtypes=[dtype, dtype],
    )
    return keys, values
