"""Measuring which variant and settings are fastest on this machine.

A candidate replaces the default only if it is faster by more than the noise of both, and gives the
same result.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from quire.kernels.choice.check import tolerance
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Problem, to_float64
from quire.kernels.choice.record import Record, Timing, save_record
from quire.kernels.choice.selection import Selector, UnsupportedShape
from quire.kernels.choice.sizes import ModelSizes
from quire.kernels.choice.spec import AnySpec, Settings, describe, describe_settings
from quire.kernels.choice.timing import Samples, chained, is_faster, measure, shortest_call
from quire.kernels.specs import SPECS

logger = logging.getLogger("quire.kernels")

_ROUNDS = 24
# A candidate whose single calls take so many times the default's is not measured further.
_HOPELESS = 3.0
# With many candidates left a short round picks those worth measuring well.
_SCREENING_ROUNDS = 5
_FINALISTS = 5
# Calls take turns with several inputs, so that no cache holds what the next call reads.
_ROTATED_BYTES = {"metal": 128 << 20, "cuda": 256 << 20, "cpu": 64 << 20}
_MAX_COPIES = 8
# A gain below this is not worth leaving the default for.
_MIN_GAIN = 0.02


class Task(NamedTuple):
    """Something to find the fastest variant for."""

    spec: AnySpec
    shape: Any
    dtype: str

    @property
    def bucket(self) -> tuple[int | bool, ...]:
        return tuple(self.spec.timing_bucket(self.shape))


class Candidate(NamedTuple):
    variant: Any  # of the enum of the operation
    settings: Settings

    def __str__(self) -> str:
        numbers = describe_settings(self.settings)
        return f"{self.variant.value} ({numbers})" if numbers else str(self.variant.value)


def tuned_operations() -> list[str]:
    """Operations that have something to choose from when they are called."""
    return [spec.name for spec in SPECS if spec.tuned is not None]


def tasks_for(
    sizes: ModelSizes, device: DeviceName, block_size: int, operations: Sequence[str] | None = None
) -> Iterator[Task]:
    """What to measure for a model on a device, for some of :func:`tuned_operations` or all."""
    for spec in SPECS:
        if spec.tuned is not None and (operations is None or spec.name in operations):
            for shape in spec.tuned(sizes, device, block_size):
                yield Task(spec, shape, sizes.dtype)


def tune(
    device: DeviceName,
    record: Record,
    tasks: Sequence[Task],
    *,
    force: bool = False,
    report: Callable[[Timing], None] = lambda timing: None,
) -> Record:
    """Measure the tasks that ``record`` has no timing for (``force``: all) and save each winner.

    ``device`` is the default device. Tasks with nothing to choose from are left out.

    Raises:
        OSError: the record cannot be written.
    """
    # Chosen by support and verdicts only: what was tuned before is not a default.
    selector = Selector(device, Record(record.key, record.verdicts))
    done = set() if force else set(record.timings_by_bucket())
    for task in tasks:
        key = task.spec.name, task.bucket, task.dtype
        if key in done:
            continue
        done.add(key)
        try:
            found = candidates(selector, task)
        except UnsupportedShape:
            continue
        if len(found) < 2:
            continue
        timing = find_fastest(device, task, found)
        mx.clear_cache()
        record = record.with_timing(timing)
        save_record(record)
        report(timing)
    return record


def candidates(selector: Selector, task: Task) -> list[Candidate]:
    """Every variant and combination of settings for a task, the default first.

    Where the variant is chosen for a model, it is the default in all of them.

    Raises:
        UnsupportedShape: there is none.
    """
    choice = selector.default(task.spec, task.shape, task.dtype)
    found = [Candidate(choice.variant, choice.settings)]
    for name, variant in selector.usable(task.spec, task.shape, task.dtype).items():
        if task.spec.group is not None and name != choice.variant:
            continue
        for values in itertools.product(*variant.settings.values()):
            candidate = Candidate(name, dict(zip(variant.settings, values, strict=True)))
            if candidate not in found:
                found.append(candidate)
    return found


def find_fastest(device: DeviceName, task: Task, found: Sequence[Candidate]) -> Timing:
    """Time the candidates in turns; the first is the default."""

    def problem(seed: int) -> Problem:
        made: Problem = task.spec.problem(task.shape, getattr(mx, task.dtype), seed, False)
        return made

    problems = [problem(0)]
    copies = _ROTATED_BYTES[device] // max(1, problems[0].num_bytes) + 1
    problems += [problem(seed) for seed in range(1, min(copies, _MAX_COPIES))]
    agreeing = _agreeing(device, task, problems[0], found)
    functions = {str(c): task.spec.variants[c.variant].with_settings(c.settings) for c in agreeing}
    limit = _HOPELESS * shortest_call(functions[str(found[0])], problems)
    hopeful = [c for c in agreeing[1:] if shortest_call(functions[str(c)], problems) <= limit]

    def samples(chosen: Sequence[Candidate], rounds: int) -> list[Samples]:
        timings = measure({str(c): functions[str(c)] for c in chosen}, problems, rounds, chained)
        return [Samples(tuple(timings[str(c)].throughput_us)) for c in chosen]

    if len(hopeful) > _FINALISTS:
        screened = samples(hopeful, _SCREENING_ROUNDS)
        order = sorted(range(len(hopeful)), key=lambda index: min(screened[index].values))
        hopeful = [hopeful[index] for index in order[:_FINALISTS]]
    finalists = [found[0], *hopeful]
    times = samples(finalists, _ROUNDS)
    winner = min(range(len(times)), key=lambda index: times[index].median)
    if not is_faster(times[winner], times[0], _MIN_GAIN):
        winner = 0
    return Timing(
        task.spec.name,
        task.bucket,
        task.dtype,
        finalists[winner].variant.value,
        dict(finalists[winner].settings),
        round(times[winner].median, 2),
        round(times[0].median, 2),
    )


def _agreeing(
    device: DeviceName, task: Task, problem: Problem, found: Sequence[Candidate]
) -> list[Candidate]:
    """Leave out what computes something else than the default, and what does not run."""
    spec, default = task.spec, found[0]
    wanted = to_float64(spec.variants[default.variant].run(problem, default.settings))
    agreeing = [default]
    for candidate in found[1:]:
        variants = spec.variants[candidate.variant], spec.variants[default.variant]
        limit = sum(tolerance(variant, task.dtype, device) for variant in variants)
        try:
            result = to_float64(variants[0].run(problem, candidate.settings))
        except Exception as error:  # registers, threadgroup memory: one more that cannot win
            logger.warning("%s: %s does not run: %s", spec.name, candidate, error)
            continue
        difference = problem.difference(result, wanted)
        if difference <= limit:
            agreeing.append(candidate)
        else:
            off = f"{candidate} is off by {difference:.1e} from {default}"
            logger.warning("%s: %s at %s", spec.name, off, describe(task.shape))
    return agreeing
