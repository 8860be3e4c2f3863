"""Sizes that recur, so that compiled graphs do."""

from __future__ import annotations

# On Metal MLX puts inputs of fewer elements into another address space, which makes another text.
CONSTANT_SIZE = 8


def pad_size(count: int) -> int:
    """``count`` rounded up to one of at most four sizes per power of two: where padding costs."""
    step = max(1, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


def round_up_to_power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two of at least ``count`` and ``least``."""
    return 1 << (max(count, least) - 1).bit_length()
