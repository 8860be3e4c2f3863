"""Sizes that recur, so that compiled graphs do."""

from __future__ import annotations


def bucket(count: int) -> int:
    """``count`` rounded up to one of at most four sizes per power of two."""
    step = max(1, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step
