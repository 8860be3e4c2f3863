"""Short convolutions of recurrent layers.

mlx-lm's files join what a layer kept of the rows before with the new rows, keep the last of both
for the next time, and convolve them. What stands for the joined rows here is recognised when the
convolution meets it, which then reads and stores the kept rows by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from quire.engine.recurrent.layer import StateHandle
from quire.engine.recurrent.scan import windows
from quire.kernels.conv_window import Convolution
from quire.kernels.recurrent import apply_convolution


class _Joined(NamedTuple):
    array: mx.array  # (T, kept + 1, channels)
    handle: StateHandle
    rows: mx.array  # (T, 1, channels)


_newest: list[_Joined] = []  # at most one: a convolution follows at once


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
        conv = Convolution(self.weight, self.get("bias"), silu=False)
        result = apply_convolution(rows[:, 0], conv, handle.pool, handle.segments, handle.fence)
        return handle.computed(result)[:, None]


def adapt_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Conv1d and _is_short(module):
            module.__class__ = WindowConv1d


def _is_short(conv: nn.Conv1d) -> bool:
    channels, _, per_group = conv.weight.shape
    is_plain = (conv.padding, conv.stride, conv.dilation) == (0, 1, 1)
    return is_plain and per_group == 1 and conv.groups == channels
