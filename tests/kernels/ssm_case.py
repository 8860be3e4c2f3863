"""Mamba-2's recurrence over segments, small enough to simulate, and what mlx-lm makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models.ssm import compute_dt, ssm_attn
from recurrent_case import Layout, check_states

from quire.kernels.scan_settings import ScanSettings
from quire.kernels.ssm_scan import ssm_scan
from quire.kernels.ssm_steps import SsmLayer, SsmRows

LIMITS = (0.001, 100.0)


@dataclass(frozen=True)
class SsmCase:
    """Attributes:
    dims: groups, heads, head_dim, state_dim
    """

    layout: Layout
    dims: tuple[int, int, int, int] = (2, 4, 16, 64)
    dtype: mx.Dtype = mx.float32
    settings: ScanSettings | None = None

    def problem(self) -> tuple[SsmRows, SsmLayer, mx.array]:
        """Rows, the layer's part, and a pool full of states; the steps are mlx-lm's."""
        groups, heads, head_dim, state_dim = self.dims
        rng = np.random.default_rng(sum(self.layout.lengths) + state_dim)
        rows = self.layout.num_rows

        def normal(*shape: int) -> mx.array:
            return mx.array(rng.normal(size=shape)).astype(self.dtype)

        dt = compute_dt(self._steps(), mx.zeros((heads,)), LIMITS)
        layer = SsmLayer(mx.array(np.log(np.arange(1, heads + 1)), mx.float32), normal(heads))
        b, c = normal(rows, groups, state_dim), normal(rows, groups, state_dim)
        made = SsmRows(normal(rows, heads, head_dim), b, c * state_dim**-0.5, dt)
        states = self.layout.num_slots, heads, head_dim, state_dim
        pool = mx.array(rng.normal(size=states), mx.float32)
        mx.eval(*made, *layer, pool)
        return made, layer, pool

    def _steps(self) -> mx.array:
        """What dt is before softplus."""
        shape = self.layout.num_rows, self.dims[1]
        return mx.array(np.random.default_rng(3).normal(size=shape) - 1, mx.float32)

    def expected(
        self, rows: SsmRows, layer: SsmLayer, pool: mx.array
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """y by mlx-lm's function, sequence by sequence, and the states by target."""
        ys, states, state, start = [], {}, None, 0
        layout, targets = self.layout, self.layout.slots()[1]
        bias, steps = mx.zeros((self.dims[1],)), self._steps()
        for index, length in enumerate(layout.lengths):
            state = layout.state(pool, state, index)
            if length:
                x, b, c, dt = (each[None, start : start + length] for each in (*rows[:3], steps))
                y, after = ssm_attn(x, layer.a_log, b, c, layer.d, dt, bias, state[None], LIMITS)
                ys.append(y[0])
                state = after[0]
            states[targets[index]] = state
            start += length
        y = mx.concatenate([*ys, mx.zeros((layout.padding, *ys[0].shape[1:]), ys[0].dtype)])
        mx.eval(y, states)  # before a kernel writes over what these are made of
        return y, states

    def run(self) -> tuple[mx.array, mx.array, mx.array]:
        """What the kernel makes of :meth:`problem`: y, its fence and the pool."""
        rows, layer, pool = self.problem()
        segments = self.layout.segments()
        y, fence = ssm_scan(rows, layer, pool, segments, mx.array([1]), self.settings)
        return y, fence, pool

    def check(self) -> None:
        rows, layer, before = self.problem()
        y, states = self.expected(rows, layer, before)
        found, fence, pool = self.run()
        assert fence.tolist() == [1]
        check_rows(found, y)
        check_states(pool, before, states, atol=1e-5)


def check_rows(found: mx.array, wanted: mx.array) -> None:
    """mlx-lm rounds twice: y, and its sum with d * x."""
    assert found.dtype == wanted.dtype
    tolerance = 3e-6 if wanted.dtype == mx.float32 else 2 * float(mx.finfo(wanted.dtype).eps)
    np.testing.assert_allclose(
        found.astype(mx.float32), wanted.astype(mx.float32), rtol=tolerance, atol=2 * tolerance
    )
