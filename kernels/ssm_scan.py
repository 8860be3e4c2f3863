"""Mamba-2's recurrence over rows of many sequences.

For each head, with a state S of (head_dim, state_dim), a row computes

    S = S * exp(-exp(a_log) * dt) + outer(dt * x, b);  y = S c + d * x

(Dao and Gu, 2024, https://arxiv.org/abs/2405.21060).
"""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel
from quire.kernels.scan_settings import ScanSettings, Sharing, scan_settings
from quire.kernels.segments import Segments, update_states
from quire.kernels.ssm_steps import SsmLayer, SsmRows, many_rows, one_row

_kernel = GpuKernel(
    "ssm_scan",
    inputs=("x", "b", "c", "dt", "a_log", "d", "pool", "starts", "sources", "targets", "fence"),
    outputs=("y", "new_fence"),
    headers=("states",),
)

# On an H200, bfloat16, 64 heads of 64 x 128, us by CUPTI of 2,048 rows of one sequence, and of 16
# and 64 decodes: 534, 22 and 73; with 4 simdgroups 609, 23 and 84, with 32 values in a lane 642, 23
# and 78.
_ON_CUDA = Sharing(values=16, simdgroups=8)


def ssm_scan(
    rows: SsmRows,
    layer: SsmLayer,
    pool: mx.array,
    segments: Segments,
    fence: mx.array,
    settings: ScanSettings | None = None,
) -> tuple[mx.array, mx.array]:
    """All rows of a step by one kernel, which reads and writes the states where they are.

    What was said of order in :func:`quire.kernels.delta_rule.delta_rule` holds here.

    Args:
        pool: (slots, heads, head_dim, state_dim) float32
        fence: an output of the step before, or of whoever used the pool last.

    Returns:
        y (T, heads, head_dim) in the dtype of x, and the fence of this write, (1,) int32.
    """
    assert pool.dtype == mx.float32, "states of another type"
    dtype, num_rows = rows.x.dtype, rows.x.shape[0]
    heads, head_dim, state_dim = pool.shape[1:]
    lanes, simdgroups = scan_settings(state_dim, settings, _ON_CUDA)
    in_threadgroup = simdgroups * 32 // lanes
    y, new_fence = _kernel(
        [
            rows.x,
            rows.b.astype(dtype),
            rows.c.astype(dtype),
            rows.dt.astype(mx.float32),
            layer.a_log,
            layer.d,
            pool,
            segments.starts,
            segments.sources,
            segments.targets,
            fence,
        ],
        template={
            "T": dtype,
            "STATE_DIM": state_dim,
            "HEAD_DIM": head_dim,
            "GROUPS": rows.b.shape[1],
            "HEADS": heads,
            "LANES": lanes,
            "SIMDGROUPS": simdgroups,
        },
        groups=(-(-head_dim // in_threadgroup), heads, segments.sources.shape[0]),
        threads=32 * simdgroups,
        output_shapes=[(num_rows, heads, head_dim), (1,)],
        output_dtypes=[dtype, mx.int32],
    )
    return y, new_fence


def ssm_scan_steps(rows: SsmRows, layer: SsmLayer, pool: mx.array, segments: Segments) -> mx.array:
    """The same y by MLX's operations, on any device; ``pool`` holds the new states afterwards.

    MLX writes in place if nothing else refers to the array of ``pool``, and copies all of it
    otherwise: callers keep no second reference.
    """
    return update_states(
        pool,
        segments,
        rows,
        lambda each, states: one_row(SsmRows(*each), layer, states),
        lambda each, state: many_rows(SsmRows(*each), layer, state),
    )
