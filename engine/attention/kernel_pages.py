"""Pages that kernels write in place and read where they lie: on GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.cache.pages import LayerPages
from quire.engine.attention.backend import Query, StepInputs
from quire.engine.attention.decode_rows import DecodeRows, Reach
from quire.engine.attention.rows import PaddedSizes, Rows, round_rows
from quire.engine.step_batch import Chunk, StepBatch
from quire.kernels.attention import AttentionPlan, attend
from quire.kernels.choice.selection import select
from quire.kernels.decode_plan import DecodePlan, DecodeSettings, default_settings, plan_rows
from quire.kernels.heads import Heads
from quire.kernels.kv_write import write_in_place
from quire.kernels.mixed_attention_spec import MIXED_ATTENTION, MixedShape, MixedVariant
from quire.kernels.padding import pad_size, round_up_to_power_of_two
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_decode_spec import PAGED_DECODE, DecodeShape
from quire.kernels.paged_prompt import plan_tiles
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptShape
from quire.kernels.prompt_plan import PromptPlan, PromptVariant, plan_prompts
from quire.kernels.ragged import PromptChunk, SharedRun
from quire.kernels.shared_context import plan_shared
from quire.kernels.shared_context_spec import SHARED_CONTEXT, SharedShape, SharedVariant

Int32Array = npt.NDArray[np.int32]

_LEAST_TABLE_WIDTH = 16  # blocks


class _PaddedDecodes(NamedTuple):
    tables: Int32Array  # (B, blocks)
    lengths: Int32Array  # (B,), of contexts; rows of padding have one token
    runs: list[SharedRun]


class KernelPages:
    """Kernels take rows of any lengths together, so that only rows that share pages are sorted.

    Rows are padded to sizes that recur: then a step's graph can be compiled once and replayed.
    """

    def __init__(self, kinds: Sequence[Heads], block_size: int, reach: Reach | None = None) -> None:
        """
        Args:
            kinds: those of all layers.
            reach: of rows in layers with blocks of their own, of any backend.
        """
        self._kinds = list(kinds)
        self._block_size = block_size
        self._reach = reach

    def lay_out(self, batch: StepBatch) -> Rows:
        count = batch.num_decodes
        decodes = DecodeRows.of(batch.chunks[:count], self._block_size)
        if count:
            clustered = decodes.clustered()
            if clustered is not decodes and self._share(clustered):
                decodes = clustered
        as_chunks = not decodes.clusters.any() and self._fuses_decodes(batch)
        num_decode_rows = count if as_chunks or not count else pad_size(count)
        num_rows = num_decode_rows + batch.num_tokens - count
        if batch.num_tokens > count:
            num_rows = round_rows(num_rows)
        return Rows(
            batch,
            decodes,
            self._block_size,
            num_decode_rows=num_decode_rows,
            num_rows=num_rows,
            decodes_as_chunks=as_chunks,
            reach=self._reach,
        )

    def padded_sizes(self, max_decodes: int, max_rows: int) -> PaddedSizes:
        return PaddedSizes(
            sorted({pad_size(n + 1) for n in range(max_decodes)}),
            sorted({round_rows(n + 1) for n in range(max_rows)}),
        )

    def plan(self, rows: Rows) -> dict[Heads, AttentionPlan]:
        if rows.decodes_as_chunks:
            return {heads: self._plan_fused(rows, heads) for heads in self._kinds}
        padded: dict[int, _PaddedDecodes] = {}  # by whose contexts they are
        plans = {}
        for heads in self._kinds:
            contexts = rows.contexts(heads)
            decodes = prompts = tables = None
            if len(contexts.decodes):
                if id(contexts) not in padded:
                    padded[id(contexts)] = self._pad(contexts.decodes, rows.num_decode_rows)
                tables, lengths, runs = padded[id(contexts)]
                decodes = self._plan_decodes(lengths, heads, runs)
            if contexts.prompts:
                prompts = self._plan_prompts(rows, contexts.prompts, heads)
            plans[heads] = AttentionPlan(decodes, tables, prompts)
        return plans

    def write(
        self, pages: LayerPages, step: StepInputs, keys: mx.array, values: mx.array
    ) -> PageArrays:
        return write_in_place(
            PageArrays(pages.keys, pages.values, step.fence),
            keys.astype(pages.keys.dtype),
            values.astype(pages.values.dtype),
            step.slots(pages.windowed),
            keep_rows=step.plans.keeps_rows,
        )

    def attend(self, pages: PageArrays, step: StepInputs, query: Query) -> mx.array:
        assert step.plans.kernels is not None, "a step without a plan for these pages"
        scoring, extra = query.scoring, query.extra
        heads = Heads(
            query.rows.shape[1],
            pages.keys.shape[1],
            pages.keys.shape[3],
            pages.values.shape[3],
            scoring.window,
            scoring.sinks is not None,
            pages.keys.dtype,
            scoring.softcap is not None,
            0 if extra is None else extra.queries.shape[3],
            query.chunked,
        )
        return attend(query.rows, pages, step.plans.kernels[heads], scoring, extra)

    # ---- prompt chunks

    def _fuses_decodes(self, batch: StepBatch) -> bool:
        """Whether one launch of the kernel for prompts takes all rows of a layer, decodes too."""
        decodes, prompts = batch.chunks[: batch.num_decodes], batch.chunks[batch.num_decodes :]
        if not prompts:
            return False
        longest = max((chunk.context_length for chunk in decodes), default=0)
        for heads in self._kinds:
            for chunk in prompts:
                for num_rows, context in self._seen(chunk, heads):
                    variant = self._prompt_variant(num_rows, context, heads)
                    if variant is not PromptVariant.PAGED_KERNEL:
                        return False
            if not decodes:
                continue
            seen = longest if heads.window is None else min(longest, heads.window)
            if heads.chunked and self._reach is not None:
                seen = min(longest, self._reach.size)
            shape = MixedShape(
                len(decodes), seen, *self._common(heads), heads.window is not None, heads.sinks
            )
            if select(MIXED_ATTENTION, shape, heads.dtype).variant is not MixedVariant.FUSED:
                return False
        return True

    def _seen(self, chunk: Chunk, heads: Heads) -> Iterator[tuple[int, int]]:
        """The rows and the contexts of what is a chunk of a prompt to such a layer."""
        if not heads.chunked or self._reach is None:
            yield chunk.num_tokens, chunk.context_length
            return
        for piece in self._reach.pieces(chunk):
            skipped = self._reach.skipped_blocks(piece.start, self._block_size)
            yield len(piece), piece.stop - skipped * self._block_size

    def _plan_fused(self, rows: Rows, heads: Heads) -> AttentionPlan:
        tiles = plan_tiles(rows.contexts(heads).chunks, heads, rows.num_padding_rows)
        return AttentionPlan(None, None, PromptPlan(tiles, [], [], None))

    def _plan_prompts(self, rows: Rows, chunks: list[PromptChunk], heads: Heads) -> PromptPlan:
        return plan_prompts(
            chunks,
            heads,
            self._block_size,
            lambda chunk: self._prompt_variant(chunk.num_rows, chunk.context_length, heads),
            num_before=rows.num_decode_rows,
            num_padding_rows=rows.num_padding_rows,
        )

    def _prompt_variant(self, num_rows: int, context: int, heads: Heads) -> PromptVariant:
        shape = self._prompt_shape(num_rows, context, heads)
        return select(PROMPT_ATTENTION, shape, heads.dtype).variant

    def _prompt_shape(self, num_rows: int, context: int, heads: Heads) -> PromptShape:
        return PromptShape(
            num_rows,
            context,
            *self._common(heads),
            from_start=num_rows == context,
            window=heads.window is not None,
            sinks=heads.sinks,
            softcap=heads.softcap,
            extra_dim=heads.extra_dim,
        )

    # ---- decodes

    def _share(self, decodes: DecodeRows) -> bool:
        """Whether rows that begin alike read what they share together, in any layer."""
        runs, lengths = decodes.runs(self._block_size), decodes.positions + 1
        return any(self._reads_together(lengths, heads, runs) for heads in self._kinds)

    def _pad(self, decodes: DecodeRows, num_rows: int) -> _PaddedDecodes:
        lengths = np.ones(num_rows, np.int32)
        lengths[: len(decodes)] += decodes.positions
        tables = _widen(decodes.tables, num_rows)
        return _PaddedDecodes(tables, lengths, decodes.runs(self._block_size))

    def _plan_decodes(
        self, lengths: Int32Array, heads: Heads, runs: Sequence[SharedRun]
    ) -> DecodePlan:
        shared, own = None, lengths
        if runs and self._reads_together(lengths, heads, runs):
            shared = plan_shared(runs, len(lengths), heads.heads, heads.kv_heads)
            own = lengths - shared.num_tokens
        return plan_rows(lengths, heads.window, self._settings(own, heads), shared)

    def _reads_together(self, lengths: Int32Array, heads: Heads, runs: Sequence[SharedRun]) -> bool:
        """Whether the rows of ``runs`` read what they share once for all of them."""
        if heads.window is not None or heads.softcap or heads.extra_dim or heads.chunked:
            return False
        rows = np.concatenate([np.arange(r.first_row, r.first_row + r.num_rows) for r in runs])
        context = sum(run.num_rows * run.num_tokens for run in runs) // len(rows)
        own = int(lengths[rows].mean()) - context
        shape = SharedShape(len(rows), context, own, *self._common(heads), heads.sinks)
        choice = select(SHARED_CONTEXT, shape, heads.dtype)
        return choice.variant is SharedVariant.CASCADE

    def _settings(self, lengths: Int32Array, heads: Heads) -> DecodeSettings:
        """The defaults for these contexts, or what was tuned for contexts like them."""
        seen = lengths if heads.window is None else np.minimum(lengths, heads.window)
        shape = DecodeShape(
            len(lengths),
            max(1, int(seen.mean())),
            *self._common(heads),
            window=heads.window is not None,
            sinks=heads.sinks,
            softcap=heads.softcap,
            extra_dim=heads.extra_dim,
        )
        choice = select(PAGED_DECODE, shape, heads.dtype)
        settings = default_settings(lengths, heads.window, heads.kv_heads, heads.group)
        return settings._replace(**choice.settings)

    def _common(self, heads: Heads) -> tuple[int, int, int, int, int]:
        """What all shapes say of a layer: heads, key heads, their sizes and the block size."""
        return (*heads[:4], self._block_size)


def _widen(tables: Int32Array, size: int) -> Int32Array:
    """Pad to ``size`` rows and a power of two columns, with the scratch block."""
    padded = np.zeros(
        (size, round_up_to_power_of_two(tables.shape[1], _LEAST_TABLE_WIDTH)), np.int32
    )
    padded[: tables.shape[0], : tables.shape[1]] = tables
    return padded
