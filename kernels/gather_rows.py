"""Rows in another order: ragged prompts become a batch, and a batch the rows of a step again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel, TemplateValue

_THREADS = 256

_take = GpuKernel(
    "take_rows",
    inputs=("a", "b", "c", "indices"),
    outputs=("taken_a", "taken_b", "taken_c"),
)
_join = GpuKernel("join_rows", inputs=("first", "second", "indices"), outputs=("joined",))


def take_rows(arrays: Sequence[mx.array], indices: mx.array) -> list[mx.array]:
    """``[array[indices] for array in arrays]`` in one launch.

    Args:
        arrays: one to three, (rows, ...) each of one dtype, rows of whole 16 bytes.
        indices: (n,) int32
    """
    count = indices.shape[0]
    packs = [_packs(array) for array in arrays]
    missing = 3 - len(arrays)
    template: dict[str, TemplateValue] = {"THREADS": _THREADS}
    for name, size in zip("ABC", [*packs, *[0] * missing], strict=True):
        template[f"PACKS_{name}"] = size
    taken = _take(
        [*arrays, *[None] * missing, indices],
        template=template,
        groups=(-(-count * sum(packs) // _THREADS), 1, 1),
        threads=_THREADS,
        output_shapes=[(count, *array.shape[1:]) for array in arrays] + [(1,)] * missing,
        output_dtypes=[array.dtype for array in arrays] + [arrays[0].dtype] * missing,
    )
    return taken[: len(arrays)]


def join_rows(first: mx.array, second: mx.array, indices: mx.array) -> mx.array:
    """``mx.concatenate([first, second])[indices]`` in one launch.

    Args:
        first, second: (rows, ...) alike but for their number of rows, of whole 16 bytes each.
        indices: (n,) int32
    """
    packs = _packs(first)
    (joined,) = _join(
        [first, second, indices],
        template={"PACKS": packs, "THREADS": _THREADS},
        groups=(-(-indices.shape[0] * packs // _THREADS), 1, 1),
        threads=_THREADS,
        output_shapes=[(indices.shape[0], *first.shape[1:])],
        output_dtypes=[first.dtype],
    )
    return joined


def _packs(array: mx.array) -> int:
    """Packs of 16 bytes in a row."""
    return math.prod(array.shape[1:]) * array.itemsize // 16
