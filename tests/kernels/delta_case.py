"""The delta rule over segments, small enough to simulate, and what mlx-lm makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models.gated_delta import compute_g, gated_delta_ops
from recurrent_case import Layout, check_states

from quire.kernels.delta_rule import delta_rule
from quire.kernels.delta_steps import DeltaRows, Gates
from quire.kernels.scan_settings import ScanSettings


@dataclass(frozen=True)
class DeltaCase:
    """Attributes:
    dims: key heads, value heads, key_dim, value_dim
    vector: a gate for each key channel.
    raw: gates and factors are not computed yet.
    """

    layout: Layout
    dims: tuple[int, int, int, int] = (2, 4, 64, 16)
    vector: bool = False
    raw: bool = False
    dtype: mx.Dtype = mx.float32
    settings: ScanSettings | None = None

    def problem(self) -> tuple[DeltaRows, mx.array]:
        """Rows, and a pool full of states."""
        key_heads, heads, key_dim, value_dim = self.dims
        rng = np.random.default_rng(sum(self.layout.lengths) + key_dim)
        rows = self.layout.num_rows

        def key(size: float) -> mx.array:
            drawn = rng.normal(size=(rows, key_heads, key_dim))
            drawn *= size / np.linalg.norm(drawn, axis=-1, keepdims=True)
            return mx.array(drawn).astype(self.dtype)

        v = mx.array(rng.normal(size=(rows, heads, value_dim))).astype(self.dtype)
        gates = (rows, heads, key_dim) if self.vector else (rows, heads)
        g = mx.array(np.exp(-np.exp(rng.normal(size=gates))), mx.float32)
        g[1] = 0.0  # forgets all
        beta = mx.array(rng.uniform(0, 2, size=(rows, heads))).astype(self.dtype)
        states = self.layout.num_slots, heads, value_dim, key_dim
        pool = mx.array(rng.normal(size=states), mx.float32)
        gates = None
        if self.raw:
            gates = Gates(mx.linspace(-3, 3, heads), mx.linspace(-1, 1, heads).astype(self.dtype))
            g, beta = (
                mx.array(4 * rng.normal(size=(rows, heads))).astype(self.dtype) for _ in range(2)
            )
            g[1], beta[1] = 30.0, -30.0  # forgets all and takes nothing
        made = DeltaRows(key(key_dim**-0.5), key(1.0), v, g, beta, gates)
        mx.eval(*made[:5], pool)
        return made, pool

    def expected(self, rows: DeltaRows, pool: mx.array) -> tuple[mx.array, dict[int, mx.array]]:
        """y by mlx-lm's functions, sequence by sequence, and the states by target."""
        if rows.gates is not None:
            g = compute_g(rows.gates.a_log, rows.g, rows.gates.dt_bias)
            rows = rows._replace(g=g, beta=mx.sigmoid(rows.beta))
        ys, states, state, start = [], {}, None, 0
        layout, targets = self.layout, self.layout.slots()[1]
        for index, length in enumerate(layout.lengths):
            state = layout.state(pool, state, index)
            if length:
                part = [x[None, start : start + length] for x in rows[:5]]
                y, after = gated_delta_ops(*part, state[None])
                ys.append(y[0])
                state = after[0]
            states[targets[index]] = state
            start += length
        y = mx.concatenate([*ys, mx.zeros((layout.padding, *ys[0].shape[1:]), ys[0].dtype)])
        mx.eval(y, states)  # before a kernel writes over what these are made of
        return y, states

    def run(self) -> tuple[mx.array, mx.array, mx.array]:
        """What the kernel makes of :meth:`problem`: y, its fence and the pool."""
        rows, pool = self.problem()
        y, fence = delta_rule(rows, pool, self.layout.segments(), mx.array([1]), self.settings)
        return y, fence, pool

    def check(self) -> None:
        rows, before = self.problem()
        y, states = self.expected(rows, before)
        found, fence, pool = self.run()
        assert fence.tolist() == [1]
        tolerance = 2e-6 if self.dtype == mx.float32 else float(mx.finfo(self.dtype).eps)
        # Half precision rounds what a gate is made of one way or the other.
        is_rounded = self.raw and self.dtype != mx.float32
        np.testing.assert_allclose(
            found.astype(mx.float32), y.astype(mx.float32), rtol=tolerance, atol=tolerance
        )
        check_states(pool, before, states, atol=tolerance if is_rounded else 1e-5)
