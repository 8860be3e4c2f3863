"""What a recurrent layer asks of kernels, whoever computes it on this machine."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.choice.selection import select
from quire.kernels.conv_window import Convolution, conv_window, conv_window_steps
from quire.kernels.conv_window_spec import CONV_WINDOW, ConvShape, ConvVariant
from quire.kernels.delta_rule import delta_rule, delta_rule_steps
from quire.kernels.delta_rule_spec import DELTA_RULE, DeltaShape, DeltaVariant
from quire.kernels.delta_steps import DeltaRows
from quire.kernels.scan_settings import ScanSettings
from quire.kernels.segments import Segments
from quire.kernels.ssm_scan import ssm_scan, ssm_scan_steps
from quire.kernels.ssm_scan_spec import SSM_SCAN, SsmShape, SsmVariant
from quire.kernels.ssm_steps import SsmLayer, SsmRows


def apply_delta_rule(
    rows: DeltaRows, pool: mx.array, segments: Segments, fence: mx.array
) -> tuple[mx.array, mx.array]:
    """The gated delta rule, as :func:`quire.kernels.delta_rule.delta_rule` says.

    Returns:
        y, and what the next user of the pool waits for: ``fence``, if MLX knows of the writes.
    """
    shape = DeltaShape.of(rows, segments.sources.shape[0])
    choice = select(DELTA_RULE, shape, rows.q.dtype)
    if choice.variant is DeltaVariant.IN_PLACE:
        return delta_rule(rows, pool, segments, fence, ScanSettings(**choice.settings))
    return delta_rule_steps(rows, pool, segments), fence


def apply_convolution(
    x: mx.array, conv: Convolution, pool: mx.array, segments: Segments, fence: mx.array
) -> tuple[mx.array, mx.array]:
    """A short convolution, as :func:`quire.kernels.conv_window.conv_window` says; returns as
    :func:`apply_delta_rule` does."""
    shape = ConvShape(
        x.shape[0],
        segments.sources.shape[0],
        x.shape[1],
        pool.shape[1] + 1,
        conv.bias is not None,
        conv.silu,
    )
    if select(CONV_WINDOW, shape, x.dtype).variant is ConvVariant.IN_PLACE:
        return conv_window(x, conv, pool, segments, fence)
    return conv_window_steps(x, conv, pool, segments), fence


def apply_ssm(
    rows: SsmRows, layer: SsmLayer, pool: mx.array, segments: Segments, fence: mx.array
) -> tuple[mx.array, mx.array]:
    """Mamba-2's recurrence, as :func:`quire.kernels.ssm_scan.ssm_scan` says; returns as
    :func:`apply_delta_rule` does."""
    shape = SsmShape.of(rows, segments.sources.shape[0])
    choice = select(SSM_SCAN, shape, rows.x.dtype)
    if choice.variant is SsmVariant.IN_PLACE:
        return ssm_scan(rows, layer, pool, segments, fence, ScanSettings(**choice.settings))
    return ssm_scan_steps(rows, layer, pool, segments), fence
