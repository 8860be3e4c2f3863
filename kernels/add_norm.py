"""A residual addition and the RMS norm that follows it, in one kernel."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel

_MAX_SIMDGROUPS = 16
_PACKS_PER_THREAD = 2

_kernel = GpuKernel(
    "add_rms_norm", inputs=("x", "delta", "weight", "params"), outputs=("sum", "normed")
)


def fits_add_rms_norm(dim: int, dtype: mx.Dtype) -> bool:
    """Whether rows of ``dim`` values come in whole packs."""
    return dtype in (mx.float32, mx.float16, mx.bfloat16) and dim * dtype.size % 16 == 0


def add_rms_norm(
    x: mx.array, delta: mx.array, weight: mx.array, eps: mx.array
) -> tuple[mx.array, mx.array]:
    """x + delta, and its RMS norm.

    Args:
        x, delta: (T, dim)
        weight: (dim,) in the same dtype.
        eps: (1,) float32

    Returns:
        Two arrays like ``x``. The sum is rounded to its dtype before the norm.
    """
    rows, dim = x.shape
    packs = dim * x.dtype.size // 16
    simdgroups = min(_MAX_SIMDGROUPS, -(-packs // (32 * _PACKS_PER_THREAD)))
    total, normed = _kernel(
        [x, delta, weight, eps],
        template={"T": x.dtype, "DIM": dim, "SIMDGROUPS": simdgroups},
        groups=(rows, 1, 1),
        threads=32 * simdgroups,
        output_shapes=[(rows, dim), (rows, dim)],
        output_dtypes=[x.dtype, x.dtype],
    )
    return total, normed
