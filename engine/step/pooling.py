"""Sums of hidden states, for the rows of a step whose prompts are to become vectors."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from quire.engine.attention.rows import Rows
from quire.engine.step_batch import StepBatch
from quire.kernels.padding import pad_size, round_up_to_power_of_two
from quire.kernels.tree import Array

_MIN_ROWS = 4


@dataclass(frozen=True)
class PooledRows:
    """A node of a :mod:`quire.kernels.tree`.

    Attributes:
        rows: (P,) int32, of the step.
        sums: (P,) int32, to which of the sums each row belongs; padding belongs to the last.
        num_sums: the last one included.
    """

    rows: Array
    sums: Array
    num_sums: int


def plan_pooling(batch: StepBatch, rows: Rows) -> PooledRows | None:
    """On the host: a sum for each of ``batch.pooled``, in its order."""
    if not batch.pooled:
        return None
    wanted: list[int] = []
    sums: list[int] = []
    last_rows = dict(zip(map(id, batch.chunks), rows.last_rows, strict=True))
    for number, chunk in enumerate(batch.pooled):
        last, count = last_rows[id(chunk)], chunk.num_pooled
        wanted += range(last - count + 1, last + 1)
        sums += [number] * count
    num_sums = round_up_to_power_of_two(len(batch.pooled), _MIN_ROWS) + 1
    missing = max(pad_size(len(wanted)), _MIN_ROWS) - len(wanted)
    return PooledRows(
        np.array(wanted + wanted[-1:] * missing, np.int32),
        np.array(sums + [num_sums - 1] * missing, np.int32),
        num_sums,
    )


def sum_rows(hidden: mx.array, pooled: PooledRows) -> mx.array:
    """(P, hidden_size) states of the rows -> (num_sums, hidden_size) float32.

    Not a product with a matrix of ones and zeros: a state that is not finite stays its own.
    """
    totals = mx.zeros((pooled.num_sums, hidden.shape[-1]), mx.float32)
    return totals.at[pooled.sums].add(hidden.astype(mx.float32))
