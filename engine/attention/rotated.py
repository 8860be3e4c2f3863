"""Attention from a layer's projections on: norms of heads, rotary embeddings and page writes in one
kernel, which attends too if it can."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.engine.attention.backend import StepInputs
from quire.kernels.attention import AttentionPlan, attend
from quire.kernels.choice.selection import select
from quire.kernels.heads import Heads, Scoring
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_decode import rotate_and_decode
from quire.kernels.rotate import HeadNorms, ProjectedRows, Rotary, rotate_and_write
from quire.kernels.rotate_and_decode_spec import (
    ROTATE_AND_DECODE,
    RotatingDecodeShape,
    RotatingDecodeVariant,
)


class Rotation(NamedTuple):
    """What a layer does to its projections in front of attention.

    Attributes:
        norms: over each head of queries and keys; None: there are none.
        gated: each head of queries is followed by as many values that gate it.
    """

    rotary: Rotary
    norms: HeadNorms | None = None
    gated: bool = False


def rotate_and_attend(
    qkv: mx.array,
    rotation: Rotation,
    heads: Heads,
    pages: PageArrays,
    step: StepInputs,
    scoring: Scoring,
) -> mx.array:
    """(T, outputs of all projections), as in :class:`ProjectedRows`, -> (T, heads * head_dim), with
    keys and values written to ``pages``."""
    assert step.plans.kernels is not None, "a step without a plan for these pages"
    plan = step.plans.kernels[heads]
    slots = step.slots(heads.window is not None)
    # Head norms of another type make keys of that.
    qkv = qkv.astype(pages.keys.dtype)
    projected = ProjectedRows(qkv, step.positions, slots, rotation.gated)
    # One launch finds the newest key by its position: contexts behind a window count theirs anew.
    counts_anew = heads.window is not None and step.window_slots is not None
    if not counts_anew and _is_joined(qkv, rotation, heads, pages, plan):
        assert plan.decodes is not None
        assert plan.block_tables is not None
        attended = rotate_and_decode(
            *(projected, pages, plan.block_tables, plan.decodes, scoring),
            *(rotation.rotary, rotation.norms),
        )
    else:
        queries, pages = rotate_and_write(
            *(projected, pages, rotation.rotary, rotation.norms),
            keep_rows=step.plans.keeps_rows,
        )
        attended = attend(queries, pages, plan, scoring)
    return attended.reshape(qkv.shape[0], -1)


def _is_joined(
    qkv: mx.array, rotation: Rotation, heads: Heads, pages: PageArrays, plan: AttentionPlan
) -> bool:
    """Whether one launch rotates, writes and attends: for decodes alone that share no pages."""
    if plan.decodes is None or plan.prompts is not None or plan.decodes.shared_items is not None:
        return False
    shape = RotatingDecodeShape(
        rows=qkv.shape[0],
        context=1,  # the choice is made for a model
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        head_dim=heads.key_dim,
        rotary_dim=rotation.rotary.dims,
        block_size=pages.keys.shape[2],
        norms=rotation.norms is not None,
        traditional=rotation.rotary.traditional,
        window=heads.window is not None,
        sinks=heads.sinks,
        gated=rotation.gated,
        scaled=rotation.rotary.factor != 1,
    )
    choice = select(ROTATE_AND_DECODE, shape, qkv.dtype)
    return choice.variant is RotatingDecodeVariant.FUSED
