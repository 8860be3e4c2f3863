"""Mixtures of experts by kernels of our own where specifications choose them; else mlx-lm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwiGLU,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from quire.engine.model.block_ops import gated
from quire.engine.model.join import can_join, join
from quire.kernels.choice.selection import Choice, select
from quire.kernels.experts import SORTED_PAIRS, Pairs, Quantized
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
    """down(activation(up(x), gate(x))) of each row's experts, gate and up as one product."""

    @property
    def dim(self) -> int:
        return int(self.gate_up_proj.weight.shape[1]) // 2

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        output, places = self.pairs(x, indices)
        if places is not None:
            output = output[places]
        return output.reshape(*indices.shape, -1)

    def pairs(self, x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array | None]:
        """(P, dim), the experts' output for each pair of a row and an expert, and which row of it
        belongs to which pair; None: they are in the order of ``indices``."""
        products = _products([self.gate_up_proj, self.down_proj], x, indices)
        if products is None:
            return self._by_mlx(x, indices)
        gate_up, down = products
        return down(self._activated(gate_up(x.reshape(-1, x.shape[-1])))), None

    def join(self) -> None:
        """Have one matrix for gate and up, instead of theirs."""
        self.gate_up_proj = join([self.gate_proj, self.up_proj], axis=1)
        del self.gate_proj, self.up_proj
        mx.clear_cache()  # they are most of the model, and of no size that is wanted again

    def _activated(self, both: mx.array) -> mx.array:
        if type(self.activation) is SwiGLU:
            rows = gated(both.reshape(-1, both.shape[-1]))
            return rows.reshape(*both.shape[:-1], rows.shape[-1])
        gate, up = mx.split(both, 2, axis=-1)
        hidden: mx.array = self.activation(up, gate)
        return hidden

    def _by_mlx(self, x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array | None]:
        """As mlx-lm does it: where pairs are many, they are sorted by expert for all products."""
        rows, experts, order = mx.expand_dims(x, (-2, -3)), indices, None
        if indices.size >= SORTED_PAIRS:
            order = mx.argsort(indices.flatten())
            rows = rows.flatten(0, -3)[order // indices.shape[-1]]
            experts = indices.flatten()[order]
        sort = {"sorted_indices": order is not None}
        both = self.gate_up_proj(rows, experts, **sort)
        output: mx.array = self.down_proj(self._activated(both), experts, **sort)
        return output.reshape(-1, output.shape[-1]), None if order is None else mx.argsort(order)


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


def adapt_experts(model: nn.Module) -> None:
    """Have kernels multiply wherever they are chosen. A layer whose gates and ups are packed
    differently stays as it is: it cannot have both in one product."""
    for module in model.modules():
        if type(module) is SwitchMLP:
            module.__class__ = KernelMLP
        elif type(module) is SwitchGLU and _can_join([module.gate_proj, module.up_proj]):
            module.__class__ = KernelGLU
            module.join()


def _can_join(linears: Sequence[Any]) -> bool:
    return type(linears[0]) in (SwitchLinear, QuantizedSwitchLinear) and can_join(linears)


def _products(linears: Sequence[Any], x: mx.array, indices: mx.array) -> list[Product] | None:
    """Each of ``linears`` as a product by kernels; None if MLX is to compute any of them, or if
    their kernels differ, which may want the pairs of a row and an expert in different orders.

    Args:
        linears: the layers of the experts, in the order in which rows pass through them. The last
            one takes a row for each pair; those before take the rows of ``x``.
        x: (..., dim)
        indices: (..., chosen), the experts of each row.
    """
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
