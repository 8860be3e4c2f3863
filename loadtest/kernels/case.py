"""What is measured: one operation at one shape, done in several ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.selection import Why, selector_for
from quire.kernels.choice.spec import Kind, P, S, Spec, V, describe_settings, dtype_name
from quire.kernels.choice.timing import Function


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
        inputs: makes one set of inputs from a seed, with a method ``chained`` as
            :class:`Problem` has. Several sets are used in turn, so that a problem smaller than the
            device's cache is read from memory, as in a model.
        variants: what is compared: each takes one set of inputs and returns arrays.
        baselines: variants to compare with: not Quire's own, or its way before this one. The first
            also gives the values that the others' results must agree with.
        bytes_moved: what the operation must at least read and write.
        variant_bytes: the same for variants that work on other data, such as weights not quantised.
        flops: arithmetic of the operation, or 0 where it is beside the point.
        tolerance: largest difference from the first baseline, relative to its largest value.
            None where results may differ.
        memory: bytes that must be free on the device; cases that ask too much are left out.
    """

    operation: str
    name: str
    labels: Mapping[str, int | str]
    inputs: Callable[[int], Any]
    variants: Mapping[str, Function]
    baselines: tuple[str, ...]
    bytes_moved: int
    variant_bytes: Mapping[str, int] = field(default_factory=dict)
    flops: int = 0
    tolerance: float | None = 0.02
    memory: int = 0

    def __post_init__(self) -> None:
        missing = set(self.baselines) - set(self.variants)
        if missing or not self.baselines:
            raise ValueError(f"{self.operation} {self.name}: baselines {missing} are no variants")


def specified_variants(
    profile: Profile, spec: Spec[S, V, P], shape: S
) -> tuple[dict[str, Function], dict[str, int | str]]:
    """What the engine would run, under the name "quire", and every kernel it could run instead;
    and a label that says what "quire" is."""
    selector = selector_for(profile.device)
    dtype = dtype_name(profile.dtype)
    choice = selector.select(spec, shape, profile.dtype)
    usable = selector.usable(spec, shape, dtype)
    found: dict[str, Function] = {"quire": usable[choice.variant].with_settings(choice.settings)}
    if choice.why is Why.TUNED:
        default = selector.default(spec, shape, dtype)
        found["default"] = usable[default.variant].with_settings(default.settings)
    for name, variant in usable.items():
        if name is not choice.variant and variant.kind is Kind.KERNEL:
            found[str(name.value)] = variant.with_settings(variant.default_settings)
    what = " ".join((str(choice.variant.value), describe_settings(choice.settings)))
    return found, {"quire": what.strip()}
