"""The recurrent layers of a model and their states, as one object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from quire.cache.states import LayerStates, StateShape
from quire.engine.attention.rows import Rows
from quire.engine.model.seam import CurrentStep
from quire.engine.recurrent.convolution import adapt_convolutions
from quire.engine.recurrent.families import adapt_model
from quire.engine.recurrent.layer import StateItem, StateLayer
from quire.engine.recurrent.plan import PlanOptions, StatePlan, plan_states
from quire.engine.recurrent.seam import install
from quire.kernels.choice.selection import Selector
from quire.kernels.recurrent import Use


class RecurrentStates:
    """Owns the states of all layers, as long as the model is served.

    Attributes:
        layers: stand-ins for the caches of recurrent layers.
    """

    def __init__(self, model: nn.Module, step: CurrentStep) -> None:
        """``step`` is whose inputs the layers look at."""
        install()
        adapt_convolutions(model)
        adapt_model(model)
        self._step = step
        self.layers: list[StateLayer] = []

    def stand_in(self, cache: ArraysCache) -> StateLayer:
        """What to give a layer in place of ``cache``, which an ordinary forward pass has filled."""
        shapes = [StateShape(item.shape[1:], item.dtype) for item in cache.cache]
        self.layers.append(StateLayer(self._step, shapes))
        return self.layers[-1]

    @property
    def bytes_per_slot(self) -> int:
        return sum(item.shape.nbytes for item in self._items)

    @property
    def row_bytes(self) -> int:
        """Bytes of the longest row that a layer keeps for later tokens, such as a convolution's."""
        return max(item.shape.shape[-1] * item.shape.dtype.size for item in self._items)

    @property
    def in_place(self) -> bool:
        """Whether kernels write all states."""
        return all(item.in_place for item in self._items)

    @property
    def uses(self) -> list[Use]:
        """What the probe has seen done with states, by operations that kernels may compute."""
        return [item.use for item in self._items if item.use is not None]

    def choose(self, selector: Selector) -> None:
        """Decide anew who writes states, after a kernel has been found wrong."""
        for item in self._items:
            if item.use is not None:
                item.in_place = item.use.in_place(selector)

    def allocate(self, num_slots: int) -> None:
        for layer in self.layers:
            layer.states = None  # the old ones, before there are new ones
            layer.states = LayerStates([item.shape for item in layer.items], num_slots)

    def plan(self, rows: Rows) -> StatePlan:
        """How the layers see a step; any thread may ask."""
        others = [item for item in self._items if item.in_place is None]
        sizes = {item.window_size for item in others if item.window_size is not None}
        return plan_states(rows, PlanOptions(self.in_place, bool(others), sizes))

    def stored_with(self, logits: mx.array) -> mx.array:
        """``logits``, which are computed only once MLX has stored the step's states."""
        arrays = [
            array
            for layer in self.layers
            if layer.states is not None
            for item, array in zip(layer.items, layer.states.arrays, strict=True)
            if not item.in_place
        ]
        if not arrays:
            return logits
        outputs: list[mx.array] = mx.depends([logits], arrays)
        return outputs[0]

    @property
    def _items(self) -> Iterator[StateItem]:
        for layer in self.layers:
            yield from layer.items


def are_recurrent(caches: Iterable[object]) -> bool:
    """Whether a layer's cache, as mlx-lm makes it, is a state."""
    for cache in caches:
        parts = getattr(cache, "caches", [cache])
        if any(type(part) is ArraysCache for part in parts):
            return True
    return False
