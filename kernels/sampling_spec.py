"""One token per row of (rows, vocab) logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Float64Array, Problem, normal, to_float64
from quire.kernels.choice.sizes import ModelSizes
from quire.kernels.choice.spec import (
    ANYWHERE,
    GPUS,
    Default,
    Kind,
    Limit,
    Settings,
    Spec,
    Variant,
    round_up,
)
from quire.kernels.draws import Draws
from quire.kernels.sampling import sample_on_gpu, take_likeliest_on_gpu
from quire.kernels.sampling_reference import sample_reference


class SampleVariant(Enum):
    KERNEL = "kernel"
    BISECT = "bisect"


class SampleShape(NamedTuple):
    rows: int
    vocab: int
    filtered: bool = True  # some row has a top-k, top-p or min-p
    greedy: bool = False  # every row takes its likeliest token

    def bucket(self) -> SampleShape:
        return SampleShape(round_up(self.rows), round_up(self.vocab), *self[2:])


class SampleProblem(Problem):
    """Logits and parameters: of all kinds if filtered, else temperatures only."""

    waits = "logits"

    def __init__(self, shape: SampleShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        self.shape = shape
        rng, size = np.random.default_rng(seed), shape.rows
        logits = normal((size, shape.vocab), mx.float32, mx.random.key(seed)) * 3
        self.logits = logits.astype(dtype)
        mx.eval(self.logits)
        self.num_bytes = self.logits.nbytes
        filtered = shape.filtered
        self.draws = Draws(
            temperature=rng.choice([0.3, 0.7, 1.0, 1.5], size),
            top_k=rng.choice([0, 5, 40, shape.vocab] if filtered else [0], size),
            top_p=rng.choice([1.0, 0.95, 0.6] if filtered else [1.0], size),
            min_p=rng.choice([0.0, 0.02] if filtered else [0.0], size),
            uniform=(rng.integers(0, 1 << 24, size) / (1 << 24)).astype(np.float32),
        )

    def expected(self) -> list[Float64Array]:
        if self.shape.greedy:
            return [rows.argmax(axis=-1).astype(np.float64) for rows in to_float64([self.logits])]
        tokens = []
        for weights, uniform in zip(self._weights(), self.draws.uniform, strict=True):
            ends = np.cumsum(weights)
            tokens.append(float(np.searchsorted(ends, float(uniform) * ends[-1], "right")))
        return [np.array(tokens)]

    def difference(self, found: Sequence[Float64Array], expected: Sequence[Float64Array]) -> float:
        """How far the random number lies outside the drawn token's stretch of the cumulative
        distribution; infinite if a filter excludes the token."""
        if self.shape.greedy:
            return super().difference(found, expected)
        worst = 0.0
        for weights, uniform, token in zip(
            self._weights(), self.draws.uniform, found[0].astype(int), strict=True
        ):
            if not 0 <= token < self.shape.vocab or weights[token] == 0:
                return math.inf
            end = weights[: token + 1].sum() / weights.sum()
            start = end - weights[token] / weights.sum()
            worst = max(worst, start - float(uniform), float(uniform) - end)
        return worst

    def _weights(self) -> Iterator[Float64Array]:
        (rows,) = to_float64([self.logits])
        for index, row in enumerate(rows):
            yield _kept_weights(row, self.draws, index)


def _kept_weights(logits: Float64Array, draws: Draws, row: int) -> Float64Array:
    """Weights relative to the likeliest token, 0 for those a filter of ``row`` excludes."""
    distance = (logits.max() - logits) * (np.log2(np.e) / draws.temperature[row])
    weights: Float64Array = 2.0**-distance
    order = np.sort(distance)
    # Equals stay together: they count as one to the precision of float32.
    slack = 2.0**-20
    if rank := int(draws.top_k[row]):
        weights[distance > order[min(rank, len(order)) - 1] + slack] = 0
    if draws.top_p[row] < 1:
        before = np.cumsum(2.0**-order) - 2.0**-order
        before, order = before[: np.count_nonzero(weights)], order[: np.count_nonzero(weights)]
        last = np.flatnonzero(before < draws.top_p[row] * weights.sum())[-1]
        weights[distance > order[last] + slack] = 0
    if draws.min_p[row] > 0:
        weights[distance > -np.log2(draws.min_p[row]) + slack] = 0
    return weights


def _kernel(problem: SampleProblem, settings: Settings) -> list[mx.array]:
    if problem.shape.greedy:
        return [take_likeliest_on_gpu(problem.logits)]
    # Parameters go through memory of steps before, as in the engine. Where these have not ended, in
    # a chain, a call may see those of a later one.
    return [sample_on_gpu(problem.logits, problem.draws)]


def _bisect(problem: SampleProblem, settings: Settings) -> list[mx.array]:
    if problem.shape.greedy:
        return [mx.argmax(problem.logits, axis=-1).astype(mx.int32)]
    return [sample_reference(problem.logits, problem.draws)]


def _tuned(sizes: ModelSizes, device: DeviceName, block_size: int) -> Iterator[SampleShape]:
    for rows in (1, 8) if device == "cpu" else (1, 16, 64):
        for filtered in (True, False):
            yield SampleShape(rows, sizes.vocab, filtered)
        yield SampleShape(rows, sizes.vocab, filtered=False, greedy=True)


SAMPLE = Spec(
    name="sample",
    shape=SampleShape,
    variants={
        SampleVariant.KERNEL: Variant(_kernel),
        SampleVariant.BISECT: Variant(_bisect, Kind.STEPS, ANYWHERE),
    },
    reference=SampleVariant.BISECT,
    # On an H200 MLX's argmax takes 230 us for 16 rows of 151,936 logits, and 24 us for one (CUPTI).
    # Metal's has not been measured.
    defaults=(
        Default(SampleVariant.BISECT, ("metal",), {"greedy": Limit(values=(True,))}),
        Default(SampleVariant.KERNEL, GPUS),
    ),
    problem=SampleProblem,
    checked=(
        SampleShape(64, 1500, True),
        SampleShape(4, 300, False),
        SampleShape(3, 1500, False, greedy=True),
    ),
    surveyed={
        "filtered": SampleShape(16, 151936, True),
        "unfiltered": SampleShape(16, 151936, False),
        "greedy": SampleShape(16, 151936, False, greedy=True),
    },
    tuned=_tuned,
)
