"""What a worker gives back while the whole machine is short of memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from quire.engine.memory.host import available_memory, total_memory

_INTERVAL = 1.0  # seconds between two looks
# Seconds without pressure, after which what was given back is taken again: at once where nothing
# runs, since what runs is computed anew then.
_CALM, _CALM_IF_BUSY = 60.0, 600.0
# Of a machine's or container's memory, that is left.
_SHORT, _CRITICAL = 0.08, 0.04


class Pressure(IntEnum):
    NONE = 0
    SHORT = 1
    CRITICAL = 2


def system_pressure(root: Path = Path("/")) -> Pressure:
    """As macOS itself says, elsewhere by the memory that is left; ``root`` holds proc and sys."""
    if sys.platform == "darwin":
        level = _sysctl("kern.memorystatus_vm_pressure_level")
        return {2: Pressure.SHORT, 4: Pressure.CRITICAL}.get(level, Pressure.NONE)
    if sys.platform != "linux":
        return Pressure.NONE
    left = available_memory(root) / total_memory(root)
    if left < _CRITICAL:
        return Pressure.CRITICAL
    return Pressure.SHORT if left < _SHORT else Pressure.NONE


def _sysctl(name: str) -> int:
    """A number that the kernel tells; 0 where it does not."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    library = ctypes.CDLL(None)
    library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return value.value


class Relief:
    """How many blocks the pool has while memory is short: cached ones go before anything fails."""

    def __init__(
        self,
        num_blocks: int,
        least_blocks: int,
        read: Callable[[], Pressure] = system_pressure,
    ) -> None:
        """
        Args:
            num_blocks: of the pool while all is well.
            least_blocks: that the longest request needs.
        """
        self._wanted = num_blocks
        self._least = min(least_blocks, num_blocks)
        self._read = read
        self._looked = float("-inf")
        self._calm_since = float("-inf")

    def look(self, now: float) -> Pressure | None:
        """The pressure, or None where the last look was a moment ago."""
        if now - self._looked < _INTERVAL:
            return None
        self._looked = now
        pressure = self._read()
        if pressure is not Pressure.NONE:
            self._calm_since = now
        return pressure

    def wait(self, now: float) -> None:
        """Calm begins anew: the blocks that were to return have found no room."""
        self._calm_since = now

    def num_blocks(self, pressure: Pressure, now: float, current: int, *, idle: bool) -> int:
        """What the pool should have, which has ``current`` blocks."""
        if pressure is Pressure.CRITICAL:
            return max(self._least, min(current, current // 2 + 1))
        if now - self._calm_since >= (_CALM if idle else _CALM_IF_BUSY):
            return self._wanted
        return current
