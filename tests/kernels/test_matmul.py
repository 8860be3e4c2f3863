"""Dense products by the exact Metal text, against a float64 reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
from metal_sim import KernelFault, compiled_ahead, simulated_kernels

from quire.engine.model import block_weights
from quire.kernels import matmul_spec as module
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.linear import matmul
from quire.kernels.matmul import SkinnySettings, skinny_matmul
from quire.kernels.matmul_spec import MATMUL, DenseShape, MatmulVariant

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
# Of the largest value of a row.
LIMITS = {F32: 1e-5, F16: 2e-3, BF16: 1e-2}

# rows, outputs, dim, dtype. No number of outputs is a multiple of a tile; of 32 values of K some
# simdgroups have none.
SHAPES = [
    (1, 37, 32, BF16),
    (3, 50, 96, F16),
    (8, 21, 160, BF16),
    (17, 70, 96, F16),
    (64, 37, 160, BF16),
]
SETTINGS = [SkinnySettings(*each) for each in product((1, 2, 4), (4, 8, 16), (2, 4))]
CASES: list[tuple[int, int, int, mx.Dtype, SkinnySettings | None]] = [
    *((*shape, None) for shape in SHAPES),
    *((*SHAPES[i % len(SHAPES)], settings) for i, settings in enumerate(SETTINGS)),
    # Several turns, the last of which not all slices have; more rows than one threadgroup takes.
    (13, 21, 1184, F16, SkinnySettings(1, 4, 4)),
    (5, 21, 1184, BF16, SkinnySettings(2, 8, 4)),
    (70, 21, 352, BF16, SkinnySettings(4, 4, 4)),
]
MUTATED = CASES[-3]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    with compiled_ahead():
        for *shape, settings in CASES:
            skinny_matmul(*operands(*shape), settings)


def operands(rows: int, outputs: int, dim: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """x and the weights."""
    random = np.random.default_rng(rows * outputs)
    sizes = (rows, dim), (outputs, dim)
    x, weight = (mx.array(random.standard_normal(size).astype(np.float32)) for size in sizes)
    return x.astype(dtype), weight.astype(dtype)


def double(array: mx.array) -> npt.NDArray[np.float64]:
    return np.array(array.astype(F32)).astype(np.float64)


def reference(x: mx.array, weight: mx.array) -> npt.NDArray[np.float64]:
    return double(x) @ double(weight).T


def error(result: mx.array, expected: npt.NDArray[np.float64]) -> float:
    """Largest of any row, against the row's largest value; NaN counts as infinite."""
    assert result.shape == expected.shape
    relative = np.abs(double(result) - expected) / np.abs(expected).max(axis=1, keepdims=True)
    return float(np.nan_to_num(relative, nan=np.inf).max())


@pytest.mark.parametrize(("rows", "outputs", "dim", "dtype", "settings"), CASES)
def test_agrees_with_float64(
    rows: int, outputs: int, dim: int, dtype: mx.Dtype, settings: SkinnySettings | None
) -> None:
    given = operands(rows, outputs, dim, dtype)
    with simulated_kernels():
        result = skinny_matmul(*given, settings)
    assert result.dtype == dtype
    assert error(result, reference(*given)) < LIMITS[dtype]


def test_a_broken_row_harms_no_other() -> None:
    *shape, settings = MUTATED
    x, weight = operands(*shape)
    expected = reference(x, weight)
    x[3] = mx.nan
    with simulated_kernels():
        result = skinny_matmul(x, weight, settings)
    healthy = [row for row in range(x.shape[0]) if row != 3]
    assert np.isnan(double(result[3])).all()
    assert error(result[mx.array(healthy)], expected[healthy]) < LIMITS[F16]


MUTANTS = {
    "no barrier": ("BARRIER();", ";"),
    "a row beyond the last": ("first_row + row, rows - 1)", "first_row + row, rows)"),
    "a slice too few": ("if (next < slices)", "if (next < slices - 1)"),
    "x of the slice before": ("near * SLICE", "(near ^ 1) * SLICE"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_kernel_is_noticed(mutant: str) -> None:
    old, new = MUTANTS[mutant]
    *shape, settings = MUTATED
    given = operands(*shape)
    try:
        with simulated_kernels({"skinny_matmul": lambda text: text.replace(old, new)}):
            result = skinny_matmul(*given, settings)
    except KernelFault:
        return
    assert error(result, reference(*given)) > 10 * LIMITS[F16]


def test_defaults() -> None:
    def chosen(
        rows: int,
        outputs: int,
        dim: int,
        device: DeviceName = "cuda",
        dtype: str = "bfloat16",
    ) -> str:
        selector = Selector(device, None)
        return selector.default(MATMUL, DenseShape(rows, outputs, dim), dtype).variant.value

    # Small matrices, of up to 64 rows; larger ones of up to 16; neither of one row.
    assert {chosen(rows, 6144, 1024) for rows in (2, 9, 64)} == {"skinny"}
    assert {chosen(rows, 6144, 1024) for rows in (1, 65)} == {"mlx"}
    assert {chosen(rows, 4096, 4096) for rows in (2, 16)} == {"skinny"}
    assert chosen(17, 4096, 4096) == chosen(16, 24576, 4096) == chosen(16, 1024, 48) == "mlx"
    assert {
        chosen(8, 1024, 1024, dtype="float32"),
        chosen(8, 1024, 1024, "metal"),
        chosen(8, 1024, 1024, "cpu", "float32"),
    } == {"mlx"}


def test_default_settings_can_be_tuned() -> None:
    allowed = MATMUL.variants[MatmulVariant.SKINNY]
    assert allowed.has_settings(SkinnySettings()._asdict())


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_block_multiplies_by_the_selected_variant(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = nn.Linear(64, 40, bias=bias)
    if bias:
        linear.bias = mx.random.normal((40,))
    linear.apply(lambda array: array.astype(BF16))
    kind, arrays = block_weights._kind(linear), block_weights._arrays(linear)
    launched: list[int] = []

    def recorded(x: mx.array, *rest: Any) -> mx.array:
        launched.append(x.shape[0])
        return skinny_matmul(x, *rest)

    monkeypatch.setattr(module, "skinny_matmul", recorded)
    for rows in (9, 65):
        x = mx.random.normal((rows, 64)).astype(BF16)
        with simulated_kernels(orders=1), selecting(Selector("cuda", None)):
            got = block_weights._multiply(x, kind, arrays)
        expected = reference(x, linear.weight) + (double(linear.bias) if bias else 0.0)
        assert error(got, expected) < LIMITS[BF16]
    assert launched == [9]
    # Types that differ are MLX's business.
    x = mx.random.normal((2, 64))
    assert matmul(x, *arrays).dtype == F32
    assert launched == [9]
