"""Ways to choose the experts of each row, and to sum what they gave."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.choice.problem import Float64Array, Problem, normal, to_float64
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
from quire.kernels.routing import (
    MAX_CHOSEN,
    MAX_EXPERTS,
    Routing,
    Shared,
    top_experts,
    top_experts_by_steps,
    weigh_experts,
    weigh_experts_by_steps,
)


class RoutingVariant(Enum):
    FUSED = "fused"
    SEPARATE = "separate"


class RoutingShape(NamedTuple):
    """``chosen`` of so many experts for each row."""

    rows: int
    experts: int
    chosen: int
    sigmoid: bool = False
    factored: bool = False  # each expert has a factor of its own

    def bucket(self) -> RoutingShape:
        return self._replace(rows=round_up(self.rows))


class MixtureShape(NamedTuple):
    """What ``chosen`` experts gave for each row, ``dim`` values each."""

    rows: int
    dim: int
    chosen: int
    shared: bool = False  # an expert that all rows have
    gated: bool = False  # by a sigmoid
    sorted: bool = False  # pairs lie in the order of their experts

    def bucket(self) -> MixtureShape:
        return self._replace(rows=round_up(self.rows))


class RoutingProblem(Problem):
    waits = "logits"

    def __init__(self, shape: RoutingShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        random = np.random.default_rng(seed)
        self.shape = shape
        self.routing = Routing(shape.chosen, True, shape.sigmoid, 2.5 if shape.sigmoid else 1.0)
        logits = random.uniform(-2, 0, (shape.rows, shape.experts))
        # Apart by more than any dtype rounds: which ones are chosen is not for rounding to say.
        for row in logits:
            best = random.choice(shape.experts, shape.chosen, replace=False)
            row[best] = 0.25 + np.arange(shape.chosen) * 2 / shape.chosen
        self.logits = mx.array(logits).astype(dtype)
        self.bias = None
        if shape.sigmoid:
            self.bias = mx.array(random.uniform(-0.02, 0.02, shape.experts), mx.float32)
        self.factors = None
        if shape.factored:
            self.factors = mx.array(random.uniform(0.5, 1.5, shape.experts)).astype(dtype)
            mx.eval(self.factors)
        mx.eval(self.logits)
        self.num_bytes = self.logits.nbytes + 8 * shape.rows * shape.chosen

    def dense(self, experts: mx.array, weights: mx.array) -> list[mx.array]:
        """(rows, experts) weights, zero where an expert is not chosen."""
        zeros = mx.zeros(self.logits.shape, weights.dtype)
        return [mx.put_along_axis(zeros, experts, weights, axis=1)]

    def expected(self) -> list[Float64Array]:
        (logits,) = to_float64([self.logits])
        if self.routing.sigmoid:
            scores = order = 1 / (1 + np.exp(-logits))
            if self.bias is not None:
                order = scores + to_float64([self.bias])[0]
        else:
            scores = order = np.exp(logits)
        chosen = np.argsort(-order, axis=1)[:, : self.shape.chosen]
        found = np.zeros(logits.shape)
        np.put_along_axis(found, chosen, np.take_along_axis(scores, chosen, 1), 1)
        found /= found.sum(axis=1, keepdims=True)
        if self.factors is not None:
            return [found * to_float64([self.factors])[0]]
        return [found * self.routing.scale]


class MixtureProblem(Problem):
    waits = "pairs"

    def __init__(self, shape: MixtureShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        random = mx.random.split(mx.random.key(seed), 5)
        self.pairs = normal((shape.rows * shape.chosen, shape.dim), dtype, random[0])
        self.weights = mx.softmax(normal((shape.rows, shape.chosen), dtype, random[1]), axis=-1)
        self.shared = None
        if shape.shared:
            gates = normal((shape.rows, 1), dtype, random[3]) if shape.gated else None
            self.shared = Shared(normal((shape.rows, shape.dim), dtype, random[2]), gates)
        self.places = None
        if shape.sorted:
            self.places = mx.random.permutation(len(self.pairs), key=random[4]).astype(mx.uint32)
            mx.eval(self.places)
        mx.eval(self.weights)
        self.num_bytes = self.pairs.nbytes + shape.rows * shape.dim * dtype.size

    def expected(self) -> list[Float64Array]:
        pairs, weights = to_float64([self.pairs, self.weights])
        if self.places is not None:
            pairs = pairs[np.array(self.places)]
        total = (pairs.reshape(*weights.shape, -1) * weights[:, :, None]).sum(axis=1)
        if self.shared is not None:
            (rows,) = to_float64([self.shared.rows])
            if self.shared.gates is not None:
                rows = rows / (1 + np.exp(-to_float64([self.shared.gates])[0]))
            total += rows
        return [total]


def _choose(
    function: Callable[..., tuple[mx.array, mx.array]], problem: RoutingProblem, settings: Settings
) -> list[mx.array]:
    given = problem.logits, problem.routing, problem.bias, problem.factors
    return problem.dense(*function(*given))


def _weigh(
    function: Callable[..., mx.array], problem: MixtureProblem, settings: Settings
) -> list[mx.array]:
    return [function(problem.pairs, problem.weights, problem.shared, problem.places)]


TOP_EXPERTS = Spec(
    name="top_experts",
    shape=RoutingShape,
    variants={
        RoutingVariant.FUSED: Variant(
            partial(_choose, top_experts),
            limits={
                "experts": Limit(max=MAX_EXPERTS),
                "chosen": Limit(max=MAX_CHOSEN),
            },
        ),
        RoutingVariant.SEPARATE: Variant(
            partial(_choose, top_experts_by_steps), Kind.STEPS, ANYWHERE
        ),
    },
    reference=RoutingVariant.SEPARATE,
    defaults=(Default(RoutingVariant.FUSED, GPUS),),
    problem=RoutingProblem,
    checked=(
        RoutingShape(1, 4, 2),
        RoutingShape(2, 100, 6, factored=True),
        RoutingShape(1, 64, 4, sigmoid=True),
    ),
    surveyed={"8 of 256": RoutingShape(8, 256, 8)},
)

WEIGH_EXPERTS = Spec(
    name="weigh_experts",
    shape=MixtureShape,
    variants={
        RoutingVariant.FUSED: Variant(
            partial(_weigh, weigh_experts), limits={"dim": Limit(multiple_of=8)}
        ),
        RoutingVariant.SEPARATE: Variant(
            partial(_weigh, weigh_experts_by_steps), Kind.STEPS, ANYWHERE
        ),
    },
    reference=RoutingVariant.SEPARATE,
    defaults=(Default(RoutingVariant.FUSED, GPUS),),
    problem=MixtureProblem,
    checked=(
        MixtureShape(3, 136, 4),
        MixtureShape(1, 64, 8, shared=True),
        MixtureShape(5, 64, 2, shared=True, gated=True, sorted=True),
    ),
    surveyed={"8 of dim 2048": MixtureShape(8, 2048, 8, shared=True, gated=True)},
)
