"""The CPU's own exponential and sigmoid against float64."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from quire.kernels.activation import rational_sigmoid
from quire.kernels.cpu_rope import RowRope, _rope
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


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [16, 8])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("with_freqs", [False, True])
def test_rope_of_rows_equals_mlx_s(
    traditional: bool, dims: int, scale: float, with_freqs: bool
) -> None:
    rope = RowRope()
    for step in range(3):  # other positions each time: tables must not outlive their step
        positions = mx.array([0, 1, 7, 500 + step, 131071])
        for heads in (4, 2):
            x = mx.random.normal((5, heads, 1, 16))
            freqs = mx.exp(mx.linspace(0, 9, dims // 2)) if with_freqs else None
            options = {
                "traditional": traditional,
                "base": None if with_freqs else 10000.0,
                "scale": scale,
                "offset": positions,
                "freqs": freqs,
            }
            assert mx.allclose(rope(x, dims, **options), _rope(x, dims, **options), atol=1e-6)


def test_other_ropes_go_to_mlx() -> None:
    x = mx.random.normal((1, 4, 9, 16))
    options = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 3}
    assert mx.array_equal(RowRope()(x, 16, **options), _rope(x, 16, **options))
    half = mx.random.normal((2, 4, 1, 16)).astype(mx.float16)
    options["offset"] = mx.array([3, 9])
    assert mx.array_equal(RowRope()(half, 16, **options), _rope(half, 16, **options))
