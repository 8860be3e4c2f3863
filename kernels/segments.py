"""Which rows of a step belong to which sequence, and where the sequences' states stand.

Recurrent layers keep one state per sequence, of a fixed size, in a slot of a pool: (slots, ...),
one pool for each layer and kind of state. A step reads a segment's state from one slot and leaves
it in another, which may be the same: to keep a state, write the next one elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from quire.kernels.tree import Array

# As a source, the state of a sequence that begins: zeros, whatever is in the slot. As a target,
# nothing is kept. Rows of padding have it as both.
EMPTY = 0
# As a source: the state that the segment before ends with. Its rows go on where those end.
CONTINUED = -1


@dataclass(frozen=True)
class Segments:
    """Consecutive rows of one sequence each, decodes and chunks of prompts alike.

    A node of a :mod:`quire.kernels.tree`. No slot may be the target of two segments, or the target
    of one and the source of another that does not continue it: they are computed at once. A segment
    without rows copies its state. Rows behind the last segment are padding, and give zeros.

    Attributes:
        starts: (S + 1,) int32, from 0: segment s has the rows from ``starts[s]`` up to
            ``starts[s + 1]``.
        sources: (S,) int32, the slot of the state before its first row, :data:`EMPTY` or
            :data:`CONTINUED`; the first segment continues none.
        targets: (S,) int32, the slot that its state goes to after its last row, or :data:`EMPTY`.
        lengths: number of rows of each, which MLX's operations must know, and kernels need not;
            None stands for as many rows as segments, none of which continues another.
        continued: which segments continue the one before, if ``lengths`` is known.
    """

    starts: Array
    sources: Array
    targets: Array
    lengths: tuple[int, ...] | None = None
    continued: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        sources: Sequence[int],
        targets: Sequence[int],
        *,
        keep_lengths: bool = True,
    ) -> Segments:
        """On the host; with ``keep_lengths`` for MLX's operations, in a graph of its own."""
        return cls(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            np.array(sources, np.int32),
            np.array(targets, np.int32),
            tuple(lengths) if keep_lengths else None,
            tuple(np.flatnonzero(np.array(sources) == CONTINUED).tolist()) if keep_lengths else (),
        )


Rows = Sequence[mx.array]  # (T, ...) each
Update = Callable[[Rows, mx.array], tuple[mx.array, mx.array]]


def update_states(
    pool: mx.array, segments: Segments, rows: Rows, one_row: Update, many_rows: Update
) -> mx.array:
    """Run a recurrence over all segments; ``pool`` holds the new states afterwards.

    Args:
        one_row: from a row of each of B sequences and (B, ...) states, y (B, ...) and new states.
        many_rows: from the rows of one sequence and its state (...), y and the new state.

    Returns:
        y of all rows.
    """
    sources = segments.sources
    is_kept = (sources > EMPTY).reshape(-1, *[1] * (pool.ndim - 1))
    states = mx.where(is_kept, pool[mx.maximum(sources, EMPTY)], mx.zeros((), pool.dtype))
    if segments.lengths is None:
        y, new = one_row(rows, states)
    else:
        y, new = _one_by_one(segments, rows, states, one_row, many_rows)
    pool[segments.targets] = new.astype(pool.dtype)
    return y


def _one_by_one(
    segments: Segments, rows: Rows, states: mx.array, one_row: Update, many_rows: Update
) -> tuple[mx.array, mx.array]:
    """Decodes, which come first, together; chunks one by one."""
    lengths, continued = segments.lengths or (), segments.continued
    decodes = 0
    while decodes < len(lengths) and lengths[decodes] == 1 and decodes not in continued:
        decodes += 1
    ys, new = [], []
    if decodes:
        y, after = one_row([x[:decodes] for x in rows], states[:decodes])
        ys.append(y)
        new.append(after)
    start = decodes
    for index in range(decodes, len(lengths)):
        state = new[-1][-1] if index in continued else states[index]
        end = start + lengths[index]
        if end > start:
            y, state = many_rows([x[start:end] for x in rows], state)
            ys.append(y)
        new.append(state[None])
        start = end
    if padding := rows[0].shape[0] - start:
        ys.append(mx.zeros((padding, *ys[0].shape[1:]), ys[0].dtype))
    return mx.concatenate(ys), mx.concatenate(new)


def cut_into_chunks(rows: mx.array, size: int) -> mx.array:
    """(T, heads, n) rows of one sequence as (heads, chunks, size, n) float32, with zeros behind the
    last row."""
    padding = -rows.shape[0] % size
    rows = mx.pad(rows.astype(mx.float32), [(0, padding), (0, 0), (0, 0)]).swapaxes(0, 1)
    return rows.reshape(rows.shape[0], -1, size, rows.shape[2])
