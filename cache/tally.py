"""Counts of values by size, cheap enough for every block and every step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Tally:
    """``counts[i]`` values lie at or below ``bounds[i]`` and above the bound before; the last count
    has those above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds`` ascend."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0  # of the values

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
