"""The gated delta rule: the recurrence of gated delta nets and of Kimi's delta attention.

For each value head, with a state S of (value_dim, key_dim), a row computes

    S = S * g;  S = S + outer(beta * (v - S k), k);  y = S q

(Yang et al., 2024, https://arxiv.org/abs/2412.06464; with a gate for each key channel, Kimi Team,
2025, https://arxiv.org/abs/2510.26692). Keys are normalised, and q scaled, by whoever calls.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from quire.kernels.delta_steps import DeltaRows, many_rows, one_row
from quire.kernels.gpu_kernel import GpuKernel
from quire.kernels.scan_settings import ScanSettings, Sharing, scan_settings
from quire.kernels.segments import Segments, update_states

_kernel = GpuKernel(
    "delta_rule",
    inputs=(
        *("q", "k", "v", "g", "beta", "a_log", "dt_bias"),
        *("pool", "starts", "sources", "targets", "fence"),
    ),
    outputs=("y", "new_fence"),
    headers=("states",),
)

# On an H200, bfloat16, 32 heads of 128 x 128, us by CUPTI of 2,048 rows of one sequence, and of 16
# and 64 decodes: 32 values in a lane 721, 20 and 67, 16 values 733, 24 and 85; 8 simdgroups 979, 27
# and 100. States alone take 18 and 72 at the bandwidth of a copy.
_ON_CUDA = Sharing(values=32, simdgroups=4)


def delta_rule(
    rows: DeltaRows,
    pool: mx.array,
    segments: Segments,
    fence: mx.array,
    settings: ScanSettings | None = None,
) -> tuple[mx.array, mx.array]:
    """All rows of a step by one kernel, which reads and writes the states where they are.

    MLX does not know that the pool changes. Order comes from real inputs alone: the kernel waits
    for ``fence``, and whoever reads or writes the pool next waits for the one returned.

    Args:
        pool: (slots, value_heads, value_dim, key_dim) float32
        fence: an output of the step before, or of whoever used the pool last.

    Returns:
        y (T, value_heads, value_dim) in the dtype of q, and the fence of this write, (1,) int32.
    """
    assert pool.dtype == mx.float32, "states of another type"
    dtype, num_rows = rows.q.dtype, rows.q.shape[0]
    heads, value_dim, key_dim = pool.shape[1:]
    lanes, simdgroups = scan_settings(key_dim, settings, _ON_CUDA)
    in_threadgroup = simdgroups * 32 // lanes
    gates = rows.gates or (None, None)
    y, new_fence = _kernel(
        [
            rows.q,
            rows.k.astype(dtype),
            rows.v.astype(dtype),
            rows.g.astype(mx.float32) if rows.gates is None else rows.g,
            rows.beta,
            *gates,
            pool,
            segments.starts,
            segments.sources,
            segments.targets,
            fence,
        ],
        template={
            "T": dtype,
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "KEY_HEADS": rows.k.shape[1],
            "VALUE_HEADS": heads,
            "VECTOR": rows.g.ndim == 3,
            "RAW": rows.gates is not None,
            # What a gate is made of is rounded to it.
            "SUM": mx.result_type(rows.g, rows.gates.dt_bias) if rows.gates else mx.float32,
            "LANES": lanes,
            "SIMDGROUPS": simdgroups,
        },
        groups=(-(-value_dim // in_threadgroup), heads, segments.sources.shape[0]),
        threads=32 * simdgroups,
        output_shapes=[(num_rows, heads, value_dim), (1,)],
        output_dtypes=[dtype, mx.int32],
    )
    return y, new_fence


def delta_rule_steps(
    rows: DeltaRows,
    pool: mx.array,
    segments: Segments,
    many: Callable[[DeltaRows, mx.array], tuple[mx.array, mx.array]] = many_rows,
) -> mx.array:
    """The same y by MLX's operations, on any device; ``pool`` holds the new states afterwards.

    MLX writes in place if nothing else refers to the array of ``pool``, and copies all of it
    otherwise: callers keep no second reference.

    Args:
        many: computes several rows of one sequence.
    """
    rows = rows.gated()
    share = rows.v.shape[1] // rows.k.shape[1]
    q, k = (mx.repeat(x, share, axis=1) if share > 1 else x for x in (rows.q, rows.k))
    return update_states(
        pool,
        segments,
        (q, k, rows.v, rows.g, rows.beta),
        lambda each, states: one_row(DeltaRows.of(each), states),
        lambda each, state: many(DeltaRows.of(each), state),
    )
