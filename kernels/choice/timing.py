"""Timing of lazy arrays: what is timed is really computed.

A function that returns MLX arrays has done nothing yet. Every result is evaluated as a flat list of
arrays, a result without arrays is refused, and so is one on which nothing is left to compute.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

RUNS = 20
_WARMUP = 3
# Calls of one throughput sample: enough to last this long.
_SAMPLE_US = 2000.0
# Calls of a chain, handed over a piece at a time: while the device computes one piece, the host
# encodes the next.
_PIECE = 8
_MAX_CHAINED = 8 * _PIECE
_CHECKED_CALLS = 4  # the fewest of which some are handed over by a later one alone
# Calls timed at a time for the host's share: few, so that no queue is full and none waits. On the
# CPU, MLX makes the host wait as soon as ten operations are under way: results of more show it.
_HOST_CALLS = 4


class NotEvaluatedError(TypeError):
    """A measured function did not leave its arrays to be computed, or they were not computed."""


class CallTimes(NamedTuple):
    """Samples in microseconds per call."""

    latency_us: list[float]  # each call evaluated alone, until its result is there
    throughput_us: list[float]  # many calls chained, then one wait
    host_us: list[float]  # building one call's graph and handing it over, without waiting
    calls: int  # of one throughput sample


@dataclasses.dataclass(frozen=True)
class Samples:
    """Microseconds per call, one value per round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def noise(self) -> float:
        """Standard error of the median, from the median deviation, which outliers do not move."""
        deviation = statistics.median(abs(value - self.median) for value in self.values)
        return 1.25 * 1.48 * deviation / math.sqrt(len(self.values))


def is_faster(challenger: Samples, champion: Samples, min_gain: float) -> bool:
    """Whether the difference is more than noise (three standard errors), and more than a share
    ``min_gain`` of the champion's time."""
    gain = champion.median - challenger.median
    noise = math.hypot(champion.noise, challenger.noise)
    return gain > max(3 * noise, min_gain * champion.median)


Function = Callable[[Any], object]
# From the next set of inputs and the result before, the inputs of the next call.
Chain = Callable[[Any, Any], Any]


def chained(inputs: Any, result: Any) -> Any:
    """The chain of inputs that know how to wait, as every :class:`Problem` does."""
    return inputs.chained(result)


def flatten(result: object) -> list[mx.array]:
    """Every array of a tree of lists, tuples, dicts and dataclasses.

    Raises :class:`NotEvaluatedError` for any other leaf: arrays inside it would stay lazy.
    """
    if isinstance(result, mx.array):
        return [result]
    if isinstance(result, list | tuple):
        children: Sequence[object] = result
    elif isinstance(result, dict):
        children = list(result.values())
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        children = [getattr(result, f.name) for f in dataclasses.fields(result)]
    else:
        raise NotEvaluatedError(f"a result of type {type(result).__name__} cannot be evaluated")
    return [leaf for child in children for leaf in flatten(child)]


def is_pending(arrays: Sequence[mx.array]) -> bool:
    """Whether anything is left to compute: MLX drops the graph of what it has evaluated."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return "shape=rectangle" in text.getvalue()  # how an operation is drawn; arrays have no shape


def check_evaluated(function: Function, inputs: Sequence[Any], chain: Chain) -> list[mx.array]:
    """Call ``function`` on each set of inputs twice, then in a short chain.

    Returns the arrays of its first result. Raises :class:`NotEvaluatedError` if a call returns no
    arrays, or arrays on which nothing is left to compute, such as a result kept from the call
    before; and for a chain as :func:`measure` does.
    """
    first: list[mx.array] | None = None
    for index, one in enumerate([*inputs, *inputs]):
        arrays = flatten(function(one))
        if not is_pending(arrays):
            raise NotEvaluatedError(f"call {index + 1} left nothing to compute")
        mx.eval(arrays)
        if first is None:
            # Inputs that are written in place change with later calls.
            first = [array + 0 for array in arrays]
            mx.eval(first)
    assert first is not None
    _chained(chain, function, inputs, _CHECKED_CALLS)
    return first


def measure(
    functions: dict[str, Function], inputs: Sequence[Any], runs: int, chain: Chain
) -> dict[str, CallTimes]:
    """Time checked functions, in turns, so that whatever drifts does so for all of them.

    Calls of a throughput sample follow one another in one graph, as the layers of a model do. The
    graph is built before the clock starts; the figure is of encoding and computing it, whichever
    takes longer. Only what depends on the result before waits for it.

    Args:
        inputs: sets of inputs, used one after the other.
        chain: ``chain(next_inputs, previous_result)`` makes the inputs of the next call of a
            throughput sample, and leaves ``next_inputs`` as they are.

    Raises :class:`NotEvaluatedError` if calls of a chain are computed before the clock starts, or
    not at all, because the next call does not depend on them.
    """
    for function in functions.values():
        for call in range(_WARMUP):
            mx.eval(flatten(function(inputs[call % len(inputs)])))
    timings: dict[str, CallTimes] = {name: CallTimes([], [], [], 0) for name in functions}
    with _no_collection():
        for run in range(runs):
            for name, function in functions.items():
                timings[name].latency_us.append(_latency(function, inputs[run % len(inputs)]))
        for name, timing in timings.items():
            calls = _chained_calls(chain, functions[name], inputs)
            timings[name] = timing._replace(calls=calls)
        for _ in range(runs):
            for name, timing in timings.items():
                sample = _chained(chain, functions[name], inputs, timing.calls)
                timing.throughput_us.append(sample)
                timing.host_us.append(_host(functions[name], inputs, timing.calls))
    return timings


def shortest_call(function: Function, inputs: Sequence[Any]) -> float:
    """Microseconds that one call takes by itself, the shortest of a few."""
    return min(_latency(function, inputs[run % len(inputs)]) for run in range(_WARMUP))


def _latency(function: Function, inputs: Any) -> float:
    start = time.perf_counter_ns()
    mx.eval(flatten(function(inputs)))
    return (time.perf_counter_ns() - start) / 1e3


def _chained(chain: Chain, function: Function, inputs: Sequence[Any], calls: int) -> float:
    result = function(inputs[0])
    results = [flatten(result)]
    for call in range(1, calls):
        result = function(chain(inputs[call % len(inputs)], result))
        results.append(flatten(result))
    if not is_pending(results[0]):
        raise NotEvaluatedError("a call of the chain was computed before the clock started")
    piece = min(_PIECE, calls // 2)
    start = time.perf_counter_ns()
    for end in range(piece, calls + piece, piece):
        mx.async_eval(results[min(end, calls) - 1])
    mx.synchronize()
    elapsed = time.perf_counter_ns() - start
    if is_pending([array for arrays in results for array in arrays]):
        raise NotEvaluatedError("the last call of the chain does not depend on all the others")
    return elapsed / 1e3 / calls


def _chained_calls(chain: Chain, function: Function, inputs: Sequence[Any]) -> int:
    """As many as last long enough, two at least; more until their time is not the first call's."""
    calls = 2
    while calls < _MAX_CHAINED:
        call_us = min(_chained(chain, function, inputs, calls) for _ in range(_WARMUP))
        wanted = math.ceil(_SAMPLE_US / call_us)
        if wanted <= calls:
            break
        calls = min(_MAX_CHAINED, max(2 * calls, wanted))
    return calls


def _host(function: Function, inputs: Sequence[Any], calls: int) -> float:
    calls = min(calls, _HOST_CALLS)
    start = time.perf_counter_ns()
    for call in range(calls):
        mx.async_eval(flatten(function(inputs[call % len(inputs)])))
    elapsed = time.perf_counter_ns() - start
    mx.synchronize()
    return elapsed / 1e3 / calls


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
