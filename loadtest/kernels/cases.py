"""What is measured: one operation at one shape, done in several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from quire.kernels.choice.check import tolerance
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Problem
from quire.kernels.choice.selection import Why, selector_for
from quire.kernels.choice.sizes import typical_sizes
from quire.kernels.choice.spec import (
    AnySpec,
    Kind,
    Shape,
    describe,
    describe_settings,
    dtype_name,
)
from quire.kernels.choice.timing import Function
from quire.kernels.specs import SPECS

_BLOCK_SIZE = 16


class Profile(NamedTuple):
    """Which sizes of an operation are measured, and in what arithmetic."""

    device: DeviceName
    quick: bool  # only the smallest sizes

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def dtype(self) -> mx.Dtype:
        """What models run in there: bfloat16 has no fast arithmetic on the CPU."""
        return mx.bfloat16 if self.gpu else mx.float32


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Args:
        name: unique among the cases of the operation; results of different runs meet by it.
        inputs: makes one set of inputs from a seed. Several sets are used in turn, so that a
            problem smaller than the device's cache is read from memory, as in a model.
        variants: what is compared: each takes one set of inputs and returns arrays.
        baselines: variants to compare with: not Quire's own, or its way before this one. The first
            also gives the values that the others' results must agree with.
        labels: what the case is, for pictures.
        tolerance: largest difference from the first baseline.
    """

    operation: str
    name: str
    inputs: Callable[[int], Problem]
    variants: Mapping[str, Function]
    baselines: tuple[str, ...]
    labels: Mapping[str, int | str] = field(default_factory=dict)
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        missing = set(self.baselines) - set(self.variants)
        if missing or not self.baselines:
            raise ValueError(f"{self.operation} {self.name}: baselines {missing} are no variants")


def specified_cases(spec: AnySpec, profile: Profile) -> Iterator[Case]:
    """The shapes that are tuned for a typical model, or the first that is surveyed, and at last one
    whose contexts are of all lengths."""
    sizes = typical_sizes(profile.device)
    shapes = [next(iter(spec.surveyed.values()))]
    if spec.tuned is not None:
        shapes = list(spec.tuned(sizes, profile.device, _BLOCK_SIZE))
    for shape in shapes[:1] if profile.quick else shapes:
        yield _case(spec, shape, profile, ragged=False)
    fields = spec.shape._fields
    if not profile.quick and "context" in fields and "from_start" not in fields:
        yield _case(spec, shapes[-1], profile, ragged=True)


def _case(spec: AnySpec, shape: Shape, profile: Profile, ragged: bool) -> Case:
    """What the engine would run, under the name "quire", every kernel it could run instead, and
    what others do."""
    selector, dtype = selector_for(profile.device), dtype_name(profile.dtype)
    choice = selector.select(spec, shape, profile.dtype)
    usable = selector.usable(spec, shape, dtype)
    reference = usable.get(spec.reference, spec.variants[spec.reference])
    baselines: dict[str, Function] = {
        name: partial(_run, run) for name, run in spec.baselines.items()
    } or {spec.reference.value: reference.with_settings({})}
    variants: dict[str, Function] = {"quire": usable[choice.variant].with_settings(choice.settings)}
    if choice.why is Why.TUNED:
        default = selector.default(spec, shape, dtype)
        variants["default"] = usable[default.variant].with_settings(default.settings)
    for name, variant in usable.items():
        if name is not choice.variant and variant.kind is Kind.KERNEL:
            variants[name.value] = variant.with_settings({})
    what = f"{choice.variant.value} {describe_settings(choice.settings)}".strip()
    return Case(
        operation=spec.name,
        name=describe(shape) + ", ragged" * ragged,
        inputs=lambda seed: spec.problem(shape, profile.dtype, seed, ragged),
        variants={**baselines, **variants},
        baselines=tuple(baselines),
        labels={**_labels(shape), **({"ragged": "yes"} if ragged else {}), "quire": what},
        # Two variants of several operations may be as far apart as both are from the exact result.
        tolerance=2 * tolerance(reference, dtype, profile.device),
    )


def _labels(shape: Shape) -> dict[str, int | str]:
    """Its sizes, and the flags that are set."""
    fields = shape._asdict().items()
    return {name: "yes" if value is True else value for name, value in fields if value is not False}


def _run(run: Callable[..., Sequence[mx.array]], problem: Problem) -> Sequence[mx.array]:
    return run(problem, {})


def cases_of(operations: Sequence[str], profile: Profile) -> Iterator[Case]:
    """The cases of ``operations``, in their order. Each is made when it is asked for."""
    from quire.loadtest.kernels.table_cases import attention_cases

    for operation in operations:
        if operation == "attention_table":
            yield from attention_cases(profile)
        for spec in SPECS:
            if spec.name == operation:
                yield from specified_cases(spec, profile)
