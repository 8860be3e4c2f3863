"""Drawing the next token of every row, each by its own parameters.

The randomness is one uniform number per row, which is a hash of (seed, output index): no state, so
a preempted or batched request draws what it would have drawn alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.engine.step_batch import Chunk
from quire.kernels.draws import MIN_TEMPERATURE, Draws
from quire.kernels.sample_tokens import sample_tokens, take_likeliest
from quire.kernels.upload import upload


def sample(logits: mx.array, rows: Sequence[Chunk]) -> mx.array:
    """Draw one token per row.

    Args:
        logits: (R, vocab) float32, float16 or bfloat16
        rows: the R chunks whose last token the logits belong to.

    Returns:
        (R,) int32 token ids.
    """
    logits = _ban(logits, rows)
    params = [row.sampling for row in rows]
    if all(p.temperature < MIN_TEMPERATURE or p.top_k == 1 for p in params):
        return take_likeliest(logits)
    draws = Draws(
        temperature=np.array([p.temperature for p in params], np.float64),
        top_k=np.array([p.top_k for p in params], np.int64),
        top_p=np.array([p.top_p for p in params], np.float64),
        min_p=np.array([p.min_p for p in params], np.float64),
        uniform=uniforms([row.seed for row in rows], [row.output_index for row in rows]),
    )
    return sample_tokens(logits, draws)


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
    if not banned:
        return logits
    (where,) = upload([np.array(banned, np.int32)])
    allowed = logits[:]  # the caller keeps its own: an assignment changes the array object
    allowed[where[:, 0], where[:, 1]] = -mx.inf
    return allowed
