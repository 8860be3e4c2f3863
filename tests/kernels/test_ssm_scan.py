"""Mamba-2's recurrence over segments equals mlx-lm's function over each sequence."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import simulated_kernels
from recurrent_case import CUT, LAYOUTS, Layout, check_states
from ssm_case import SsmCase, check_rows

from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.recurrent import apply_ssm
from quire.kernels.scan_settings import ScanSettings
from quire.kernels.ssm_scan import ssm_scan_steps

every_dtype = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@every_dtype
@pytest.mark.parametrize("dims", [(1, 2, 8, 32), (2, 4, 16, 64)], ids=str)
@every_layout
def test_steps_equal_mlx_lm(
    layout: Layout, dims: tuple[int, int, int, int], dtype: mx.Dtype
) -> None:
    case = SsmCase(layout, dims, dtype)
    rows, layer, pool = case.problem()
    y, states = case.expected(rows, layer, pool)
    before = mx.array(pool)
    check_rows(ssm_scan_steps(rows, layer, pool, layout.segments()), y)
    check_states(pool, before, states, atol=1e-5, keeps_empty=False)


@every_dtype
@every_layout
def test_kernel_equals_mlx_lm(layout: Layout, dtype: mx.Dtype) -> None:
    with simulated_kernels():
        SsmCase(layout, dtype=dtype).check()


@pytest.mark.parametrize("settings", [ScanSettings(4, 8), ScanSettings(16, 2)], ids=str)
@pytest.mark.parametrize("dims", [(1, 1, 8, 128), (1, 2, 40, 192), (1, 1, 16, 256)], ids=str)
def test_any_share_of_lanes(dims: tuple[int, int, int, int], settings: ScanSettings) -> None:
    with simulated_kernels():
        SsmCase(CUT, dims, mx.bfloat16, settings).check()


def test_where_a_prompt_is_cut_changes_nothing() -> None:
    """Of what the kernel computes, to the last bit."""
    found = []
    for lengths in ((33,), (1, 20, 12)):
        layout = Layout(lengths, continues=tuple(range(1, len(lengths))), moves=False)
        case = SsmCase(layout)
        rows, layer, _ = SsmCase(Layout((33,))).problem()
        with simulated_kernels(orders=1), selecting(Selector("metal", None)):
            pool = mx.zeros((layout.num_slots, *_.shape[1:]))
            y, _, _ = apply_ssm(rows, layer, pool, case.layout.segments(), mx.array([1]))
        found.append((np.array(y), np.array(pool[layout.slots()[1][-1]])))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_whoever_computes_it() -> None:
    """The kernel is chosen for a GPU, MLX's operations for a CPU."""
    case = SsmCase(Layout((1, 1, 6)))
    rows, layer, pool = case.problem()
    y, states = case.expected(rows, layer, pool)
    before, fence = mx.array(pool), mx.array([1])
    for device in ("metal", "cpu"):
        pool = mx.array(np.array(before))
        with simulated_kernels(orders=1), selecting(Selector(device, None)):
            found, new_fence, _ = apply_ssm(rows, layer, pool, case.layout.segments(), fence)
        assert (new_fence is fence) == (device == "cpu")
        check_rows(found, y)
        check_states(pool, before, states, atol=1e-5, keeps_empty=False)
