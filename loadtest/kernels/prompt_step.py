"""Prompt chunks of a step, attended to as the engine does."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from quire.kernels.attention import AttentionPlan, attend
from quire.kernels.choice.selection import select
from quire.kernels.heads import Heads, Scoring
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import paged_attention
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptShape
from quire.kernels.prompt_plan import PromptVariant, plan_prompts
from quire.kernels.ragged import PromptChunk, RaggedBatch
from quire.kernels.tree import to_device


class PromptStep:
    """The plan of ``chunks``, which all layers of a step share and no timing has in it."""

    def __init__(
        self, chunks: Sequence[PromptChunk], heads: Heads, block_size: int, *, gpu: bool
    ) -> None:
        def variant(chunk: PromptChunk) -> PromptVariant:
            rows, context = chunk.num_rows, chunk.context_length
            shape = PromptShape(rows, context, *heads[:4], block_size, rows == context)
            return select(PROMPT_ATTENTION, shape, heads.dtype).variant

        self._batch = to_device(RaggedBatch([], list(chunks)))
        self._plan: AttentionPlan | None = None
        if gpu:
            prompts = plan_prompts(chunks, heads, block_size, variant)
            self._plan = to_device(AttentionPlan(None, None, prompts))

    def attend(self, queries: mx.array, pages: PageArrays, scale: float) -> mx.array:
        """(T, heads, 1, head_dim) -> (T, heads, 1, value_dim)."""
        if self._plan is None:
            return paged_attention(queries, pages, self._batch, Scoring(scale))
        return attend(queries, pages, self._plan, Scoring(scale))
