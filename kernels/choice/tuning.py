"""Measuring which variant and settings are fastest on this machine.

A candidate replaces the default only if it is faster by more than the noise of both, and gives the
same result.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.manifest import load_manifest
from quire.kernels.choice.record import Record, Timing, save_record
from quire.kernels.choice.selection import Choice, Selector, UnsupportedShape
from quire.kernels.choice.shapes import AnyShape, describe, timing_bucket
from quire.kernels.choice.verify import tolerance
from quire.kernels.probes import make_probe
from quire.kernels.probes.probe import Probe

logger = logging.getLogger("quire.kernels")

_ROUNDS = 24
# A candidate whose single calls take so many times the default's is not measured further.
_HOPELESS = 3.0
_SINGLE_CALLS = 3
# With many candidates left a short round picks those worth measuring well.
_SCREENING_ROUNDS = 5
_FINALISTS = 5
# A sample queues so many calls that it takes about this long, as the layers of a step are queued:
# one call alone would measure how long handing over takes.
_SAMPLE_SECONDS = 2e-3
_MAX_CALLS = 32
# Calls take turns with several inputs, so that no cache holds what the next call reads.
_ROTATED_BYTES = {"metal": 128 << 20, "cuda": 256 << 20, "cpu": 64 << 20}
_MAX_COPIES = 8
# A gain below this is not worth leaving the default for.
_MIN_GAIN = 0.02


class Task(NamedTuple):
    """Something to find the fastest variant for."""

    operation: str
    shape: AnyShape
    dtype: str


class Candidate(NamedTuple):
    variant: str
    settings: Mapping[str, int]

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.variant} ({numbers})" if numbers else self.variant


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one value per round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def noise(self) -> float:
        """Standard error of the median, from the median deviation, which outliers do not move."""
        deviation = statistics.median(abs(value - self.median) for value in self.values)
        return 1.25 * 1.48 * deviation / math.sqrt(len(self.values))


def is_faster(challenger: Samples, champion: Samples) -> bool:
    """Whether the difference is more than noise (three standard errors) and worth having."""
    gain = champion.median - challenger.median
    noise = math.hypot(champion.noise, challenger.noise)
    return gain > max(3 * noise, _MIN_GAIN * champion.median)


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
    selector = Selector(device, load_manifest(), Record(record.key, record.verdicts))
    done = set() if force else set(record.timings_by_bucket())
    for task in tasks:
        bucket = timing_bucket(task.shape)
        if (task.operation, bucket, task.dtype) in done:
            continue
        done.add((task.operation, bucket, task.dtype))
        try:
            found = candidates(selector, task)
        except UnsupportedShape:
            continue
        if len(found) < 2:
            continue
        timing = measure(device, task, found)
        mx.clear_cache()
        record = record.with_timing(timing)
        save_record(record)
        report(timing)
    return record


def candidates(selector: Selector, task: Task) -> list[Candidate]:
    """Every variant and combination of settings for a task, the default first.

    Where the variant is chosen once for a model, it is the default in all of them.

    Raises:
        UnsupportedShape: there is none.
    """
    choice: Choice = selector.default(task.operation, task.shape, task.dtype)
    found = [Candidate(choice.variant, choice.settings)]
    once = load_manifest()[task.operation].once
    for name, variant in selector.usable(task.operation, task.shape, task.dtype).items():
        if once and name != choice.variant:
            continue
        for values in itertools.product(*(s.values for s in variant.settings.values())):
            settings = MappingProxyType(dict(zip(variant.settings, values, strict=True)))
            if Candidate(name, settings) not in found:
                found.append(Candidate(name, settings))
    return found


def measure(device: DeviceName, task: Task, found: Sequence[Candidate]) -> Timing:
    """Time the candidates in turns; the first is the default."""
    dtype = getattr(mx, task.dtype)
    probes = [make_probe(task.shape, dtype)]
    copies = _ROTATED_BYTES[device] // max(1, probes[0].num_bytes) + 1
    probes += [make_probe(task.shape, dtype, seed) for seed in range(1, min(copies, _MAX_COPIES))]
    found = _hopeful(probes, _agreeing(device, task, probes[0], found))
    calls = _calls_per_sample(probes, found[0])
    if len(found) > _FINALISTS + 1:
        screened = _time(probes, found, _SCREENING_ROUNDS, calls)
        best = sorted(found[1:], key=lambda candidate: min(screened[found.index(candidate)].values))
        found = [found[0], *best[:_FINALISTS]]
    samples = _time(probes, found, _ROUNDS, calls)
    winner = min(range(len(found)), key=lambda index: samples[index].median)
    if not is_faster(samples[winner], samples[0]):
        winner = 0
    return Timing(
        task.operation,
        timing_bucket(task.shape),
        task.dtype,
        found[winner].variant,
        dict(found[winner].settings),
        round(samples[winner].median * 1e6, 2),
        round(samples[0].median * 1e6, 2),
    )


def _agreeing(
    device: DeviceName, task: Task, probe: Probe, found: Sequence[Candidate]
) -> list[Candidate]:
    """Leave out what computes something else than the default, and what does not run."""
    variants = load_manifest()[task.operation].variants
    wanted = probe.result(*found[0])
    agreeing = [found[0]]
    for candidate in found[1:]:
        limit = tolerance(variants[candidate.variant], task.dtype, device)
        limit += tolerance(variants[found[0].variant], task.dtype, device)
        try:
            difference = probe.difference(probe.result(*candidate), wanted)
        except RuntimeError as error:
            logger.warning("%s: %s does not run: %s", task.operation, candidate, error)
            continue
        if difference <= limit:
            agreeing.append(candidate)
        else:
            logger.warning(
                "%s: %s is off by %.1e from %s at %s",
                task.operation,
                candidate,
                difference,
                found[0],
                describe(task.shape),
            )
    return agreeing


def _hopeful(probes: Sequence[Probe], found: Sequence[Candidate]) -> list[Candidate]:
    limit = _HOPELESS * _single_call(probes, found[0])
    return [found[0], *(each for each in found[1:] if _single_call(probes, each) <= limit)]


def _single_call(probes: Sequence[Probe], candidate: Candidate) -> float:
    """Seconds that one call takes by itself."""
    return min(_sample(probes, candidate, 1, offset) for offset in range(_SINGLE_CALLS))


def _calls_per_sample(probes: Sequence[Probe], candidate: Candidate) -> int:
    return max(1, min(_MAX_CALLS, round(_SAMPLE_SECONDS / _single_call(probes, candidate))))


def _time(
    probes: Sequence[Probe], found: Sequence[Candidate], rounds: int, calls: int
) -> list[Samples]:
    """``rounds`` samples of each candidate, in turns that begin with another one each round."""
    values: list[list[float]] = [[] for _ in found]
    for candidate in found:
        _sample(probes, candidate, calls, 0)
    for turn in range(rounds):
        for place in range(len(found)):
            index = (place + turn) % len(found)
            values[index].append(_sample(probes, found[index], calls, turn))
    return [Samples(tuple(times)) for times in values]


def _sample(probes: Sequence[Probe], candidate: Candidate, calls: int, offset: int) -> float:
    """Seconds per call over ``calls`` calls that are queued together and waited for."""
    runs = [probe.variants[candidate.variant] for probe in probes]
    start = time.perf_counter()
    outputs = [
        array
        for call in range(calls)
        for array in runs[(offset + call) % len(runs)](candidate.settings)
    ]
    mx.eval(*outputs)
    return (time.perf_counter() - start) / calls
