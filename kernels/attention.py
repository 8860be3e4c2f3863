"""Attention over pages that kernels have written: decodes and prompt chunks of one step."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from quire.kernels.decode_plan import DecodePlan
from quire.kernels.heads import Scoring
from quire.kernels.page_arrays import ExtraScores, PageArrays
from quire.kernels.paged_decode import paged_decode
from quire.kernels.prompt_attention import prompt_attention
from quire.kernels.prompt_plan import PromptPlan
from quire.kernels.shared_context import attend_shared
from quire.kernels.tree import Array


@dataclass(frozen=True)
class AttentionPlan:
    """How the rows of a step attend, in all layers alike; a node of :mod:`quire.kernels.tree`.

    Attributes:
        decodes: the step's first rows, one query each; None: there are none.
        block_tables: (B, max_blocks) int32 of the decodes; None with them.
        prompts: the rows behind; None: there are none.
    """

    decodes: DecodePlan | None
    block_tables: Array | None
    prompts: PromptPlan | None


def attend(
    queries: mx.array,
    pages: PageArrays,
    plan: AttentionPlan,
    scoring: Scoring,
    extra: ExtraScores | None = None,
) -> mx.array:
    """Causal attention of every row over its own sequence's pages.

    Args:
        queries: (T, heads, 1, head_dim); decode rows first, then the chunks.
        pages: that kernels have written.
        scoring: with the window that ``plan`` was made for.
        extra: further scores; new values of ``pages`` are then the rows of its keys.

    Returns:
        (T, heads, 1, value_dim) in the dtype of ``queries``.
    """
    dtype = queries.dtype
    queries = queries.astype(pages.keys.dtype)
    if extra is not None:
        extra = extra._replace(queries=extra.queries.astype(pages.keys.dtype))
    output = None
    if plan.decodes is not None:
        assert plan.block_tables is not None, "decodes without block tables"
        rows = queries[: plan.block_tables.shape[0]]
        decodes = rows, pages, plan.block_tables, plan.decodes, scoring
        if extra is None:
            output = paged_decode(*decodes, shared=attend_shared(*decodes))
        else:
            own = extra._replace(queries=extra.queries[: len(rows)])
            output = paged_decode(*decodes, extra=own)
    if plan.prompts is not None:
        prompts = queries, pages, plan.prompts, scoring
        output = prompt_attention(*prompts, before=output, extra=extra)
    assert output is not None, "a step without rows"
    return output.astype(dtype)
