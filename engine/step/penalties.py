"""Logits of tokens that have come up in a row before.

The newest of a row's tokens may be known to the device only: it is taken from the samples of the
step before, and counts like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.engine.step_batch import Chunk
from quire.kernels.padding import round_up_to_power_of_two
from quire.kernels.tree import Array

Int32Array = npt.NDArray[np.int32]

_LEAST_SEEN, _LEAST_NEWEST = 64, 4


@dataclass(frozen=True)
class Penalties:
    """What R rows hold against tokens; a node of a :mod:`quire.kernels.tree`.

    Attributes:
        seen: (n, 4) int32, a row, a token, how often the row has drawn it, and whether it counts as
            seen without that.
        newest: (m, 2) int32, a row and where its token that the host does not know stands among
            the samples of the step before; None: all are known.
        strengths: (3, R) float32: what a drawn token loses, what it loses each time, and what a
            seen token's logit is divided or multiplied by.
    """

    seen: Array
    newest: Array | None
    strengths: Array


def plan_penalties(rows: Sequence[tuple[int, Chunk]], num_rows: int) -> Penalties | None:
    """On the host, of ``num_rows`` rows of logits those in ``rows``; None where no row has anything
    to hold against a token."""
    penalized = [(i, row) for i, row in rows if row.sampling.penalizes]
    if not penalized:
        return None
    seen = [np.insert(row.sequence.seen_tokens().table(), 0, i, axis=1) for i, row in penalized]
    newest = [(i, row.source_row) for i, row in penalized if row.source_row >= 0]
    strengths = np.zeros((3, num_rows), np.float32)
    strengths[2] = 1
    for i, row in penalized:
        p = row.sampling
        strengths[:, i] = p.presence_penalty, p.frequency_penalty, p.repetition_penalty
    return Penalties(
        seen=_padded(np.concatenate(seen), _LEAST_SEEN),
        newest=_padded(np.array(newest, np.int32), _LEAST_NEWEST) if newest else None,
        strengths=strengths,
    )


def penalize(logits: mx.array, penalties: Penalties, previous: mx.array) -> mx.array:
    """The logits less what tokens have to lose.

    Args:
        logits: (R, vocab)
        penalties: of :func:`plan_penalties`, the arrays on the device.
        previous: (n,) int32, the samples of the step before.

    Returns:
        (R, vocab) float32; where nothing is held against a token, its logit is what it was.
    """
    rows, tokens, counts, in_prompt = penalties.seen.T
    if penalties.newest is not None:
        newest_rows, newest = penalties.newest[:, 0], previous[penalties.newest[:, 1]]
        num_rows = penalties.strengths.shape[1]
        newest_of = mx.full((num_rows,), -1, mx.int32)
        newest_of[newest_rows] = newest
        again = tokens == newest_of[rows]
        counts = counts + again
        # Of each row's newest token: one, or one more than before.
        count_of = mx.ones((num_rows,), mx.int32).at[rows].maximum(mx.where(again, counts, 1))
        rows = mx.concatenate([rows, newest_rows])
        tokens = mx.concatenate([tokens, newest])
        counts = mx.concatenate([counts, count_of[newest_rows]])
        in_prompt = mx.concatenate([in_prompt, mx.zeros_like(newest)])
    presence, frequency, repetition = penalties.strengths[:, rows]
    logits = logits.astype(mx.float32)[:]  # the caller keeps its own
    values = logits[rows, tokens]
    drawn = counts > 0
    repeated = mx.where(values > 0, values / repetition, values * repetition)
    values = mx.where(drawn | (in_prompt > 0), repeated, values)
    # A token may stand there twice, but then with one count: which of them is written is the same.
    logits[rows, tokens] = values - drawn * presence - counts * frequency
    return logits


def _padded(table: Int32Array, least: int) -> Int32Array:
    """With more of the last row, so that the number of rows recurs; at least one, of zeros."""
    if not len(table):
        table = np.zeros((1, table.shape[1]), np.int32)
    missing = round_up_to_power_of_two(len(table), least) - len(table)
    return np.concatenate([table, np.repeat(table[-1:], missing, axis=0)])
