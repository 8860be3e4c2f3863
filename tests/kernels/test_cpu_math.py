"""The CPU's own exponential and sigmoid against float64."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from quire.kernels.activation import rational_sigmoid
from quire.kernels.exponential import exp2_difference


def test_exp2_of_differences() -> None:
    x = np.linspace(-79, 0, 100001, dtype=np.float32)
    got = np.array(exp2_difference(mx.array(x), mx.array(0.0)))
    assert np.abs(got / np.exp2(x.astype(np.float64)) - 1).max() < 5e-7


@pytest.mark.parametrize("hidden", [-np.inf, -1e30, -200.0])
def test_hidden_scores_weigh_nothing_and_are_not_denormal(hidden: float) -> None:
    weight = exp2_difference(mx.array([hidden]), mx.array([3.0])).item()
    assert 1e-38 < weight < 1e-20


def test_sigmoid() -> None:
    x = np.linspace(-30, 30, 200001, dtype=np.float32)
    got = np.array(rational_sigmoid(mx.array(x)))
    assert np.abs(got - 1 / (1 + np.exp(-x.astype(np.float64)))).max() < 3e-7
    assert got.min() >= 0
    assert got.max() <= 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_other_types_keep_mlx_s_sigmoid(dtype: mx.Dtype) -> None:
    x = mx.random.normal((100,)).astype(dtype)
    assert mx.array_equal(rational_sigmoid(x), mx.sigmoid(x))


def test_it_can_stand_in_for_mlx_s_own_in_compiled_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = mx.random.normal((7, 33))
    expected = nn.silu(x)
    monkeypatch.setattr(mx, "sigmoid", rational_sigmoid)
    silu = mx.compile(lambda value: value * mx.sigmoid(value), shapeless=True)
    for rows in (1, 7, 4):
        assert mx.allclose(silu(x[:rows]), expected[:rows], atol=2e-6)
