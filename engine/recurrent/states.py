"""The recurrent layers of a model and their states, as one object."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from quire.cache.states import LayerStates, StateShape
from quire.engine.attention.rows import Rows
from quire.engine.model.seam import CurrentStep
from quire.engine.recurrent.families import adapt_model
from quire.engine.recurrent.layer import StateLayer
from quire.engine.recurrent.plan import StatePlan, plan_states
from quire.engine.recurrent.seam import install


class RecurrentStates:
    """Owns the states of all layers, as long as the model is served."""

    def __init__(self, model: nn.Module, step: CurrentStep) -> None:
        """``step`` is whose inputs the layers look at."""
        install()
        adapt_model(model)
        self._step = step
        self._layers: list[StateLayer] = []

    def stand_in(self, cache: ArraysCache) -> StateLayer:
        """What to give a layer in place of ``cache``, which an ordinary forward pass has filled."""
        shapes = [StateShape(item.shape[1:], item.dtype) for item in cache.cache]
        self._layers.append(StateLayer(self._step, shapes))
        return self._layers[-1]

    @property
    def bytes_per_slot(self) -> int:
        return sum(item.nbytes for layer in self._layers for item in layer.shapes)

    def allocate(self, num_slots: int) -> None:
        for layer in self._layers:
            layer.states = None  # the old ones, before there are new ones
            layer.states = LayerStates(layer.shapes, num_slots)

    def plan(self, rows: Rows) -> StatePlan:
        """How the layers see a step; any thread may ask."""
        return plan_states(rows, {n for layer in self._layers for n in layer.window_sizes})

    def stored_with(self, logits: mx.array) -> mx.array:
        """``logits``, which are computed only once the step has stored its states."""
        arrays = [array for layer in self._layers for array in layer.arrays]
        outputs: list[mx.array] = mx.depends([logits], arrays)
        return outputs[0]


def are_recurrent(caches: Iterable[object]) -> bool:
    """Whether a layer's cache, as mlx-lm makes it, is a state."""
    for cache in caches:
        parts = getattr(cache, "caches", [cache])
        if any(type(part) is ArraysCache for part in parts):
            return True
    return False
