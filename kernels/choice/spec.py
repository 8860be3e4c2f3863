"""The specification of an operation that can be computed in several ways.

One stands beside each launcher. Selection, checks, tuning, benchmarks, the doctor and the tests
read it, and nothing about a variant is written anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Problem
from quire.kernels.choice.sizes import ModelSizes
from quire.kernels.padding import round_up_to_power_of_two

DTYPES = ("float32", "float16", "bfloat16")
HALF = ("float16", "bfloat16")
GPUS: tuple[DeviceName, ...] = ("metal", "cuda")
ANYWHERE: tuple[DeviceName, ...] = ("metal", "cuda", "cpu")

Self = TypeVar("Self", bound="Shape")


class Shape(Protocol):
    """What selection knows of a call: a named tuple of whole numbers and flags."""

    def bucket(self: Self) -> Self:
        """With sizes rounded up to powers of two, and without what neither support nor speed
        depends on, so that a process meets few different ones. It is its own bucket."""

    def _asdict(self) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[Any]: ...


S = TypeVar("S", bound=Shape)
P = TypeVar("P", bound=Problem)
V = TypeVar("V", bound=Enum)

Settings = Mapping[str, int]


class Kind(Enum):
    """How a variant computes."""

    KERNEL = "kernel"  # one of Quire's own for GPUs
    STEPS = "steps"  # several operations, which round in between: MLX's, or kernels and these


class Group(Enum):
    """Kernels of which a model takes all or none."""

    PAGES = "kernels over pages"
    BLOCKS = "kernels of fused blocks"
    STATES = "kernels over recurrent states"


def _said(value: int) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Limit:
    """What one field of a shape may be.

    Sizes that a bucket rounds up have a ``max`` only, a power of two.
    """

    values: tuple[int, ...] | None = None
    min: int | None = None
    max: int | None = None
    multiple_of: int | None = None

    def allows(self, value: int) -> bool:
        return (
            (self.values is None or value in self.values)
            and (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        said = [] if self.values is None else [" or ".join(map(_said, self.values))]
        said += [] if self.min is None else [f"from {self.min}"]
        said += [] if self.max is None else [f"to {self.max}"]
        said += [] if self.multiple_of is None else [f"in steps of {self.multiple_of}"]
        return " ".join(said)


def _fits_always(shape: Any, dtype: str) -> bool:
    return True


@dataclass(frozen=True)
class Variant(Generic[S, P]):
    """One way to compute an operation.

    Attributes:
        run: builds the result from a problem's inputs, lazily.
        limits: by field of the shape; others may have any value.
        fits: what is more than a limit of one field.
        settings: numbers it can be tuned by, and their values; without any, whoever launches the
            variant decides by the shape.
        needs: the kernels without which it does not run.
    """

    run: Callable[[P, Settings], Sequence[mx.array]]
    kind: Kind = Kind.KERNEL
    devices: tuple[DeviceName, ...] = GPUS
    dtypes: tuple[str, ...] = DTYPES
    limits: Mapping[str, Limit] = field(default_factory=dict)
    fits: Callable[[S, str], bool] = _fits_always
    settings: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    needs: Group | None = None

    def supports(self, shape: S, dtype: str, device: DeviceName) -> bool:
        return (
            device in self.devices
            and dtype in self.dtypes
            and all(limit.allows(getattr(shape, name)) for name, limit in self.limits.items())
            and self.fits(shape, dtype)
        )

    def with_settings(self, settings: Settings) -> Callable[[P], Sequence[mx.array]]:
        return lambda problem: self.run(problem, settings)

    def has_settings(self, settings: Settings) -> bool:
        """Whether ``settings`` are allowed: none, or all of them."""
        return not settings or (
            settings.keys() == self.settings.keys()
            and all(value in self.settings[name] for name, value in settings.items())
        )


@dataclass(frozen=True)
class Default(Generic[V]):
    """The variant for some buckets where nothing has been measured."""

    variant: V
    devices: tuple[DeviceName, ...]
    when: Mapping[str, Limit] = field(default_factory=dict)

    def matches(self, bucket: Shape, device: DeviceName) -> bool:
        return device in self.devices and all(
            limit.allows(getattr(bucket, name)) for name, limit in self.when.items()
        )


@dataclass(frozen=True, eq=False)
class Spec(Generic[S, V, P]):
    """An operation.

    Attributes:
        reference: the variant that runs everywhere and is never dropped.
        defaults: the first that matches, and whose variant can be used, is taken; else the
            reference. Passing over a kernel is a gap.
        problem: makes inputs from a shape, a type, a seed, and whether contexts are ragged, of all
            lengths up to the shape's.
        checked: small, and between them every path.
        surveyed: by name, shapes of models that differ from a common one in one respect.
        tuned: the shapes that are worth measuring for a model, with so many tokens in a block;
            None if there is nothing to choose from when it is called.
        group: of its kernels. The variant is then chosen for a model, and tuned by settings only.
        baselines: what others do, for benchmarks; if there are none, the reference.
        untimed: flags that hardly change how long a call takes.
    """

    name: str
    shape: type[S]
    variants: Mapping[V, Variant[S, P]]
    reference: V
    problem: Callable[[S, mx.Dtype, int, bool], P]
    checked: Sequence[S]
    surveyed: Mapping[str, S]
    defaults: Sequence[Default[V]] = ()
    tuned: Callable[[ModelSizes, DeviceName, int], Iterable[S]] | None = None
    group: Group | None = None
    baselines: Mapping[str, Callable[[P, Settings], Sequence[mx.array]]] = field(
        default_factory=dict
    )
    untimed: tuple[str, ...] = ()

    def timing_bucket(self, shape: S) -> S:
        """The bucket under which ``shape`` is timed."""
        fields = shape.bucket()._asdict()
        return self.shape(**fields | dict.fromkeys(self.untimed, False))

    def variant(self, name: str) -> V:
        """The variant of that name.

        Raises:
            ValueError: there is none.
        """
        for variant in self.variants:
            if variant.value == name:
                return variant
        raise ValueError(f"there is no {self.name}.{name}")


AnySpec = Spec[Any, Any, Any]


def describe(shape: Shape) -> str:
    """One line for people, without what a shape has not: flags not set, and sizes of 0."""
    found = {name: value for name, value in shape._asdict().items() if value}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in found.items())


def describe_settings(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


round_up = round_up_to_power_of_two  # what buckets do to sizes


def dtype_name(dtype: mx.Dtype) -> str:
    """The name without its package: "bfloat16"."""
    return str(dtype).rpartition(".")[2]
