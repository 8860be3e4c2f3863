"""What a recurrent layer is given where it expects its cache.

A model sees a batch of T sequences of one token each. What it computes token by token is right as
it is; what looks back meets a :class:`StateHandle` instead of a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from quire.cache.states import LayerStates, StateShape
from quire.engine.model.seam import CurrentStep
from quire.engine.recurrent.plan import SequenceRows
from quire.kernels.recurrent import Applied, Use
from quire.kernels.segments import Segments


class Stored:
    """What a recurrence returns as its new state: it has been stored."""


STORED = Stored()


@dataclass
class StateItem:
    """One item of a layer's state.

    Attributes:
        shape: as an ordinary forward pass showed it.
        use: the operation that computes it, if it is one of :mod:`quire.kernels.recurrent`.
        in_place: whether a kernel writes it; None: it is not known, or MLX writes what an operation
            returns that is not one of these.
        window_size: of such an operation, the number of rows that it keeps.
    """

    shape: StateShape
    use: Use | None = None
    in_place: bool | None = None
    window_size: int | None = None


class StateLayer(ArraysCache):
    """Stands in for the cache of one recurrent layer.

    Attributes:
        items: what the layer keeps of a sequence; the probe shows how they are used.
        states: the items of all slots, once there is memory for them.
    """

    # What mlx-lm's files look at: no row is padding.
    lengths = None
    left_padding = None

    def __init__(self, step: CurrentStep, shapes: list[StateShape]) -> None:
        self.step = step
        self.items = [StateItem(shape) for shape in shapes]
        self.states: LayerStates | None = None

    def __bool__(self) -> bool:
        return True  # mlx-lm asks `if cache`

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> StateHandle:
        if index >= len(self.items):
            raise IndexError(index)
        return StateHandle(self, index)

    def __setitem__(self, index: int, rows: mx.array | Stored) -> None:
        """Keep what (T, *shape) ``rows`` say of the state behind each row, unless it has been."""
        if isinstance(rows, Stored) or self.items[index].in_place is not None:
            return
        handle = self[index]
        ends = handle.rows.ends
        handle.store(rows if ends is None else rows[ends])

    def reached(self, index: int, hidden: mx.array) -> None:
        """An item has been computed; ``hidden`` depends on that and on all layers before."""
        if self.step.pace is not None and index == len(self.items) - 1:
            self.step.pace.passed(hidden)

    def make_mask(self, num_tokens: int) -> None:
        return None

    def advance(self, num_tokens: int) -> None:
        """Nothing to do: the step has the positions."""


class StateHandle:
    """One item of a layer's states, seen by the model as the state before its tokens.

    Not an array: any use but those that are known fails loudly.
    """

    __slots__ = ("_layer", "index", "item")

    def __init__(self, layer: StateLayer, index: int) -> None:
        self._layer = layer
        self.index = index
        self.item = layer.items[index]

    @property
    def pool(self) -> mx.array:
        """(slots, *shape): to be read or written at once, not to be kept."""
        assert self._layer.states is not None, "a layer without states"
        return self._layer.states.arrays[self.index]

    @property
    def positions(self) -> mx.array:
        """(T,) int32"""
        positions: mx.array = self._layer.step.inputs.positions
        return positions

    @property
    def fence(self) -> mx.array:
        """What the step's first write in place waits for."""
        fence = self._layer.step.inputs.fence
        assert fence is not None, "a step with nothing before it"
        return fence

    @property
    def segments(self) -> Segments:
        plan = self._layer.step.inputs.plans.states
        assert plan is not None, "a step without a plan for states"
        return plan.segments

    @property
    def rows(self) -> SequenceRows:
        plan = self._layer.step.inputs.plans.states
        assert plan is not None, "a step without a plan for states"
        assert plan.rows is not None, "a use of a state that the probe has not seen"
        return plan.rows

    def computed(self, applied: Applied) -> mx.array:
        """The result of an operation of :mod:`quire.kernels.recurrent`."""
        in_place = applied.fence is not self.fence
        assert self.item.in_place in (None, in_place), "a state that is written in two ways"
        self.item.in_place = in_place
        self.item.use = self.item.use or applied.use
        self._layer.reached(self.index, applied.result)
        return applied.result

    def read(self) -> mx.array:
        """(S, *shape), the states of the step's sequences before their first rows."""
        return self.pool[self.rows.sources]

    def store(self, states: mx.array) -> None:
        """Put (E, *shape) states into the slots that they go to."""
        pool = self.pool
        pool[self.rows.targets] = states.astype(pool.dtype)
        self._layer.reached(self.index, states)
