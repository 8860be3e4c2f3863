"""Sampling: temperature and top-p over a whole vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from quire.kernels.draws import Draws
from quire.kernels.sampling import sample_tokens, take_likeliest
from quire.kernels.upload import begin_step
from quire.loadtest.kernels.case import Case, Profile

_VOCAB = {"gpu": 151_936, "cpu": 32_000}
_ROWS = {"gpu": (1, 16, 64), "cpu": (1, 8)}
_TOP_P = 0.95


def sample_cases(profile: Profile) -> Iterator[Case]:
    """One sequence's logits, then those of whole batches."""
    place = "gpu" if profile.gpu else "cpu"
    for rows in _ROWS[place][:1] if profile.quick else _ROWS[place]:
        yield _case(profile, rows, _VOCAB[place])
        yield _greedy(profile, rows, _VOCAB[place])


class _Inputs:
    def __init__(self, rows: int, vocab: int, dtype: mx.Dtype, seed: int) -> None:
        # Standard deviation 3: a few hundred tokens share most of the probability.
        self.logits = mx.random.normal((rows, vocab), dtype, scale=3.0, key=mx.random.key(seed))
        numbers = np.random.default_rng(seed).integers(0, 2**24, rows)
        mx.eval(self.logits)
        self.draws = Draws(
            temperature=np.ones(rows),
            top_k=np.zeros(rows, np.int64),
            top_p=np.full(rows, _TOP_P),
            min_p=np.zeros(rows),
            uniform=numbers.astype(np.float32) / np.float32(2**24),
        )


def _chain(inputs: _Inputs, result: mx.array) -> _Inputs:
    """The same logits, written anew once the tokens of another call are there: a model's head
    writes them just before they are read, too."""
    chained = copy.copy(inputs)
    zero = (result[0] * 0).astype(inputs.logits.dtype)
    chained.logits = inputs.logits + zero
    return chained


def _quire(x: _Inputs) -> mx.array:
    # As in the engine, parameters go through memory of steps before. Where these have not ended,
    # in a chain, a call may see those of a later one, which differ by their random numbers only.
    begin_step()
    return sample_tokens(x.logits, x.draws)


def _sort(x: _Inputs) -> mx.array:
    """Everything in order of probability, cut where top-p is reached, and one draw."""
    order = mx.argsort(-x.logits, axis=-1)
    chances = mx.softmax(mx.take_along_axis(x.logits, order, axis=-1).astype(mx.float32), axis=-1)
    reached = mx.cumsum(chances, axis=-1)
    reached = mx.cumsum(mx.where(reached - chances < _TOP_P, chances, 0.0), axis=-1)
    place = (reached <= reached[:, -1:] * mx.array(x.draws.uniform)[:, None]).sum(axis=-1)
    return mx.take_along_axis(order, place[:, None], axis=-1)[:, 0]


def _greedy(profile: Profile, rows: int, vocab: int) -> Case:
    """Every row takes its likeliest token."""
    return Case(
        operation="sample",
        name=f"{rows} x {vocab} greedy",
        labels={"rows": rows, "vocab": vocab, "greedy": "yes"},
        inputs=partial(_Inputs, rows, vocab, profile.dtype),
        variants={
            "argmax": lambda x: mx.argmax(x.logits, axis=-1).astype(mx.int32),
            "quire": lambda x: take_likeliest(x.logits),
        },
        chain=_chain,
        baselines=("argmax",),
        bytes_moved=rows * vocab * profile.dtype.size,
        tolerance=0.0,
        memory=4 * rows * vocab * profile.dtype.size,
    )


def _case(profile: Profile, rows: int, vocab: int) -> Case:
    moved = rows * vocab * profile.dtype.size
    return Case(
        operation="sample",
        name=f"{rows} x {vocab}",
        labels={"rows": rows, "vocab": vocab, "top_p": str(_TOP_P)},
        inputs=partial(_Inputs, rows, vocab, profile.dtype),
        variants={"sort": _sort, "quire": _quire},
        chain=_chain,
        baselines=("sort",),
        bytes_moved=moved,
        tolerance=None,  # the order of the tokens differs, and with it what a number draws
        memory=32 * rows * vocab,
    )
