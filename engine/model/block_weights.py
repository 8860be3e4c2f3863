"""The weights of standard transformer blocks, as :mod:`quire.engine.model.standard` runs them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from quire.engine.model.flat_linear import flat_product
from quire.engine.model.join import join_alike
from quire.kernels.fused_ops import fits_packs
from quire.kernels.linear import matmul
from quire.kernels.rotate import Rotary

# Models whose code is that of `standard`, read and compared; the check at load compares logits.
_STANDARD = {f"mlx_lm.models.{name}" for name in ("llama", "qwen2", "qwen3")}
# Models of images and text whose text part is one of these; mlx-lm drops the other part.
_WRAPPERS = {f"mlx_lm.models.{name}" for name in ("mistral3", "pixtral", "qwen2_vl", "qwen3_vl")}


ROPES = (nn.RoPE, Llama3RoPE, YarnRoPE)  # that :func:`rotary_of` takes


@dataclass(frozen=True)
class LinearKind:
    """What multiplying by a linear layer takes beside its arrays."""

    has_bias: bool
    bits: int | None = None  # None: not quantised
    group_size: int = 0
    mode: str = "affine"


@dataclass(frozen=True)
class BlockKind:
    """All about a block but its arrays: blocks of one kind run the same code.

    Linears of the same input are one, or several whose outputs follow each other.
    """

    qkv: tuple[LinearKind, ...]
    output: tuple[LinearKind, ...]
    gate_up: tuple[LinearKind, ...]
    down: tuple[LinearKind, ...]
    rotary_dims: int
    traditional: bool
    rotary_factor: float
    head_norm_eps: float | None  # None: heads are not normed
    input_eps: float
    output_eps: float
    scale: float


LinearArrays = tuple[tuple[mx.array, ...], ...]


class BlockWeights(NamedTuple):
    """A block's arrays. Each linear has its weight and a transposed view of it, or weight, scales
    and biases if it is quantised, and the bias if it has one."""

    input_norm: mx.array  # (dim,)
    qkv: LinearArrays
    rotary: mx.array  # (rotary_dims / 2,) inverse frequencies
    head_norms: tuple[mx.array, ...]  # of queries and keys, (head_dim,) each; or none
    output: LinearArrays
    output_norm: mx.array  # (dim,)
    gate_up: LinearArrays
    down: LinearArrays


class Block(NamedTuple):
    kind: BlockKind
    weights: BlockWeights


def standard_part(model: nn.Module) -> nn.Module | None:
    """``model``, or what it hands all of its work to, if that is made of standard blocks only."""
    if type(model).__module__ in _WRAPPERS:
        model = model.language_model
    if type(model).__module__ not in _STANDARD:
        return None
    norm = getattr(model.model.norm, "wrapped", model.model.norm)
    blocks = model.model.layers
    return model if _fits(norm) and all(map(_is_standard_block, blocks)) else None


def read_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a standard model.

    Linears of the same input are joined where they are alike: their arrays become views of the
    joined ones, so that memory stays the same.
    """
    return [_read(block) for block in model.model.layers]


def multiply(x: mx.array, kinds: tuple[LinearKind, ...], arrays: LinearArrays) -> mx.array:
    """(T, inputs) times all of the linears, (T, outputs of all)."""
    products = [_multiply(x, *linear) for linear in zip(kinds, arrays, strict=True)]
    return products[0] if len(products) == 1 else mx.concatenate(products, axis=1)


def _is_standard_block(block: nn.Module) -> bool:
    attention, mlp = block.self_attn, block.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if not all(isinstance(x, nn.QuantizedLinear) or type(x) is nn.Linear for x in linears):
        return False
    if type(attention.rope) not in ROPES:
        return False
    norms = [block.input_layernorm, block.post_attention_layernorm]
    if not all(map(_fits, norms)) or (
        "q_norm" in attention and (attention.q_norm.eps != attention.k_norm.eps)
    ):
        return False
    return fits_packs(_num_outputs(mlp.gate_proj), norms[0].weight.dtype)


def _fits(norm: nn.Module) -> bool:
    """Whether a norm can be computed together with the addition before it."""
    return type(norm) is nn.RMSNorm and fits_packs(norm.weight.size, norm.weight.dtype)


def _read(block: nn.Module) -> Block:
    attention, mlp = block.self_attn, block.mlp
    norm, post_norm = block.input_layernorm, block.post_attention_layernorm
    rotary = rotary_of(attention.rope)
    head_norms: tuple[mx.array, ...] = ()
    if "q_norm" in attention:
        head_norms = attention.q_norm.weight, attention.k_norm.weight
    products = {
        "qkv": join_alike([attention.q_proj, attention.k_proj, attention.v_proj]),
        "output": [attention.o_proj],
        "gate_up": join_alike([mlp.gate_proj, mlp.up_proj]),
        "down": [mlp.down_proj],
    }
    weights = BlockWeights(
        input_norm=norm.weight,
        rotary=rotary.inverse_frequencies,
        head_norms=head_norms,
        output_norm=post_norm.weight,
        **{name: tuple(map(_arrays, linears)) for name, linears in products.items()},
    )
    kind = BlockKind(
        rotary_dims=rotary.dims,
        traditional=rotary.traditional,
        rotary_factor=rotary.factor,
        head_norm_eps=attention.q_norm.eps if head_norms else None,
        input_eps=norm.eps,
        output_eps=post_norm.eps,
        scale=attention.scale,
        **{name: tuple(map(_kind, linears)) for name, linears in products.items()},
    )
    return Block(kind, weights)


def _kind(linear: Any) -> LinearKind:
    if isinstance(linear, nn.QuantizedLinear):
        return LinearKind("bias" in linear, linear.bits, linear.group_size, linear.mode)
    return LinearKind("bias" in linear)


def _arrays(linear: Any) -> tuple[mx.array, ...]:
    bias = (linear.bias,) if "bias" in linear else ()
    if isinstance(linear, nn.QuantizedLinear):
        biases = (linear.biases,) if "biases" in linear else ()
        return (linear.weight, linear.scales, *biases, *bias)
    # Transposed once, and not at each call.
    transposed = linear.weight.T
    mx.eval(transposed)
    return (linear.weight, transposed, *bias)


def _multiply(x: mx.array, kind: LinearKind, arrays: tuple[mx.array, ...]) -> mx.array:
    bias = arrays[-1] if kind.has_bias else None
    if kind.bits is None:
        return matmul(x, arrays[0], arrays[1], bias)
    parts = arrays[:-1] if kind.has_bias else arrays
    product = flat_product(x, *parts, bits=kind.bits, group_size=kind.group_size, mode=kind.mode)
    return product if bias is None else product + bias


def rotary_of(rope: nn.Module) -> Rotary:
    """What a module of one of :data:`ROPES` does."""
    if type(rope) is nn.RoPE:
        steps = mx.arange(0, -(rope.dims // 2), -1, dtype=mx.float32)
        inverse = mx.exp(steps * (math.log(rope.base) / (rope.dims // 2))) * rope.scale
    else:
        inverse = 1.0 / rope._freqs.astype(mx.float32)
    mx.eval(inverse)
    factor = rope.mscale if type(rope) is YarnRoPE else 1.0
    return Rotary(inverse, rope.dims, rope.traditional, factor)


def _num_outputs(linear: Any) -> int:
    return int(linear.weight.shape[0])
