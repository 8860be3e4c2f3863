"""Running the cases: inputs made, results checked, times taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName, current_chip
from quire.kernels.choice.problem import Float64Array, Problem, to_float64
from quire.kernels.choice.timing import RUNS, Function, chained, check_evaluated, flatten, measure
from quire.loadtest.environment import command_line, describe
from quire.loadtest.kernels.cases import Case, Profile
from quire.loadtest.kernels.device import (
    copy_bandwidth,
    fastest_plausible,
    memory_size,
)
from quire.loadtest.kernels.results import CaseResult, KernelsResult, VariantResult

# Sets of inputs together hold this much, or a small problem would stay in the device's cache.
_ROTATED_BYTES = 1 << 28
_MAX_SETS = {"cpu": 4, "metal": 8, "cuda": 16}
_COPIES = 4
_CPU_CACHE_BYTES = 1 << 30
# Below this, a cache may hold a case's data, and memory bandwidth is no limit.
_UNCACHED_BYTES = 1 << 28


def compile_cases(cases: Iterable[Case], collecting: AbstractContextManager[None]) -> None:
    """Have the kernels of all cases compiled side by side, where this can be done; see
    :class:`quire.kernels.cuda_cache.KernelCache`."""
    with collecting:
        for case in cases:
            inputs = case.inputs(0)
            for function in case.variants.values():
                with suppress(Exception):  # seen again, and told, when it is measured
                    function(inputs)


def run_cases(
    cases: Iterable[Case],
    profile: Profile,
    *,
    runs: int = RUNS,
    blas: str | None = None,
    on_case: Callable[[CaseResult], None],
) -> KernelsResult:
    """Measure ``cases`` on MLX's default device, which ``profile`` names.

    A variant that raises, that computes nothing or that disagrees has a failure in its result and
    does not stop the others.

    Args:
        runs: samples of each figure.
        blas: what products on the CPU use; for the record.
        on_case: called as each case ends.
    """
    with _buffers_kept(profile.device):
        return _run_cases(cases, profile, runs, blas, on_case)


@contextmanager
def _buffers_kept(device: DeviceName) -> Iterator[None]:
    """MLX's CPU backend keeps 32 MB of buffers: larger results are timed with their page faults."""
    if device != "cpu":
        yield
        return
    before = mx.set_cache_limit(_CPU_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def _run_cases(
    cases: Iterable[Case],
    profile: Profile,
    runs: int,
    blas: str | None,
    on_case: Callable[[CaseResult], None],
) -> KernelsResult:
    copy = copy_bandwidth(profile.device)
    limit = fastest_plausible(profile.device, copy)
    budget = 0.7 * memory_size()
    results: list[CaseResult] = []
    skipped: list[str] = []
    for case in cases:
        first = case.inputs(0)
        # Baselines keep copies of their own.
        fitting = int(budget // (_COPIES * max(1, first.num_bytes)))
        if not fitting:
            skipped.append(f"{case.operation} {case.name}: {first.num_bytes / 1e9:.1f} GB and more")
            continue
        wanted = min(_MAX_SETS[profile.device], -(-_ROTATED_BYTES // max(1, first.num_bytes)))
        sets = range(1, max(1, min(wanted, fitting)))
        result = run_case(case, [first, *map(case.inputs, sets)], runs, limit)
        results.append(result)
        on_case(result)
        mx.clear_cache()
    return KernelsResult(
        device=profile.device,
        chip=current_chip().name,
        copy_gb_per_s=copy / 1e9,
        quick=profile.quick,
        runs=runs,
        cases=results,
        skipped=skipped,
        blas=blas,
        environment=describe(),
        command=command_line(),
    )


def run_case(case: Case, inputs: Sequence[Problem], runs: int, limit: float) -> CaseResult:
    """Measure one case.

    Args:
        inputs: sets of them, used in turn.
        limit: bytes per second that no real operation reaches on data beyond the caches.
    """
    results: dict[str, VariantResult] = {}
    functions: dict[str, Function] = {}
    expected: list[Float64Array] | None = None
    for name, function in case.variants.items():
        result = VariantResult(name, name in case.baselines, inputs[0].num_bytes)
        results[name] = result
        try:
            # On inputs of its own: some write into theirs.
            found = to_float64(flatten(function(case.inputs(0))))
            check_evaluated(function, inputs, chained)
        except Exception as error:
            # Whatever it is, it belongs to this variant and is shown and counted as its failure.
            result.failure = f"{type(error).__name__}: {error}"
            continue
        functions[name] = function
        if name == case.baselines[0]:
            expected = found
        elif expected is not None:
            result.difference = inputs[0].difference(found, expected)
            if not result.difference <= case.tolerance:
                other = case.baselines[0]
                result.failure = f"differs from {other} by {result.difference:.1e} of its peak"
    for name, timing in measure(functions, inputs, runs, chained).items():
        result = results[name]
        result.latency_us = _rounded(timing.latency_us)
        result.throughput_us = _rounded(timing.throughput_us)
        result.host_us = _rounded(timing.host_us)
        result.calls_per_sample = timing.calls
        if is_too_fast(result, limit):
            result.failure = (
                f"{result.gb_per_s:,.0f} GB/s is more than this device's memory can do: "
                "it is not computing all of it"
            )
    return CaseResult(
        case.operation,
        case.name,
        dict(case.labels),
        inputs[0].flops,
        list(results.values()),
        chained=True,
    )


def is_too_fast(result: VariantResult, limit: float) -> bool:
    """Whether a time is too short for the bytes that must have moved through memory.

    This finds work that a result does not depend on, which evaluating the result leaves undone.
    """
    return result.bytes_moved >= _UNCACHED_BYTES and result.gb_per_s * 1e9 > limit


def _rounded(samples: list[float]) -> list[float]:
    return [round(sample, 2) for sample in samples]
