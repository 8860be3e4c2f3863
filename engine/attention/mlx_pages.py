"""Pages that MLX's operations write and read: on the CPU, and for layers that no kernel takes."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from quire.cache.pages import LayerPages
from quire.cache.window_pool import blocks_of_window
from quire.engine.attention.backend import MlxPlan, Query, StepInputs
from quire.engine.attention.decode_rows import DecodeRows, Reach
from quire.engine.attention.rows import Contexts, Rows
from quire.engine.step_batch import StepBatch
from quire.kernels.kv_write import Slots, scatter
from quire.kernels.page_arrays import PageArrays
from quire.kernels.paged_attention import paged_attention
from quire.kernels.ragged import RaggedBatch


class MlxPages:
    """A write replaces the page arrays, in place if nobody else holds them."""

    def __init__(
        self, block_size: int, windows: Iterable[int | None] = (), reach: Reach | None = None
    ) -> None:
        """
        Args:
            windows: those of all layers, as far as they are known.
            reach: of rows in layers with blocks of their own, of any backend.
        """
        self._block_size = block_size
        self._windows = set(windows)
        self._reach = reach
        self._slots: dict[bool, Slots] = {}  # by whether it is windows' own

    def lay_out(self, batch: StepBatch) -> Rows:
        """Rows that begin alike, and then those of like lengths, side by side."""
        decodes = DecodeRows.of(batch.chunks[: batch.num_decodes], self._block_size)
        if batch.num_decodes > 1:
            decodes = decodes.clustered().by_length()
        return Rows(batch, decodes, self._block_size, reach=self._reach)

    def plan(self, rows: Rows) -> MlxPlan:
        if rows.windowed is None:
            return MlxPlan(self._batch(rows.full, self._windows), None)
        assert self._reach is not None, "windows that nobody has told of"
        if self._reach.chunked:
            batches = (self._batch(each, {None}) for each in (rows.full, rows.windowed))
            return MlxPlan(*batches)
        windows = self._windows - {None}
        most = blocks_of_window(self._reach.size, self._block_size)
        return MlxPlan(
            self._batch(rows.full, self._windows - windows),
            self._batch(rows.windowed, windows, most),
        )

    def _batch(
        self, contexts: Contexts, windows: Iterable[int | None], most: int | None = None
    ) -> RaggedBatch:
        groups = contexts.decodes.groups(most) if len(contexts.decodes) else []
        for group in groups:
            for window in windows:
                group.make_view(window, self._block_size)
        return RaggedBatch(groups, contexts.prompts)

    def write(
        self, pages: LayerPages, step: StepInputs, keys: mx.array, values: mx.array
    ) -> PageArrays:
        mapping = step.slots(pages.windowed)
        slots = self._slots.get(pages.windowed)
        if slots is None or slots.mapping is not mapping:
            slots = self._slots[pages.windowed] = Slots(mapping, self._block_size)
        scatter(pages.keys, keys, slots)
        scatter(pages.values, values, slots)
        return PageArrays(pages.keys, pages.values)

    def attend(self, pages: PageArrays, step: StepInputs, query: Query) -> mx.array:
        plan = step.plans.mlx
        assert plan is not None, "a step without a plan for these pages"
        batch = plan.full
        sees_all = query.scoring.window is None and not query.chunked
        if not sees_all and plan.windowed is not None:
            batch = plan.windowed
        return paged_attention(query.rows, pages, batch, query.scoring, query.extra)
