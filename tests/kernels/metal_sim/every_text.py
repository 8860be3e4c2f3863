"""Every Metal text that the specifications can lead to.

Over all kernels that run on Metal: shapes that are checked and surveyed, of one row and of several,
types, settings, and the variants MLX writes for inputs of fewer than 8 elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import mlx.core as mx

from metal_sim.eager import launches_by
from metal_sim.text import MetalText, metal_text
from quire.kernels.choice.spec import AnySpec, Kind, Settings, Variant
from quire.kernels.download import copy_to_host
from quire.kernels.gpu_kernel import GpuKernel, TemplateValue
from quire.kernels.specs import SPECS

# MLX passes arrays of fewer elements in the constant address space.
_SMALL = 8
# No text depends on sizes beyond these.
_MAX_SIZES = {
    "rows": 40,
    "context": 1100,
    "blocks": 16,
    "outputs": 512,
    "inputs": 512,
    "vocab": 4096,
}


@dataclass(frozen=True)
class Text:
    """A text, and whether the settings that make it are used where nothing is tuned."""

    kernel: str
    text: MetalText
    is_default: bool


@dataclass(frozen=True)
class _Launch:
    kernel: GpuKernel
    template: tuple[tuple[str, TemplateValue], ...]
    dtypes: tuple[mx.Dtype, ...]  # of inputs
    small: tuple[bool, ...]  # which inputs are
    ndims: tuple[int, ...]
    output_dtypes: tuple[mx.Dtype, ...]


def every_text(*, thorough: bool = False) -> list[Text]:
    """The texts, each once.

    Args:
        thorough: all combinations of settings, and surveyed shapes in all types, and not only each
            value of a setting and the last type.
    """
    found: dict[_Launch, bool] = {}
    is_default = False

    def note(
        kernel: GpuKernel,
        inputs: Sequence[mx.array],
        *,
        template: dict[str, TemplateValue],
        output_dtypes: Sequence[mx.Dtype],
    ) -> None:
        small = tuple(array.size < _SMALL for array in inputs)
        for each in {small, tuple(False for _ in small)}:
            launch = _Launch(
                kernel,
                tuple(template.items()),
                tuple(array.dtype for array in inputs),
                each,
                tuple(array.ndim for array in inputs),
                tuple(output_dtypes),
            )
            found[launch] = found.get(launch, False) or is_default

    with (
        mock.patch.object(mx.metal, "is_available", return_value=True),
        mock.patch.object(mx.random, "normal", _zeros),
        launches_by(note),
    ):
        for spec, variant, shape, dtype in _problems(thorough):
            problem = spec.problem(shape, getattr(mx, dtype), 0, True)
            is_tried = thorough or (shape in spec.checked and dtype == variant.dtypes[-1])
            for settings in _settings(variant, thorough) if is_tried else ({},):
                is_default = not settings
                variant.run(problem, settings)
        is_default = True
        for size in (4, 40):
            copy_to_host(mx.arange(size, dtype=mx.int32), mx.zeros(64, mx.int32))
    return [Text(x.kernel.name, _text(x), default) for x, default in found.items()]


def _zeros(shape: Sequence[int], dtype: mx.Dtype, key: mx.array) -> mx.array:
    """No text depends on values, and random ones take time."""
    return mx.zeros(shape, dtype)


def _problems(thorough: bool) -> Iterator[tuple[AnySpec, Variant[Any, Any], Any, str]]:
    for spec in SPECS:
        shapes = dict.fromkeys(map(_cut, (*spec.checked, *spec.surveyed.values())))
        shapes |= dict.fromkeys(filter(None, map(_of_one_row, spec.checked)))
        kernels = [v for v in spec.variants.values() if v.kind is Kind.KERNEL]
        for variant, shape in product(kernels, shapes):
            is_new = thorough or shape in spec.checked or getattr(shape, "rows", 0) == 1
            for dtype in variant.dtypes if is_new else variant.dtypes[-1:]:
                if variant.supports(shape.bucket(), dtype, "metal"):
                    yield spec, variant, shape, dtype


def _cut(shape: Any) -> Any:
    """The shape, small enough to be made in no time."""
    fields = shape._asdict()
    cut = {name: min(most, fields[name]) for name, most in _MAX_SIZES.items() if name in fields}
    if fields.get("from_start"):
        cut["context"] = cut["rows"]
    return shape._replace(**cut)


def _of_one_row(shape: Any) -> Any | None:
    """The same with arrays of few elements, if there can be."""
    fields = shape._asdict()
    return None if "rows" not in fields or fields.get("from_start") else shape._replace(rows=1)


def _settings(variant: Variant[Any, Any], everything: bool) -> Iterator[Settings]:
    """None, each value by itself with the first of the others, or all combinations."""
    yield {}
    names, values = list(variant.settings), list(variant.settings.values())
    if everything:
        yield from (dict(zip(names, each, strict=True)) for each in product(*values))
    elif names:
        first = {name: each[0] for name, each in zip(names, values, strict=True)}
        for name, each in zip(names, values, strict=True):
            yield from ({**first, name: value} for value in each)


def _text(launch: _Launch) -> MetalText:
    inputs = [
        mx.zeros((1,) * (ndim - 1) + (_SMALL - 1 if is_small else _SMALL,), dtype)
        for dtype, is_small, ndim in zip(launch.dtypes, launch.small, launch.ndims, strict=True)
    ]
    return metal_text(
        launch.kernel,
        inputs,
        template=dict(launch.template),
        output_dtypes=launch.output_dtypes,
    )
