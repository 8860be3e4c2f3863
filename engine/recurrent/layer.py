"""What a recurrent layer is given where it expects its cache.

A model sees a batch of T sequences of one token each. What it computes token by token is right as
it is; what looks back, the windows of convolutions and the recurrences, meets a
:class:`StateHandle` instead of a state, and goes to :func:`windows`, :func:`previous_rows` or
:func:`scan`, which know which rows are one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from quire.cache.states import LayerStates, StateShape
from quire.engine.model.seam import CurrentStep
from quire.engine.recurrent.plan import StatePlan


class Stored:
    """What a recurrence returns as its new state: it has been stored."""


STORED = Stored()


class StateLayer(ArraysCache):
    """Stands in for the cache of one recurrent layer.

    Attributes:
        shapes: of the items, as an ordinary forward pass showed them.
        states: the items of all slots, once there is memory for them.
        window_sizes: how many rows its convolutions keep, as the probe showed it.
    """

    # What mlx-lm's files look at: no row is padding.
    lengths = None
    left_padding = None

    def __init__(self, step: CurrentStep, shapes: list[StateShape]) -> None:
        self._step = step
        self.shapes = shapes
        self.states: LayerStates | None = None
        self.window_sizes: set[int] = set()

    def __bool__(self) -> bool:
        return True  # mlx-lm asks `if cache`

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> StateHandle:
        if index >= len(self.shapes):
            raise IndexError(index)
        return StateHandle(self, index)

    def __setitem__(self, index: int, rows: mx.array | Stored) -> None:
        """Keep what (T, *shape) ``rows`` say of the state behind each row."""
        if not isinstance(rows, Stored):
            ends = self.plan.ends
            self.store(index, rows if ends is None else rows[ends])

    def make_mask(self, num_tokens: int) -> None:
        return None

    def advance(self, num_tokens: int) -> None:
        """Positions are in the step."""

    @property
    def plan(self) -> StatePlan:
        plan = self._step.inputs.plans.states
        assert plan is not None, "a step without a plan for states"
        return plan

    @property
    def positions(self) -> mx.array:
        """(T,) int32"""
        positions: mx.array = self._step.inputs.positions
        return positions

    @property
    def arrays(self) -> list[mx.array]:
        assert self.states is not None, "a layer without states"
        return self.states.arrays

    def store(self, index: int, states: mx.array) -> None:
        """Put (E, *shape) states into the slots that they go to."""
        array = self.arrays[index]
        array[self.plan.targets] = states.astype(array.dtype)


class StateHandle:
    """One item of a layer's states, seen by the model as the state before its tokens.

    Not an array: any use but those that are known fails loudly.
    """

    __slots__ = ("index", "layer")

    def __init__(self, layer: StateLayer, index: int) -> None:
        self.layer = layer
        self.index = index

    def read(self) -> mx.array:
        """(S, *shape), the states of the step's sequences before their first rows."""
        return self.layer.arrays[self.index][self.layer.plan.sources]


def windows(handle: StateHandle, rows: mx.array, kept: int) -> mx.array:
    """Each row behind the ``kept`` rows before it in its sequence.

    Args:
        handle: of a state that is those rows, the oldest first.
        rows: (T, ...)

    Returns:
        (T, kept + 1, n), the last axis all of a row.
    """
    layer = handle.layer
    layer.window_sizes.add(kept)
    flat = rows.reshape(rows.shape[0], -1)
    tails = handle.read()
    tails = tails.reshape(tails.shape[0], kept, -1).astype(flat.dtype)
    if not layer.plan.pieces:
        return mx.concatenate([tails, flat[:, None]], axis=1)
    known = mx.concatenate([tails.reshape(-1, flat.shape[1]), flat])
    return known[layer.plan.windows[kept]]


def previous_rows(handle: StateHandle, rows: mx.array) -> mx.array:
    """For each of (T, ...) rows the one before it in its sequence."""
    return windows(handle, rows, 1)[:, 0].reshape(rows.shape)


Recurrence = Callable[[list[mx.array], mx.array], tuple[mx.array, mx.array]]


def scan(
    recurrence: Recurrence, handle: StateHandle, rows: Sequence[mx.array]
) -> tuple[mx.array, Stored]:
    """Run a recurrence over the rows of each sequence, and store its states.

    Args:
        recurrence: takes arrays (B, L, ...) and states (B, *shape) before them, and returns
            (B, L, ...) and the states behind. It is called once with one row of every decode, and
            then with each piece of each prompt chunk.
        rows: (T, 1, ...) each.

    Returns:
        (T, 1, ...), and what stands for the new state.
    """
    layer = handle.layer
    plan = layer.plan
    states = handle.read()
    num_rows = plan.num_decode_rows
    found: list[mx.array] = []
    behind: list[mx.array] = []
    if num_rows:
        every = [x[:num_rows] for x in rows] if plan.pieces else list(rows)
        outputs, new = recurrence(every, states[:num_rows] if plan.pieces else states)
        found.append(outputs)
        behind.append(new if plan.num_decodes == num_rows else new[: plan.num_decodes])
    first = num_rows
    for sequence, lengths in enumerate(plan.pieces, num_rows):
        state = states[sequence : sequence + 1]
        for length in lengths:
            piece = [x[first : first + length].swapaxes(0, 1) for x in rows]
            outputs, state = recurrence(piece, state)
            found.append(outputs.swapaxes(0, 1))
            behind.append(state)
            first += length
    if padding := rows[0].shape[0] - first:
        found.append(mx.zeros((padding, *found[0].shape[1:]), found[0].dtype))
    layer.store(handle.index, _joined(behind))
    return _joined(found), STORED


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)
