"""mlx-lm's model families at a size that builds in milliseconds, with random float32 weights.

Quire's engine is compared token for token with mlx-lm's own generation over these models, so
weights are drawn such that greedy decoding wanders over the vocabulary and the best logit leads
the second by far more than float32 rounding.
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from model_zoo_base import BASE, Config
from model_zoo_dense import DENSE
from model_zoo_experts import EXPERTS, LATENT
from model_zoo_recurrent import RECURRENT
from model_zoo_unpaged import UNPAGED_FAMILIES, UNPAGED_VARIANTS
from model_zoo_variants import VARIANTS, WRAPPERS


@dataclass(frozen=True)
class Family:
    """A file of ``mlx_lm.models`` and a small configuration for it."""

    module: str
    config: Config


FAMILIES: dict[str, Family] = {
    **{
        name: Family(name, config)
        for name, config in {**DENSE, **EXPERTS, **LATENT, **RECURRENT, **WRAPPERS}.items()
    },
    **{name: Family(module, config) for name, (module, config) in VARIANTS.items()},
}
"""Families and variants that should be served."""

_UNPAGED_BUILDERS = {
    **{name: Family(name, config) for name, (_, config) in UNPAGED_FAMILIES.items()},
    **{name: Family(module, config) for name, (_, module, config) in UNPAGED_VARIANTS.items()},
}

UNPAGED: dict[str, str] = {
    **{name: reason for name, (reason, _) in UNPAGED_FAMILIES.items()},
    **{name: reason for name, (reason, _, _) in UNPAGED_VARIANTS.items()},
}
"""Families and variants that cannot be served, and why."""

UNRUNNABLE = {"bitnet", "muse_spark", "olmo", "phi3small"}
"""Of those, what mlx-lm itself cannot run on the CPU: the first two call Metal kernels, olmo.py
adds the mask "causal" to its scores, and the forward pass of phi3small corrupts the heap."""


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a family of ``FAMILIES`` or ``UNPAGED``; equal seeds give equal weights.

    Raises ``KeyError`` for an unknown name and whatever mlx-lm raises for a model it cannot build.
    """
    family = FAMILIES.get(name) or _UNPAGED_BUILDERS[name]
    # olmo.py exits the interpreter unless this package can be imported, and then never uses it.
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    module = importlib.import_module(f"mlx_lm.models.{family.module}")
    # Some families write defaults into the dictionaries they are given.
    config = copy.deepcopy({"model_type": family.module, **BASE, **family.config})
    mx.random.seed(seed)  # biases keep the values that their layers draw
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    _randomise(model, seed)
    model.eval()
    return model


def _randomise(model: nn.Module, seed: int) -> None:
    """Redraw every floating-point parameter.

    Vectors (norm weights, biases, sinks) keep their initial value plus a little noise, so that a
    forgotten one shows. Matrices are normal with a gain above one over the square root of the fan
    in, so that the context and not the last token alone decides the next.
    """
    key = mx.random.key(seed)
    fresh = []
    for path, value in tree_flatten(model.parameters()):
        if not mx.issubdtype(value.dtype, mx.floating):
            continue
        key, draw = mx.random.split(key)
        noise = mx.random.normal(value.shape, key=draw)
        if value.ndim < 2:
            drawn = value.astype(mx.float32) + 0.1 * noise
        else:
            drawn = noise * (2.0 / value.shape[-1] ** 0.5)
        fresh.append((path, drawn))
    model.update(tree_unflatten(fresh))
    mx.eval(model.parameters())


def reference_generate(
    model: nn.Module, prompt: list[int], max_tokens: int
) -> tuple[list[int], list[float]]:
    """Generate greedily, one sequence at a time, with mlx-lm's own loop and caches.

    Returns the tokens and, for each, how far the best logit was ahead of the second best.
    """
    if model.model_type == "plamo3":
        return _generate_without_cache(model, prompt, max_tokens)
    tokens: list[int] = []
    gaps: list[float] = []
    for token, logprobs in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
        top = mx.topk(logprobs, 2)
        tokens.append(int(token))
        gaps.append((top.max() - top.min()).item())
    return tokens, gaps


def _generate_without_cache(
    model: nn.Module, prompt: list[int], max_tokens: int
) -> tuple[list[int], list[float]]:
    """For plamo3, whose sliding layers see a token more than the cache that mlx-lm gives them."""
    tokens: list[int] = []
    gaps: list[float] = []
    for _ in range(max_tokens):
        logits = model(mx.array([prompt + tokens]))[0, -1]
        top = mx.topk(logits, 2)
        tokens.append(int(mx.argmax(logits).item()))
        gaps.append((top.max() - top.min()).item())
    return tokens, gaps
