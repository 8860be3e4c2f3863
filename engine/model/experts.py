"""Mixtures of experts with a kernel of our own for few rows; else they are mlx-lm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from quire.kernels.choice.selection import Choice, select
from quire.kernels.experts import Quantized
from quire.kernels.experts_spec import (
    EXPERT_MATMUL,
    QUANTIZED_EXPERT_MATMUL,
    ExpertShape,
    ExpertVariant,
    QuantizedExpertShape,
    run_experts,
)

Product = Callable[[mx.array], mx.array]
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class FewRowsGLU(SwitchGLU):
    """down(activation(up(x), gate(x))) of each row's experts."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        products = _products([self.up_proj, self.gate_proj, self.down_proj], x, indices)
        if products is None:
            given: mx.array = super().__call__(x, indices)
            return given
        up, gate, down = products
        rows = x.reshape(-1, x.shape[-1])
        output = down(self.activation(up(rows), gate(rows)))
        return output.reshape(*indices.shape, output.shape[-1])


class FewRowsMLP(SwitchMLP):
    """fc2(activation(fc1(x))) of each row's experts."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        products = _products([self.fc1, self.fc2], x, indices)
        if products is None:
            given: mx.array = super().__call__(x, indices)
            return given
        first, second = products
        rows = x.reshape(-1, x.shape[-1])
        output = second(self.activation(first(rows)))
        return output.reshape(*indices.shape, output.shape[-1])


_CLASSES = {SwitchGLU: FewRowsGLU, SwitchMLP: FewRowsMLP}


def adapt_experts(model: nn.Module) -> None:
    """Have kernels multiply few rows, wherever they can."""
    for module in model.modules():
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]


def _products(linears: Sequence[Any], x: mx.array, indices: mx.array) -> list[Product] | None:
    """The products by kernels, the last one of what the others give for each pair of a row and an
    expert; None if any of them is to be MLX's, which wants the pairs sorted."""
    experts = indices.reshape(-1).astype(mx.uint32)
    found: list[Product] = []
    for linear in linears:
        each = 1 if linear is linears[-1] else indices.shape[-1]
        product = _product(linear, x.dtype, experts, each)
        if product is None:
            return None
        found.append(product)
    return found


def _product(linear: Any, dtype: mx.Dtype, experts: mx.array, each: int) -> Product | None:
    matrix = weights_of(linear)
    if matrix is None:
        return None
    choice = _choice(linear, matrix, dtype, experts.size, each)
    if choice is None or choice.variant is ExpertVariant.MLX:
        return None
    run = partial(run_experts, choice.variant, choice.settings)
    if "bias" not in linear:
        return lambda rows: run(rows, matrix, experts, each)
    return lambda rows: run(rows, matrix, experts, each) + linear["bias"][experts]


def _choice(
    linear: Any, matrix: mx.array | Quantized, dtype: mx.Dtype, pairs: int, each: int
) -> Choice[ExpertVariant] | None:
    """None if the specifications say nothing: of types that differ, or of no rows."""
    num_experts, outputs = linear.weight.shape[:2]
    sizes = pairs, each, num_experts, outputs, linear.input_dims
    if not pairs or dtype not in _FLOATS:
        return None
    if isinstance(matrix, Quantized):
        is_fp4 = matrix.mode == "mxfp4"
        if not is_fp4 and matrix.scales.dtype != dtype:
            return None
        shape = QuantizedExpertShape(*sizes, matrix.bits, matrix.group_size, is_fp4)
        return select(QUANTIZED_EXPERT_MATMUL, shape, dtype)
    return select(EXPERT_MATMUL, ExpertShape(*sizes), dtype) if matrix.dtype == dtype else None


def weights_of(linear: nn.Module) -> mx.array | Quantized | None:
    """The matrices of all experts, if they are dense or of a mode that specifications know."""
    if type(linear) is SwitchLinear:
        dense: mx.array = linear["weight"]
        return dense
    if type(linear) is QuantizedSwitchLinear and linear.mode in ("affine", "mxfp4"):
        w, scales, biases = linear["weight"], linear["scales"], linear.get("biases")
        return Quantized(w, scales, biases, linear.group_size, linear.bits, linear.mode)
    return None
