"""Which variant computes an operation: by what the manifest says, and what this machine has shown.

The order is: what `quire tune` measured for the shape on this chip, then the manifest's defaults,
then whatever supports the shape. A variant that disagreed with the reference here is never chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName, current_device
from quire.kernels.choice.manifest import Manifest, Variant, load_manifest
from quire.kernels.choice.record import Record, load_record
from quire.kernels.choice.shapes import AnyShape, describe, timing_bucket


class Why(StrEnum):
    """The reason for a choice."""

    TUNED = "tuned on this chip"
    DEFAULT = "default for this device"
    ONLY = "only one that supports this shape"
    GAP = "gap: no kernel supports this shape"


@dataclass(frozen=True)
class Choice:
    """A variant and the numbers it runs with."""

    variant: str
    settings: Mapping[str, int]
    why: Why


class Gap(NamedTuple):
    """A shape for which the manifest would have a kernel, but no kernel can be used."""

    operation: str
    shape: AnyShape  # its bucket
    dtype: str
    device: str
    variant: str | None  # what runs instead; None: nothing can


class UnsupportedShape(ValueError):
    """No variant at all supports what was asked for."""


class Selector:
    """Chooses for one device, from one manifest and one record of this machine."""

    def __init__(self, device: DeviceName, manifest: Manifest, record: Record | None) -> None:
        self._device = device
        self._manifest = manifest
        self._timings = {} if record is None else record.timings_by_bucket()
        self._dropped = set() if record is None else record.dropped()
        self._choices: dict[tuple[str, AnyShape, mx.Dtype], Choice] = {}
        self._gaps: dict[Gap, None] = {}

    def select(self, operation: str, shape: AnyShape, dtype: mx.Dtype) -> Choice:
        """What computes ``shape``; the same for all shapes of its bucket.

        Raises:
            UnsupportedShape: nothing does.
        """
        key = operation, shape.bucket(), dtype
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = self._choose(operation, key[1], dtype_name(dtype))
        return choice

    def gaps(self) -> list[Gap]:
        """Every gap met so far, in the order they were met."""
        return list(self._gaps)

    def usable(self, operation: str, shape: AnyShape, dtype: str) -> dict[str, Variant]:
        """The variants that support ``shape`` and have not been dropped, by name."""
        entry = self._manifest[operation]
        return {
            name: variant
            for name, variant in entry.variants.items()
            if variant.supports(shape.bucket(), dtype, self._device)
            and (name == entry.reference or (operation, name, dtype) not in self._dropped)
        }

    def default(self, operation: str, shape: AnyShape, dtype: str) -> Choice:
        """What is chosen where nothing has been measured.

        Raises:
            UnsupportedShape: nothing supports ``shape``.
        """
        bucket = shape.bucket()
        usable = self.usable(operation, bucket, dtype)
        wanted = [d for d in self._manifest[operation].defaults if d.matches(bucket, self._device)]
        why = Why.ONLY if len(usable) == 1 else Why.DEFAULT
        kinds = {variant.kind for variant in usable.values()}
        if wanted and "kernel" not in kinds:
            first = self._manifest[operation].variants[wanted[0].variant]
            why = Why.GAP if first.kind == "kernel" else why
        for default in wanted:
            if default.variant in usable:
                return Choice(default.variant, default.settings, why)
        for name, variant in usable.items():
            return Choice(name, variant.default_settings, why)
        self._gaps[Gap(operation, bucket, dtype, self._device, None)] = None
        raise UnsupportedShape(f"{operation}: nothing supports {describe(shape)} in {dtype}")

    def _choose(self, operation: str, bucket: AnyShape, dtype: str) -> Choice:
        choice = self.default(operation, bucket, dtype)
        timing = self._timings.get((operation, timing_bucket(bucket), dtype))
        if choice.why is Why.GAP:
            self._gaps[Gap(operation, bucket, dtype, self._device, choice.variant)] = None
        if timing is None or timing.variant not in self.usable(operation, bucket, dtype):
            return choice
        why = choice.why if choice.why is Why.GAP else Why.TUNED
        return Choice(timing.variant, MappingProxyType(dict(timing.settings)), why)


_selectors: dict[DeviceName, Selector] = {}


def select(
    operation: str, shape: AnyShape, dtype: mx.Dtype, device: DeviceName | None = None
) -> Choice:
    """What computes ``shape`` on this machine; reads the record of ``quire tune`` at first use.

    Args:
        dtype: float32, float16 or bfloat16
        device: MLX's default device if not given.

    Raises:
        UnsupportedShape: nothing does.
    """
    return selector_for(device or current_device()).select(operation, shape, dtype)


def gaps() -> list[Gap]:
    """Everything this process asked for that no kernel of its device supports."""
    return [gap for selector in _selectors.values() for gap in selector.gaps()]


def selector_for(device: DeviceName) -> Selector:
    """The process-wide selector of ``device``."""
    selector = _selectors.get(device)
    if selector is None:
        selector = Selector(device, load_manifest(), load_record(device))
        _selectors[device] = selector
    return selector


def use_record(device: DeviceName, record: Record) -> None:
    """Choose by ``record`` from now on; choices already handed out stay as they are."""
    _selectors[device] = Selector(device, load_manifest(), record)


def dtype_name(dtype: mx.Dtype) -> str:
    """The name without its package: "bfloat16"."""
    return str(dtype).rpartition(".")[2]
