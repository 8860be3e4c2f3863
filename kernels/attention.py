"""Attention over pages that kernels have written: decodes and prompt chunks of one step."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from quire.kernels.decode_plan import DecodePlan
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_decode import paged_decode
from quire.kernels.prompt_attention import PromptPlan, prompt_attention
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
    *,
    scale: float,
    window: int | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Causal attention of every row over its own sequence's pages.

    Args:
        queries: (T, heads, 1, head_dim); decode rows first, then the chunks.
        window: each row sees the last ``window`` tokens, itself included, as ``plan`` was made for;
            None sees all.
        sinks: (heads,) logits that take part in the softmax but have no value.

    Returns:
        (T, heads, 1, value_dim) in the dtype of ``queries``.
    """
    dtype, fence = queries.dtype, pages.written
    assert fence is not None, "pages that nobody has written in place"
    queries = queries.astype(pages.keys.dtype)
    output = None
    if plan.decodes is not None:
        assert plan.block_tables is not None, "decodes without block tables"
        decodes = (
            queries[: plan.block_tables.shape[0]],
            pages.keys,
            pages.values,
            plan.block_tables,
            plan.decodes,
        )
        shared = attend_shared(*decodes, scale=scale, written=fence)
        output = paged_decode(*decodes, scale=scale, written=fence, sinks=sinks, shared=shared)
    if plan.prompts is not None:
        output = prompt_attention(
            queries, pages, plan.prompts, scale=scale, window=window, sinks=sinks, before=output
        )
    assert output is not None, "a step without rows"
    return output.astype(dtype)
