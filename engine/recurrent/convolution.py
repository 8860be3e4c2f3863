"""Short convolutions of recurrent layers.

mlx-lm's files join what a layer kept of the rows before with the new rows, keep the last of both
for the next time, and convolve them. What stands for the joined rows here is recognised when the
convolution meets it, which then reads and stores the kept rows by itself.

Gated delta nets make queries, keys and values of the result by nine operations: SiLU, three parts,
norms and scales. Where a kernel does all that, it runs when their recurrence does, and what those
operations make of an array that means nothing is never computed.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from quire.engine.recurrent.layer import StateHandle
from quire.engine.recurrent.scan import windows
from quire.kernels.conv_window import Convolution, QueryKeyHeads
from quire.kernels.recurrent import apply_convolution, is_one_kernel


class _Joined(NamedTuple):
    array: mx.array  # (T, kept + 1, channels)
    handle: StateHandle
    rows: mx.array  # (T, 1, channels)


_newest: list[_Joined] = []  # at most one: a convolution follows at once


class _Convolved(NamedTuple):
    handle: StateHandle
    rows: mx.array  # (T, channels), before
    conv: Convolution


_delta_net: list[_Convolved] = []  # at most one: the recurrence follows
# Files of gated delta nets whose convolution gives queries, keys and values in this order, each
# with SiLU, queries and keys with `normalize_qk`: read and compared; the check at load compares
# logits.
DELTA_NETS = ("qwen3_5", "qwen3_next")
_DELTA_NETS = {f"mlx_lm.models.{name}" for name in DELTA_NETS}


def join_window(handle: StateHandle, rows: mx.array) -> mx.array:
    """(T, 1, ...) rows, each behind those before it in its sequence.

    Where a convolution is known to follow, an array of that shape that means nothing.
    """
    kept = handle.item.shape.shape[0]
    if handle.item.in_place is None:
        found = windows(handle, rows, kept).reshape(rows.shape[0], kept + 1, *rows.shape[2:])
    else:
        found = mx.broadcast_to(rows, (rows.shape[0], kept + 1, *rows.shape[2:]))
    _newest[:] = [_Joined(found, handle, rows)]
    return found


class WindowConv1d(nn.Conv1d):
    """One channel at a time, without padding."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _newest or _newest[0].array is not x:
            convolved: mx.array = super().__call__(x)
            return convolved
        _, handle, rows = _newest.pop()
        return self._convolve(handle, rows)

    def _convolve(self, handle: StateHandle, rows: mx.array) -> mx.array:
        """(T, 1, channels) -> (T, 1, channels)"""
        conv = Convolution(self.weight, self.get("bias"), silu=False)
        result = apply_convolution(rows[:, 0], conv, handle.pool, handle.segments, handle.fence)
        return handle.computed(result)[:, None]


class DeltaNetConv1d(WindowConv1d):
    """In front of a gated delta rule, for which a kernel makes queries, keys and values at once."""

    heads: QueryKeyHeads

    def _convolve(self, handle: StateHandle, rows: mx.array) -> mx.array:
        """Where the kernel is used, an array of the result's shape that means nothing."""
        conv = Convolution(self.weight, self.get("bias"), silu=True, heads=self.heads)
        if handle.item.in_place is False or not is_one_kernel(rows[:, 0], conv, handle.segments):
            return super()._convolve(handle, rows)
        _delta_net[:] = [_Convolved(handle, rows[:, 0], conv)]
        return rows


def by_head(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values, (T, 1, heads, dim) each, as they were made of what a convolution
    returned; or where that meant nothing, of its rows by the kernel."""
    if not _delta_net:
        return q, k, v
    handle, rows, conv = _delta_net.pop()
    assert conv.heads is not None
    applied = apply_convolution(rows, conv, handle.pool, handle.segments, handle.fence)
    parts = conv.heads.parts(handle.computed(applied), rows.shape[0])
    q, k, v = (new.reshape(old.shape) for new, old in zip(parts, (q, k, v), strict=True))
    return q, k, v


def adapt_convolutions(model: nn.Module) -> None:
    modules = model.modules()
    for module in modules:
        if type(module) is nn.Conv1d and _is_short(module):
            module.__class__ = WindowConv1d
    for module in modules:
        if type(module).__module__ in _DELTA_NETS and type(module.get("conv1d")) is WindowConv1d:
            module.conv1d.__class__ = DeltaNetConv1d
            module.conv1d.heads = QueryKeyHeads(module.num_k_heads, module.head_k_dim)


def _is_short(conv: nn.Conv1d) -> bool:
    channels, _, per_group = conv.weight.shape
    is_plain = (conv.padding, conv.stride, conv.dilation) == (0, 1, 1)
    return is_plain and per_group == 1 and conv.groups == channels
