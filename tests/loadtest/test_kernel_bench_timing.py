"""Kernel timings are of work that was done."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from quire.kernels.choice.problem import Problem, relative_difference
from quire.kernels.choice.timing import (
    NotEvaluatedError,
    check_evaluated,
    flatten,
    is_pending,
    measure,
)
from quire.loadtest.kernels.bench import run_case
from quire.loadtest.kernels.cases import Case
from quire.loadtest.kernels.results import CaseResult, VariantResult


class Pair(NamedTuple):
    keys: mx.array
    values: mx.array


@dataclasses.dataclass
class Routed:
    output: mx.array
    loads: dict[str, list[mx.array]]


class Cache:
    """Not a tree: MLX would leave what is inside lazy."""

    def __init__(self, keys: mx.array) -> None:
        self.keys = keys


def _ones() -> mx.array:
    ones = mx.ones((8,))
    mx.eval(ones)
    return ones


def _result(inputs: Any, result: Any) -> Any:
    """The chain of calls that take nothing but the result before."""
    return result


def _next(inputs: tuple[int, mx.array], result: mx.array) -> tuple[int, mx.array]:
    return inputs[0], result


def test_every_array_of_a_tree_is_found() -> None:
    a, b, c, d = (mx.array([float(i)]) for i in range(4))
    found = flatten([Pair(a, b), Routed(c, {"experts": [d]})])
    assert [array.item() for array in found] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("result", [None, 1.5, "x", Cache(mx.array(1.0)), [Cache(mx.array(1.0))]])
def test_a_result_that_cannot_be_evaluated_is_refused(result: object) -> None:
    with pytest.raises(NotEvaluatedError, match="cannot be evaluated"):
        flatten(result)


def test_pending_means_that_something_is_left_to_compute() -> None:
    x = _ones()
    y, z = x + 1, x * 2
    assert is_pending([x, y])
    mx.eval(y)
    assert not is_pending([x, y])
    assert is_pending([y, z])


def test_a_result_kept_from_an_earlier_call_is_found_out() -> None:
    kept: list[mx.array] = []

    def remembers(x: mx.array) -> mx.array:
        if not kept:
            kept.append(x + 1)
        return kept[0]

    with pytest.raises(NotEvaluatedError, match="call 2 left nothing to compute"):
        check_evaluated(remembers, [_ones()], _result)


def test_a_result_of_the_function_is_kept_from_later_writes() -> None:
    pages = mx.zeros((4,))

    def writes(x: mx.array) -> mx.array:
        pages[0] = pages[0] + x[0]
        return pages

    (first,) = check_evaluated(writes, [_ones()], _result)
    assert first[0].item() == 1.0
    assert pages[0].item() > 1.0


def test_every_input_is_used_and_every_figure_has_its_samples() -> None:
    seen: list[int] = []

    def function(item: tuple[int, mx.array]) -> mx.array:
        seen.append(item[0])
        return item[1] + 1

    inputs = [(0, _ones()), (1, _ones())]
    timing = measure({"a": function}, inputs, runs=6, chain=_next)["a"]
    assert len(timing.latency_us) == len(timing.throughput_us) == len(timing.host_us) == 6
    assert all(sample > 0 for sample in timing.latency_us + timing.throughput_us + timing.host_us)
    assert timing.calls >= 2
    assert set(seen) == {0, 1}


def test_each_call_of_a_chain_takes_the_next_inputs_and_the_result_before() -> None:
    calls: list[tuple[int, mx.array, mx.array]] = []

    def function(item: tuple[int, mx.array]) -> mx.array:
        calls.append((*item, item[1] + 1))
        return calls[-1][2]

    inputs = [(0, _ones()), (1, _ones()), (2, _ones())]
    timing = measure({"a": function}, inputs, runs=2, chain=_next)["a"]
    assert len(timing.throughput_us) == 2
    assert timing.calls in range(16, 65)
    # The last sample, then the calls that the host's share was timed on.
    last = next(end for end in range(len(calls), 0, -1) if calls[end - 1][2][0].item() > 2)
    sample = calls[last - timing.calls : last]
    assert [index for index, _, _ in sample] == [i % 3 for i in range(timing.calls)]
    assert sample[0][1] is inputs[0][1]
    assert all(b[1] is a[2] for a, b in itertools.pairwise(sample))
    assert not is_pending([result for _, _, result in sample])
    assert sample[-1][2].tolist() == [timing.calls + 1.0] * 8


def test_a_chain_of_calls_that_do_not_need_each_other_is_refused() -> None:
    with pytest.raises(NotEvaluatedError, match="does not depend on all the others"):
        measure({"a": lambda x: x + 1}, [_ones()], runs=1, chain=lambda x, result: x)


def test_a_chain_that_is_computed_while_it_is_built_is_refused() -> None:
    def reads(x: mx.array) -> mx.array:
        return x * (1 / x[0].item())

    with pytest.raises(NotEvaluatedError, match="before the clock started"):
        check_evaluated(reads, [_ones()], _result)


def test_a_variant_that_cannot_be_chained_does_not_stop_the_others() -> None:
    variants = {"reads": lambda x: x.row + x.row[0].item()}
    result = _run(_case(variants))
    assert "before the clock started" in (_variant(result, "reads").failure or "")
    assert _variant(result, "plain").failure is None


class Row(Problem):
    def __init__(self, row: mx.array, num_bytes: int = 64) -> None:
        self.row, self.num_bytes = row, num_bytes

    def expected(self) -> list[npt.NDArray[np.float64]]:
        return [np.full(8, 2.0)]

    def chained(self, result: Sequence[mx.array]) -> Row:
        assert isinstance(result, mx.array)
        return Row(result, self.num_bytes)


def _case(variants: dict[str, Callable[[Any], object]], num_bytes: int = 64) -> Case:
    return Case(
        operation="test",
        name="one",
        labels={"size": 8},
        inputs=lambda seed: Row(_ones(), num_bytes),
        variants={"plain": lambda x: x.row + 1, **variants},
        baselines=("plain",),
    )


def _run(case: Case, limit: float = float("inf")) -> CaseResult:
    return run_case(case, [case.inputs(0), case.inputs(1)], runs=3, limit=limit)


def _variant(result: CaseResult, name: str) -> VariantResult:
    return next(variant for variant in result.variants if variant.name == name)


def test_one_failing_variant_does_not_stop_the_others() -> None:
    def raises(x: Row) -> mx.array:
        raise RuntimeError("[compile] no such kernel")

    result = _run(
        _case({"lazy": lambda x: Cache(x.row), "raises": raises, "good": lambda x: 1 + x.row})
    )
    assert _variant(result, "lazy").failure == (
        "NotEvaluatedError: a result of type Cache cannot be evaluated"
    )
    assert _variant(result, "raises").failure == "RuntimeError: [compile] no such kernel"
    assert _variant(result, "lazy").latency_us == []
    good = _variant(result, "good")
    assert good.failure is None
    assert good.difference == 0
    assert len(good.throughput_us) == 3
    assert result.speed_against("plain", good) is not None
    assert result.speed_against("lazy", good) is None


def test_a_wrong_result_is_a_failure() -> None:
    result = _run(_case({"wrong": lambda x: x.row + 1.5, "short": lambda x: x.row[:4] + 1}))
    assert _variant(result, "wrong").failure == "differs from plain by 2.5e-01 of its peak"
    assert _variant(result, "short").failure == "differs from plain by inf of its peak"
    nan = _run(_case({"nan": lambda x: x.row + float("nan")}))
    assert "differs" in (_variant(nan, "nan").failure or "")


def test_work_that_the_result_does_not_depend_on_is_found_by_its_speed() -> None:
    def computes_something_else(x: Row) -> mx.array:
        x.row @ mx.broadcast_to(x.row[:, None], (8, 1 << 20))  # never evaluated
        return x.row + 1

    case = _case({"lazy": computes_something_else}, num_bytes=1 << 40)
    result = _run(case, limit=1e12)
    assert "more than this device's memory can do" in (_variant(result, "lazy").failure or "")
    # What may lie in a cache has no such limit.
    small = _run(_case({"small": lambda x: x.row + 1}, num_bytes=1 << 20), limit=1.0)
    assert _variant(small, "small").failure is None


def test_differences_are_relative_to_the_peak() -> None:
    expected = [np.array([[0.0, -4.0], [2.0, 1.0]])]
    assert relative_difference([np.array([[0.0, -4.0], [2.0, 2.0]])], expected) == 0.25
    assert relative_difference([np.array([0.0])], [np.array([0.0])]) == 0
    # What comes after does not count; what is missing, or has another shape, does.
    assert relative_difference([*expected, np.array([9.0])], expected) == 0
    assert relative_difference([], expected) == math.inf
    assert relative_difference([np.array([0.0, -4.0, 2.0, 1.0])], expected) == math.inf
    assert relative_difference([expected[0] * np.nan], expected) == math.inf


def test_baselines_must_be_variants() -> None:
    with pytest.raises(ValueError, match="baselines"):
        Case("test", "one", lambda seed: Row(_ones()), {"a": lambda x: x}, ("b",))


def test_listing_the_commands_takes_no_device() -> None:
    """`quire bench serve` runs beside a server: importing MLX would take the device."""
    code = "import sys, quire.loadtest.command; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
