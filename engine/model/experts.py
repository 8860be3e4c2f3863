"""Mixtures of experts by kernels of our own where specifications choose them; else mlx-lm's."""

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
from quire.kernels.experts import Pairs, Quantized
from quire.kernels.experts_spec import (
    EXPERT_MATMUL,
    QUANTIZED_EXPERT_MATMUL,
    ExpertShape,
    ExpertVariant,
    QuantizedExpertShape,
    QuantizedExpertVariant,
    pairs_for,
    run_experts,
)

Product = Callable[[mx.array], mx.array]
ExpertChoice = Choice[ExpertVariant] | Choice[QuantizedExpertVariant]
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
_MLX = (ExpertVariant.MLX, QuantizedExpertVariant.MLX)


class KernelGLU(SwitchGLU):
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


class KernelMLP(SwitchMLP):
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


_CLASSES = {SwitchGLU: KernelGLU, SwitchMLP: KernelMLP}


def adapt_experts(model: nn.Module) -> None:
    """Have kernels multiply wherever they are chosen."""
    for module in model.modules():
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]


def _products(linears: Sequence[Any], x: mx.array, indices: mx.array) -> list[Product] | None:
    """The products by kernels, the last one of what the others give for each pair of a row and an
    expert; None if any of them is to be MLX's, or they do not go alike."""
    each = [indices.shape[-1]] * (len(linears) - 1) + [1]
    choices: list[ExpertChoice] = []
    for linear, n in zip(linears, each, strict=True):
        choice = _choice(linear, x.dtype, indices.size, n)
        if choice is None or choice.variant in _MLX:
            return None
        choices.append(choice)
    if len({choice.variant for choice in choices}) > 1:
        return None
    num_experts = linears[0].weight.shape[0]
    pairs = pairs_for(choices[0].variant, indices.reshape(-1).astype(mx.uint32), num_experts)
    return [
        partial(_product, linear, partial(run_experts, choice.variant, choice.settings), pairs, n)
        for linear, choice, n in zip(linears, choices, each, strict=True)
    ]


def _product(
    linear: Any, run: Callable[..., mx.array], pairs: Pairs, each: int, rows: mx.array
) -> mx.array:
    output = run(rows, weights_of(linear), pairs, each)
    return output + linear["bias"][pairs.experts] if "bias" in linear else output


def _choice(linear: Any, dtype: mx.Dtype, pairs: int, each: int) -> ExpertChoice | None:
    """None if the specifications say nothing: of types that differ, or of no rows."""
    matrix = weights_of(linear)
    if matrix is None or not pairs or dtype not in _FLOATS:
        return None
    num_experts, outputs = linear.weight.shape[:2]
    sizes = pairs, each, num_experts, outputs, linear.input_dims
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
