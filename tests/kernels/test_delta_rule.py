"""The delta rule over segments equals mlx-lm's function over each sequence."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from delta_case import DeltaCase
from metal_sim import simulated_kernels
from recurrent_case import CUT, LAYOUTS, Layout, check_states

from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.delta_rule import delta_rule_steps
from quire.kernels.delta_steps import inverse_of_unit_lower
from quire.kernels.recurrent import apply_delta_rule
from quire.kernels.scan_settings import ScanSettings

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
every_gate = pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])


@every_gate
@pytest.mark.parametrize("dims", [(1, 2, 32, 8), (2, 2, 64, 16)], ids=str)
@every_layout
def test_steps_equal_mlx_lm(layout: Layout, dims: tuple[int, int, int, int], vector: bool) -> None:
    case = DeltaCase(layout, dims, vector)
    rows, pool = case.problem()
    y, states = case.expected(rows, pool)
    before = mx.array(pool)
    found = delta_rule_steps(rows, pool, layout.segments())
    np.testing.assert_allclose(found, y, rtol=0, atol=3e-6)
    check_states(pool, before, states, atol=1e-5, keeps_empty=False)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_types_round_once(dtype: mx.Dtype) -> None:
    layout = Layout((1, 1, 40))
    case = DeltaCase(layout, (1, 2, 32, 8), dtype=dtype)
    rows, pool = case.problem()
    y, _ = case.expected(rows, pool)
    found = delta_rule_steps(rows, pool, layout.segments())
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found.astype(mx.float32), y.astype(mx.float32), rtol=mx.finfo(dtype).eps, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@every_gate
@every_layout
def test_kernel_equals_mlx_lm(layout: Layout, vector: bool, dtype: mx.Dtype) -> None:
    with simulated_kernels():
        DeltaCase(layout, vector=vector, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(1, 2, 32, 8), (4, 8, 64, 16)], ids=str)
def test_gates_are_computed_with_the_rule(dims: tuple[int, int, int, int], dtype: mx.Dtype) -> None:
    with simulated_kernels():
        DeltaCase(CUT, dims, raw=True, dtype=dtype).check()


def test_steps_compute_gates_too() -> None:
    case = DeltaCase(CUT, raw=True)
    rows, pool = case.problem()
    y, _ = case.expected(rows, pool)
    found = delta_rule_steps(rows, pool, CUT.segments())
    np.testing.assert_allclose(found, y, rtol=0, atol=3e-6)


@pytest.mark.parametrize("settings", [ScanSettings(4, 8), ScanSettings(16, 2)], ids=str)
@pytest.mark.parametrize("dims", [(1, 1, 128, 8), (1, 2, 192, 40), (1, 1, 256, 16), (1, 1, 96, 8)])
def test_any_share_of_lanes(dims: tuple[int, int, int, int], settings: ScanSettings) -> None:
    with simulated_kernels():
        DeltaCase(CUT, dims, dtype=mx.bfloat16, settings=settings).check()


def test_decodes_need_no_lengths() -> None:
    layout = Layout((1, 1, 1, 1), begins=(2,))
    case = DeltaCase(layout, (1, 2, 32, 8))
    rows, pool = case.problem()
    other = mx.array(pool)
    y = delta_rule_steps(rows, pool, layout.segments())
    again = delta_rule_steps(rows, other, layout.segments(keep_lengths=False))
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(pool, other)


def test_rows_alike_can_be_told_apart() -> None:
    """Keys all the same and no forgetting: the system of a chunk is as ill as it can be."""
    layout = Layout((48,))
    case = DeltaCase(layout, (1, 2, 32, 8))
    rows, pool = case.problem()
    rows = rows._replace(
        k=mx.broadcast_to(rows.k[:1], rows.k.shape),
        g=mx.ones_like(rows.g),
        beta=mx.full(rows.beta.shape, 1.9),
    )
    y, states = case.expected(rows, pool)
    found = delta_rule_steps(rows, pool, layout.segments())
    np.testing.assert_allclose(found, y, rtol=0, atol=1e-5)
    for slot, state in states.items():
        np.testing.assert_allclose(pool[slot], state, rtol=0, atol=1e-4)


def test_inverse_of_unit_lower() -> None:
    lower = np.tril(np.random.default_rng(0).normal(size=(3, 16, 16)), -1).astype(np.float32)
    found = np.array(inverse_of_unit_lower(mx.array(lower)))
    wanted = np.linalg.inv(np.eye(16) + lower.astype(np.float64))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)


def test_whoever_computes_it() -> None:
    """The kernel is chosen for a GPU, MLX's operations for a CPU."""
    case = DeltaCase(Layout((1, 1, 6)))
    rows, pool = case.problem()
    y, states = case.expected(rows, pool)
    before, fence = mx.array(pool), mx.array([1])
    for device in ("metal", "cpu"):
        pool = mx.array(np.array(before))
        with simulated_kernels(orders=1), selecting(Selector(device, None)):
            found, new_fence, _ = apply_delta_rule(rows, pool, case.layout.segments(), fence)
        assert (new_fence is fence) == (device == "cpu")
        np.testing.assert_allclose(found, y, rtol=0, atol=3e-6)
        check_states(pool, before, states, atol=1e-5, keeps_empty=False)
