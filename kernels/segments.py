"""Which rows of a step belong to which sequence, and where the sequences' states stand.

Recurrent layers keep one state per sequence, of a fixed size, in a slot of a pool: (slots, ...),
one pool for each layer and kind of state. A step reads a segment's state from one slot and leaves
it in another, which may be the same: to keep a state, write the next one elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        lengths: number of rows of each, for computation by MLX's operations, which is another for
            other lengths. None is for kernels, or for as many rows as segments, of one row each.
    """

    starts: Array
    sources: Array
    targets: Array
    lengths: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        sources: Sequence[int],
        targets: Sequence[int],
        *,
        keep_lengths: bool = True,
    ) -> Segments:
        """On the host. ``keep_lengths`` is for computation by MLX's operations."""
        return cls(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            np.array(sources, np.int32),
            np.array(targets, np.int32),
            tuple(lengths) if keep_lengths else None,
        )
