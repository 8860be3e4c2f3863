"""Products with dense weights, for the few rows of a decode step.

There the time goes into reading the weights. The kernel here reads each of them once for up to 32
rows, or 64 with narrow tiles, and its launch costs the host less than that of a library's product.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel

_HEADERS = ("fragments", "dense_fragments", "dense_product", "tile_sums")
_kernel = GpuKernel("skinny_matmul", ("x", "w"), ("output",), headers=_HEADERS)

_MAX_INPUT_TILES = 8  # of 8 rows
_MAX_SUMS = 16  # tiles of 16 x 8 sums, in one simdgroup: more would not find registers


class SkinnySettings(NamedTuple):
    """What may be tuned; results differ by rounding only."""

    tiles: int = 1  # of 16 columns of the result, in one simdgroup
    simdgroups: int = 8  # of a threadgroup, which share K
    depth: int = 4  # slices of K under way in a lane, times tiles; at least one slice is


def skinny_matmul(
    x: mx.array, weight: mx.array, settings: SkinnySettings | None = None
) -> mx.array:
    """x @ W^T by matrix units, for float16 and bfloat16 and K a multiple of 32."""
    rows, outputs = x.shape[0], weight.shape[0]
    settings = settings or SkinnySettings()
    tiles = settings.tiles
    input_tiles = _input_tiles(rows, tiles)
    depth = 1 if tiles * input_tiles == _MAX_SUMS else max(1, settings.depth // tiles)
    return _kernel(
        (x, weight),
        template={
            "T": x.dtype,
            "TILES": tiles,
            "INPUT_TILES": input_tiles,
            "SIMDGROUPS": settings.simdgroups,
            "DEPTH": depth,
        },
        groups=(_threadgroups(rows, outputs, tiles), 1, 1),
        threads=32 * settings.simdgroups,
        output_shapes=[(rows, outputs)],
        output_dtypes=[x.dtype],
    )[0]


def _threadgroups(rows: int, outputs: int, tiles: int) -> int:
    return -(-rows // (8 * _input_tiles(rows, tiles))) * -(-outputs // (16 * tiles))


def _input_tiles(rows: int, tiles: int) -> int:
    """One of two: every other kernel takes seconds to compile on CUDA, in the middle of serving."""
    return 2 if rows <= 16 else min(_MAX_INPUT_TILES, _MAX_SUMS // tiles)
