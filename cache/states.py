"""The states of recurrent layers: one array for each item of a layer's state, allocated once."""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx


class StateShape(NamedTuple):
    """One item of what a layer keeps of a sequence, as the model itself showed it."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


class LayerStates:
    """The items of one layer, each (num_slots, \\*shape).

    Slot 0 holds zeros, the state of a sequence that begins, and is never written. Where MLX writes
    the arrays they are replaced: hold no view of them across a step, or it must copy them all
    before it can write.
    """

    __slots__ = ("arrays",)

    def __init__(self, shapes: list[StateShape], num_slots: int) -> None:
        self.arrays = [mx.zeros((num_slots, *item.shape), item.dtype) for item in shapes]
        mx.eval(self.arrays)
