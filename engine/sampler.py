"""Drawing the next token of every row, each by its own parameters.

In descending order of probability top-k, top-p and min-p all keep a prefix, so the shortest one
wins. The draw inverts the cumulative distribution at one uniform number per row, which is a hash of
(seed, output index): no state, so a preempted or batched request draws what it would have drawn
alone. Rows take their path by their own parameters, never by their neighbours'.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.engine.messages import SamplingParams
from quire.engine.step_batch import Chunk

# Below this, dividing by the temperature overflows float32 and only the best token has any weight.
_MIN_TEMPERATURE = 1e-5
# With a top-k up to this, only that many candidates are sorted.
_MAX_CANDIDATES = 1024


def sample(logits: mx.array, rows: Sequence[Chunk]) -> mx.array:
    """Draw one token per row.

    Args:
        logits: (R, vocab)
        rows: the R chunks whose last token the logits belong to.

    Returns:
        (R,) int32 token ids.
    """
    logits = _ban(logits.astype(mx.float32), rows)
    paths: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        paths.setdefault(_path(row.sampling), []).append(index)
    drawn = []
    order: list[int] = []
    for path, members in paths.items():
        part = logits if len(paths) == 1 else logits[mx.array(members)]
        drawn.append(_PATHS[path](part, [rows[i] for i in members]).astype(mx.int32))
        order += members
    if len(drawn) == 1:
        return drawn[0]
    return mx.concatenate(drawn)[mx.array(np.argsort(order))]


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> npt.NDArray[np.float32]:
    """One number in [0, 1) per (seed, index), by splitmix64 (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        state = np.array([seed & (2**64 - 1) for seed in seeds], np.uint64)
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state + np.array(indices, np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _ban(logits: mx.array, rows: Sequence[Chunk]) -> mx.array:
    banned = [(i, token) for i, row in enumerate(rows) for token in row.banned_token_ids]
    if banned:
        where = mx.array(banned)
        logits[where[:, 0], where[:, 1]] = -mx.inf
    return logits


def _path(params: SamplingParams) -> str:
    if params.temperature < _MIN_TEMPERATURE or params.top_k == 1:
        return "greedy"
    if 0 < params.top_k <= _MAX_CANDIDATES:
        return "candidates"
    if params.top_k or params.top_p < 1:
        return "sorted"
    return "whole"


def _greedy(logits: mx.array, rows: Sequence[Chunk]) -> mx.array:
    return mx.argmax(logits, axis=-1)


def _whole(logits: mx.array, rows: Sequence[Chunk]) -> mx.array:
    """No prefix to find: draw in vocabulary order, without sorting. Min-p needs no order."""
    weights = _weights(logits, rows)
    weights = mx.where(weights >= _column([r.sampling.min_p for r in rows]), weights, 0.0)
    return _invert(mx.cumsum(weights, axis=-1), rows)


def _sorted(logits: mx.array, rows: Sequence[Chunk]) -> mx.array:
    return _filtered(logits, mx.argsort(-logits, axis=-1), rows)


def _candidates(logits: mx.array, rows: Sequence[Chunk]) -> mx.array:
    if logits.shape[-1] <= _MAX_CANDIDATES:
        return _sorted(logits, rows)
    best = mx.argpartition(-logits, kth=_MAX_CANDIDATES - 1, axis=-1)[:, :_MAX_CANDIDATES]
    order = mx.argsort(-mx.take_along_axis(logits, best, axis=-1), axis=-1)
    return _filtered(logits, mx.take_along_axis(best, order, axis=-1), rows)


def _filtered(logits: mx.array, order: mx.array, rows: Sequence[Chunk]) -> mx.array:
    """``order`` (R, n) holds each row's likeliest tokens, best first."""
    params = [row.sampling for row in rows]
    weights = _weights(mx.take_along_axis(logits, order, axis=-1), rows)
    rank = mx.arange(order.shape[-1])[None]
    weights = mx.where(rank < _column([p.top_k or order.shape[-1] for p in params]), weights, 0.0)
    # A token stays if what comes before it has not reached top-p of what top-k has left.
    cumulative = mx.cumsum(weights, axis=-1)
    limit = _column([p.top_p for p in params]) * cumulative[:, -1:]
    keep = (cumulative - weights < limit) & (weights >= _column([p.min_p for p in params]))
    keep = keep | (rank == 0)
    choice = _invert(mx.cumsum(mx.where(keep, weights, 0.0), axis=-1), rows)
    return mx.take_along_axis(order, choice[:, None], axis=-1)[:, 0]


def _weights(logits: mx.array, rows: Sequence[Chunk]) -> mx.array:
    """Probabilities relative to the likeliest token, which has weight 1."""
    inverse = _column([1.0 / row.sampling.temperature for row in rows])
    return mx.exp((logits - logits.max(axis=-1, keepdims=True)) * inverse)


def _invert(cumulative: mx.array, rows: Sequence[Chunk]) -> mx.array:
    """The first index whose cumulative weight exceeds u times the total."""
    draws = uniforms([row.seed for row in rows], [row.output_index for row in rows])
    target = mx.array(draws)[:, None] * cumulative[:, -1:]
    return (cumulative <= target).sum(axis=-1)


def _column(values: list[float] | list[int]) -> mx.array:
    return mx.array(values)[:, None]


_PATHS = {"greedy": _greedy, "whole": _whole, "candidates": _candidates, "sorted": _sorted}
