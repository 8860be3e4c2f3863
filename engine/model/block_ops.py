"""What stands between the products of a standard block: by a kernel, or where that was found wrong
on this machine by MLX's operations."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.choice.selection import select
from quire.kernels.fused_ops import add_rms_norm, swiglu_joined
from quire.kernels.fused_ops_spec import ADD_RMS_NORM, SWIGLU, BlockShape, FusedVariant


def add_norm(
    x: mx.array, delta: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """As :func:`quire.kernels.fused_ops.add_rms_norm`."""
    if x.dtype == delta.dtype == weight.dtype:  # norms may be float32 where all else is not
        choice = select(ADD_RMS_NORM, BlockShape(*x.shape), x.dtype)
        if choice.variant is FusedVariant.FUSED:
            return add_rms_norm(x, delta, weight, eps)
    total = x + delta
    return total, mx.fast.rms_norm(total, weight, eps)


def gated(both: mx.array) -> mx.array:
    """As :func:`quire.kernels.fused_ops.swiglu_joined`."""
    rows, dim = both.shape[0], both.shape[1] // 2
    if select(SWIGLU, BlockShape(rows, dim), both.dtype).variant is FusedVariant.FUSED:
        return swiglu_joined(both)
    gate, up = mx.split(both, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up
