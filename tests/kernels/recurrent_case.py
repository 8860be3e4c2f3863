"""Segments of rows with states in shuffled slots, small enough to simulate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from quire.kernels.segments import CONTINUED, EMPTY, Segments
from quire.kernels.tree import to_device


@dataclass(frozen=True)
class Layout:
    """How a step's rows are cut into segments.

    Attributes:
        lengths: rows of each.
        begins: which begin with an empty state.
        continues: which go on where the one before ends.
        drops: which keep nothing.
        moves: whether states go to another slot than they came from.
        padding: rows behind the last.
    """

    lengths: tuple[int, ...]
    begins: tuple[int, ...] = ()
    continues: tuple[int, ...] = ()
    drops: tuple[int, ...] = ()
    moves: bool = True
    padding: int = 0

    @property
    def num_rows(self) -> int:
        return sum(self.lengths) + self.padding

    @property
    def num_slots(self) -> int:
        return 2 * len(self.lengths) + 3

    def slots(self) -> tuple[list[int], list[int]]:
        """Sources and targets, none of which is the other's of another segment."""
        count = len(self.lengths)
        slots = 1 + np.random.default_rng(7).permutation(self.num_slots - 1)
        sources, targets = slots[:count].tolist(), slots[count : 2 * count].tolist()
        if not self.moves:
            targets = list(sources)
        for each in self.begins:
            sources[each] = EMPTY
        for each in self.continues:
            sources[each] = CONTINUED
        for each in self.drops:
            targets[each] = EMPTY
        return sources, targets

    def segments(self, *, keep_lengths: bool = True) -> Segments:
        return to_device(Segments.of(self.lengths, *self.slots(), keep_lengths=keep_lengths))

    def state(self, pool: mx.array, state: object, index: int) -> mx.array:
        """What segment ``index`` begins with, ``state`` being what the one before ends with."""
        source = self.slots()[0][index]
        if source == CONTINUED:
            assert isinstance(state, mx.array)
            return state
        return mx.zeros_like(pool[0]) if source == EMPTY else pool[source]


def check_states(
    pool: mx.array,
    before: mx.array,
    states: Mapping[int, mx.array],
    *,
    atol: float,
    keeps_empty: bool = True,
) -> None:
    """The pool holds ``states`` by slot, and what it held before in all others.

    Args:
        keeps_empty: whether nothing is written to the slot of the empty state.
    """
    for slot in range(EMPTY if keeps_empty else EMPTY + 1, len(before)):
        wanted = before[slot] if slot == EMPTY else states.get(slot, before[slot])
        np.testing.assert_allclose(
            pool[slot].astype(mx.float32), wanted.astype(mx.float32), rtol=0, atol=atol
        )


DECODES = Layout((1, 1, 1), begins=(1,), drops=(2,))
MIXED = Layout((1, 1, 17, 2, 40), begins=(3,), drops=(1,), padding=3)
CUT = Layout((1, 5, 3, 0, 1, 33, 2), begins=(1,), continues=(2, 3, 4, 6), drops=(4,))
COPIES = Layout((1, 0, 3), moves=True)
IN_PLACE = Layout((1, 2, 21), moves=False)
LAYOUTS: Sequence[Layout] = (DECODES, MIXED, CUT, COPIES, IN_PLACE)
