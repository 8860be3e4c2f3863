"""What a recurrent layer asks of kernels, whoever computes it on this machine."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.choice.selection import Selector, select
from quire.kernels.choice.spec import AnySpec, Kind, Shape
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


class Use(NamedTuple):
    """An operation on the states of a layer, and the shape of a call."""

    spec: AnySpec
    shape: Shape
    dtype: mx.Dtype

    def in_place(self, selector: Selector) -> bool:
        """Whether a kernel computes it."""
        variant = selector.select(self.spec, self.shape, self.dtype).variant
        return self.spec.variants[variant].kind is Kind.KERNEL


class Applied(NamedTuple):
    """What an operation returns.

    Attributes:
        fence: what the next user of the pool waits for; the one that came in, if MLX knows of the
            writes.
    """

    result: mx.array
    fence: mx.array
    use: Use


def apply_delta_rule(
    rows: DeltaRows, pool: mx.array, segments: Segments, fence: mx.array
) -> Applied:
    """The gated delta rule, as :func:`quire.kernels.delta_rule.delta_rule` says."""
    use = Use(DELTA_RULE, DeltaShape.of(rows, segments.sources.shape[0]), rows.q.dtype)
    choice = select(*use)
    if choice.variant is DeltaVariant.IN_PLACE:
        settings = ScanSettings(**choice.settings)
        return Applied(*delta_rule(rows, pool, segments, fence, settings), use)
    return Applied(delta_rule_steps(rows, pool, segments), fence, use)


def apply_convolution(
    x: mx.array, conv: Convolution, pool: mx.array, segments: Segments, fence: mx.array
) -> Applied:
    """A short convolution, as :func:`quire.kernels.conv_window.conv_window` says."""
    use = _conv_use(x, conv, segments)
    if select(*use).variant is ConvVariant.IN_PLACE:
        return Applied(*conv_window(x, conv, pool, segments, fence), use)
    return Applied(conv_window_steps(x, conv, pool, segments), fence, use)


def _conv_use(x: mx.array, conv: Convolution, segments: Segments) -> Use:
    return Use(CONV_WINDOW, ConvShape.of(x, conv, segments.sources.shape[0]), x.dtype)


def is_one_kernel(x: mx.array, conv: Convolution, segments: Segments) -> bool:
    """Whether a kernel computes all that ``conv`` says."""
    return select(*_conv_use(x, conv, segments)).variant is ConvVariant.IN_PLACE


def apply_ssm(
    rows: SsmRows, layer: SsmLayer, pool: mx.array, segments: Segments, fence: mx.array
) -> Applied:
    """Mamba-2's recurrence, as :func:`quire.kernels.ssm_scan.ssm_scan` says."""
    use = Use(SSM_SCAN, SsmShape.of(rows, segments.sources.shape[0]), rows.x.dtype)
    choice = select(*use)
    if choice.variant is SsmVariant.IN_PLACE:
        settings = ScanSettings(**choice.settings)
        return Applied(*ssm_scan(rows, layer, pool, segments, fence, settings), use)
    return Applied(ssm_scan_steps(rows, layer, pool, segments), fence, use)
