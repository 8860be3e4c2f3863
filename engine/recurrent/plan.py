"""Which states a step reads and writes, as host arrays."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.cache.state_pool import EMPTY_SLOT
from quire.engine.attention.rows import Rows
from quire.kernels.padding import round_up_to_power_of_two
from quire.kernels.segments import CONTINUED, EMPTY, Segments
from quire.kernels.tree import Array

_LEAST_SEGMENTS = 8


@dataclass(frozen=True)
class SequenceRows:
    """A step's sequences, for operations that know nothing of slots.

    A sequence has either one row among the decodes, which come first, or one prompt chunk behind
    them. The rows of a chunk may fall into pieces, after each of which its state is stored.

    Attributes:
        sources: (S,) int32, for each sequence the slot of its state before its first row.
        ends: (E,) int32, rows behind which a state is stored; None: behind every row.
        targets: (E,) int32, the slots those states go to, each another.
        windows: by the number n of rows that a state keeps, (T, n + 1) int32: each row behind
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


@dataclass(frozen=True)
class StatePlan:
    """A node of a :mod:`quire.kernels.tree`.

    Attributes:
        segments: the sequences as the operations of :mod:`quire.kernels.recurrent` see them.
        rows: as all others do; None if there are none.
    """

    segments: Segments
    rows: SequenceRows | None


@dataclass(frozen=True)
class PlanOptions:
    """What a model's recurrent layers need.

    Attributes:
        in_place: whether kernels write all states.
        has_others: whether any operation is not one of :mod:`quire.kernels.recurrent`.
        window_sizes: numbers of rows that their states keep.
    """

    in_place: bool
    has_others: bool
    window_sizes: Collection[int]


def plan_states(rows: Rows, options: PlanOptions) -> StatePlan:
    """How recurrent layers see ``rows``; any thread may ask."""
    found = _sequence_rows(rows, options.window_sizes) if options.has_others else None
    return StatePlan(_segments(rows, options.in_place), found)


def _segments(rows: Rows, in_place: bool) -> Segments:
    """One for each decode, padding included, then one for each state that a prompt chunk stores.

    Where kernels compute them (``in_place``) they need no lengths, and their number is padded to
    one that recurs, so that the step's graph does.
    """
    count = rows.num_decodes
    padding = rows.num_decode_rows - count
    lengths = [1] * rows.num_decode_rows
    sources = [moves.source for moves in rows.state_moves[:count]] + [EMPTY] * padding
    targets = [moves.stores[-1][1] for moves in rows.state_moves[:count]] + [EMPTY] * padding
    prompts = rows.state_moves[count:]
    for moves in prompts:
        done = 0
        for num_tokens, slot in moves.stores:
            lengths.append(num_tokens - done)
            sources.append(CONTINUED if done else moves.source)
            targets.append(slot)
            done = num_tokens
    if prompts and in_place:
        padding = round_up_to_power_of_two(len(lengths), _LEAST_SEGMENTS) - len(lengths)
        lengths += [0] * padding
        sources += [EMPTY] * padding
        targets += [EMPTY] * padding
    keep_lengths = bool(prompts) and not in_place
    return Segments.of(lengths, sources, targets, keep_lengths=keep_lengths)


def _sequence_rows(rows: Rows, window_sizes: Collection[int]) -> SequenceRows:
    sources = [EMPTY_SLOT] * rows.num_decode_rows
    ends: list[int] = []
    targets: list[int] = []
    pieces: list[tuple[int, ...]] = []
    first = 0
    for moves in rows.state_moves:
        if len(ends) < rows.num_decodes:
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
    return SequenceRows(
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


def probe_plan() -> StatePlan:
    """The plan of two rows that begin two sequences, in slots 1 and 2."""
    sources, targets = [EMPTY, EMPTY], [1, 2]
    rows = SequenceRows(
        sources=np.array(sources, np.int32),
        ends=None,
        targets=np.array(targets, np.int32),
        windows={},
        pieces=(),
        num_decode_rows=2,
    )
    return StatePlan(Segments.of([1, 1], sources, targets, keep_lengths=False), rows)
