"""Which experts rows have, and sums of what they gave, by the exact Metal text."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import compiled_ahead, simulated_kernels

from quire.kernels.routing import (
    Routing,
    Shared,
    top_experts,
    top_experts_by_steps,
    weigh_experts,
    weigh_experts_by_steps,
)

# rows, experts, and how they are chosen
CHOICES = [
    (1, 4, Routing(1, normalised=False)),
    (3, 8, Routing(8, normalised=True)),
    (2, 33, Routing(32, normalised=True)),
    (2, 60, Routing(4, normalised=False)),
    (5, 256, Routing(8, normalised=True)),
    (1, 1024, Routing(10, normalised=True, scale=0.5)),
    (3, 64, Routing(4, normalised=True, sigmoid=True, scale=1.8)),
    (1, 128, Routing(1, normalised=False, sigmoid=True)),
    (2, 32, Routing(4, normalised=True, sigmoid=True, epsilon=0.5)),
]
# rows, experts of each, values, what there is beside, whether they are sorted by experts
SUMS = [
    (1, 8, 64, "gated", False),
    (3, 2, 40, "", True),
    (2, 4, 2056, "shared", True),
    (300, 1, 8, "", False),
]


def chosen(rows: int, experts: int, routing: Routing) -> tuple[mx.array, mx.array | None]:
    random = np.random.default_rng(experts)
    logits = mx.array(random.normal(size=(rows, experts)) * 2).astype(mx.float32)
    bias = mx.array(random.normal(size=experts)).astype(mx.float32) if routing.sigmoid else None
    mx.eval(logits)
    return logits, bias


def summed(
    rows: int, count: int, dim: int, beside: str, is_sorted: bool
) -> tuple[mx.array, mx.array, Shared | None, mx.array | None]:
    random = np.random.default_rng(dim)

    def normal(*shape: int) -> mx.array:
        return mx.array(random.normal(size=shape)).astype(mx.float32)

    gates = normal(rows, 1) if beside == "gated" else None
    shared = Shared(normal(rows, dim), gates) if beside else None
    places = mx.array(random.permutation(rows * count), mx.uint32) if is_sorted else None
    return normal(rows * count, dim), normal(rows, count), shared, places


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    with compiled_ahead():
        for rows, experts, routing in CHOICES:
            logits, bias = chosen(rows, experts, routing)
            top_experts(logits, routing, bias)
        for case in SUMS:
            weigh_experts(*summed(*case))


@pytest.mark.parametrize(("rows", "experts", "routing"), CHOICES)
def test_the_highest_scores_are_chosen(rows: int, experts: int, routing: Routing) -> None:
    logits, bias = chosen(rows, experts, routing)
    with simulated_kernels(orders=1):
        found, weights = top_experts(logits, routing, bias)
        mx.eval(found, weights)
    expected, expected_weights = top_experts_by_steps(logits, routing, bias)
    for row in range(rows):
        by_expert = dict(zip(found[row].tolist(), weights[row].tolist(), strict=True))
        wanted = dict(zip(expected[row].tolist(), expected_weights[row].tolist(), strict=True))
        assert by_expert.keys() == wanted.keys()
        for expert, weight in wanted.items():
            assert by_expert[expert] == pytest.approx(weight, rel=1e-5, abs=1e-7)


def test_of_equal_scores_the_first_is_chosen_and_each_once() -> None:
    logits = mx.array([[1.0] * 40, [0.0] * 39 + [1.0], [-mx.inf] * 38 + [2.0, 1.0]])
    with simulated_kernels(orders=1):
        found, weights = top_experts(logits, Routing(2, normalised=True))
        mx.eval(found, weights)
    assert found.tolist() == [[0, 1], [39, 0], [38, 39]]
    np.testing.assert_allclose(weights[0], [0.5, 0.5])
    np.testing.assert_allclose(weights.sum(axis=1), [1.0] * 3, rtol=1e-6)


def test_experts_that_cannot_be_chosen_come_last_and_weigh_nothing() -> None:
    logits = mx.array([[2.0, *[-mx.inf] * 39], [*[-mx.inf] * 39, 2.0]])
    with simulated_kernels(orders=1):
        found, weights = top_experts(logits, Routing(3, normalised=False))
        mx.eval(found, weights)
    assert found.tolist() == [[0, 1, 2], [39, 0, 1]]
    assert weights.tolist() == [[1, 0, 0]] * 2


def test_a_bias_chooses_nothing_that_is_no_number() -> None:
    logits, bias = mx.array([[mx.nan, *[0.0] * 7]]), mx.array([3.0, *[0.0] * 7])
    with simulated_kernels(orders=1):
        found, _ = top_experts(logits, Routing(2, normalised=True, sigmoid=True), bias)
        mx.eval(found)
    assert found.tolist() == [[1, 2]]


def test_rows_without_numbers_have_experts_that_there_are() -> None:
    """What they give is no number either; but no other memory is read for them."""
    logits = mx.full((2, 40), mx.nan)
    with simulated_kernels(orders=1):
        found, _ = top_experts(logits, Routing(4, normalised=True))
        mx.eval(found)
    assert max(found.flatten().tolist()) < 40


@pytest.mark.parametrize("case", SUMS)
def test_what_experts_gave_is_weighed(case: tuple[int, int, int, str, bool]) -> None:
    given = summed(*case)
    with simulated_kernels(orders=1):
        found = weigh_experts(*given)
        mx.eval(found)
    np.testing.assert_allclose(found, weigh_experts_by_steps(*given), rtol=1e-5, atol=1e-5)
