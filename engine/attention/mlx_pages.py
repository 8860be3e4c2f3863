"""Pages that MLX's operations write and read: on the CPU, and for layers that no kernel takes."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from quire.cache.pages import LayerPages
from quire.engine.attention.backend import Query, StepInputs
from quire.engine.attention.decode_rows import DecodeRows
from quire.engine.attention.rows import Rows
from quire.engine.step_batch import StepBatch
from quire.kernels.kv_write import Slots, scatter
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import paged_attention
from quire.kernels.ragged import RaggedBatch


class MlxPages:
    """A write replaces the page arrays, in place if nobody else holds them."""

    def __init__(self, block_size: int, windows: Iterable[int | None] = ()) -> None:
        """``windows`` are those of all layers, as far as they are known."""
        self._block_size = block_size
        self._windows = set(windows)
        self._slots: tuple[mx.array, Slots] | None = None

    def lay_out(self, batch: StepBatch) -> Rows:
        """Rows that begin alike, and then those of like lengths, side by side."""
        decodes = DecodeRows.of(batch.chunks[: batch.num_decodes], self._block_size)
        if batch.num_decodes > 1:
            decodes = decodes.clustered().by_length()
        return Rows(batch, decodes, self._block_size)

    def plan(self, rows: Rows) -> RaggedBatch:
        groups = rows.decodes.groups() if len(rows.decodes) else []
        for group in groups:
            for window in self._windows:
                group.make_view(window, self._block_size)
        return RaggedBatch(groups, rows.prompts)

    def write(
        self, pages: LayerPages, step: StepInputs, keys: mx.array, values: mx.array
    ) -> PageArrays:
        if self._slots is None or self._slots[0] is not step.slot_mapping:
            self._slots = step.slot_mapping, Slots(step.slot_mapping, self._block_size)
        slots = self._slots[1]
        scatter(pages.keys, keys, slots)
        scatter(pages.values, values, slots)
        return PageArrays(pages.keys, pages.values)

    def attend(self, pages: PageArrays, step: StepInputs, query: Query) -> mx.array:
        batch = step.plans.mlx
        assert batch is not None, "a step without a plan for these pages"
        return paged_attention(query.rows, pages, batch, query.scoring, query.extra)
