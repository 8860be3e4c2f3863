"""Which states a step reads and writes, as host arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.cache.state_pool import EMPTY_SLOT
from quire.engine.attention.rows import Rows
from quire.kernels.tree import Array


@dataclass(frozen=True)
class StatePlan:
    """A step's sequences as recurrent layers see them; a node of a :mod:`quire.kernels.tree`.

    A sequence has either one row among the decodes, which come first, or one prompt chunk behind
    them. The rows of a chunk may fall into pieces, after each of which its state is stored.

    Attributes:
        sources: (S,) int32, for each sequence the slot of its state before its first row.
        ends: (E,) int32, rows behind which a state is stored; None: behind every row.
        targets: (E,) int32, the slots those states go to, each another.
        windows: by the number n of rows that convolutions keep, (T, n + 1) int32: each row behind
            the n before it, as places among the S * n kept rows followed by the T new ones. Empty
            where every row is a sequence.
        pieces: rows of each piece of each chunk.
        num_decode_rows: decodes and the rows that pad them.
    """

    sources: Array
    ends: Array | None
    targets: Array
    windows: dict[int, Array]
    pieces: tuple[tuple[int, ...], ...]
    num_decode_rows: int

    @property
    def num_decodes(self) -> int:
        return len(self.targets) - sum(map(len, self.pieces))


def plan_states(rows: Rows, window_sizes: Iterable[int]) -> StatePlan:
    """How recurrent layers see ``rows``; any thread may ask.

    Args:
        window_sizes: how many rows the model's convolutions keep.
    """
    sources = [EMPTY_SLOT] * rows.num_decode_rows
    ends: list[int] = []
    targets: list[int] = []
    pieces: list[tuple[int, ...]] = []
    first = 0
    for moves in rows.state_moves:
        if len(ends) < len(rows.decodes):
            sources[first] = moves.source
        else:
            first = max(first, rows.num_decode_rows)
            sources.append(moves.source)
            bounds = [0, *(count for count, _ in moves.stores)]
            pieces.append(tuple(np.diff(bounds).tolist()))
        ends += [first + count - 1 for count, _ in moves.stores]
        targets += [slot for _, slot in moves.stores]
        first += moves.stores[-1][0]
    every_row = not pieces and len(ends) == len(rows)
    return StatePlan(
        sources=np.array(sources, np.int32),
        ends=None if every_row else np.array(ends, np.int32),
        targets=np.array(targets, np.int32),
        windows={n: _windows(n, rows, pieces) for n in window_sizes} if pieces else {},
        pieces=tuple(pieces),
        num_decode_rows=rows.num_decode_rows,
    )


def _windows(kept: int, rows: Rows, pieces: list[tuple[int, ...]]) -> npt.NDArray[np.int32]:
    lengths = [1] * rows.num_decode_rows + [sum(lengths) for lengths in pieces]
    found = np.zeros((len(rows), kept + 1), np.int32)
    back = np.arange(-kept, 1, dtype=np.int32)
    first = 0
    for sequence, length in enumerate(lengths):
        offsets = np.arange(length, dtype=np.int32)[:, None] + back
        new = len(lengths) * kept + first + offsets
        found[first : first + length] = np.where(offsets < 0, sequence * kept + kept + offsets, new)
        first += length
    return found
