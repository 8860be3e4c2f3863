"""Mixtures of experts whose choice and sum are kernels, around the experts' own products."""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from quire.kernels.choice.selection import select
from quire.kernels.routing import (
    Routing,
    Shared,
    top_experts,
    top_experts_by_steps,
    weigh_experts,
    weigh_experts_by_steps,
)
from quire.kernels.routing_spec import (
    TOP_EXPERTS,
    WEIGH_EXPERTS,
    MixtureShape,
    RoutingShape,
    RoutingVariant,
)

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# What mlx-lm's blocks of Qwen 3 and its kin are called, and where they are.
_BLOCKS = (
    ("mlx_lm.models.qwen3_moe", "Qwen3MoeSparseMoeBlock"),
    ("mlx_lm.models.qwen3_next", "Qwen3NextSparseMoeBlock"),
)
# How those gates go on that score by sigmoids.
_GATE = (
    "return group_expert_select( x @ self.weight.T, self.e_score_correction_bias, self.top_k, "
    "self.n_group, self.topk_group, self.routed_scaling_factor, self.norm_topk_prob, )"
)


def route(
    logits: mx.array, routing: Routing, bias: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """As :func:`quire.kernels.routing.top_experts`, of logits (..., experts)."""
    rows = logits.reshape(-1, logits.shape[-1])
    shape = RoutingShape(len(rows), rows.shape[1], routing.chosen, routing.sigmoid)
    by_kernel = (
        len(rows) > 0
        and logits.dtype in _FLOATS
        and select(TOP_EXPERTS, shape, logits.dtype).variant is RoutingVariant.FUSED
    )
    choose = top_experts if by_kernel else top_experts_by_steps
    experts, weights = choose(rows, routing, bias)
    size = *logits.shape[:-1], routing.chosen
    return experts.reshape(size), weights.reshape(size)


def weigh(pairs: mx.array, weights: mx.array, shared: Shared | None = None) -> mx.array:
    """As :func:`quire.kernels.routing.weigh_experts`, of pairs (..., chosen, dim)."""
    *lead, chosen, dim = pairs.shape
    pairs, weights = pairs.reshape(-1, chosen, dim), weights.reshape(-1, chosen)
    dtypes = {pairs.dtype}
    if shared is not None:
        shared = Shared(shared.rows.reshape(-1, dim), shared.gates.reshape(-1, 1))
        dtypes.add(shared.rows.dtype)
    shape = MixtureShape(len(pairs), dim, chosen, shared is not None)
    by_kernel = (
        len(pairs) > 0
        and len(dtypes) == 1
        and pairs.dtype in _FLOATS
        and select(WEIGH_EXPERTS, shape, pairs.dtype).variant is RoutingVariant.FUSED
    )
    add = weigh_experts if by_kernel else weigh_experts_by_steps
    return add(pairs, weights, shared).reshape(*lead, dim)


class KernelMixture(nn.Module):
    """Mixed into a block that weighs its experts by a softmax."""

    gate: Any
    switch_mlp: Any
    top_k: int
    norm_topk_prob: bool

    def __call__(self, x: mx.array) -> mx.array:
        experts, weights = route(self.gate(x), Routing(self.top_k, self.norm_topk_prob))
        pairs = self.switch_mlp(x, experts)
        shared = None
        if "shared_expert" in self:
            shared = Shared(self["shared_expert"](x), self["shared_expert_gate"](x))
        return weigh(pairs, weights, shared)


class KernelGate(nn.Module):
    """Mixed into a gate that scores by sigmoids, without groups of experts."""

    weight: mx.array
    e_score_correction_bias: mx.array
    top_k: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return route(x @ self.weight.T, routing_of(self), self.e_score_correction_bias)


def routing_of(gate: Any) -> Routing:
    """Of a :class:`KernelGate`; a sum of one weight is not divided by."""
    normalised = bool(gate.norm_topk_prob) and gate.top_k > 1
    return Routing(gate.top_k, normalised, sigmoid=True, scale=float(gate.routed_scaling_factor))


def adapt_mixtures(model: nn.Module) -> None:
    """Have kernels choose experts and sum what they give, in blocks whose code is known."""
    blocks = [getattr(sys.modules.get(module), name, None) for module, name in _BLOCKS]
    for module in model.modules():
        kind: Any = type(module)
        if kind in blocks and module.sharding_group is None:
            module.__class__ = _mixed(KernelMixture, kind)
        elif _is_gate(module) and module.n_group == 1:
            module.__class__ = _mixed(KernelGate, kind)


@cache
def _mixed(mixin: Any, kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (mixin, kind), {})


def _is_gate(module: nn.Module) -> bool:
    """Whether its code is those lines."""
    if "e_score_correction_bias" not in module:
        return False
    _, _, body = inspect.getsource(type(module).__call__).partition("\n")
    return " ".join(body.split()) == _GATE
