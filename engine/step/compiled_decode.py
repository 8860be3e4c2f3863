"""Steps of decodes alone, compiled: most of what a GPU computes, and always of the same few shapes.

At small batches the host decides how long a step takes. A compiled step replays the graph of an
earlier one instead of running the model's Python code again. Rows, block tables and work items are
padded to a few sizes; padding rows decode a token of the scratch block, and nobody reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.engine.model.paged_model import PagedModel
from quire.engine.step.compiled_blocks import CompiledBlocks
from quire.engine.step.layout import Layout
from quire.engine.step.recurring import DIRECT_RUNS, Recurring
from quire.kernels.buckets import bucket
from quire.kernels.choice.selection import select
from quire.kernels.decode_plan import DecodeSettings, PlanForm, default_settings, plan_rows
from quire.kernels.kv_write import Slots
from quire.kernels.paged_decode_spec import PAGED_DECODE, DecodeShape
from quire.kernels.ragged import DecodeRows, RaggedBatch, SharedRun
from quire.kernels.shared_context import plan_shared
from quire.kernels.shared_context_spec import SHARED_CONTEXT, SharedShape, SharedVariant
from quire.kernels.upload import upload, upload_packed

Int32Array = npt.NDArray[np.int32]

_MIN_TABLE_WIDTH = 16  # blocks
_LENGTHS = [2**n for n in range(4, 18)]  # tokens, one of each size that selection tells apart


class DecodeInputs(NamedTuple):
    """What a compiled step is given, still on the host."""

    num_rows: int
    size: int  # rows, with those that pad them
    table_width: int  # blocks
    parts: list[Int32Array]  # in the order in which the step takes them
    plans: list[tuple[int, bool, int, int, int, int]]  # by window; see _run
    some_pending: bool  # tokens of rows are not known yet
    all_pending: bool


class CompiledDecode:
    """Runs steps of one token per sequence over pages that kernels write in place."""

    def __init__(self, model: PagedModel, blocks: CompiledBlocks | None) -> None:
        """``blocks`` runs those of the model that are fused."""
        self._context = model.context
        self._windows = sorted(model.windows, key=lambda window: window or 0)
        self._shapes = {
            use.window: (layer.shape, use.heads)
            for layer in model.layers
            for use in layer.uses
            if layer.shape is not None
        }
        # Not a method: a cycle through the compiled function would keep the pages it has seen.
        run = partial(_run, model, blocks, self._windows)
        self._run = Recurring(run, DIRECT_RUNS if blocks is not None else 0)
        self._sharing: dict[int, bool] = {}  # by key heads of all rows, as a power of two
        self._nothing_before = mx.zeros((1,), mx.int32)
        mx.eval(self._nothing_before)

    def prepare(self, layout: Layout) -> DecodeInputs:
        """The inputs of a step without prompt chunks."""
        count = layout.num_decodes
        size = bucket(count)
        tables = _widen(layout.decode_tables, size)
        lengths = _pad(layout.positions + 1, size, 1)
        parts = [
            _pad(layout.token_ids, size),
            np.maximum(_pad(layout.source_rows, size, -1), 0),
            _pad((layout.source_rows >= 0).astype(np.int32), size),
            _pad(layout.positions, size),
            _pad(layout.slot_mapping, size),
            tables,
        ]
        plans = []
        for window in self._windows:
            arrays, form = self._plan(lengths, window, layout.shared_runs)
            parts += arrays
            plans.append((len(arrays[0]), *form))
        pending = layout.source_rows >= 0
        return DecodeInputs(
            count, size, tables.shape[1], parts, plans, bool(pending.any()), bool(pending.all())
        )

    def __call__(self, inputs: DecodeInputs, previous_tokens: mx.array | None) -> mx.array:
        """(num_rows, vocab) logits."""
        size = inputs.size
        packed = upload_packed(inputs.parts)
        tokens = packed[:size]
        if inputs.some_pending:
            assert previous_tokens is not None, "a token is awaited from no step"
            sampled = previous_tokens[packed[size : 2 * size]]
            if not inputs.all_pending:
                sampled = mx.where(packed[2 * size : 3 * size], sampled, tokens)
            tokens = sampled
        after = self.order_after(previous_tokens)
        form = size, inputs.table_width, tuple(inputs.plans)
        logits = self._run(form, tokens, packed, after, inputs.table_width, inputs.plans)
        return logits if size == inputs.num_rows else logits[: inputs.num_rows]

    def rows(self, layout: Layout) -> DecodeRows | None:
        """The decodes of a mixed step as the kernel takes them."""
        if not layout.num_decodes:
            return None
        lengths = layout.positions[: layout.num_decodes] + 1
        parts = [_widen(layout.decode_tables, layout.num_decodes)]
        forms = []
        for window in self._windows:
            arrays, form = self._plan(lengths, window, layout.shared_runs)
            parts += arrays
            forms.append(form)
        tables, *uploaded = upload(parts)
        left = iter(uploaded)
        plans = {window: form.plan(left) for window, form in zip(self._windows, forms, strict=True)}
        return DecodeRows(tables, plans)

    def order_after(self, previous_tokens: mx.array | None) -> mx.array:
        """What in-place writes must wait for: every layer's attention is behind these tokens."""
        return self._nothing_before if previous_tokens is None else previous_tokens[:1]

    def may_share(self, num_rows: int) -> bool:
        """Whether there are contexts whose beginning so many rows would read together."""
        if None not in self._shapes or not num_rows:
            return False
        # What is chosen depends on this much of it only.
        size = (num_rows * self._shapes[None][0].key_heads - 1).bit_length()
        if size not in self._sharing:
            self._sharing[size] = any(
                self._reads_together(num_rows, context, own)
                for context, own in product(_LENGTHS, repeat=2)
            )
        return self._sharing[size]

    def _plan(
        self, lengths: Int32Array, window: int | None, runs: Sequence[SharedRun]
    ) -> tuple[list[Int32Array], PlanForm]:
        """The arrays of a :class:`DecodePlan` on the host, and the rest of it."""
        shared, own = None, lengths
        if runs and window is None:
            rows = np.concatenate([np.arange(r.first_row, r.first_row + r.num_rows) for r in runs])
            context = sum(run.num_rows * run.num_tokens for run in runs) // len(rows)
            if self._reads_together(len(rows), context, int(lengths[rows].mean()) - context):
                shape, heads = self._shapes[window]
                shared = plan_shared(runs, len(lengths), heads, shape.key_heads)
                own = lengths - shared.num_tokens
        return plan_rows(lengths, window, self._settings(own, window), shared)

    def _reads_together(self, rows: int, context: int, own: int) -> bool:
        """Whether ``rows`` that share ``context`` tokens, and have ``own`` more on average, read
        these once for all of them."""
        shape, heads = self._shapes[None]
        shared_shape = SharedShape(
            rows,
            context,
            own,
            heads,
            shape.key_heads,
            shape.key_dim,
            shape.value_dim,
            self._context.block_size,
        )
        choice = select(SHARED_CONTEXT, shared_shape, shape.key_dtype)
        return choice.variant is SharedVariant.CASCADE

    def _settings(self, lengths: Int32Array, window: int | None) -> DecodeSettings:
        """The defaults for these contexts, or what was tuned for contexts like them."""
        shape, heads = self._shapes[window]
        seen = lengths if window is None else np.minimum(lengths, window)
        decode_shape = DecodeShape(
            rows=len(lengths),
            context=max(1, int(seen.mean())),
            heads=heads,
            kv_heads=shape.key_heads,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            block_size=self._context.block_size,
            window=window is not None,
        )
        choice = select(PAGED_DECODE, decode_shape, shape.key_dtype)
        group = heads // shape.key_heads
        settings = default_settings(lengths, window, shape.key_heads, group)
        return settings._replace(**choice.settings)


def _run(
    model: PagedModel,
    blocks: CompiledBlocks | None,
    windows: Sequence[int | None],
    tokens: mx.array,
    packed: mx.array,
    after: mx.array,
    table_width: int,
    plans: Sequence[tuple[int, bool, int, int, int, int]],
) -> mx.array:
    """The step's graph; whatever is not an array is part of what makes it another graph."""
    size = tokens.shape[0]
    place = 3 * size

    def take(*shape: int) -> mx.array:
        nonlocal place
        start, place = place, place + math.prod(shape)
        return packed[start:place].reshape(shape)

    context = model.context
    context.positions = take(size)
    context.slots = Slots(take(size), context.block_size, after)
    context.wanted_rows = None
    block_tables = take(size, table_width)
    by_window = {}
    for window, (num_items, *numbers) in zip(windows, plans, strict=True):
        form = PlanForm._make(numbers)
        shapes: list[tuple[int, ...]] = [(num_items, 4)]
        if form.is_merged:
            shapes.append((size + 1,))
        if form.num_shared_items:
            shapes.append((form.num_shared_items, 8))
        by_window[window] = form.plan(iter([take(*shape) for shape in shapes]))
    context.batch = RaggedBatch([], [], DecodeRows(block_tables, by_window))
    # The first block is traced and the others repeat it, in a third of the time.
    context.run_block = None if blocks is None else blocks.for_step(context.rows)
    return model(tokens)


def _widen(tables: Int32Array, size: int) -> Int32Array:
    """Pad to ``size`` rows and a power of two columns, with the scratch block."""
    width = max(_MIN_TABLE_WIDTH, 1 << (tables.shape[1] - 1).bit_length())
    padded = np.zeros((size, width), np.int32)
    padded[: tables.shape[0], : tables.shape[1]] = tables
    return padded


def _pad(values: Int32Array, size: int, fill: int = 0) -> Int32Array:
    if len(values) == size:
        return values
    return np.concatenate([values, np.full(size - len(values), fill, np.int32)])
