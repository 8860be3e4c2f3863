"""Attention layers of mlx-lm's that kernels take over behind their projections: one launch for
decodes, where the layers' own code takes six."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from quire.engine.attention.rotated import Rotation
from quire.engine.model.block_weights import ROPES, rotary_of
from quire.engine.model.joined import product_of_all
from quire.engine.model.known_code import code_of, known, mixed
from quire.engine.model.seam import PagedLayer
from quire.kernels.rotate import HeadNorms, Rotary

_LINEARS = """
B, L, D = x.shape
queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
"""
_HEADS = """
queries = queries.reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
keys = keys.reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
values = values.reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
"""
_NORMED_HEADS = """
queries = self.q_norm(queries.reshape(B, L, self.n_heads, -1)).transpose(0, 2, 1, 3)
keys = self.k_norm(keys.reshape(B, L, self.n_kv_heads, -1)).transpose(0, 2, 1, 3)
values = values.reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
"""
_HEADS_NORMED_OR_NOT = """
queries = queries.reshape(B, L, self.n_heads, -1)
keys = keys.reshape(B, L, self.n_kv_heads, -1)
if self.use_qk_norm:
    queries = self.q_norm(queries)
    keys = self.k_norm(keys)
queries = queries.transpose(0, 2, 1, 3)
keys = keys.transpose(0, 2, 1, 3)
values = values.reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
"""
_GATED_HEADS = """
B, L, D = x.shape
q_proj_output = self.q_proj(x)
queries, gate = mx.split(q_proj_output.reshape(B, L, self.n_heads, -1), 2, axis=-1)
gate = gate.reshape(B, L, -1)
keys, values = self.k_proj(x), self.v_proj(x)
queries = self.q_norm(queries).transpose(0, 2, 1, 3)
keys = self.k_norm(keys.reshape(B, L, self.n_kv_heads, -1)).transpose(0, 2, 1, 3)
values = values.reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
"""
_ATTENTION = """
if cache is not None:
    queries = self.rope(queries, offset=cache.offset)
    keys = self.rope(keys, offset=cache.offset)
    keys, values = cache.update_and_fetch(keys, values)
else:
    queries = self.rope(queries)
    keys = self.rope(keys)
output = scaled_dot_product_attention(
    queries, keys, values, cache=cache, scale=self.scale, mask=mask
)
output = output.transpose(0, 2, 1, 3).reshape(B, L, -1)
"""
_OUTPUT = "return self.o_proj(output)"
_GATED_OUTPUT = "return self.o_proj(output * mx.sigmoid(gate))"
# With sinks.
_GPT_OSS = """
B, L, _ = x.shape
D = self.head_dim
q = self.q_proj(x).reshape(B, L, -1, D).swapaxes(1, 2)
k = self.k_proj(x).reshape(B, L, -1, D).swapaxes(1, 2)
v = self.v_proj(x).reshape(B, L, -1, D).swapaxes(1, 2)
if cache is not None:
    q = self.rope(q, offset=cache.offset)
    k = self.rope(k, offset=cache.offset)
    k, v = cache.update_and_fetch(k, v)
else:
    q = self.rope(q)
    k = self.rope(k)
v_hat = scaled_dot_product_attention(
    q, k, v, cache, self.sm_scale, mask=mask, sinks=self.sinks
)
return self.o_proj(v_hat.swapaxes(1, 2).reshape(B, L, -1))
"""
_UNGATED = (
    _GPT_OSS,
    _LINEARS + _HEADS + _ATTENTION + _OUTPUT,
    _LINEARS + _NORMED_HEADS + _ATTENTION + _OUTPUT,
    _LINEARS + _HEADS_NORMED_OR_NOT + _ATTENTION + _OUTPUT,
)
_GATED = (_GATED_HEADS + _ATTENTION + _GATED_OUTPUT,)
# What some files write in place of what stands above.
_OTHER_NAMES = {
    "num_attention_heads": "n_heads",
    "num_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "q_layernorm": "q_norm",
    "k_layernorm": "k_norm",
    "out_proj": "o_proj",
    "mask=mask, scale=self.scale": "scale=self.scale, mask=mask",
}


class RotatedAttention(nn.Module):
    """Mixed into such a layer; over anything but pages of kernels it stays what it is.

    Attributes:
        is_gated: whether each head of queries has a gate behind it, by which what it attends to is
            multiplied.
    """

    rotary: Rotary
    is_gated: bool

    @property
    def score_scale(self) -> float:
        return float(self.sm_scale if hasattr(self, "sm_scale") else self.scale)

    @property
    def norms(self) -> HeadNorms | None:
        norms = _norms(self)
        return None if not norms else HeadNorms(norms[0].weight, norms[1].weight, norms[0].eps)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if not isinstance(cache, PagedLayer) or cache.rotated is None:
            output: mx.array = super().__call__(x, mask, cache)
            return output
        linears = [self[name] for name in ("q_proj", "k_proj", "v_proj")]
        qkv = product_of_all(linears, x).reshape(len(x), -1)
        rotation = Rotation(self.rotary, self.norms, self.is_gated)
        sinks = self.get("sinks")
        attended = cache.rotate_and_attend(qkv, rotation, self.score_scale, sinks)
        if self.is_gated:
            heads, dim = cache.rotated.heads, cache.rotated.key_dim
            both = qkv[:, : 2 * heads * dim].reshape(-1, heads, 2, dim)
            gated = attended.reshape(-1, heads, dim) * mx.sigmoid(both[:, :, 1])
            attended = gated.reshape(len(x), -1)
        output = self["o_proj" if "o_proj" in self else "out_proj"](attended[:, None])
        return output


def adapt_attention(model: nn.Module) -> None:
    """Have kernels take over in layers whose code is known."""
    for module in model.modules():
        is_gated = _is_one_of(module, _GATED)
        if not is_gated and not _is_one_of(module, _UNGATED):
            continue
        norms = _norms(module)
        if any(type(norm) is not nn.RMSNorm or norm.eps != norms[0].eps for norm in norms):
            continue
        if type(module.rope) in ROPES:
            for name, value in (("rotary", rotary_of(module.rope)), ("is_gated", is_gated)):
                object.__setattr__(module, name, value)  # kept out of the parameters
            kind: Any = type(module)
            module.__class__ = mixed(RotatedAttention, kind)


def _is_one_of(module: nn.Module, codes: tuple[str, ...]) -> bool:
    kind: Any = type(module)
    return _usual_code(kind) in {known("x, mask, cache", code) for code in codes}


@cache
def _usual_code(kind: Any) -> str:
    code = code_of(kind.__call__)
    for other, usual in _OTHER_NAMES.items():
        code = code.replace(other, usual)
    return code


def _norms(module: nn.Module) -> list[Any]:
    """Of heads of queries and keys, if they are normed."""
    names = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
    return [module[name] for name in names if name in module]
