"""The blocks of steps with prompts, compiled.

All fused blocks of a step run the same code over other weights. So the first one is traced and the
others replay its graph, as do later steps whose rows and plans are padded to the same sizes. At
small batches building a step takes as long as computing it, and this is a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from quire.engine.model.fused_blocks import BlockKind, BlockWeights, run_block
from quire.engine.model.seam import StepRows
from quire.kernels.decode_plan import PlanForm
from quire.kernels.kv_write import Slots
from quire.kernels.ragged import (
    DecodeRows,
    PaddedChunks,
    PromptChunk,
    PromptPlan,
    RaggedBatch,
    TiledChunks,
)

# Graphs kept before all are dropped: prompts come in many sizes.
_MAX_FORMS = 512
_NO_WINDOW = -1


class RowsForm(NamedTuple):
    """All about a step's rows but their arrays, in plain numbers: MLX compares them.

    Attributes:
        decodes: per window: window, and the form of its plan.
        prompts: per window: window, tiles, padded batches, chunks alone, whether rows are put in
            order. Tiles, if any: rows, results, whether results are merged. A batch: count, rows,
            first row, whether rows are taken, whether keys are masked.
            A chunk: first row, rows, context.
    """

    block_size: int
    needs_new_rows: bool
    decodes: tuple[tuple[int, tuple[int, ...]], ...]
    prompts: tuple[
        tuple[
            int,
            tuple[tuple[int, int, bool], ...],
            tuple[tuple[int, int, int, bool, bool, bool], ...],
            tuple[tuple[int, int, int], ...],
            bool,
        ],
        ...,
    ]


class CompiledBlocks:
    """Compiled functions of the blocks, by their kind."""

    def __init__(self) -> None:
        self._functions: dict[tuple[BlockKind, int | None], Callable[..., Any]] = {}
        self._forms: set[tuple[int, RowsForm]] = set()

    def for_step(self, rows: StepRows) -> Callable[..., tuple[mx.array, mx.array]]:
        """What runs the blocks of a step: :func:`run_block` but for its ``rows``.

        Every prompt has its plan, and chunks that go alone see nothing but their own rows.
        """
        arrays, form = flatten(rows)
        if len(self._forms) == _MAX_FORMS:
            self._functions.clear()
            self._forms.clear()
        self._forms.add((rows.positions.shape[0], form))
        return partial(self._run, arrays, form)

    def _run(
        self,
        arrays: list[mx.array],
        form: RowsForm,
        kind: BlockKind,
        window: int | None,
        weights: BlockWeights,
        keys: mx.array,
        values: mx.array,
        *,
        hidden: tuple[mx.array, ...],
    ) -> tuple[mx.array, mx.array]:
        function = self._functions.get((kind, window))
        if function is None:
            traced = mx.compile(partial(_trace, kind, window))
            function = self._functions[kind, window] = traced
        residual, delta = function(hidden, arrays, tuple(weights), keys, values, tuple(form))
        return residual, delta


def _trace(
    kind: BlockKind,
    window: int | None,
    hidden: tuple[mx.array, ...],
    arrays: list[mx.array],
    weights: tuple[Any, ...],
    keys: mx.array,
    values: mx.array,
    form: tuple[Any, ...],
) -> tuple[mx.array, mx.array]:
    rows = unflatten(arrays, RowsForm(*form))
    return run_block(kind, window, BlockWeights(*weights), keys, values, rows, tuple(hidden))


def flatten(rows: StepRows) -> tuple[list[mx.array], RowsForm]:
    """The arrays of ``rows``, and the rest of them."""
    batch, slots = rows.batch, rows.slots
    assert slots.after is not None, "an in-place write needs the step before to wait for"
    arrays = [rows.positions, slots.mapping, slots.after]
    decodes = []
    if batch.decodes is not None:
        arrays.append(batch.decodes.block_tables)
        for window, plan in batch.decodes.plans.items():
            arrays += plan.arrays()
            decodes.append((_name(window), tuple(plan.form())))
    prompts = []
    for window, prompt_plan in batch.prompt_plans.items():
        tiles = []
        if (tiled := prompt_plan.tiled) is not None:
            first_items = [] if tiled.first_items is None else [tiled.first_items]
            arrays += [tiled.items, tiled.block_tables, *first_items]
            tiles.append((tiled.num_rows, tiled.num_results, bool(first_items)))
        padded = []
        for chunks in prompt_plan.padded:
            optional = [chunks.rows, chunks.visible]
            arrays += [chunks.block_ids, *(array for array in optional if array is not None)]
            taken, masked = (array is not None for array in optional)
            numbers = chunks.count, chunks.num_rows, chunks.first_row, chunks.is_fresh
            padded.append((*numbers, taken, masked))
        alone = tuple((c.first_row, c.num_rows, c.context_length) for c in prompt_plan.alone)
        if prompt_plan.order is not None:
            arrays.append(prompt_plan.order)
        reordered = prompt_plan.order is not None
        prompts.append((_name(window), tuple(tiles), tuple(padded), alone, reordered))
    form = RowsForm(slots.block_size, batch.needs_new_rows, tuple(decodes), tuple(prompts))
    return arrays, form


def unflatten(arrays: list[mx.array], form: RowsForm) -> StepRows:
    """The inverse of :func:`flatten`."""
    left = iter(arrays)
    positions, mapping, after = next(left), next(left), next(left)
    decodes = DecodeRows(next(left), {}) if form.decodes else None
    for name, plan_form in form.decodes:
        assert decodes is not None
        decodes.plans[_window(name)] = PlanForm._make(plan_form).plan(left)
    plans = {}
    for name, tiles, padded, alone, reordered in form.prompts:
        tiled = None
        for num_rows, num_results, merged in tiles:
            items, tables, first_items = next(left), next(left), next(left) if merged else None
            tiled = TiledChunks(num_rows, items, tables, first_items, num_results, _window(name))
        batches = [_padded(left, *each) for each in padded]
        nothing = np.empty(0, np.int32)
        chunks = [PromptChunk(*each, nothing) for each in alone]
        order = next(left) if reordered else None
        plans[_window(name)] = PromptPlan(tiled, batches, chunks, order)
    batch = RaggedBatch(
        [], [], decodes, prompt_plans=plans, needs_new_rows=bool(form.needs_new_rows)
    )
    return StepRows(positions, Slots(mapping, form.block_size, after), batch)


def _padded(
    left: Iterator[mx.array],
    count: int,
    rows: int,
    first_row: int,
    is_fresh: bool,
    taken: bool,
    masked: bool,
) -> PaddedChunks:
    block_ids = next(left)
    taken_rows = next(left) if taken else None
    return PaddedChunks(
        count, rows, taken_rows, first_row, block_ids, is_fresh, next(left) if masked else None
    )


def _name(window: int | None) -> int:
    return _NO_WINDOW if window is None else window


def _window(name: int) -> int | None:
    return None if name == _NO_WINDOW else name
