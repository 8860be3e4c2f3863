"""Convolutions over segments equal Conv1d over each sequence."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from metal_sim import simulated_kernels
from recurrent_case import LAYOUTS, Layout

from quire.kernels.conv_window import Convolution, conv_window, conv_window_steps


def problem(
    layout: Layout, width: int, dtype: mx.Dtype, *, bias: bool = False, silu: bool = True
) -> tuple[mx.array, Convolution, mx.array]:
    rng = np.random.default_rng(width + sum(layout.lengths))
    channels = 24

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape)).astype(dtype)

    conv = Convolution(normal(channels, width, 1), normal(channels) if bias else None, silu)
    x, pool = normal(layout.num_rows, channels), normal(layout.num_slots, width - 1, channels)
    mx.eval(x, pool, conv.weight)
    return x, conv, pool


def expected(
    layout: Layout, x: mx.array, conv: Convolution, pool: mx.array
) -> tuple[mx.array, dict[int, mx.array]]:
    """By MLX's own layer, sequence by sequence, and the tails by target."""
    channels, width, _ = conv.weight.shape
    layer = nn.Conv1d(channels, channels, width, groups=channels, bias=conv.bias is not None)
    layer.weight = conv.weight
    if conv.bias is not None:
        layer.bias = conv.bias
    ys, states, tail, start = [], {}, None, 0
    targets = layout.slots()[1]
    for index, length in enumerate(layout.lengths):
        window = mx.concatenate([layout.states(pool, tail, index), x[start : start + length]])
        if length:
            y = layer(window[None])[0]
            ys.append(nn.silu(y) if conv.silu else y)
        states[targets[index]] = tail = window[-(width - 1) :]
        start += length
    states.pop(0, None)
    y = mx.concatenate([*ys, mx.zeros((layout.padding, channels), x.dtype)])
    mx.eval(y, states)  # before a kernel writes over what these are made of
    return y, states


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_steps_equal_conv1d(layout: Layout, width: int, dtype: mx.Dtype) -> None:
    x, conv, pool = problem(layout, width, dtype, bias=width == 4, silu=width == 4)
    y, tails = expected(layout, x, conv, pool)
    before = np.array(pool.astype(mx.float32))
    found = conv_window_steps(x, conv, pool, layout.segments())
    check(found, y)
    after = np.array(pool.astype(mx.float32))
    for slot in range(1, len(after)):
        wanted = tails[slot].astype(mx.float32) if slot in tails else before[slot]
        np.testing.assert_array_equal(after[slot], wanted)


def check(found: mx.array, wanted: mx.array) -> None:
    eps = mx.finfo(wanted.dtype).eps
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(
        found.astype(mx.float32), wanted.astype(mx.float32), rtol=2 * eps, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_kernel_equals_conv1d(layout: Layout, width: int, dtype: mx.Dtype) -> None:
    x, conv, pool = problem(layout, width, dtype, bias=width != 3, silu=width != 2)
    y, tails = expected(layout, x, conv, pool)
    before = np.array(pool.astype(mx.float32))
    with simulated_kernels():
        found, token = conv_window(x, conv, pool, layout.segments(), mx.array([1]))
    assert token.tolist() == [1]
    check(found, y)
    after = np.array(pool.astype(mx.float32))
    for slot in range(len(after)):
        wanted = tails[slot].astype(mx.float32) if slot in tails else before[slot]
        np.testing.assert_array_equal(after[slot], wanted)
