"""Quantised products by the exact Metal text, against a float64 reference."""

from __future__ import annotations

from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
from metal_sim import KernelFault, compiled_ahead, simulated_kernels
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from quire.engine.model.flat_linear import FlatQuantizedLinear, flatten_linears
from quire.kernels import quantized_matmul as module
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.record import Key, Record, Timing
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.gpu_kernel import GpuKernel
from quire.kernels.linear import quantized_matmul
from quire.kernels.quantized_matmul import (
    MatrixSettings,
    RowsSettings,
    matrix_matmul,
    rows_matmul,
)
from quire.kernels.quantized_matmul_spec import (
    QUANTIZED_MATMUL,
    MatmulShape,
    QuantizedVariant,
    run_quantized,
)

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
# Of the largest value of a row.
LIMITS = {F32: 1e-5, F16: 2e-3, BF16: 1e-2}

# rows, columns, inputs, bits, group size, dtype, and the settings if not the default ones. No
# number of columns is a multiple of a tile; inputs go from one group to several rounds.
MATRIX_CASES = [
    (1, 37, 320, 4, 64, BF16, None),
    (2, 21, 32, 8, 32, F16, None),
    (3, 9, 384, 4, 128, F32, MatrixSettings(tiles=1, simdgroups=2, depth=2)),
    (5, 50, 192, 8, 64, BF16, MatrixSettings(tiles=2, simdgroups=2, depth=2)),
    (8, 37, 224, 4, 32, F16, None),
    (16, 70, 256, 8, 128, F32, MatrixSettings(tiles=4, simdgroups=1, depth=1)),
    (17, 37, 320, 4, 64, F32, MatrixSettings(tiles=2, simdgroups=4, depth=1)),
    (32, 37, 128, 4, 64, BF16, MatrixSettings(tiles=2, simdgroups=2, depth=4)),
    (35, 18, 128, 4, 64, BF16, MatrixSettings(tiles=2, simdgroups=2, depth=4)),
]
ROWS_CASES = [
    (1, 37, 1120, 4, 32, BF16, None),
    (2, 21, 32, 8, 32, F16, None),
    (3, 9, 384, 4, 128, F32, RowsSettings(columns=2, simdgroups=1, depth=1)),
    (5, 50, 192, 8, 64, BF16, None),
    (8, 37, 2112, 4, 64, F16, RowsSettings(columns=4, simdgroups=2, depth=4)),
    (16, 10, 256, 8, 128, F32, None),
    (17, 37, 320, 4, 64, F32, None),
    (32, 37, 128, 4, 64, F32, None),
]
KERNELS = {"matrix": matrix_matmul, "rows": rows_matmul}
CASES = [("matrix", *case) for case in MATRIX_CASES] + [("rows", *case) for case in ROWS_CASES]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    with compiled_ahead():
        for variant, *case in CASES:
            *shape, settings = case
            x, *weights = operands(*shape)
            KERNELS[variant](x, *weights, shape[4], shape[3], settings)


def operands(
    rows: int, columns: int, inputs: int, bits: int, group_size: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """x, w, scales and biases."""
    random = np.random.default_rng(rows * columns)
    dense = mx.array(random.standard_normal((columns, inputs)).astype(np.float32))
    w, scales, biases = mx.quantize(dense, group_size=group_size, bits=bits)
    x = mx.array(random.standard_normal((rows, inputs)).astype(np.float32))
    return x.astype(dtype), w, scales.astype(dtype), biases.astype(dtype)


def double(array: mx.array) -> npt.NDArray[np.float64]:
    return np.array(array.astype(F32)).astype(np.float64)


def reference(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> npt.NDArray[np.float64]:
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    integers = (np.array(w)[..., None] >> shifts) & ((1 << bits) - 1)
    integers = integers.reshape(w.shape[0], x.shape[1])
    scale = np.repeat(double(scales), group_size, axis=1)
    dense: npt.NDArray[np.float64] = integers * scale + np.repeat(double(biases), group_size, 1)
    return double(x) @ dense.T


def error(result: mx.array, expected: npt.NDArray[np.float64]) -> float:
    """Largest of any row, against the row's largest value; NaN counts as infinite."""
    assert result.shape == expected.shape
    relative = np.abs(double(result) - expected) / np.abs(expected).max(axis=1, keepdims=True)
    return float(np.nan_to_num(relative, nan=np.inf).max())


@pytest.mark.parametrize(
    ("variant", "rows", "columns", "inputs", "bits", "group_size", "dtype", "settings"), CASES
)
def test_agrees_with_float64(
    variant: str,
    rows: int,
    columns: int,
    inputs: int,
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    settings: RowsSettings | MatrixSettings | None,
) -> None:
    given = operands(rows, columns, inputs, bits, group_size, dtype)
    with simulated_kernels():
        result = KERNELS[variant](*given, group_size, bits, settings)
    assert result.dtype == dtype
    assert error(result, reference(*given, group_size, bits)) < LIMITS[dtype]


@pytest.mark.parametrize("case", [MATRIX_CASES[6], ROWS_CASES[6]], ids=["matrix", "rows"])
def test_a_broken_row_harms_no_other(case: tuple[int, int, int, int, int, mx.Dtype, None]) -> None:
    *shape, settings = case
    x, *weights = operands(*shape)
    multiply = matrix_matmul if isinstance(settings, MatrixSettings) else rows_matmul
    expected = reference(x, *weights, 64, 4)
    x[3] = mx.nan
    with simulated_kernels():
        result = multiply(x, *weights, 64, 4, settings)
    healthy = [row for row in range(x.shape[0]) if row != 3]
    assert np.isnan(np.array(result[3])).all()
    assert error(result[mx.array(healthy)], expected[healthy]) < LIMITS[F32]


MUTANTS = {
    "no barrier": ("BARRIER();", ";"),
    "scale of the row above": ("scale[d][i * 2 + e % 4 / 2]", "scale[d][i * 2]"),
    "bias forgotten": ("totals[e] * b", "0.0f"),
    "a group too few": ("if (base + d < groups)", "if (base + d < groups - 1)"),
    "words of another place": ("at * 4 + place", "at * 4 + (place ^ 1)"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_kernel_is_noticed(mutant: str) -> None:
    old, new = MUTANTS[mutant]
    *shape, settings = MATRIX_CASES[6]
    given = operands(*shape)
    mutations = {"quantized_matmul_matrix": lambda text: text.replace(old, new)}
    try:
        with simulated_kernels(mutations):
            result = matrix_matmul(*given, 64, 4, settings)
    except KernelFault:
        return
    assert error(result, reference(*given, 64, 4)) > 10 * LIMITS[F32]


def test_defaults() -> None:
    def chosen(
        rows: int, device: DeviceName = "cuda", dtype: str = "bfloat16", bits: int = 4
    ) -> str:
        shape = MatmulShape(rows, 4096, 4096, bits, 64)
        return Selector(device, None).default(QUANTIZED_MATMUL, shape, dtype).variant.value

    assert chosen(1) == chosen(2) == chosen(16) == chosen(128) == "matrix"
    assert chosen(1, dtype="float32") == "mlx"
    assert chosen(16, dtype="float32") == "rows"
    assert chosen(17, dtype="float32") == chosen(16, bits=3) == "mlx"
    assert chosen(129) == chosen(2048) == chosen(129, bits=3) == "dequantize"
    assert {chosen(rows, "metal") for rows in (1, 16, 4096)} == {"mlx"}
    assert chosen(4, "cpu", "float32") == "mlx"
    assert chosen(5, "cpu", "float32") == chosen(4096, "cpu", "float32", bits=3) == "dequantize"


def test_the_selected_variant_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the scales are of another type: then it is MLX's own, which promotes them."""
    given = operands(5, 37, 320, 4, 64, F32)
    expected = reference(*given, 64, 4)
    launched: list[str] = []
    bucket = tuple(MatmulShape(5, 37, 320, 4, 64).bucket())
    settings = {"columns": 8, "simdgroups": 4, "depth": 1}
    tuned = Timing("quantized_matmul", bucket, "float32", "rows", settings, 1.0, 2.0)
    record = Record(Key("", "", "", ""), timings=(tuned,))

    def run(kernel: GpuKernel, inputs: Any, template: dict[str, int], **kwargs: Any) -> mx.array:
        launched.append(f"{kernel.name} {template['COLUMNS']} {template['DEPTH']}")
        return mx.zeros((5, 37))

    monkeypatch.setattr(module, "_run", run)
    with selecting(Selector("cuda", record)):
        quantized_matmul(*given, group_size=64, bits=4)
    assert launched == ["quantized_matmul 8 1"]
    x, w, scales, biases = given
    mixed = x, w, scales.astype(BF16), biases.astype(BF16)
    result = quantized_matmul(*mixed, group_size=64, bits=4)
    assert len(launched) == 1
    assert error(result, expected) < LIMITS[BF16]


@pytest.mark.parametrize("columns", [1, 37, 300])
def test_unpacking_piece_by_piece(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CPU_PIECE", 16 * 128)
    given = operands(9, columns, 128, 8, 64, F32)
    with mx.stream(mx.cpu):
        result = quantized_matmul(*given, group_size=64, bits=8)
        mx.eval(result)
    assert error(result, reference(*given, 64, 8)) < LIMITS[F32]


@pytest.mark.parametrize("variant", [QuantizedVariant.MLX, QuantizedVariant.DEQUANTIZE])
def test_what_mlx_computes_agrees_too(variant: QuantizedVariant) -> None:
    given = operands(5, 37, 128, 4, 64, F32)
    x, *matrix = given
    found = run_quantized(variant, {}, x, (matrix[0], matrix[1], matrix[2]), 64, 4)
    assert error(found, reference(*given, 64, 4)) < LIMITS[F32]


def test_layers_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.QuantizedLinear(64, 32, bias=True, group_size=32, bits=4)
    linear.bias = mx.random.normal((32,))
    head = nn.QuantizedEmbedding(40, 64, group_size=32, bits=4)
    other = nn.QuantizedLinear(64, 32, bias=False, mode="mxfp4")
    layers = nn.Sequential(linear, head, other)
    rows = mx.random.normal((9, 1, 64))
    expected = linear(rows), head.as_linear(rows), other(rows), head(mx.array([3]))
    flatten_linears(layers)
    assert type(linear) is FlatQuantizedLinear
    launched: list[str] = []
    run = module._run

    def recorded(kernel: GpuKernel, *args: Any, **kwargs: Any) -> mx.array:
        launched.append(kernel.name)
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(module, "_run", recorded)
    with simulated_kernels(), selecting(Selector("cuda", None)):
        got = linear(rows), head.as_linear(rows), other(rows), head(mx.array([3]))
    assert launched == ["quantized_matmul"] * 2
    for one, two in zip(got, expected, strict=True):
        assert one.shape == two.shape
        assert mx.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("packed", [None, {"bits": 4}, {"bits": 6}, {"mode": "mxfp4", "bits": 4}])
def test_a_matrix_for_each_head_takes_all_rows_at_once(
    rows: int, packed: dict[str, Any] | None
) -> None:
    heads = MultiLinear(64, 24, 5)
    layer = heads.to_quantized(32, **packed) if packed else heads
    q = mx.random.normal((rows, 1, 5, 80)).swapaxes(1, 2)[..., :64]  # as a model slices it
    unpacked = q @ _dense(layer).swapaxes(-1, -2)
    flatten_linears(layer)
    with (
        mock.patch.object(mx, "quantized_matmul", wraps=mx.quantized_matmul) as products,
        mock.patch.object(mx, "dequantize", wraps=mx.dequantize) as unpacking,
        mock.patch.object(MultiLinear, "__call__", autospec=True, side_effect=_multiplied) as dense,
    ):
        got = layer(q)
    assert got.shape == (rows, 5, 1, 24)
    assert mx.allclose(got, unpacked, atol=1e-5)
    calls = products.call_args_list + unpacking.call_args_list + dense.call_args_list
    assert len(calls) == 1
    if rows > 1:
        assert {call.args[0].shape for call in products.call_args_list} <= {(5, rows, 64)}
        assert {call.args[1].shape for call in dense.call_args_list} <= {(1, 5, rows, 64)}


def test_a_matrix_for_each_head_keeps_sequences_apart() -> None:
    layer = MultiLinear(64, 24, 5)
    sequences = mx.random.normal((1, 5, 7, 64)), mx.random.normal((1, 5, 7, 24))
    expected = layer(sequences[0]), layer(sequences[1], transpose=False)
    flatten_linears(layer)
    got = layer(sequences[0]), layer(sequences[1], transpose=False)
    assert all(mx.array_equal(*pair) for pair in zip(got, expected, strict=True))


def _multiplied(layer: MultiLinear, x: mx.array, transpose: bool = True) -> mx.array:
    return x @ (layer.weight.swapaxes(-1, -2) if transpose else layer.weight)


def _dense(layer: MultiLinear | QuantizedMultiLinear) -> mx.array:
    if isinstance(layer, MultiLinear):
        return layer.weight
    options = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.biases, **options)
