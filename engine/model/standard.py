"""The standard transformer block, run by a forward of our own with fewer operations.

Most models are made of one block: RMS norm, projections of queries, keys and values, rotary
embeddings, attention, projection, RMS norm, SwiGLU. mlx-lm's own takes about 18 kernels a layer;
over pages that kernels write this one takes 8 to 10: projections of the same input are one matrix
product, a residual is added by the norm after it, and norms of heads, rotary embeddings and page
writes are one kernel, which attends too if it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from quire.cache.pages import LayerPages
from quire.engine.attention.backend import StepInputs
from quire.engine.attention.rotated import Rotation, rotate_and_attend
from quire.engine.model.block_ops import add_norm, gated
from quire.engine.model.block_weights import BlockKind, BlockWeights, multiply, read_blocks
from quire.engine.model.pace import Pace
from quire.engine.model.recurring import Recurring
from quire.engine.step.pooling import sum_rows
from quire.kernels.heads import Heads, Scoring
from quire.kernels.page_arrays import PageArrays
from quire.kernels.rotate import HeadNorms, Rotary
from quire.kernels.tree import join, split


class BlockForm(NamedTuple):
    """Blocks of one form, in steps of one form, are one graph."""

    kind: BlockKind
    heads: Heads
    step: Any  # the static part of its inputs


class StandardForward:
    """Embedding, blocks, norm and head of a model whose blocks are all standard."""

    def __init__(self, model: Any, heads: Sequence[Heads]) -> None:
        """
        Args:
            model: an mlx-lm model of Llama, Qwen 2 or Qwen 3; see :func:`is_standard`.
            heads: of each block.
        """
        self._model = model
        self._blocks = read_blocks(model)
        self._heads = list(heads)
        # The first block of a form is traced, and the others, which run the same code over other
        # weights, replay its graph: the host builds a step in a third of the time.
        self._run_block = Recurring(_run_block, direct_runs=0)

    def __call__(
        self,
        token_ids: mx.array,
        step: StepInputs,
        pages: Sequence[LayerPages],
        pace: Pace | None = None,
    ) -> list[mx.array]:
        """(T,) int32 -> (R, vocab) logits of the rows that ``step`` wants, and behind them sums of
        hidden states where it wants any.

        Args:
            pages: those of each block, written in place.
            pace: at which a long step is handed over in pieces.
        """
        inner = self._model.model
        terms: tuple[mx.array, ...] = (inner.embed_tokens(token_ids),)
        arrays, static = split(step)
        for (kind, weights), heads, own in zip(self._blocks, self._heads, pages, strict=True):
            form = BlockForm(kind, heads, static)
            terms = self._run_block(form, arrays, terms, tuple(weights), own.keys, own.values)
            if pace is not None:
                pace.passed(*terms)
        residual, delta = terms
        norm = inner.norm
        sums = []
        if (pooled := step.pooled) is not None:
            _, hidden = add_norm(residual[pooled.rows], delta[pooled.rows], norm.weight, norm.eps)
            sums = [sum_rows(hidden, pooled)]
        if step.logits_rows is not None:
            residual, delta = residual[step.logits_rows], delta[step.logits_rows]
        _, normed = add_norm(residual, delta, norm.weight, norm.eps)
        head = inner.embed_tokens.as_linear
        if not self._model.args.tie_word_embeddings:
            head = self._model.lm_head
        return [head(normed), *sums]


def _run_block(
    form: BlockForm,
    arrays: list[mx.array],
    terms: tuple[mx.array, ...],
    weight_arrays: tuple[Any, ...],
    keys: mx.array,
    values: mx.array,
) -> tuple[mx.array, mx.array]:
    """One block. Its output is the sum of two (T, dim) arrays, a residual and what is added to it:
    the norm that follows computes the sum too.

    Args:
        arrays: of the step.
        terms: of the block's input: two, or only one in front of the first block.
        weight_arrays: :class:`BlockWeights` as a plain tuple.
        keys, values: the layer's pages, (num_blocks, kv_heads, block_size, head_dim).
    """
    kind, weights = form.kind, BlockWeights(*weight_arrays)
    step: StepInputs = join(arrays, form.step)
    residual = terms[0]
    if len(terms) == 1:
        normed = mx.fast.rms_norm(residual, weights.input_norm, kind.input_eps)
    else:
        residual, normed = add_norm(residual, terms[1], weights.input_norm, kind.input_eps)
    qkv = multiply(normed, kind.qkv, weights.qkv)
    attended = _attend(form, weights, qkv, step, PageArrays(keys, values, step.fence))
    projected = multiply(attended, kind.output, weights.output)
    residual, normed = add_norm(residual, projected, weights.output_norm, kind.output_eps)
    hidden = gated(multiply(normed, kind.gate_up, weights.gate_up))
    return residual, multiply(hidden, kind.down, weights.down)


def _attend(
    form: BlockForm, weights: BlockWeights, qkv: mx.array, step: StepInputs, pages: PageArrays
) -> mx.array:
    """(T, (heads + 2 * kv_heads) * head_dim) -> (T, heads * head_dim), keys and values written."""
    kind, heads = form.kind, form.heads
    rotary = Rotary(weights.rotary, kind.rotary_dims, kind.traditional, kind.rotary_factor)
    norms = None
    if kind.head_norm_eps is not None:
        norms = HeadNorms(weights.head_norms[0], weights.head_norms[1], kind.head_norm_eps)
    scoring = Scoring(kind.scale, heads.window)
    return rotate_and_attend(qkv, Rotation(rotary, norms), heads, pages, step, scoring)
