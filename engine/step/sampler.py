"""Drawing the next token of every row, each by its own parameters.

The randomness is one uniform number per row, which is a hash of (seed, output index): no state, so
a preempted or batched request draws what it would have drawn alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.engine.step.penalties import Penalties, penalize, plan_penalties
from quire.engine.step.restrictions import Restrictions, plan_restrictions, restrict
from quire.engine.step_batch import Chunk
from quire.kernels.draws import MIN_TEMPERATURE, Draws
from quire.kernels.padding import round_up_to_power_of_two
from quire.kernels.sample_tokens import is_filtered, samples_by_kernel, take_likeliest
from quire.kernels.sampling import draw_by_table, kernel_table, num_steps
from quire.kernels.sampling_reference import sample_reference
from quire.kernels.tree import Array

_LEAST_BIASED = 8


@dataclass(frozen=True)
class SamplingInputs:
    """How R rows are drawn; a node of a :mod:`quire.kernels.tree`.

    Attributes:
        table: (R, 8) float32 for the kernels; None: every row takes its likeliest token.
        num_steps: of the kernels.
        bias, penalties, restrictions: in the order in which they change the logits; None: no row
            has any.
    """

    table: Array | None
    num_steps: int
    bias: Bias | None = None
    penalties: Penalties | None = None
    restrictions: Restrictions | None = None


@dataclass(frozen=True)
class Bias:
    """A node of a :mod:`quire.kernels.tree`.

    Attributes:
        places: (n, 2) int32, rows and tokens.
        values: (n,) float32, which are added there.
    """

    places: Array
    values: Array


def plan_sampling(
    rows: Sequence[Chunk], num_rows: int, vocab_size: int
) -> tuple[SamplingInputs, Draws | None]:
    """On the host, for ``num_rows`` rows of logits, the first of them those of ``rows``.

    Also returns the draws, where they are not all greedy.
    """
    changed = [
        (i, row)
        for i, row in enumerate(rows)
        if row.banned_token_ids or row.sampling.changes_logits
    ]
    changes = (
        _plan_bias(changed),
        plan_penalties(changed, num_rows),
        plan_restrictions(changed, vocab_size),
    )
    params = [row.sampling for row in rows]
    if all(p.temperature < MIN_TEMPERATURE or p.top_k == 1 for p in params):
        return SamplingInputs(None, 0, *changes), None
    draws = Draws(
        temperature=np.array([p.temperature for p in params], np.float64),
        top_k=np.array([p.top_k for p in params], np.int64),
        top_p=np.array([p.top_p for p in params], np.float64),
        min_p=np.array([p.min_p for p in params], np.float64),
        uniform=uniforms([row.seed for row in rows], [row.output_index for row in rows]),
    )
    table = kernel_table(draws, num_rows)
    return SamplingInputs(table, num_steps(table, vocab_size), *changes), draws


def _plan_bias(rows: Sequence[tuple[int, Chunk]]) -> Bias | None:
    biased = [
        (i, token, value) for i, row in rows for token, value in row.sampling.logit_bias.items()
    ]
    if not biased:
        return None
    size = round_up_to_power_of_two(len(biased), _LEAST_BIASED)
    places, values = np.zeros((size, 2), np.int32), np.zeros(size, np.float32)
    places[: len(biased)] = [place for *place, _ in biased]
    values[: len(biased)] = [value for _, _, value in biased]
    return Bias(places, values)


def sample(
    logits: mx.array, inputs: SamplingInputs, draws: Draws | None, previous: mx.array
) -> mx.array:
    """Draw one token per row.

    Args:
        logits: (R, vocab) float32, float16 or bfloat16
        inputs, draws: of :func:`plan_sampling`, the arrays on the device.
        previous: (n,) int32, the samples of the step before.

    Returns:
        (R,) int32 token ids; where no kernel draws only those of the rows that ``draws`` has.
    """
    if inputs.bias is not None:
        rows, tokens = inputs.bias.places.T
        logits = logits.astype(mx.float32).at[rows, tokens].add(inputs.bias.values)
    if inputs.penalties is not None:
        logits = penalize(logits, inputs.penalties, previous)
    if inputs.restrictions is not None:
        logits = restrict(logits, inputs.restrictions, previous)
    if draws is None:
        return take_likeliest(logits)
    if samples_by_kernel(logits, is_filtered(draws)):
        assert inputs.table is not None, "draws without a table"
        return draw_by_table(logits, inputs.table, inputs.num_steps)
    return sample_reference(logits[: len(draws.uniform)], draws)


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
