"""Problems to check and time variants on: random inputs, every variant, and the exact result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Run = Callable[[Mapping[str, int]], list[mx.array]]


def relative_difference(found: Sequence[Float64Array], expected: Sequence[Float64Array]) -> float:
    """The largest difference between two results, relative to the largest expected value."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"the result has shape {a.shape}, not {b.shape}")
        worst = max(worst, float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30)))
        if np.isnan(a).any():
            return float("inf")
    return worst


@dataclass(frozen=True)
class Probe:
    """One problem of one shape.

    Attributes:
        variants: functions that build a variant's result from its settings, lazily.
        expected: computes the exact result in float64.
        difference: how far one result is from another; 0 is the same.
        num_bytes: what a call reads and writes at least.
    """

    variants: Mapping[str, Run]
    expected: Callable[[], list[Float64Array]]
    num_bytes: int
    difference: Callable[[Sequence[Float64Array], Sequence[Float64Array]], float] = (
        relative_difference
    )

    def result(self, variant: str, settings: Mapping[str, int]) -> list[Float64Array]:
        """Run a variant and read its result."""
        outputs = self.variants[variant](settings)
        mx.eval(*outputs)
        return to_float64(outputs)


def to_float64(arrays: Sequence[mx.array]) -> list[Float64Array]:
    mx.eval(*arrays)
    return [np.array(array.astype(mx.float32), np.float64) for array in arrays]


def normal(shape: Sequence[int], dtype: mx.Dtype, key: mx.array) -> mx.array:
    """Standard normal values, evaluated."""
    values = mx.random.normal(tuple(shape), dtype=dtype, key=key)
    mx.eval(values)
    return values


def ints(values: Any) -> mx.array:
    return mx.array(np.asarray(values, np.int32))
