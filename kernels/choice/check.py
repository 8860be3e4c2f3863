"""Does each variant compute the right thing on this machine? Compared with float64 in NumPy.

Metal kernels are written without a Mac at hand and drivers differ, so the first start on a GPU
checks every kernel, and one that disagrees or does not compile is not used.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any

import mlx.core as mx
import msgspec

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Problem, to_float64
from quire.kernels.choice.record import Record, Verdict, load_record, save_record
from quire.kernels.choice.selection import Choice, UnsupportedShape, Why, selector_for, use_record
from quire.kernels.choice.spec import DTYPES, AnySpec, Kind, Settings, Variant, describe
from quire.kernels.specs import SPECS

logger = logging.getLogger("quire.kernels")

_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# Made of several operations, a variant rounds its intermediate results to half precision too.
_STEPWISE = 2.0
# On GPUs MLX multiplies float32 matrices with ten bits of mantissa (TF32) where it can.
_TF32_TOLERANCE = 2e-3
# What a GPU says when others left it no memory or no time. Another start may find both.
_PASSING = re.compile(
    r"out ?of ?memory|insufficient memory|unable to allocate|bad_alloc|time ?out|timed out"
    r"|ImpactingInteractivity",
    re.IGNORECASE,
)


def tolerance(variant: Variant[Any, Any], dtype: str, device: DeviceName) -> float:
    """The error allowed of a result, relative to its largest value."""
    if variant.kind is Kind.KERNEL:
        return _TOLERANCE[dtype]
    if dtype == "float32":
        return _TOLERANCE[dtype] if device == "cpu" else _TF32_TOLERANCE
    return _STEPWISE * _TOLERANCE[dtype]


def error_of(problem: Problem, variant: Variant[Any, Any], settings: Settings) -> float:
    """How far a variant's result is from float64."""
    return problem.difference(to_float64(variant.run(problem, settings)), problem.expected())


def check_variant(
    spec: AnySpec, name: Enum, dtype: str, device: DeviceName, *, briefly: bool = False
) -> Verdict | None:
    """Run a variant on the shapes it supports of those to check; None if it supports none.

    It runs with its default settings, and with the smallest, which cut contexts into most pieces.

    Args:
        briefly: only the first shape, with the default settings: on CUDA every other text takes
            two or three seconds to compile.
    """
    variant = spec.variants[name]
    worst = None
    shapes = [s for s in spec.checked if variant.supports(s.bucket(), dtype, device)]
    smallest = {key: min(values) for key, values in variant.settings.items()}
    tried: list[Settings] = [{}, *([smallest] if smallest and not briefly else [])]
    for shape in shapes[:1] if briefly else shapes:
        problem = spec.problem(shape, getattr(mx, dtype), 0, True)
        for settings in tried:
            try:
                error = error_of(problem, variant, settings)
            except Exception as failure:  # whatever it is, this variant cannot be used
                reason = f"{type(failure).__name__}: {failure}"
                return Verdict(spec.name, name.value, dtype, worst, reason)
            if not error <= tolerance(variant, dtype, device):
                reason = f"its result is off by {error:.1e} at {shape}"
                shown = error if math.isfinite(error) else None
                return Verdict(spec.name, name.value, dtype, shown, reason)
            worst = max(error, worst or 0.0)
    return None if worst is None else Verdict(spec.name, name.value, dtype, worst, "")


def check_all(device: DeviceName, dtypes: Sequence[str]) -> Iterator[Verdict]:
    """A verdict on every variant of every operation that runs on ``device``, the default device."""
    for spec in SPECS:
        for name, dtype in product(spec.variants, dtypes):
            if verdict := check_variant(spec, name, dtype, device):
                yield verdict


def checked_variants(
    device: DeviceName,
    dtypes: Sequence[str] = DTYPES,
    collecting: AbstractContextManager[None] | None = None,
) -> Record:
    """Check the kernels that this machine's record has no verdict on, once, and select by it.

    Briefly: `quire doctor --kernels all` checks them at every shape. Everything else is made of
    MLX's operations and needs no check before use. Call it on the thread that uses MLX, with
    ``device`` as the default device. A record that cannot be written is used by this process all
    the same, and so is a failure for want of memory or time, which is not written.

    Args:
        collecting: a context manager in which kernels are compiled but not run, such as
            :meth:`quire.kernels.cuda_cache.KernelCache.collecting`. All checks run within it once
            before they count, so that their kernels are compiled together.

    Returns:
        The record, with a verdict on every kernel of ``device`` for ``dtypes``.
    """
    record = load_record(device)
    known = {(v.operation, v.variant, v.dtype, v.shapes) for v in record.verdicts}
    missing = [
        (spec, name, dtype)
        for spec in SPECS
        for (name, variant), dtype in product(spec.variants.items(), dtypes)
        if variant.kind is Kind.KERNEL and device in variant.devices
        if (spec.name, name.value, dtype, "") not in known
    ]
    if missing and collecting is not None:
        with collecting:
            for spec, name, dtype in missing:
                check_variant(spec, name, dtype, device, briefly=True)
    briefly = device == "cuda"
    verdicts = [check_variant(*variant, device, briefly=briefly) for variant in missing]
    new = [verdict for verdict in verdicts if verdict is not None]
    record = record.with_verdicts(new)
    use_verdicts(device, record, saving=bool(new))
    return record


def use_verdicts(
    device: DeviceName, record: Record, shapes: Collection[str] = (), *, saving: bool
) -> Record:
    """Select by the general verdicts and those on the ``shapes`` of a model; returns these."""
    own = record.for_shapes(shapes)
    for verdict in own.verdicts:
        if verdict.reason:
            kernel = f"{verdict.operation}.{verdict.variant}"
            logger.warning("not using %s for %s: %s", kernel, verdict.dtype, verdict.reason)
    if saving:
        lasting = [v for v in record.verdicts if not _PASSING.search(v.reason)]
        try:
            save_record(msgspec.structs.replace(record, verdicts=tuple(lasting)))
        except OSError as error:
            logger.warning("the kernels will be checked again at the next start: %s", error)
    use_record(device, own)
    return own


@dataclass(frozen=True)
class Use:
    """What computes a shape here, and how far its result is from float64."""

    operation: str
    shape: str
    dtype: str
    variant: str
    settings: Settings
    why: Why
    error: float | None
    limit: float
    problem: str = ""

    @property
    def agrees(self) -> bool:
        return not self.problem and self.error is not None and self.error <= self.limit


def in_use(
    device: DeviceName,
    dtypes: Sequence[str],
    collecting: AbstractContextManager[None] | None = None,
) -> Iterator[Use]:
    """The choice for every shape that is checked, by the selector that the engine asks, run and
    compared; ``device`` is the default device.

    Args:
        collecting: as for :func:`checked_variants`.
    """
    if collecting is not None:
        with collecting:
            for spec, shape, dtype, choice in _choices(device, dtypes):
                with suppress(Exception):  # seen again, and told, when it runs in earnest
                    problem = spec.problem(shape, getattr(mx, dtype), 0, True)
                    spec.variants[choice.variant].run(problem, choice.settings)
    for spec, shape, dtype, choice in _choices(device, dtypes):
        variant = spec.variants[choice.variant]
        error, failed = None, ""
        try:
            problem = spec.problem(shape, getattr(mx, dtype), 0, True)
            error = error_of(problem, variant, choice.settings)
        except Exception as failure:  # shown to the user, and counted as disagreement
            failed = f"{type(failure).__name__}: {failure}"
        yield Use(
            spec.name,
            describe(shape),
            dtype,
            choice.variant.value,
            choice.settings,
            choice.why,
            error,
            tolerance(variant, dtype, device),
            failed,
        )


def _choices(
    device: DeviceName, dtypes: Sequence[str]
) -> Iterator[tuple[AnySpec, Any, str, Choice[Any]]]:
    selector = selector_for(device)
    for spec in SPECS:
        for shape, dtype in product(spec.checked, dtypes):
            try:
                yield spec, shape, dtype, selector.select(spec, shape, getattr(mx, dtype))
            except UnsupportedShape:
                continue  # the gaps list it


def list_gaps(device: DeviceName, dtypes: Sequence[str]) -> list[str]:
    """One line per surveyed shape that no kernel of ``device`` supports, and what runs instead."""
    lines: dict[str, list[str]] = {}
    for spec in SPECS:
        for (label, shape), dtype in product(spec.surveyed.items(), dtypes):
            try:
                choice = selector_for(device).select(spec, shape, getattr(mx, dtype))
                instead = f"{choice.variant.value} runs instead" if choice.why is Why.GAP else ""
            except UnsupportedShape:
                instead = "nothing supports it"
            if instead:
                lines.setdefault(f"{spec.name} {label}: {instead}", []).append(dtype)
    return [
        line if len(found) == len(dtypes) else f"{line} ({', '.join(found)})"
        for line, found in lines.items()
    ]
