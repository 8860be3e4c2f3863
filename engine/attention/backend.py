"""What the model and the step ask of attention over pages, whoever computes it.

There is one backend for each kind of page storage. All layers whose pages it keeps share the plan
that it makes of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from quire.cache.pages import LayerPages
from quire.engine.attention.rows import Rows
from quire.engine.recurrent.plan import StatePlan
from quire.engine.step.pooling import PooledRows
from quire.engine.step_batch import StepBatch
from quire.kernels.attention import AttentionPlan
from quire.kernels.heads import Heads, Scoring
from quire.kernels.page_arrays import ExtraScores, PageArrays
from quire.kernels.ragged import RaggedBatch
from quire.kernels.tree import Array


class Query(NamedTuple):
    """One call of attention, as a model makes it.

    Attributes:
        rows: (T, heads, 1, head_dim)
        extra: further scores (MLA).
        chunked: each row sees its own chunk of its sequence only.
    """

    rows: mx.array
    scoring: Scoring
    extra: ExtraScores | None = None
    chunked: bool = False


@dataclass(frozen=True)
class StepInputs:
    """Everything a step is given: numpy's arrays while it is planned, MLX's while it runs.

    A node of a :mod:`quire.kernels.tree`: what is an array is uploaded, what is not is part of the
    key of the step's graph.

    Attributes:
        token_ids: (T,) int32, where they are known.
        token_places: (T,) int32, where each row's token stands in token_ids followed by the samples
            of the step before.
        positions: (T,) int32
        slot_mapping: (T,) int32, block * block_size + offset: where each row's keys and values go.
        window_slots: (T,) int32, the same in layers whose windows or chunks have blocks of their
            own; None: there are none.
        logits_rows: (R,) int32, rows whose logits are wanted; None: all.
        plans: by backend, what it needs to attend.
        pooled: rows whose hidden states are summed; None: none.
        fence: (1,) an output of the step before, which writes in place wait for; put here on the
            device.
    """

    token_ids: Array
    token_places: Array
    positions: Array
    slot_mapping: Array
    logits_rows: Array | None
    plans: Plans
    pooled: PooledRows | None = None
    fence: mx.array | None = None
    window_slots: Array | None = None

    def slots(self, windowed: bool) -> Array:
        """Where rows go in layers with or without windows."""
        if windowed and self.window_slots is not None:
            return self.window_slots
        return self.slot_mapping


@dataclass(frozen=True)
class MlxPlan:
    """A step's rows as attention in MLX's operations takes them.

    Attributes:
        full: of layers without windows, and of all where windows have no blocks of their own.
        windowed: of layers with windows or chunks; None: ``full`` is theirs too.
    """

    full: RaggedBatch
    windowed: RaggedBatch | None = None


@dataclass(frozen=True)
class Plans:
    """What a model's layers must know of a step beside its rows, made once for all of a kind.

    Attributes:
        mlx: of layers whose pages MLX's operations write.
        kernels: of layers whose pages kernels write in place.
        keeps_rows: whether attention may read new keys and values as rows instead of from pages.
        states: of recurrent layers.
    """

    mlx: MlxPlan | None = None
    kernels: dict[Heads, AttentionPlan] | None = None
    keeps_rows: bool = False
    states: StatePlan | None = None


class AttentionBackend(Protocol):
    """Attention over one kind of page storage."""

    def lay_out(self, batch: StepBatch) -> Rows:
        """The order and padding of a step's rows that suit it best."""

    def plan(self, rows: Rows) -> Any:
        """What attention needs to know of a step, on the host; any thread may ask."""

    def write(
        self, pages: LayerPages, step: StepInputs, keys: mx.array, values: mx.array
    ) -> PageArrays:
        """Write (T, heads, 1, dim) rows to their slots; returns what attention reads then."""

    def attend(self, pages: PageArrays, step: StepInputs, query: Query) -> mx.array:
        """(T, heads, 1, value_dim): each row over its own sequence's pages, up to itself."""
