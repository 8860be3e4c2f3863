"""How recurrent kernels share the rows of a state among lanes."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

LANES = (4, 8, 16)
SIMDGROUPS = (2, 4, 8)


class ScanSettings(NamedTuple):
    """What may be tuned; results differ by rounding only. 0 is for: by the shape and the device."""

    lanes: int = 0  # that share a row of the state, of LANES
    simdgroups: int = 0  # of a threadgroup, of SIMDGROUPS


class Sharing(NamedTuple):
    """What is taken where nothing was tuned."""

    values: int  # of a row of the state in each lane, at most, if so many lanes can share one
    simdgroups: int


# Nothing is known of Metal yet: registers and threadgroup memory are left to others.
_ELSEWHERE = Sharing(values=16, simdgroups=4)


def scan_settings(dim: int, settings: ScanSettings | None, on_cuda: Sharing) -> ScanSettings:
    """Both of them, for rows of ``dim`` values, a multiple of 32, which lanes share in fours."""
    lanes, simdgroups = settings or ScanSettings()
    sharing = on_cuda if mx.cuda.is_available() else _ELSEWHERE
    fitting = [n for n in LANES if dim % (4 * n) == 0]
    if lanes:
        lanes = max((n for n in fitting if n <= lanes), default=fitting[0])
    else:
        lanes = next((n for n in fitting if dim // n <= sharing.values), fitting[-1])
    return ScanSettings(lanes, simdgroups or sharing.simdgroups)
