"""Standard transformer blocks with fewer operations.

Most models are made of one block: RMS norm, projections of queries, keys and values, rotary
embeddings, attention, projection, RMS norm, SwiGLU. mlx-lm's own takes about 18 kernels a layer.
Over pages on a GPU a loaded block of a known class is given another class that takes 8 to 10:
projections of the same input are one matrix product, a residual is added by the norm after it, and
norms of heads, rotary embeddings and page writes are one kernel, which attends too if it can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE

from quire.engine.model.flat_linear import flat_product
from quire.engine.model.seam import PagedLayer, PendingSum, StepContext, StepRows, WindowMask
from quire.kernels.attention import attend
from quire.kernels.block_ops import add_rms_norm, fits_packs, swiglu_joined
from quire.kernels.choice.selection import select
from quire.kernels.linear import matmul
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_decode import rotate_and_decode
from quire.kernels.ragged import RaggedBatch
from quire.kernels.rotate import HeadNorms, Rotary, rotate_and_write
from quire.kernels.rotate_and_decode_spec import (
    ROTATE_AND_DECODE,
    RotatingDecodeShape,
    RotatingDecodeVariant,
)

# Blocks whose code is the one above, read and compared; the load-time check compares their logits.
_STANDARD = {f"mlx_lm.models.{name}.TransformerBlock" for name in ("llama", "qwen2", "qwen3")}


@dataclass(frozen=True)
class LinearKind:
    """What multiplying by a linear layer takes beside its arrays."""

    has_bias: bool
    bits: int | None = None  # None: not quantised
    group_size: int = 0
    mode: str = "affine"


@dataclass(frozen=True)
class BlockKind:
    """All about a block but its arrays: blocks of one kind run the same code."""

    qkv: LinearKind
    output: LinearKind
    gate_up: LinearKind
    down: LinearKind
    rotary_dims: int
    traditional: bool
    head_norm_eps: float | None  # None: heads are not normed
    input_eps: float
    output_eps: float
    scale: float


class BlockWeights(NamedTuple):
    """A block's arrays. Linears are their weight and a transposed view of it, or weight, scales and
    biases if they are quantised, and the bias if they have one."""

    input_norm: mx.array  # (dim,)
    qkv: tuple[mx.array, ...]
    rotary: mx.array  # (rotary_dims / 2,) inverse frequencies
    head_norms: tuple[mx.array, ...]  # of queries and keys, (head_dim,) each; or none
    output: tuple[mx.array, ...]
    output_norm: mx.array  # (dim,)
    gate_up: tuple[mx.array, ...]
    down: tuple[mx.array, ...]


def run_block(
    kind: BlockKind,
    window: int | None,
    weights: BlockWeights,
    keys: mx.array,
    values: mx.array,
    rows: StepRows,
    hidden: tuple[mx.array, ...],
) -> tuple[mx.array, mx.array]:
    """One block over pages written in place.

    Args:
        window: tokens a row sees, itself included; None: all.
        keys, values: the layer's pages, (num_blocks, kv_heads, block_size, head_dim).
        hidden: (T, dim); or two of them, whose sum it is.

    Returns:
        Two arrays like ``hidden``, whose sum is the block's output: whoever comes next adds them.
    """
    if len(hidden) == 1:
        (residual,) = hidden
        normed = mx.fast.rms_norm(residual, weights.input_norm, kind.input_eps)
    else:
        residual, normed = add_rms_norm(hidden[0], hidden[1], weights.input_norm, kind.input_eps)
    rotary = Rotary(weights.rotary, kind.rotary_dims, kind.traditional)
    norms = None
    if kind.head_norm_eps is not None:
        norms = HeadNorms(weights.head_norms[0], weights.head_norms[1], kind.head_norm_eps)
    qkv = _multiply(normed, kind.qkv, weights.qkv)
    if _is_joined(kind, window, qkv, keys, rows.batch):
        decodes = rows.batch.decodes
        assert decodes is not None
        attended = rotate_and_decode(
            qkv,
            keys,
            values,
            decodes.block_tables,
            decodes.plans[window],
            rows.positions,
            rows.slots,
            rotary,
            norms,
            scale=kind.scale,
        )
    else:
        rotated = rotate_and_write(
            qkv,
            keys,
            values,
            rows.positions,
            rows.slots,
            rotary,
            norms,
            keep_rows=rows.batch.needs_new_rows,
        )
        pages = PageArrays(keys, values, rotated.written, rotated.keys, rotated.values)
        attended = attend(rotated.queries, pages, rows.batch, scale=kind.scale, window=window)
    projected = _multiply(attended.reshape(residual.shape[0], -1), kind.output, weights.output)
    residual, normed = add_rms_norm(residual, projected, weights.output_norm, kind.output_eps)
    gated = swiglu_joined(_multiply(normed, kind.gate_up, weights.gate_up))
    return residual, _multiply(gated, kind.down, weights.down)


def _is_joined(
    kind: BlockKind, window: int | None, qkv: mx.array, keys: mx.array, batch: RaggedBatch
) -> bool:
    """Whether one launch rotates, writes and attends: for decodes alone that share no pages."""
    decodes = batch.decodes
    if decodes is None or batch.chunks or batch.prompt_plans or qkv.dtype != keys.dtype:
        return False
    if decodes.plans[window].shared_items is not None:
        return False
    kv_heads, block_size, head_dim = keys.shape[1:]
    shape = RotatingDecodeShape(
        rows=decodes.num_rows,
        context=1,  # whatever it is, as the choice is made for a model
        heads=qkv.shape[1] // head_dim - 2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=kind.rotary_dims,
        block_size=block_size,
        norms=kind.head_norm_eps is not None,
        traditional=kind.traditional,
        window=window is not None,
    )
    choice = select(ROTATE_AND_DECODE, shape, qkv.dtype)
    return choice.variant is RotatingDecodeVariant.FUSED


class FusedBlock(nn.Module):
    """Mixed into the class of a loaded block; takes over where its cache is pages in place."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if type(cache) is not PagedLayer or not cache.in_place:
            output: mx.array = super().__call__(x, mask, cache)
            return output
        assert mask is None or type(mask) is WindowMask, "a mask that pages cannot apply"
        window = cache.window if mask is None else mask.size
        pages, context = cache.pages, cache.context
        assert pages is not None
        pending, context.pending_sum = context.pending_sum, None
        if pending is not None and pending.output is x:
            hidden: tuple[mx.array, ...] = (pending.residual, pending.delta)
        else:
            hidden = (x.reshape(-1, x.shape[-1]),)
        run = context.run_block or partial(run_block, rows=context.rows)
        residual, delta = run(
            self.kind, window, self.weights, pages.keys, pages.values, hidden=hidden
        )
        # Added here for whoever asks; the next block adds the two itself, and its norm with them.
        output = (residual + delta).reshape(x.shape)
        context.pending_sum = PendingSum(output, residual, delta)
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
    linears = qkv, gate_up, [attention.o_proj], [mlp.down_proj]
    if rotary is None or not all(map(_can_join, linears)):
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
    products = {
        "qkv": _join(qkv),
        "output": attention.o_proj,
        "gate_up": _join(gate_up),
        "down": mlp.down_proj,
    }
    kinds = {name: _kind(linear) for name, linear in products.items()}
    arrays = {name: _arrays(linear) for name, linear in products.items()}
    post_norm = block.post_attention_layernorm
    weights = BlockWeights(
        input_norm=norm,
        rotary=rotary.inverse_frequencies,
        head_norms=() if norms is None else (norms.query, norms.key),
        output_norm=post_norm.weight,
        **arrays,
    )
    kind = BlockKind(
        rotary_dims=rotary.dims,
        traditional=rotary.traditional,
        head_norm_eps=None if norms is None else norms.eps,
        input_eps=block.input_layernorm.eps,
        output_eps=post_norm.eps,
        scale=attention.scale,
        **kinds,
    )
    # Plain attributes: none of it is a parameter of its own.
    object.__setattr__(block, "kind", kind)
    object.__setattr__(block, "weights", weights)
    return True


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
