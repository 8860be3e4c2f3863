"""Which variant computes an operation: by its specification, and what this machine has shown.

The order is: what `quire tune` measured for the shape on this chip, then the defaults, then the
reference. A variant that disagreed with the exact result here is never chosen, nor what needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any, Generic

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName, current_device
from quire.kernels.choice.record import Record, load_record
from quire.kernels.choice.spec import (
    AnySpec,
    Group,
    Kind,
    P,
    S,
    Settings,
    Shape,
    Spec,
    V,
    Variant,
    describe,
    dtype_name,
)
from quire.kernels.specs import SPECS

# The kernels of the first write the pages that those of the second are about.
_REQUIRED = {
    Group.PAGES: (Group.PAGES,),
    Group.BLOCKS: (Group.PAGES, Group.BLOCKS),
    Group.STATES: (Group.STATES,),
}


class Why(StrEnum):
    """The reason for a choice."""

    TUNED = "tuned on this chip"
    DEFAULT = "default for this device"
    ONLY = "only one that supports this shape"
    GAP = "gap: no kernel can be used"


@dataclass(frozen=True)
class Choice(Generic[V]):
    """A variant and the numbers it runs with."""

    variant: V
    settings: Settings
    why: Why


class UnsupportedShape(ValueError):
    """No variant at all supports what was asked for."""


class Selector:
    """Chooses for one device, by one record of this machine.

    Args:
        specs: of all operations, of which some belong to one group.
    """

    def __init__(
        self, device: DeviceName, record: Record | None, specs: Sequence[AnySpec] = SPECS
    ) -> None:
        self.device = device
        self._specs = specs
        self._timings = {} if record is None else record.timings_by_bucket()
        self._dropped = set() if record is None else record.dropped()
        self._choices: dict[tuple[AnySpec, Shape, mx.Dtype], Choice[Any]] = {}

    def select(self, spec: Spec[S, V, P], shape: S, dtype: mx.Dtype) -> Choice[V]:
        """What computes ``shape``; the same for all shapes of its bucket.

        Args:
            dtype: float32, float16 or bfloat16

        Raises:
            UnsupportedShape: nothing does.
        """
        key = spec, shape.bucket(), dtype
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = self._choose(spec, key[1], dtype_name(dtype))
        return choice

    def runs(self, group: Group, dtype: str) -> bool:
        """Whether a model of ``dtype`` takes the kernels of ``group``: none has been dropped."""
        return not any(
            (spec.name, variant.value, dtype) in self._dropped
            for spec in self._specs
            if spec.group in _REQUIRED[group]
            for variant in spec.variants
            if variant is not spec.reference
        )

    def usable(self, spec: Spec[S, V, P], shape: S, dtype: str) -> Mapping[V, Variant[S, P]]:
        """The variants that support ``shape``, and that nothing was found wrong with."""
        return {
            name: variant
            for name, variant in spec.variants.items()
            if variant.supports(shape.bucket(), dtype, self.device)
            and (name is spec.reference or self._is_trusted(spec, name, variant, dtype))
        }

    def _is_trusted(
        self, spec: AnySpec, name: Enum, variant: Variant[Any, Any], dtype: str
    ) -> bool:
        if (spec.name, name.value, dtype) in self._dropped:
            return False
        return all(
            group is None or self.runs(group, dtype) for group in (spec.group, variant.needs)
        )

    def default(self, spec: Spec[S, V, P], shape: S, dtype: str) -> Choice[V]:
        """What is chosen where nothing has been measured.

        Raises:
            UnsupportedShape: nothing supports ``shape``.
        """
        bucket = shape.bucket()
        usable = self.usable(spec, bucket, dtype)
        if not usable:
            raise UnsupportedShape(f"{spec.name}: nothing supports {describe(shape)} in {dtype}")
        wanted = [d.variant for d in spec.defaults if d.matches(bucket, self.device)]
        kernels = [name for name, variant in usable.items() if variant.kind is Kind.KERNEL]
        why = Why.ONLY if len(usable) == 1 else Why.DEFAULT
        if wanted and not kernels and spec.variants[wanted[0]].kind is Kind.KERNEL:
            why = Why.GAP
        preferred = next((name for name in (*wanted, spec.reference) if name in usable), None)
        chosen = next(iter(usable)) if preferred is None else preferred
        return Choice(chosen, {}, why)

    def _choose(self, spec: Spec[S, V, P], bucket: S, dtype: str) -> Choice[V]:
        choice = self.default(spec, bucket, dtype)
        timing = self._timings.get((spec.name, tuple(spec.timing_bucket(bucket)), dtype))
        if timing is None:
            return choice
        variant = spec.variant(timing.variant)
        # A pool of states is written one way, for all steps: in place where that can be.
        is_other = spec.group is Group.STATES and variant is not choice.variant
        if is_other or variant not in self.usable(spec, bucket, dtype):
            return choice
        why = choice.why if choice.why is Why.GAP else Why.TUNED
        return Choice(variant, dict(timing.settings), why)


_selectors: dict[DeviceName, Selector] = {}
_only: list[Selector] = []  # of :func:`selecting`, the innermost last


def selector_for(device: DeviceName | None = None) -> Selector:
    """The process's selector of ``device``, by default MLX's own; at first use it reads the record
    of this machine."""
    if _only:
        return _only[-1]
    device = device or current_device()
    if device not in _selectors:
        _selectors[device] = Selector(device, load_record(device))
    return _selectors[device]


def select(spec: Spec[S, V, P], shape: S, dtype: mx.Dtype) -> Choice[V]:
    """What computes ``shape`` on this machine, as :meth:`Selector.select` says."""
    return selector_for().select(spec, shape, dtype)


def use_record(device: DeviceName, record: Record) -> None:
    """Choose by ``record`` from now on; choices already handed out stay as they are."""
    _selectors[device] = Selector(device, record)


@contextmanager
def selecting(selector: Selector) -> Iterator[Selector]:
    """Within it ``selector`` chooses, whatever the device: the one way to choose otherwise."""
    _only.append(selector)
    try:
        yield selector
    finally:
        _only.remove(selector)
