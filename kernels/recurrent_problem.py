"""Rows of recurrent layers to check and time kernels on: how they are cut into segments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Float64Array, Problem, to_float64, waiting
from quire.kernels.choice.sizes import ModelSizes
from quire.kernels.segments import EMPTY, Segments
from quire.kernels.tree import to_device

# Rows of decodes, and rows and sequences of prompts, that are worth measuring.
TUNED_DECODES: Mapping[DeviceName, tuple[int, ...]] = {
    "metal": (1, 8, 32),
    "cuda": (1, 16, 64),
    "cpu": (1, 8),
}
TUNED_PROMPTS: Mapping[DeviceName, tuple[tuple[int, int], ...]] = {
    "metal": ((512, 1), (512, 4)),
    "cuda": ((512, 1), (2048, 4)),
    "cpu": ((128, 1),),
}

Self = TypeVar("Self", bound="RecurrentProblem")
Shape = TypeVar("Shape", bound=Any)  # with rows and sequences


def tuned_shapes(common: Shape) -> Callable[[ModelSizes, DeviceName, int], Iterator[Shape]]:
    """Decodes and prompts of a ``common`` model, whose sizes most others share."""

    def tuned(sizes: ModelSizes, device: DeviceName, block_size: int) -> Iterator[Shape]:
        yield from (common._replace(rows=n, sequences=n) for n in TUNED_DECODES[device])
        for rows, sequences in TUNED_PROMPTS[device]:
            yield common._replace(rows=rows, sequences=sequences)

    return tuned


def cut(rows: int, segments: int, *, ragged: bool, seed: int) -> list[int]:
    """The lengths of ``segments`` segments of ``rows`` rows in all: alike as far as possible, or
    with ``ragged`` at random, at least one row each."""
    if rows == segments or not ragged:
        return [(s + 1) * rows // segments - s * rows // segments for s in range(segments)]
    rng = np.random.default_rng(seed)
    inner = np.sort(rng.choice(np.arange(1, rows), segments - 1, replace=False))
    return [int(length) for length in np.diff([0, *inner, rows])]


class RecurrentProblem(Problem):
    """Base of what has rows, a pool of states and segments.

    States go to other slots than they come from, so that calls can be repeated, and every third
    sequence begins. The result is y and the whole pool; a kernel's has its fence behind.
    """

    def __init__(self, rows: int, segments: int, *, seed: int, ragged: bool) -> None:
        self.lengths = cut(rows, segments, ragged=ragged, seed=seed)
        slots = 1 + np.random.default_rng(seed).permutation(2 * segments)
        self.sources: list[int] = slots[:segments].tolist()
        self.targets: list[int] = slots[segments:].tolist()
        self.sources[2::3] = [EMPTY] * len(self.sources[2::3])
        self.num_slots = 1 + 2 * segments
        self.segments = to_device(Segments.of(self.lengths, self.sources, self.targets))
        self.fence = mx.zeros((1,), mx.int32)
        self.rows: tuple[mx.array, ...] = ()

    def keep(self, rows: Sequence[mx.array], pool: mx.array) -> None:
        """Each variant writes to a pool of its own, whose results stay for the next call."""
        self.rows, self.pool = tuple(rows), pool
        self.stepped = pool + 0
        mx.eval(self.rows, self.pool, self.stepped, self.fence)
        state = pool[0].nbytes
        self.num_bytes = 2 * len(self.lengths) * state + sum(x.nbytes for x in self.rows)

    def expected_states(self) -> tuple[Float64Array, list[Float64Array]]:
        """The pool, and what each segment begins with."""
        (pool,) = to_float64([self.stepped])
        return pool, [pool[s] if s != EMPTY else np.zeros_like(pool[0]) for s in self.sources]

    def row_by_row(
        self,
        values: Float64Array,
        step: Callable[[Float64Array, int], tuple[Float64Array, Float64Array]],
    ) -> list[Float64Array]:
        """The result where ``step`` takes a state over a row, and gives the row's y, which has the
        shape of its ``values``, too."""
        pool, states = self.expected_states()
        y, row = np.empty_like(values), 0
        for length, state, target in zip(self.lengths, states, self.targets, strict=True):
            for t in range(row, row + length):
                state, y[t] = step(state, t)
            pool[target] = state
            row += length
        return [y, pool]

    def chained(self: Self, result: Sequence[mx.array]) -> Self:
        """A kernel waits for the fence of the one before, steps for their rows."""
        other = copy.copy(self)
        *_, last = result
        if last.size == 1:
            other.fence = last
        else:
            other.rows = (waiting(self.rows[0], result[:1]), *self.rows[1:])
        return other

    def written(self, results: Sequence[mx.array], fence: mx.array) -> list[mx.array]:
        """The result of a kernel: ``results``, the pool that it wrote to, and its fence. Whoever
        evaluates one of them has the kernel run."""
        found: list[mx.array] = mx.depends([*results, self.pool, fence], [fence])
        return found

    def stepped_over(self, results: Sequence[mx.array]) -> list[mx.array]:
        """The result of MLX's operations: ``results`` and the pool of new states. Whoever evaluates
        ``results`` has the states computed too. The pool is returned as the array object that was
        assigned to: MLX would copy the whole pool at the next write if another referred to it."""
        return [*mx.depends(list(results), [self.stepped]), self.stepped]
