"""Products with weight matrices, quantised and dense."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

import mlx.core as mx

from quire.kernels.matmul import matmul
from quire.kernels.quantized_matmul import quantized_matmul
from quire.loadtest.kernels.case import Case, Profile

_GROUP_SIZE = 64
_BITS = (4, 8)
# (outputs, inputs) of Qwen3-8B: attention's queries or output, keys or values, gate or up, down and
# the head.
_MATRICES = {
    "gpu": ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288), (151_936, 4096)),
    "cpu": ((512, 512), (512, 1536)),
}
_ROWS = {"gpu": (1, 2, 4, 8, 16, 32, 64), "cpu": (1, 8)}
_DENSE_ROWS = {"gpu": (1, 4, 16, 64), "cpu": (1, 8)}
# (outputs, inputs, bias) of Qwen2.5-0.5B, one row: gate and up together, down, and QKV together.
_SINGLE_ROW = ((9728, 896, False), (896, 4864, False), (1152, 896, True))


def quantized_cases(profile: Profile) -> Iterator[Case]:
    """From one row to a small batch on the matrices of a model, at 4 and 8 bits."""
    place = "gpu" if profile.gpu else "cpu"
    matrices = _MATRICES[place][:1] if profile.quick else _MATRICES[place]
    for bits in _BITS[:1] if profile.quick else _BITS:
        for outputs, inputs in matrices:
            for rows in _ROWS[place]:
                yield _quantized("quantized_matmul", profile, rows, outputs, inputs, bits)


def matmul_cases(profile: Profile) -> Iterator[Case]:
    """One row on the matrices of a very small model: dense, 4-bit and 8-bit. Then from one row to a
    small batch on larger dense matrices."""
    for outputs, inputs, has_bias in _SINGLE_ROW[-1:] if profile.quick else _SINGLE_ROW:
        yield _dense(profile, 1, outputs, inputs, has_bias, {"naive": partial(_plus_bias, _sums)})
        for bits in _BITS:
            yield _quantized("matmul", profile, 1, outputs, inputs, bits, has_bias)
    place = "gpu" if profile.gpu else "cpu"
    for outputs, inputs in _MATRICES[place][:1] if profile.quick else _MATRICES[place]:
        for rows in _DENSE_ROWS[place]:
            yield _dense(profile, rows, outputs, inputs)


class _Weights:
    """``rows`` activations and one matrix, packed and as the numbers it stands for.

    The first column of the result is zero, for :func:`_chain`.
    """

    def __init__(
        self,
        rows: int,
        outputs: int,
        inputs: int,
        bits: int | None,
        has_bias: bool,
        dtype: mx.Dtype,
        seed: int,
    ) -> None:
        keys = mx.random.split(mx.random.key(seed), 3)
        self.x = mx.random.normal((rows, inputs), dtype, key=keys[0])
        self.dense = mx.random.normal((outputs, inputs), dtype, scale=inputs**-0.5, key=keys[1])
        self.dense[0] = 0
        self.bias: mx.array | None = None
        if has_bias:
            self.bias = mx.random.normal((outputs,), dtype, key=keys[2])
            self.bias[0] = 0
        self.bits = bits
        if bits is not None:
            self.packed = mx.quantize(self.dense, group_size=_GROUP_SIZE, bits=bits)
            mx.eval(self.packed)
            self.dense = mx.dequantize(*self.packed, group_size=_GROUP_SIZE, bits=bits)
        self.transposed = self.dense.T
        mx.eval(self.x, self.dense, self.transposed, [] if self.bias is None else self.bias)


def _chain(w: _Weights, result: mx.array) -> _Weights:
    """The same weights with rows that wait for the (rows, outputs) result of another call.

    They are taken from it where that needs no copy, else a zero of it is added to those of ``w``:
    one more small kernel in every call, whatever the variant.
    """
    chained = copy.copy(w)
    rows, inputs = w.x.shape
    outputs = result.shape[1]
    if inputs == outputs or (inputs < outputs and rows == 1):
        chained.x = result[:, :inputs]
    else:
        chained.x = w.x + result[0, 0]
    return chained


Product = Callable[[_Weights], mx.array]


def _dense_product(w: _Weights) -> mx.array:
    if w.bias is None:
        return w.x @ w.dense.T
    return mx.addmm(w.bias, w.x, w.dense.T)


def _quire_dense(w: _Weights) -> mx.array:
    return matmul(w.x, w.dense, w.transposed, w.bias)


def _plus_bias(product: Product, w: _Weights) -> mx.array:
    return product(w) if w.bias is None else product(w) + w.bias


def _sums(w: _Weights) -> mx.array:
    """Every product in memory, then their sums."""
    return (w.x[:, None] * w.dense).sum(axis=-1)


def _mlx(w: _Weights) -> mx.array:
    return mx.quantized_matmul(w.x, *w.packed, transpose=True, group_size=_GROUP_SIZE, bits=w.bits)


def _dequantize(w: _Weights) -> mx.array:
    """The whole matrix in memory as numbers, then the dense product."""
    return w.x @ mx.dequantize(*w.packed, group_size=_GROUP_SIZE, bits=w.bits).T


def _quire(w: _Weights) -> mx.array:
    assert w.bits is not None
    return quantized_matmul(w.x, *w.packed, group_size=_GROUP_SIZE, bits=w.bits)


def _quantized(
    operation: str,
    profile: Profile,
    rows: int,
    outputs: int,
    inputs: int,
    bits: int,
    has_bias: bool = False,
) -> Case:
    size = profile.dtype.size
    activations = (rows * (inputs + outputs) + outputs * has_bias) * size
    packed = outputs * inputs * bits // 8 + 2 * outputs * inputs // _GROUP_SIZE * size
    dense = outputs * inputs * size
    variants: dict[str, Product] = {
        "mlx": partial(_plus_bias, _mlx),
        "dequantize": partial(_plus_bias, _dequantize),
        "dense": _dense_product,
        "quire": partial(_plus_bias, _quire),
    }
    name = f"{rows} x {outputs} x {inputs}{' + bias' if has_bias else ''} {bits}-bit"
    return Case(
        operation=operation,
        name=name,
        labels=_labels(rows, outputs, inputs, has_bias, bits),
        inputs=partial(_Weights, rows, outputs, inputs, bits, has_bias, profile.dtype),
        variants=variants,
        chain=_chain,
        baselines=("mlx", "dequantize", "dense"),
        bytes_moved=packed + activations,
        variant_bytes={"dense": dense + activations},
        flops=2 * rows * outputs * inputs,
        tolerance=0.05,  # the dense variants round the numbers that the codes stand for
        memory=packed + 3 * dense,
    )


def _dense(
    profile: Profile,
    rows: int,
    outputs: int,
    inputs: int,
    has_bias: bool = False,
    others: Mapping[str, Product] = MappingProxyType({}),
) -> Case:
    size = profile.dtype.size
    dense = outputs * inputs * size
    return Case(
        operation="matmul",
        name=f"{rows} x {outputs} x {inputs}{' + bias' if has_bias else ''}",
        labels=_labels(rows, outputs, inputs, has_bias),
        inputs=partial(_Weights, rows, outputs, inputs, None, has_bias, profile.dtype),
        variants={"mlx": _dense_product, **others, "quire": _quire_dense},
        chain=_chain,
        baselines=("mlx", *others),
        bytes_moved=dense + (rows * (inputs + outputs) + outputs * has_bias) * size,
        flops=2 * rows * outputs * inputs,
        memory=4 * dense,
    )


def _labels(
    rows: int, outputs: int, inputs: int, has_bias: bool, bits: int | None = None
) -> dict[str, int | str]:
    labels: dict[str, int | str] = {"rows": rows, "outputs": outputs, "inputs": inputs}
    if bits is not None:
        labels["bits"] = bits
    if has_bias:
        labels["bias"] = "yes"
    return labels
