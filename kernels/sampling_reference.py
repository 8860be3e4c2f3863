"""Sampling in MLX operations: what a CPU runs, and what the kernels are held to.

Nothing is sorted whole: limits are found by partitions and by halving. `draws.py` tells how tokens
are weighed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.draws import MAX_Y, Draws

_NEVER = 1 << 30
# Least-squares fit of 2**-f over Chebyshev nodes of [0, 1], constant term first: 2e-9 relative.
_COEFFICIENTS = (
    0.9999999981040864,
    -0.6931470101900395,
    0.24022393909837672,
    -0.05548930914203722,
    0.009576802341940156,
    -0.0012728723503744313,
    0.00010845304579503207,
)
# What a CPU's caches hold: logits that are worked on at a time.
_PIECE = 1 << 18
# Up to here sorting is cheaper than halving.
_SORTED = 1024
_BLOCK = 64


def sample_reference(logits: mx.array, draws: Draws) -> mx.array:
    """Draw one token per row.

    Args:
        logits: (R, vocab) float32, float16 or bfloat16; -inf is never drawn beside a finite logit.
        draws: the parameters of the R rows.

    Returns:
        (R,) int32 token ids.
    """
    table = draws.table()
    places: dict[_Kind, list[int]] = {}
    for row, kind in enumerate(_kinds(draws, logits.shape[-1])):
        places.setdefault(kind, []).append(row)
    rows_at_once = max(1, _PIECE // logits.shape[-1])
    drawn: list[mx.array] = []
    order: list[int] = []
    for kind, rows in places.items():
        for first in range(0, len(rows), rows_at_once):
            piece = rows[first : first + rows_at_once]
            if piece[-1] - piece[0] == len(piece) - 1:
                part = logits[piece[0] : piece[-1] + 1]  # a view, unlike logits[piece]
            else:
                part = logits[mx.array(piece)]
            if drawn:
                # Piece by piece: MLX would work on all of them in turns.
                part = mx.depends(part, drawn[-1])
            drawn.append(_draw(part, kind, table[piece]))
            order += piece
    tokens = mx.concatenate(drawn)
    return tokens if len(places) == 1 else tokens[mx.array(np.argsort(order))]


class _Kind(NamedTuple):
    """Rows that take the same operations."""

    greedy: bool
    top_k: int  # 0 where it excludes nothing
    by_top_p: bool
    by_min_p: bool


def _kinds(draws: Draws, vocab: int) -> Iterator[_Kind]:
    chosen = ~draws.greedy
    top_k = np.where(draws.top_k < vocab, draws.top_k, 0) * chosen
    columns = draws.greedy, top_k, (draws.top_p < 1) & chosen, (draws.min_p > 0) & chosen
    return map(_Kind, *(column.tolist() for column in columns))


def _draw(logits: mx.array, kind: _Kind, table: npt.NDArray[np.float32]) -> mx.array:
    if kind.greedy:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    logits = logits.astype(mx.float32)
    keys = _keys(logits, logits.max(axis=-1, keepdims=True), mx.array(table[:, 0:1]))
    weights = _weights(keys)
    best = keys
    if kind.top_k:
        best = _lowest(keys, kind.top_k)
        weights = _up_to(best[:, -1:], keys, weights)
    if kind.by_top_p:
        # A token stays if what comes before it is less than top-p of what top-k has left.
        mass = _share(weights.sum(axis=-1, keepdims=True), table[:, 2:3])
        weights = _up_to(_first_beyond(best, mx.maximum(mass, 1) - 1), keys, weights)
    if kind.by_min_p:
        limit = (table[:, 3:4].astype(np.float64) * 2**24).astype(np.int32)
        weights = _up_to(mx.array(limit), keys, weights)
    # Invert the cumulative distribution, in the order of the vocabulary.
    cumulative = mx.cumsum(weights, axis=-1)
    token = (cumulative <= _share(cumulative[:, -1:], table[:, 4:5])).sum(axis=-1)
    # Only logits that are not numbers lead beyond the end.
    return mx.minimum(token, logits.shape[-1] - 1).astype(mx.int32)


def _lowest(keys: mx.array, count: int) -> mx.array:
    """(R, count) the lowest of (R, n) ``keys``, the highest of them last."""
    rows, n = keys.shape
    if count * _BLOCK * 4 <= n:
        # They lie in the blocks with the lowest minima, which are few.
        keys = _padded(keys, _BLOCK).reshape(rows, -1, _BLOCK)
        blocks = mx.argpartition(keys.min(axis=-1), count - 1, axis=-1)[:, :count]
        keys = mx.take_along_axis(keys, blocks[:, :, None], axis=1).reshape(rows, -1)
    return mx.partition(keys, count - 1, axis=-1)[:, :count]


def _first_beyond(keys: mx.array, goal: mx.array) -> mx.array:
    """(R, 1) the lowest of (R, n) ``keys`` up to which the weights add up to more than ``goal``.

    Each round splits the keys at their median and goes on with the half in which that happens: as
    in quickselect the work is that of a few passes, but here the shapes depend on no data. If the
    weights do not suffice it is the highest key.
    """
    rounds = max(0, (keys.shape[-1] - 1) // _SORTED).bit_length()
    keys = _padded(keys, 1 << rounds)
    rows = mx.arange(keys.shape[0])[:, None]
    for _ in range(rounds):
        half = keys.shape[-1] // 2
        keys = mx.partition(keys, half - 1, axis=-1)
        mass = _weights(keys[:, :half]).sum(axis=-1, keepdims=True)
        upper = mass <= goal
        goal = goal - mass * upper
        keys = keys.reshape(-1, half)[(rows * 2 + upper).reshape(-1)]
    keys = mx.sort(keys, axis=-1)
    place = (mx.cumsum(_weights(keys), axis=-1) <= goal).sum(axis=-1, keepdims=True)
    return mx.take_along_axis(keys, mx.minimum(place, keys.shape[-1] - 1), axis=-1)


def _padded(keys: mx.array, multiple: int) -> mx.array:
    missing = -keys.shape[-1] % multiple
    return mx.pad(keys, [(0, 0), (0, missing)], constant_values=_NEVER) if missing else keys


@partial(mx.compile, shapeless=True)
def _keys(logits: mx.array, peak: mx.array, scale: mx.array) -> mx.array:
    return (mx.minimum((peak - logits) * scale, MAX_Y) * 2.0**24).astype(mx.int32)


@partial(mx.compile, shapeless=True)
def _weights(keys: mx.array) -> mx.array:
    """int64 2 ** (40 - key / 2**24), rounded down; 2 ** the fraction is a multiple of 2**-24."""
    fraction = mx.bitwise_and(keys, 2**24 - 1).astype(mx.float32) * 2.0**-24
    power = mx.array(_COEFFICIENTS[-1])
    for coefficient in _COEFFICIENTS[-2::-1]:
        power = power * fraction + coefficient
    mantissa = mx.left_shift((power * 2.0**24).astype(mx.int64), 16)
    # At most 63: the weight is 0 from 41 on.
    return mx.right_shift(mantissa, mx.minimum(mx.right_shift(keys, 24), 63).astype(mx.int64))


def _up_to(limit: mx.array, keys: mx.array, weights: mx.array) -> mx.array:
    return weights * (keys <= limit)


def _share(total: mx.array, part: npt.NDArray[np.float32]) -> mx.array:
    """total * part, rounded down, without a product of more than 62 bits."""
    numerator = mx.array((np.minimum(part, 1).astype(np.float64) * 2**31).astype(np.int64))
    low = mx.bitwise_and(total, 2**31 - 1)
    return mx.right_shift(total, 31) * numerator + mx.right_shift(low * numerator, 31)
