"""Problems to check and time variants on: random inputs and the exact result."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Self = TypeVar("Self", bound="Problem")


class Problem(ABC):
    """Inputs of an operation at one shape.

    Attributes:
        num_bytes: what a call reads and writes at least.
        flops: arithmetic of a call, or 0 where it is beside the point.
        waits: the attribute of the inputs that a chain of calls goes through.
    """

    num_bytes: int
    flops = 0
    waits: str

    @abstractmethod
    def expected(self) -> list[Float64Array]:
        """The exact result, computed in float64."""

    def chained(self: Self, result: Sequence[mx.array]) -> Self:
        """The same problem with inputs that wait for the ``result`` of another call.

        Real data, not :func:`mx.depends`: kernels that are only said to depend may overlap on a
        GPU. It changes neither, and costs little and the same for all variants.
        """
        other = copy.copy(self)
        setattr(other, self.waits, waiting(getattr(self, self.waits), result))
        return other

    def difference(self, found: Sequence[Float64Array], expected: Sequence[Float64Array]) -> float:
        """How far one result is from another; 0 is the same."""
        return relative_difference(found, expected)


def relative_difference(found: Sequence[Float64Array], expected: Sequence[Float64Array]) -> float:
    """The largest difference between two results, relative to the largest expected value of each
    array; infinite if one is not a number, or if arrays or shapes differ.

    Arrays found beyond the expected ones, such as the fence of a write in place, do not count.
    """
    found = found[: len(expected)]
    if [a.shape for a in found] != [b.shape for b in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if np.isnan(a).any():
            return float("inf")
        worst = max(worst, float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30)))
    return worst


def to_float64(arrays: Sequence[mx.array]) -> list[Float64Array]:
    mx.eval(*arrays)
    return [np.array(array.astype(mx.float32), np.float64) for array in arrays]


def waiting(array: mx.array, result: Sequence[mx.array]) -> mx.array:
    """The values of ``array`` once all of ``result`` is there: a small operation more for each."""
    for part in result:
        array = array + (part.reshape(-1)[0] * 0).astype(array.dtype)
    return array


def normal(shape: Sequence[int], dtype: mx.Dtype, key: mx.array) -> mx.array:
    """Standard normal values, evaluated."""
    values = mx.random.normal(tuple(shape), dtype=dtype, key=key)
    mx.eval(values)
    return values


def ints(values: Any) -> mx.array:
    return mx.array(np.asarray(values, np.int32))
