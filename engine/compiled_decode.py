"""Steps of decodes alone, compiled: most of what a GPU computes, and always of the same few shapes.

At small batches the host decides how long a step takes. A compiled step replays the graph of an
earlier one instead of running the model's Python code again. Rows, block tables and work items are
padded to a few sizes; padding rows decode a token of the scratch block, and nobody reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.engine.layout import Layout
from quire.engine.paged_model import PagedModel
from quire.kernels.kv_write import Slots
from quire.kernels.paged_decode import DecodePlan, DecodeSettings, default_settings, plan_items
from quire.kernels.ragged import DecodeRows, RaggedBatch

Int32Array = npt.NDArray[np.int32]

_MIN_TABLE_WIDTH = 16  # blocks


class CompiledDecode:
    """Runs steps of one token per sequence over pages that kernels write in place."""

    def __init__(self, model: PagedModel) -> None:
        self._model = model
        self._context = model.context
        self._windows = sorted(model.windows, key=lambda window: window or 0)
        self._function = mx.compile(self._trace)
        self._nothing_before = mx.zeros((1,), mx.int32)
        mx.eval(self._nothing_before)

    def __call__(self, layout: Layout, previous_tokens: mx.array | None) -> mx.array:
        """(num_decodes, vocab) logits of a layout without prompt chunks."""
        count = layout.num_decodes
        size = bucket(count)
        rows = self.rows(layout, size)
        assert rows is not None
        logits = self._function(
            input_tokens(layout, previous_tokens, size),
            mx.array(_pad(layout.positions, size)),
            mx.array(_pad(layout.slot_mapping, size)),
            self.order_after(previous_tokens),
            rows.block_tables,
            [[p.items, p.first_items, *p.settings] for p in rows.plans.values()],
        )
        return logits if size == count else logits[:count]

    def rows(self, layout: Layout, size: int | None = None) -> DecodeRows | None:
        """The decodes of a step as the kernel takes them, padded to ``size`` rows."""
        if not layout.num_decodes:
            return None
        lengths = layout.positions[: layout.num_decodes] + 1
        tables = layout.decode_tables
        if size is not None:
            lengths = _pad(lengths, size, 1)
            width = max(_MIN_TABLE_WIDTH, 1 << (tables.shape[1] - 1).bit_length())
            padded = np.zeros((size, width), np.int32)
            padded[: tables.shape[0], : tables.shape[1]] = tables
            tables = padded
        plans = {window: self._plan(lengths, window, size is not None) for window in self._windows}
        return DecodeRows(mx.array(tables), plans)

    def order_after(self, previous_tokens: mx.array | None) -> mx.array:
        """What in-place writes must wait for: every layer's attention is behind these tokens."""
        return self._nothing_before if previous_tokens is None else previous_tokens[:1]

    def _plan(self, lengths: Int32Array, window: int | None, fixed_shape: bool) -> DecodePlan:
        settings = self._settings(lengths, window)
        items, first_items = plan_items(lengths, window, settings.split)
        if len(items) == len(lengths) and first_items[-1] == len(lengths):
            return DecodePlan(mx.array(items), None, settings)
        if fixed_shape:
            padding = np.zeros((bucket(len(items)) - len(items), 3), np.int32)
            items = np.concatenate([items, padding])
        return DecodePlan(mx.array(items), mx.array(first_items), settings)

    def _settings(self, lengths: Int32Array, window: int | None) -> DecodeSettings:
        layer = next(
            layer for layer in self._model.layers if any(u.window == window for u in layer.uses)
        )
        assert layer.shape is not None
        heads = next(use.heads for use in layer.uses if use.window == window)
        kv_heads = layer.shape.key_heads
        return default_settings(lengths, window, kv_heads, heads // kv_heads)

    def _trace(
        self,
        tokens: mx.array,
        positions: mx.array,
        slot_mapping: mx.array,
        after: mx.array,
        block_tables: mx.array,
        plans: Sequence[Sequence[Any]],
    ) -> mx.array:
        context = self._context
        context.positions = positions
        context.slots = Slots(slot_mapping, context.block_size, after)
        context.wanted_rows = None
        by_window = {
            window: DecodePlan(items, first_items, DecodeSettings(*settings))
            for window, (items, first_items, *settings) in zip(self._windows, plans, strict=True)
        }
        context.batch = RaggedBatch([], [], DecodeRows(block_tables, by_window))
        return self._model(tokens)


def bucket(count: int) -> int:
    """``count`` rounded up to one of at most four sizes per power of two."""
    step = max(1, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


def input_tokens(layout: Layout, previous_tokens: mx.array | None, size: int) -> mx.array:
    """(size,) int32 token ids; those the host has not seen come from the step before."""
    host = _pad(layout.token_ids, size)
    source_rows = _pad(layout.source_rows, size, -1)
    pending = source_rows >= 0
    if not pending.any():
        return mx.array(host)
    assert previous_tokens is not None, "a token is awaited from a step that does not exist"
    device = previous_tokens[mx.array(np.maximum(source_rows, 0))].astype(mx.int32)
    if pending[: len(layout.token_ids)].all():
        return device
    return mx.where(mx.array(pending), device, mx.array(host))


def _pad(values: Int32Array, size: int, fill: int = 0) -> Int32Array:
    if len(values) == size:
        return values
    return np.concatenate([values, np.full(size - len(values), fill, np.int32)])
