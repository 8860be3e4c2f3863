"""Blocks whose sums and the norms behind them are one kernel each, in models whose attention and
MLPs are mlx-lm's own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from quire.engine.model.block_ops import add_norm
from quire.engine.model.known_code import is_forward, mixed

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
    """
    residual = x
    x = self.input_layernorm(x)
    x = self.self_attn(x, mask, cache)
    x = residual + x
    residual = x
    x = self.post_attention_layernorm(x)
    x = self.mlp(x)
    x = residual + x
    return x
    """,
)


class PreNormBlock(nn.Module):
    """Mixed into such a block."""

    _next_norm: SumNorm | None = None  # of the block behind

    @property
    def dim(self) -> int:
        return int(self["post_attention_layernorm"].weight.size)

    def lead_to(self, block: PreNormBlock) -> None:
        """``block`` is given this one's output."""
        norm = block["input_layernorm"]
        if type(norm) is nn.RMSNorm:
            norm.__class__ = SumNorm
        if type(norm) is SumNorm:
            # Kept out of the module tree, so that parameters stand there once.
            object.__setattr__(self, "_next_norm", norm)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        mix = self["linear_attn"] if "linear_attn" in self else self["self_attn"]
        norm = self["post_attention_layernorm"]
        mixed = mix(self["input_layernorm"](x), mask, cache)
        total, normed = _add_norm(x, mixed, norm)
        delta = self["mlp"](normed)
        output: mx.array = (
            total + delta if self._next_norm is None else self._next_norm.add(total, delta)
        )
        return output


class SumNorm(nn.RMSNorm):
    """A norm that is computed together with the sum which it will be given.

    Where it is given something else, :meth:`add` only adds from then on.
    """

    _sum: mx.array | None = None
    _normed: mx.array | None = None
    _is_given_sums = True

    def add(self, x: mx.array, delta: mx.array) -> mx.array:
        """The sum of two (..., dim) arrays."""
        if self._sum is not None:
            self._keep(None, None)
            object.__setattr__(self, "_is_given_sums", False)
        if not self._is_given_sums:
            return x + delta
        total, normed = _add_norm(x, delta, self)
        self._keep(total, normed)
        return total

    def __call__(self, x: mx.array) -> mx.array:
        if x is not self._sum:
            plain: mx.array = super().__call__(x)
            return plain
        normed = self._normed
        self._keep(None, None)
        assert normed is not None
        return normed

    def _keep(self, total: mx.array | None, normed: mx.array | None) -> None:
        object.__setattr__(self, "_sum", total)
        object.__setattr__(self, "_normed", normed)


def adapt_blocks(model: nn.Module) -> None:
    """Have blocks whose code is known add and norm at once."""
    for module in model.modules():
        if not is_forward(module, "x, mask, cache", *_BLOCKS):
            continue
        if type(module["post_attention_layernorm"]) is nn.RMSNorm:
            kind: Any = type(module)
            module.__class__ = mixed(PreNormBlock, kind)
    for block, behind in pairwise(model.layers):
        if isinstance(block, PreNormBlock) and isinstance(behind, PreNormBlock):
            block.lead_to(behind)


def _add_norm(x: mx.array, delta: mx.array, norm: Any) -> tuple[mx.array, mx.array]:
    """The sum of two (..., dim) arrays, and its norm."""
    dim = x.shape[-1]
    total, normed = add_norm(x.reshape(-1, dim), delta.reshape(-1, dim), norm.weight, norm.eps)
    return total.reshape(x.shape), normed.reshape(x.shape)
