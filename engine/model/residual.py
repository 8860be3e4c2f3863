"""Blocks whose first sum and the norm behind it are one kernel, in models whose attention and MLPs
are mlx-lm's own."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from quire.engine.model.block_ops import add_norm
from quire.engine.model.known_code import is_forward

# How most of mlx-lm's blocks go on.
_BLOCKS = (
    """
    r = self.self_attn(self.input_layernorm(x), mask, cache)
    h = x + r
    r = self.mlp(self.post_attention_layernorm(h))
    out = h + r
    return out
    """,
    """
    r = self.self_attn(self.input_layernorm(x), mask, cache)
    h = x + r
    r = self.mlp(self.post_attention_layernorm(h))
    return h + r
    """,
    """
    if self.is_linear:
        r = self.linear_attn(self.input_layernorm(x), mask, cache)
    else:
        r = self.self_attn(self.input_layernorm(x), mask, cache)
    h = x + r
    out = h + self.mlp(self.post_attention_layernorm(h))
    return out
    """,
)


class PreNormBlock(nn.Module):
    """Mixed into such a block."""

    @property
    def dim(self) -> int:
        return int(self["post_attention_layernorm"].weight.size)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        mix = self["linear_attn"] if "linear_attn" in self else self["self_attn"]
        norm = self["post_attention_layernorm"]
        rows, delta = (
            array.reshape(-1, x.shape[-1])
            for array in (x, mix(self["input_layernorm"](x), mask, cache))
        )
        total, normed = add_norm(rows, delta, norm.weight, norm.eps)
        output: mx.array = total.reshape(x.shape) + self["mlp"](normed.reshape(x.shape))
        return output


def adapt_blocks(model: nn.Module) -> None:
    """Have blocks whose code is known add and norm at once."""
    for module in model.modules():
        if not is_forward(module, "x, mask, cache", *_BLOCKS):
            continue
        if type(module["post_attention_layernorm"]) is nn.RMSNorm:
            kind: Any = type(module)
            module.__class__ = _adapted(kind)


@cache
def _adapted(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (PreNormBlock, kind), {})
