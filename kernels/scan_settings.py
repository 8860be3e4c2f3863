"""How recurrent kernels share the rows of a state among lanes."""

from __future__ import annotations

from typing import NamedTuple

LANES = (4, 8, 16)
SIMDGROUPS = (2, 4, 8)
_VALUES_PER_LANE = 16


class ScanSettings(NamedTuple):
    """What may be tuned; results differ by rounding only. 0 is for: by the shape."""

    lanes: int = 0  # that share a row of the state, of LANES
    simdgroups: int = 4  # of a threadgroup


def share_lanes(dim: int, wanted: int = 0) -> int:
    """How many lanes share a row of ``dim`` values, in fours.

    Args:
        dim: a multiple of 32.
        wanted: at most so many; 0: as few as leave no lane more values than its registers hold
            with ease, if so many can.
    """
    fitting = [n for n in LANES if dim % (4 * n) == 0]
    if wanted:
        return max((n for n in fitting if n <= wanted), default=fitting[0])
    return next((n for n in fitting if dim // n <= _VALUES_PER_LANE), fitting[-1])
