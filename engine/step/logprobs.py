"""Log-probabilities of tokens, for the rows of a step that are asked for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from quire.engine.messages import TokenLogprobs
from quire.engine.step_batch import StepBatch
from quire.kernels.padding import round_up_to_power_of_two
from quire.kernels.tree import Array

MAX_TOP = 20  # of the likeliest tokens


@dataclass(frozen=True)
class LogprobInputs:
    """A node of a :mod:`quire.kernels.tree`.

    Attributes:
        rows: (L,) int32, of the logits.
        tokens: (L,) int32, whose logarithms are wanted; -1: those that the rows draw.
        num_top: how many of the likeliest tokens are wanted.
    """

    rows: Array
    tokens: Array
    num_top: int


def plan_logprobs(batch: StepBatch, vocab_size: int) -> LogprobInputs | None:
    """On the host: of the tokens that are drawn, and behind them of those that prompts go on with,
    both in the batch's order. The logits' rows are those of ``batch.sampled``, then of
    ``batch.scored``."""
    rows = [
        row
        for row, chunk in enumerate(batch.sampled)
        if chunk.sequence.request.logprobs is not None
    ]
    scored = [token for chunk in batch.scored for token in chunk.scored_token_ids]
    tokens = [-1] * len(rows) + scored
    rows += range(len(batch.sampled), len(batch.sampled) + len(scored))
    if not rows:
        return None
    # More of the last one, so that their number recurs; and one of two numbers of top tokens.
    missing = round_up_to_power_of_two(len(rows), 4) - len(rows)
    num_top = min(MAX_TOP, vocab_size) if any(batch.reported) else 0
    return LogprobInputs(
        np.array(rows + rows[-1:] * missing, np.int32),
        np.array(tokens + tokens[-1:] * missing, np.int32),
        num_top,
    )


def logprobs_of(logits: mx.array, drawn: mx.array, inputs: LogprobInputs) -> mx.array:
    """Everything that is wanted, in a row.

    Args:
        logits: (R, vocab), as the model gave them.
        drawn: (n,) int32, the tokens of the first rows.
        inputs: of :func:`plan_logprobs`, the arrays on the device.

    Returns:
        (L + 2 * L * num_top,) int32: the tokens' logarithms as the bits of float32, the ids of the
        likeliest tokens, and theirs.
    """
    rows = inputs.rows
    values = logits[rows].astype(mx.float32)
    values = values - mx.logsumexp(values, axis=-1, keepdims=True)
    own = drawn[mx.minimum(rows, drawn.size - 1)]
    tokens = mx.where(inputs.tokens < 0, own, inputs.tokens)[:, None]
    parts = [mx.take_along_axis(values, tokens, axis=-1).view(mx.int32)]
    if inputs.num_top:
        top = mx.argpartition(-values, inputs.num_top - 1, axis=-1)[:, : inputs.num_top]
        parts.append(top.astype(mx.int32))
        parts.append(mx.take_along_axis(values, top, axis=-1).view(mx.int32))
    return mx.concatenate([part.reshape(-1) for part in parts])


def read_logprobs(
    values: Sequence[int], num_top: int, reported: Sequence[int]
) -> list[TokenLogprobs]:
    """What :func:`logprobs_of` gave; ``reported`` says how many of the likeliest tokens each of the
    first rows is to have."""
    bits = np.array(values, np.int32)
    rows = len(bits) // (1 + 2 * num_top)
    own = bits[:rows].view(np.float32).tolist()
    ids = bits[rows : rows * (1 + num_top)].reshape(rows, num_top)
    top = bits[rows * (1 + num_top) :].view(np.float32).reshape(rows, num_top)
    # The likeliest first, and of equals the one with the lower id.
    order = np.lexsort((ids, -top), axis=-1)
    ids, top = np.take_along_axis(ids, order, 1), np.take_along_axis(top, order, 1)
    return [
        TokenLogprobs(own[row], ids[row, :count].tolist(), top[row, :count].tolist())
        for row, count in enumerate(reported)
    ]
