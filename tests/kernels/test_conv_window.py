"""Convolutions over segments equal Conv1d over each sequence."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from conv_case import ConvCase, check_rows
from metal_sim import simulated_kernels
from recurrent_case import LAYOUTS, Layout, check_states

from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.conv_window import conv_window_steps
from quire.kernels.recurrent import apply_convolution

every_dtype = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@every_dtype
@pytest.mark.parametrize("width", [2, 4])
@every_layout
def test_steps_equal_conv1d(layout: Layout, width: int, dtype: mx.Dtype) -> None:
    case = ConvCase(layout, width, dtype, bias=width == 4, silu=width == 4)
    x, conv, pool = case.problem()
    y, tails = case.expected(x, conv, pool)
    before = mx.array(pool)
    check_rows(conv_window_steps(x, conv, pool, layout.segments()), y)
    check_states(pool, before, tails, atol=0.0, keeps_empty=False)


@every_dtype
@pytest.mark.parametrize("width", [2, 3, 4])
@every_layout
def test_kernel_equals_conv1d(layout: Layout, width: int, dtype: mx.Dtype) -> None:
    with simulated_kernels():
        ConvCase(layout, width, dtype, bias=width != 3, silu=width != 2).check()


BY_HEAD = {mx.float32: (128, (2, 16)), mx.float16: (512, (2, 64)), mx.bfloat16: (512, (1, 128))}


@every_dtype
@every_layout
def test_queries_and_keys_are_normed_as_mlx_lm_does(layout: Layout, dtype: mx.Dtype) -> None:
    channels, heads = BY_HEAD[dtype]
    case = ConvCase(layout, 4, dtype, bias=False, channels=channels, heads=heads)
    with simulated_kernels():
        case.check()
    x, conv, pool = case.problem()
    y, tails = case.expected(x, conv, pool)
    before = mx.array(pool)
    check_rows(conv_window_steps(x, conv, pool, layout.segments()), y)
    check_states(pool, before, tails, atol=0.0, keeps_empty=False)


def test_whoever_computes_it() -> None:
    """The kernel is chosen for a GPU, MLX's operations for a CPU."""
    case = ConvCase(Layout((1, 1, 6)))
    x, conv, pool = case.problem()
    y, tails = case.expected(x, conv, pool)
    before, fence = mx.array(pool), mx.array([1])
    for device in ("metal", "cpu"):
        pool = mx.array(np.array(before))
        with simulated_kernels(orders=1), selecting(Selector(device, None)):
            found, new_fence, _ = apply_convolution(x, conv, pool, case.layout.segments(), fence)
        assert (new_fence is fence) == (device == "cpu")
        check_rows(found, y)
        check_states(pool, before, tails, atol=0.0, keeps_empty=False)
