"""Writing new keys and values into their pages, and reading whole contexts back."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel
from quire.kernels.page_arrays import PageArrays

_THREADS = 256

_write = GpuKernel(
    "kv_write",
    inputs=("key_pages", "value_pages", "keys", "values", "slot_mapping", "fence"),
    outputs=("new_fence", "kept_keys", "kept_values"),
)
_gather = GpuKernel(
    "gather_pages",
    inputs=("key_pages", "value_pages", "block_ids", "fence"),
    outputs=("keys", "values"),
)


class Slots:
    """Where each row of a step goes, in every layer, as MLX's operations need it.

    Args:
        mapping: (T,) int32, block * block_size + offset.
        block_size: tokens per block.
    """

    def __init__(self, mapping: mx.array, block_size: int) -> None:
        self.mapping = mapping
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


def write_in_place(
    pages: PageArrays,
    keys: mx.array,
    values: mx.array,
    slot_mapping: mx.array,
    *,
    keep_rows: bool = False,
) -> PageArrays:
    """Write the rows of both arrays by one kernel, in place whoever else refers to the pages.

    Args:
        pages: with the fence of whoever read them last.
        keys, values: (T, kv_heads, 1, dim) in the dtype of the pages.
        slot_mapping: (T,) int32, block * block_size + offset.
        keep_rows: return the new keys and values too.

    Returns:
        The same pages with the fence of this write.
    """
    dtype = pages.keys.dtype
    heads, block_size = pages.keys.shape[1:3]
    value_heads = pages.values.shape[1]
    rows = keys.shape[0]
    per_pack = 16 // dtype.size
    packs = rows * (heads * keys.shape[3] + value_heads * values.shape[3]) // per_pack
    kept = (keys.shape, values.shape) if keep_rows else ((1,), (1,))
    fence, kept_keys, kept_values = _write(
        [pages.keys, pages.values, keys, values, slot_mapping, pages.needed_fence()],
        template={
            "T": dtype,
            "DK": keys.shape[3],
            "DV": values.shape[3],
            "HEADS_K": heads,
            "HEADS_V": value_heads,
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
        return PageArrays(pages.keys, pages.values, fence)
    return PageArrays(pages.keys, pages.values, fence, kept_keys, kept_values)


def gather_context(pages: PageArrays, block_ids: mx.array) -> tuple[mx.array, mx.array]:
    """Keys and values of whole blocks as contiguous arrays.

    Args:
        pages: that kernels write.
        block_ids: (B, n) int32

    Returns:
        (B, kv_heads, n * block_size, dim) each.
    """
    dtype = pages.keys.dtype
    heads, block_size, key_dim = pages.keys.shape[1:]
    value_heads, value_dim = pages.values.shape[1], pages.values.shape[3]
    sequences, tokens = block_ids.shape[0], block_ids.shape[1] * block_size
    packs = sequences * tokens * (heads * key_dim + value_heads * value_dim) * dtype.size // 16
    keys, values = _gather(
        [pages.keys, pages.values, block_ids, pages.needed_fence()],
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
