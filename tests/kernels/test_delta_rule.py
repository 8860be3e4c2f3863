"""The delta rule over segments equals mlx-lm's function over each sequence."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.gated_delta import gated_delta_ops
from metal_sim import simulated_kernels
from recurrent_case import LAYOUTS, Layout

from quire.kernels.delta_rule import DeltaRows, delta_rule, delta_rule_steps
from quire.kernels.delta_steps import inverse_of_unit_lower

DIMS = [(1, 2, 32, 8), (2, 2, 64, 16)]  # key heads, value heads, key_dim, value_dim


def problem(
    layout: Layout, dims: tuple[int, int, int, int], *, vector: bool, dtype: mx.Dtype
) -> tuple[DeltaRows, mx.array]:
    key_heads, heads, key_dim, value_dim = dims
    rng = np.random.default_rng(sum(layout.lengths) + key_dim)
    rows = layout.num_rows

    def normal(*shape: int, size: float = 1.0) -> mx.array:
        return mx.array(size * rng.normal(size=shape)).astype(dtype)

    def key(size: float) -> mx.array:
        drawn = rng.normal(size=(rows, key_heads, key_dim))
        return mx.array(size * drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(dtype)

    gates = (rows, heads, key_dim) if vector else (rows, heads)
    g = mx.array(np.exp(-np.exp(rng.normal(size=gates))), mx.float32)
    g[1] = 0.0  # forgets all
    beta = mx.array(rng.uniform(0, 2, size=(rows, heads))).astype(dtype)
    pool = mx.array(rng.normal(size=(layout.num_slots, heads, value_dim, key_dim)), mx.float32)
    result = DeltaRows(key(key_dim**-0.5), key(1.0), normal(rows, heads, value_dim), g, beta)
    mx.eval(*result, pool)
    return result, pool


def expected(layout: Layout, rows: DeltaRows, pool: mx.array) -> tuple[mx.array, dict[int, mx.array]]:
    """y by mlx-lm's function, sequence by sequence, and the states by target."""
    ys, states, state, start = [], {}, None, 0
    targets = layout.slots()[1]
    for index, length in enumerate(layout.lengths):
        state = layout.states(pool, state, index)
        if length:
            part = [x[None, start : start + length] for x in rows]
            y, after = gated_delta_ops(*part, state[None])
            ys.append(y[0])
            state = after[0]
        states[targets[index]] = state
        start += length
    states.pop(0, None)
    y = mx.concatenate([*ys, mx.zeros((layout.padding, *ys[0].shape[1:]), ys[0].dtype)])
    mx.eval(y, states)  # before a kernel writes over what these are made of
    return y, states


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_steps_equal_mlx_lm(layout: Layout, dims: tuple[int, int, int, int], vector: bool) -> None:
    rows, pool = problem(layout, dims, vector=vector, dtype=mx.float32)
    y, states = expected(layout, rows, pool)
    before = np.array(pool)
    found = delta_rule_steps(rows, pool, layout.segments())
    np.testing.assert_allclose(found, y, rtol=0, atol=3e-6)
    after = np.array(pool)
    for slot in range(1, len(after)):
        wanted = states.get(slot)
        np.testing.assert_allclose(
            after[slot], before[slot] if wanted is None else wanted, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_types_round_once(dtype: mx.Dtype) -> None:
    layout = Layout((1, 1, 40))
    rows, pool = problem(layout, DIMS[0], vector=False, dtype=dtype)
    y, _ = expected(layout, rows, pool)
    found = delta_rule_steps(rows, pool, layout.segments())
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found.astype(mx.float32), y.astype(mx.float32), rtol=mx.finfo(dtype).eps, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_kernel_equals_steps(layout: Layout, vector: bool, dtype: mx.Dtype) -> None:
    rows, pool = problem(layout, DIMS[1], vector=vector, dtype=dtype)
    y, states = expected(layout, rows, pool)
    before = np.array(pool)
    with simulated_kernels():
        found, token = delta_rule(rows, pool, layout.segments(), mx.array([1]))
    assert token.tolist() == [1]
    tolerance = 2e-6 if dtype == mx.float32 else float(mx.finfo(dtype).eps)
    np.testing.assert_allclose(
        found.astype(mx.float32), y.astype(mx.float32), rtol=tolerance, atol=tolerance
    )
    after = np.array(pool)
    for slot in range(len(after)):
        wanted = states.get(slot, before[slot])
        np.testing.assert_allclose(after[slot], wanted, rtol=0, atol=1e-5)


def test_decodes_need_no_lengths() -> None:
    layout = Layout((1, 1, 1, 1), begins=(2,))
    rows, pool = problem(layout, DIMS[0], vector=False, dtype=mx.float32)
    other = mx.array(pool)
    y = delta_rule_steps(rows, pool, layout.segments())
    again = delta_rule_steps(rows, other, layout.segments(keep_lengths=False))
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(pool, other)


def test_rows_alike_can_be_told_apart() -> None:
    """Keys all the same and no forgetting: the system of a chunk is as ill as it can be."""
    layout = Layout((48,))
    rows, pool = problem(layout, DIMS[0], vector=False, dtype=mx.float32)
    rows = rows._replace(
        k=mx.broadcast_to(rows.k[:1], rows.k.shape),
        g=mx.ones_like(rows.g),
        beta=mx.full(rows.beta.shape, 1.9),
    )
    y, states = expected(layout, rows, pool)
    found = delta_rule_steps(rows, pool, layout.segments())
    np.testing.assert_allclose(found, y, rtol=0, atol=1e-5)
    for slot, state in states.items():
        np.testing.assert_allclose(pool[slot], state, rtol=0, atol=1e-4)


def test_inverse_of_unit_lower() -> None:
    lower = np.tril(np.random.default_rng(0).normal(size=(3, 16, 16)), -1).astype(np.float32)
    found = np.array(inverse_of_unit_lower(mx.array(lower)))
    wanted = np.linalg.inv(np.eye(16) + lower.astype(np.float64))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)
