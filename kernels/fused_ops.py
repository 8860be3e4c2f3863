"""What stands between the matrix products of a block, in one kernel each."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel, float_bits

_MAX_SIMDGROUPS = 16
_PACKS_PER_THREAD = 2

_SWIGLU_THREADS = 256

_add_norm = GpuKernel("add_rms_norm", inputs=("x", "delta", "weight"), outputs=("sum", "normed"))
_swiglu = GpuKernel("swiglu", inputs=("both",), outputs=("output",))


def fits_packs(dim: int, dtype: mx.Dtype) -> bool:
    """Whether rows of ``dim`` values can be read 16 bytes at a time, as the kernels here do."""
    return dtype in (mx.float32, mx.float16, mx.bfloat16) and dim * dtype.size % 16 == 0


def add_rms_norm(
    x: mx.array, delta: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """x + delta, and its RMS norm.

    Args:
        x, delta: (T, dim)
        weight: (dim,) in the same dtype.

    Returns:
        Two arrays like ``x``. The sum is rounded to its dtype before the norm.
    """
    rows, dim = x.shape
    packs = dim * x.dtype.size // 16
    simdgroups = min(_MAX_SIMDGROUPS, -(-packs // (32 * _PACKS_PER_THREAD)))
    total, normed = _add_norm(
        [x, delta, weight],
        template={"T": x.dtype, "DIM": dim, "SIMDGROUPS": simdgroups, "EPS": float_bits(eps)},
        groups=(rows, 1, 1),
        threads=32 * simdgroups,
        output_shapes=[(rows, dim), (rows, dim)],
        output_dtypes=[x.dtype, x.dtype],
    )
    return total, normed


def swiglu_joined(both: mx.array) -> mx.array:
    """silu(gate) * up.

    Args:
        both: (T, 2 * dim), gates first.

    Returns:
        (T, dim), rounded once.
    """
    rows, dim = both.shape[0], both.shape[1] // 2
    threads = rows * dim * both.dtype.size // 16
    (output,) = _swiglu(
        [both],
        template={"T": both.dtype, "DIM": dim, "THREADS": _SWIGLU_THREADS},
        groups=(-(-threads // _SWIGLU_THREADS), 1, 1),
        threads=_SWIGLU_THREADS,
        output_shapes=[(rows, dim)],
        output_dtypes=[both.dtype],
    )
    return output
