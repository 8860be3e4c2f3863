"""Linears that read the same input are one matrix product, where the forward is mlx-lm's own.

A product of few rows, or of few outputs, costs a launch and little else: the gates of Qwen 3.5's
recurrent layers, 32 outputs each, took a ninth of a step of 16 rows. SwiGLU MLPs get a forward of
our own; elsewhere the first of the linears that is called computes for all that stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from quire.engine.model.block_ops import gated
from quire.engine.model.flat_linear import FlatQuantizedLinear
from quire.engine.model.join import can_join, join
from quire.engine.model.known_code import is_forward
from quire.kernels.fused_ops import fits_packs

# What mlx-lm's model files call linears of the same input.
_BESIDE = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("gate", "shared_expert_gate"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_PRODUCT = "self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))"
_SWIGLU = (f"return {_PRODUCT}", f"down_proj = {_PRODUCT}\nreturn down_proj")


def join_linears(model: nn.Module) -> None:
    """Join what can be joined; parameters keep their names, as views of the joined ones."""
    for module in model.modules():
        for name, child in list(module.items()):
            if isinstance(child, nn.Module) and _is_swiglu(child):
                module[name] = SwigluMlp(child)
    for module in model.modules():
        for names in _BESIDE if type(module) is not SwigluMlp else ():
            linears = [linear for name in names if _is_linear(linear := module.get(name))]
            if len(linears) > 1 and can_join(linears):
                joined = JoinedLinears(linears)
                for index, linear in enumerate(linears):
                    linear.__class__ = _PARTS[type(linear)]
                    linear.be_part(joined, index)


class JoinedLinears:
    """The product of one input with several linears, computed when the first of them is called and
    kept until the last of them has taken its part.

    Where another input comes before that ever happened, they do not read the same: from then on
    each computes alone.
    """

    def __init__(self, linears: Sequence[Any]) -> None:
        self._whole = join(linears)
        ends = [0]
        for linear in linears:
            ends.append(ends[-1] + linear.weight.shape[0])
        self._ends = ends[1:-1]
        self.is_used = True
        self._are_alike = False  # as far as is known
        self._input: mx.array | None = None
        self._parts: dict[int, mx.array] = {}

    def product(self, index: int, x: mx.array) -> mx.array | None:
        """(..., inputs) -> (..., outputs of one linear), a view; None: it is to compute alone"""
        if x is not self._input or index not in self._parts:
            if self._parts and not self._are_alike:
                self.is_used, self._input, self._parts = False, None, {}
            if not self.is_used:
                return None
            self._input = x
            self._parts = dict(enumerate(mx.split(self._whole(x), self._ends, axis=-1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._are_alike, self._input = True, None
        return part

    def whole(self, x: mx.array) -> mx.array:
        """(..., inputs) -> (..., outputs of all), one behind the other"""
        output: mx.array = self._whole(x)
        return output


def product_of_all(linears: Sequence[Any], x: mx.array) -> mx.array:
    """(..., inputs) -> (..., outputs of all), one behind the other: in one product, if these are
    what :func:`join_linears` has joined"""
    joined = {getattr(linear, "_joined", None) for linear in linears}
    if len(joined) == 1 and (one := joined.pop()) is not None:
        product: mx.array = one.whole(x)
        return product
    return mx.concatenate([linear(x) for linear in linears], axis=-1)


class _Part:
    """Mixed into a linear that is computed with others."""

    _joined: JoinedLinears
    _index: int

    def be_part(self, joined: JoinedLinears, index: int) -> None:
        object.__setattr__(self, "_joined", joined)
        object.__setattr__(self, "_index", index)


class _LinearPart(_Part, nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        part = self._joined.product(self._index, x)
        return super().__call__(x) if part is None else part


class _QuantizedLinearPart(_Part, FlatQuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        part = self._joined.product(self._index, x)
        return super().__call__(x) if part is None else part


_PARTS = {nn.Linear: _LinearPart, FlatQuantizedLinear: _QuantizedLinearPart}


class SwigluMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), with two products instead of three."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        # Kept out of the module tree, so that parameters stand there once.
        object.__setattr__(self, "_gate_up", join([self.gate_proj, self.up_proj]))

    @property
    def dim(self) -> int:
        return int(self.gate_proj.weight.shape[0])

    def __call__(self, x: mx.array) -> mx.array:
        both = self._gate_up(x)
        hidden = gated(both.reshape(-1, both.shape[-1]))
        output: mx.array = self.down_proj(hidden.reshape(*both.shape[:-1], -1))
        return output


def _is_linear(linear: object) -> bool:
    return type(linear) in _PARTS


def _is_swiglu(mlp: nn.Module) -> bool:
    """Whether its code is those lines, and its linears can be joined."""
    linears = [mlp.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(map(_is_linear, linears)) or not can_join(linears[:2]):
        return False
    weight: Any = linears[0]
    if not fits_packs(weight.weight.shape[0], weight.get("scales", weight.weight).dtype):
        return False
    called = type(mlp).__call__.__globals__.get("swiglu")
    return is_forward(mlp, "x", *_SWIGLU) and called is swiglu
