"""Standard transformer blocks with fewer operations.

Most models are made of one block: RMS norm, projections of queries, keys and values, rotary
embeddings, attention, projection, RMS norm, SwiGLU. mlx-lm's own takes about 18 kernels a layer.
Over pages on a GPU a loaded block of a known class is given another class that takes 9 or 10:
projections of the same input are one matrix product, a residual is added by the norm after it, and
norms of heads, rotary embeddings and page writes are one kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE

from quire.engine.paging import PagedLayer, PendingSum, StepContext, WindowMask
from quire.kernels.block_ops import add_rms_norm, fits_packs, swiglu_joined
from quire.kernels.rotate import HeadNorms, Rotary

# Blocks whose code is the one above, read and compared; the load-time check compares their logits.
_STANDARD = {f"mlx_lm.models.{name}.TransformerBlock" for name in ("llama", "qwen2", "qwen3")}


class _Product:
    """A linear layer without the operation that transposes its weight, each time it is called."""

    def __init__(self, linear: Any) -> None:
        self._linear = linear
        self._weight: mx.array | None = None
        if type(linear) is nn.Linear:
            self._weight = linear.weight.T
            mx.eval(self._weight)
            self._bias = linear.get("bias")

    def __call__(self, x: mx.array) -> mx.array:
        if self._weight is None:
            output: mx.array = self._linear(x)
            return output
        if self._bias is None:
            return x @ self._weight
        return mx.addmm(self._bias, x, self._weight)


@dataclass(frozen=True)
class _Fused:
    """What a fused block computes with, beside its norms."""

    qkv: _Product
    output: _Product
    gate_up: _Product
    down: _Product
    rotary: Rotary
    head_norms: HeadNorms | None


class FusedBlock(nn.Module):
    """Mixed into the class of a loaded block; takes over where its cache is pages in place."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if type(cache) is not PagedLayer or not cache.in_place:
            output: mx.array = super().__call__(x, mask, cache)
            return output
        assert mask is None or type(mask) is WindowMask, "a mask that pages cannot apply"
        window = None if mask is None else mask.size
        residual, normed = add_and_norm(cache.context, x, self.input_layernorm)
        fused: _Fused = self.fused
        attended = cache.attend_to_projected(
            fused.qkv(normed), fused.rotary, fused.head_norms, self.self_attn.scale, window
        )
        projected = fused.output(attended.reshape(residual.shape[0], -1))
        norm = self.post_attention_layernorm
        residual, normed = add_rms_norm(residual, projected, norm.weight, norm.eps)
        projected = fused.down(swiglu_joined(fused.gate_up(normed)))
        # Added here for whoever asks; the next block adds the two itself, and its norm with them.
        output = (residual + projected).reshape(x.shape)
        cache.context.pending_sum = PendingSum(output, residual, projected)
        return output


def add_and_norm(context: StepContext, x: mx.array, norm: nn.Module) -> tuple[mx.array, mx.array]:
    """``x`` as (T, dim) rows, and their norm.

    If ``x`` is what a fused block has just returned, its last addition is made here.
    """
    pending, context.pending_sum = context.pending_sum, None
    if pending is not None and pending.output is x:
        return add_rms_norm(pending.residual, pending.delta, norm.weight, norm.eps)
    flat = x.reshape(-1, x.shape[-1])
    return flat, norm(flat)


def fuse_blocks(model: nn.Module) -> int:
    """Fuse what can be fused; returns the number of blocks. Memory stays the same."""
    fused = 0
    for block in model.modules():
        name = f"{type(block).__module__}.{type(block).__name__}"
        if name in _STANDARD and _fuse(block):
            block.__class__ = type(f"Fused{type(block).__name__}", (FusedBlock, type(block)), {})
            fused += 1
    return fused


def can_fuse_norm(norm: nn.Module) -> bool:
    """Whether :func:`add_and_norm` can compute it."""
    return type(norm) is nn.RMSNorm and fits_packs(norm.weight.size, norm.weight.dtype)


def _fuse(block: nn.Module) -> bool:
    attention, mlp = block.self_attn, block.mlp
    rotary = _rotary(attention.rope)
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_proj, mlp.up_proj]
    if rotary is None or not (_can_join(qkv) and _can_join(gate_up)):
        return False
    norm = block.input_layernorm.weight
    if not fits_packs(_num_outputs(mlp.gate_proj), norm.dtype):
        return False
    if not all(can_fuse_norm(n) for n in (block.input_layernorm, block.post_attention_layernorm)):
        return False
    norms = None
    if "q_norm" in attention:
        q_norm, k_norm = attention.q_norm, attention.k_norm
        if q_norm.eps != k_norm.eps:
            return False
        norms = HeadNorms(q_norm.weight, k_norm.weight, q_norm.eps)
    fused = _Fused(
        qkv=_Product(_join(qkv)),
        output=_Product(attention.o_proj),
        gate_up=_Product(_join(gate_up)),
        down=_Product(mlp.down_proj),
        rotary=rotary,
        head_norms=norms,
    )
    # A plain attribute: none of it is a parameter of its own.
    object.__setattr__(block, "fused", fused)
    return True


def _rotary(rope: nn.Module) -> Rotary | None:
    if type(rope) is nn.RoPE:
        steps = mx.arange(0, -(rope.dims // 2), -1, dtype=mx.float32)
        inverse = mx.exp(steps * (math.log(rope.base) / (rope.dims // 2))) * rope.scale
    elif type(rope) is Llama3RoPE:
        inverse = 1.0 / rope._freqs.astype(mx.float32)
    else:
        return None
    mx.eval(inverse)
    return Rotary(inverse, rope.dims, rope.traditional)


def _can_join(linears: list[Any]) -> bool:
    first = linears[0]
    if any(type(linear) is not type(first) or set(linear) != set(first) for linear in linears):
        return False
    if isinstance(first, nn.QuantizedLinear):
        return all(
            (x.bits, x.group_size, x.mode) == (first.bits, first.group_size, first.mode)
            for x in linears
        )
    return type(first) is nn.Linear


def _num_outputs(linear: Any) -> int:
    return int(linear.weight.shape[0])


def _join(linears: list[Any]) -> Any:
    """One linear with the outputs of all; their arrays become views of its arrays."""
    joined: Any = nn.Module.__new__(type(linears[0]))
    nn.Module.__init__(joined)
    for name in ("bits", "group_size", "mode"):
        if hasattr(linears[0], name):
            setattr(joined, name, getattr(linears[0], name))
    for name in linears[0]:
        whole = mx.concatenate([linear[name] for linear in linears])
        mx.eval(whole)
        joined[name] = whole
        ends = [0]
        for linear in linears:
            ends.append(ends[-1] + linear[name].shape[0])
            linear[name] = whole[ends[-2] : ends[-1]]
            mx.eval(linear[name])
    return joined
