"""Writing new keys and values into their pages, and reading whole contexts back."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel

_THREADS = 256

_write = GpuKernel(
    "kv_write",
    inputs=("key_pages", "value_pages", "keys", "values", "slot_mapping", "after"),
    outputs=("written",),
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
        self._block_size = block_size
        self._indices: dict[int, tuple[mx.array, mx.array, mx.array]] = {}

    def indices(self, num_heads: int) -> tuple[mx.array, mx.array, mx.array]:
        """Block (T, 1), head (1, num_heads) and offset (T, 1) of each row, made once per step."""
        if num_heads not in self._indices:
            blocks = (self.mapping // self._block_size)[:, None]
            offsets = (self.mapping % self._block_size)[:, None]
            self._indices[num_heads] = blocks, mx.arange(num_heads)[None], offsets
        return self._indices[num_heads]


def scatter(pages: mx.array, rows: mx.array, slots: Slots) -> None:
    """Set the slots of ``pages`` (num_blocks, kv_heads, block_size, dim) to ``rows``.

    ``rows`` is (T, kv_heads, 1, dim). MLX writes in place if nothing else refers to the page array,
    and copies the whole pool otherwise: callers keep no second reference.
    """
    pages[slots.indices(pages.shape[1])] = rows[:, :, 0]


def write_in_place(
    key_pages: mx.array,
    value_pages: mx.array,
    keys: mx.array,
    values: mx.array,
    slots: Slots,
) -> mx.array:
    """Write the rows of both arrays by one kernel, in place whoever else refers to the pages.

    MLX does not know that the pages change. Order comes from real inputs alone: the kernel waits
    for ``slots.after``, and whoever reads the pages takes the result as an input.

    Args:
        key_pages, value_pages: (num_blocks, kv_heads, block_size, dim)
        keys, values: (T, kv_heads, 1, dim) in the dtype of the pages.

    Returns:
        A token, (1,) int32.
    """
    dtype = key_pages.dtype
    heads, block_size = key_pages.shape[1:3]
    rows = keys.shape[0]
    per_pack = 16 // dtype.size
    packs = rows * (heads * keys.shape[3] + value_pages.shape[1] * values.shape[3]) // per_pack
    assert slots.after is not None, "an in-place write needs the step before to wait for"
    (written,) = _write(
        [key_pages, value_pages, keys, values, slots.mapping, slots.after],
        template={
            "T": dtype,
            "DK": keys.shape[3],
            "DV": values.shape[3],
            "HEADS_K": heads,
            "HEADS_V": value_pages.shape[1],
            "BLOCK_SIZE": block_size,
            "THREADS": _THREADS,
        },
        groups=(-(-packs // _THREADS), 1, 1),
        threads=_THREADS,
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
    )
    return written


def gather_context(
    key_pages: mx.array, value_pages: mx.array, block_ids: mx.array, written: mx.array
) -> tuple[mx.array, mx.array]:
    """Keys and values of whole blocks as contiguous arrays.

    Args:
        block_ids: (B, n) int32
        written: what :func:`write_in_place` returned last for these pages.

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
