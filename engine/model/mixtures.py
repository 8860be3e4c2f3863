"""Mixtures of experts whose choice and sum are kernels, around the experts' own products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text, gpt_oss, lfm2_moe, nemotron_h, qwen3_moe, qwen3_next

from quire.engine.model.experts import KernelGLU
from quire.engine.model.known_code import code_of, is_forward, mixed
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
# How gates go on that score by sigmoids, and the blocks that have them.
_GATE = """
return group_expert_select(
    x @ self.weight.T, self.e_score_correction_bias, self.top_k, self.n_group, self.topk_group,
    self.routed_scaling_factor, self.norm_topk_prob,
)
"""
_SIGMOIDS = "mx.sigmoid(gates.astype(mx.float32))"
_GATED = """
inds, scores = self.gate(x)
y = self.switch_mlp(x, inds)
y = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
if self.config.n_shared_experts is not None:
    y = y + self.shared_experts(x)
"""
_SHARDED_GATED = f"""
if self.sharding_group is not None:
    x = sum_gradients(self.sharding_group)(x)
{_GATED}
if self.sharding_group is not None:
    y = mx.distributed.all_sum(y, group=self.sharding_group)
"""


def route(
    logits: mx.array,
    routing: Routing,
    bias: mx.array | None = None,
    factors: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """As :func:`quire.kernels.routing.top_experts`, of logits (..., experts)."""
    rows = logits.reshape(-1, logits.shape[-1])
    factored = factors is not None
    shape = RoutingShape(len(rows), rows.shape[1], routing.chosen, routing.sigmoid, factored)
    by_kernel = (
        logits.dtype in _FLOATS
        and select(TOP_EXPERTS, shape, logits.dtype).variant is RoutingVariant.FUSED
    )
    choose = top_experts if by_kernel else top_experts_by_steps
    experts, weights = choose(rows, routing, bias, factors)
    size = *logits.shape[:-1], routing.chosen
    return experts.reshape(size), weights.reshape(size)


def weigh(
    pairs: mx.array,
    weights: mx.array,
    shared: Shared | None = None,
    places: mx.array | None = None,
) -> mx.array:
    """As :func:`quire.kernels.routing.weigh_experts`, with weights (..., chosen)."""
    *lead, chosen = weights.shape
    dim = pairs.shape[-1]
    pairs, weights = pairs.reshape(-1, dim), weights.reshape(-1, chosen)
    dtypes = {pairs.dtype}
    if shared is not None:
        gates = None if shared.gates is None else shared.gates.reshape(-1, 1)
        shared = Shared(shared.rows.reshape(-1, dim), gates)
        dtypes.add(shared.rows.dtype)
    gated = shared is not None and shared.gates is not None
    shape = MixtureShape(len(weights), dim, chosen, shared is not None, gated, places is not None)
    by_kernel = (
        len(dtypes) == 1
        and pairs.dtype in _FLOATS
        and select(WEIGH_EXPERTS, shape, pairs.dtype).variant is RoutingVariant.FUSED
    )
    add = weigh_experts if by_kernel else weigh_experts_by_steps
    return add(pairs, weights, shared, places).reshape(*lead, dim)


class KernelMixture(nn.Module, ABC):
    """Mixed into a block: experts are chosen, multiply, and what they give is summed."""

    @abstractmethod
    def routed(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each row, and their weights."""

    @abstractmethod
    def shapes(self) -> list[RoutingShape | MixtureShape]:
        """The shapes of choosing and summing, for one row."""

    def products(self) -> Any:
        return self["switch_mlp"]

    def shared(self, x: mx.array) -> Shared | None:
        return None

    def __call__(self, x: mx.array) -> mx.array:
        experts, weights = self.routed(x)
        pairs, places = _pairs(self.products(), x, experts)
        return weigh(pairs, weights, self.shared(x), places)


class ScoredMixture(KernelMixture):
    """In a block whose experts are scored by a linear."""

    @abstractmethod
    def scoring(self) -> tuple[Any, Routing, mx.array | None]:
        """The linear, how experts are chosen by its scores, and their bias."""

    def routed(self, x: mx.array) -> tuple[mx.array, mx.array]:
        linear, routing, bias = self.scoring()
        return route(linear(x), routing, bias)

    def shapes(self) -> list[RoutingShape | MixtureShape]:
        linear, routing, _ = self.scoring()
        shared = "shared_expert" in self
        return [
            _routed(linear, routing),
            _weighed(self.products(), routing.chosen, shared, gated=shared),
        ]


class QwenMixture(ScoredMixture):
    """In the blocks of Qwen 3 and its kin."""

    top_k: int
    norm_topk_prob: bool

    def scoring(self) -> tuple[Any, Routing, mx.array | None]:
        return self["gate"], Routing(self.top_k, self.norm_topk_prob), None

    def shared(self, x: mx.array) -> Shared | None:
        if "shared_expert" not in self:
            return None
        return Shared(self["shared_expert"](x), self["shared_expert_gate"](x))


class LfmMixture(ScoredMixture):
    """In the blocks of LFM2: scores are sigmoids."""

    top_k: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    def scoring(self) -> tuple[Any, Routing, mx.array | None]:
        scale = float(self.routed_scaling_factor)
        routing = Routing(self.top_k, self.norm_topk_prob, True, scale, epsilon=1e-6)
        return self["gate"], routing, self.get("expert_bias")


class GptOssMixture(ScoredMixture):
    num_experts_per_tok: int

    def scoring(self) -> tuple[Any, Routing, mx.array | None]:
        return self["router"], Routing(self.num_experts_per_tok, normalised=True), None

    def products(self) -> Any:
        return self["experts"]


class DeepseekMixture(KernelMixture):
    """In the blocks of DeepSeek V3 and its kin, whose gate is a module of its own."""

    def routed(self, x: mx.array) -> tuple[mx.array, mx.array]:
        routed: tuple[mx.array, mx.array] = self["gate"](x)
        return routed

    def shared(self, x: mx.array) -> Shared | None:
        return Shared(self["shared_experts"](x)) if "shared_experts" in self else None

    def shapes(self) -> list[RoutingShape | MixtureShape]:
        return [_weighed(self.products(), self["gate"].top_k, "shared_experts" in self)]


class KernelGate(nn.Module):
    """Mixed into a gate that scores by sigmoids, without groups of experts."""

    weight: mx.array
    e_score_correction_bias: mx.array
    top_k: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def routing(self) -> Routing:
        """How experts are chosen; a single weight is not normalised, as mlx-lm does not."""
        normalised = bool(self.norm_topk_prob) and self.top_k > 1
        scale = float(self.routed_scaling_factor)
        return Routing(self.top_k, normalised, sigmoid=True, scale=scale)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return route(x @ self.weight.T, self.routing, self.e_score_correction_bias)


class GemmaRouter(gemma4_text.Router):
    @property
    def routing(self) -> Routing:
        return Routing(self.config.top_k_experts, normalised=True)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        normed = mx.fast.rms_norm(x, self.scale * self._root_size, self.eps)
        return route(self.proj(normed), self.routing, factors=self.per_expert_scale)


class GemmaExperts(gemma4_text.Experts):
    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        pairs, places = _pairs(self.switch_glu, x, experts)
        return weigh(pairs, weights, places=places)


_MIXTURES: dict[Any, Any] = {
    qwen3_moe.Qwen3MoeSparseMoeBlock: QwenMixture,
    qwen3_next.Qwen3NextSparseMoeBlock: QwenMixture,
    lfm2_moe.Lfm2MoeSparseMoeBlock: LfmMixture,
    gpt_oss.MLPBlock: GptOssMixture,
}


def adapt_mixtures(model: nn.Module) -> None:
    """Have kernels choose experts and sum what they give, in blocks that are known by their code or
    as classes of the versions of mlx-lm that we take."""
    for module in model.modules():
        kind: Any = type(module)
        if kind in _MIXTURES and getattr(module, "sharding_group", None) is None:
            module.__class__ = mixed(_MIXTURES[kind], kind)
        elif _is_gated(module):
            module.__class__ = mixed(DeepseekMixture, kind)
        elif _is_gate(module) and module.n_group == 1:
            module.__class__ = mixed(KernelGate, kind)
        elif kind is gemma4_text.Router:
            module.__class__ = GemmaRouter
        elif kind is gemma4_text.Experts:
            module.__class__ = GemmaExperts


def _pairs(products: Any, x: mx.array, experts: mx.array) -> tuple[mx.array, mx.array | None]:
    """What ``products`` give, in whichever order it comes, and where each is."""
    if isinstance(products, KernelGLU):
        return products.pairs(x, experts)
    return products(x, experts), None


def mixture_shapes(model: nn.Module) -> Iterator[RoutingShape | MixtureShape]:
    """Of one row, of all that :func:`adapt_mixtures` has adapted."""
    chosen = 0
    for _, module in model.named_modules():
        if isinstance(module, KernelMixture):
            yield from module.shapes()
        elif isinstance(module, KernelGate):
            yield _routed(module, module.routing)
        elif isinstance(module, GemmaRouter):
            chosen = module.routing.chosen
            yield _routed(module.proj, module.routing)._replace(factored=True)
    for _, module in model.named_modules():
        if isinstance(module, GemmaExperts):
            yield _weighed(module.switch_glu, chosen, shared=False)


def _routed(linear: Any, routing: Routing) -> RoutingShape:
    return RoutingShape(1, linear.weight.shape[0], routing.chosen, routing.sigmoid)


def _weighed(products: Any, chosen: int, shared: bool, *, gated: bool = False) -> MixtureShape:
    out = products["down_proj"] if "down_proj" in products else products["fc2"]
    return MixtureShape(1, out.weight.shape[1], chosen, shared, gated)


def _is_gate(module: nn.Module) -> bool:
    if not is_forward(module, "x", _GATE):
        return False
    return _SIGMOIDS in code_of(type(module).__call__.__globals__["group_expert_select"])


def _is_gated(module: Any) -> bool:
    if getattr(module, "sharding_group", None) is not None:
        return False
    if type(module) is nemotron_h.NemotronHMoE:
        return module.moe_latent_size is None
    return is_forward(module, "x", *(f"{code}\nreturn y" for code in (_GATED, _SHARDED_GATED)))
