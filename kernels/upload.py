"""Small host arrays on their way to the device.

On CUDA what MLX makes of a host array lies in managed memory, whose pages travel to the device when
a kernel asks for them and back while the host writes the next step's: some 200 us a step on an
H200, in which other kernels wait too. So there the host writes into memory that stays with it, one
small kernel reads it across the bus, and all others read that kernel's result.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections import deque
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

logger = logging.getLogger(__name__)

_MIN_VALUES = 1 << 14
# One step runs while the next one is built.
_STEPS_UNDER_WAY = 2

# Of the CUDA driver's cuMemAdvise.
_SET_PREFERRED_LOCATION, _SET_ACCESSED_BY = 3, 5
_CPU, _FIRST_GPU = -1, 0


class HostSlot:
    """Memory of the host that the GPU reads where it is."""

    def __init__(self, num_values: int) -> None:
        self.array = mx.array(np.zeros(num_values, np.int32))
        self.view: Int32Array = np.array(self.array, copy=False)
        _keep_on_host(self.view)


class Staging:
    """Host memory of a few steps. Whoever builds the steps owns it.

    Slots are never given back to MLX, which would put a kernel's results into them.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[HostSlot]] = {}
        self._taken: deque[list[HostSlot]] = deque([[]])

    def begin_step(self) -> None:
        """A step is about to be built, and all but the one before it have ended.

        Host memory of steps that have ended is used again.
        """
        self._taken.append([])
        while len(self._taken) > _STEPS_UNDER_WAY:
            for slot in self._taken.popleft():
                self._free.setdefault(slot.view.size, []).append(slot)

    def upload(self, arrays: Sequence[Int32Array]) -> mx.array:
        """All values of (n,) arrays in a row, as one (n,) int32 array on the device."""
        if not mx.cuda.is_available():
            return mx.array(np.concatenate(arrays))
        size = sum(array.size for array in arrays)
        slot = self.take(size)
        np.concatenate(arrays, out=slot.view[:size])
        return slot.array[:size] + mx.array(0, mx.int32)

    def take(self, size: int) -> HostSlot:
        """Memory for at least ``size`` int32 values, until two more steps have begun."""
        num_values = max(_MIN_VALUES, 1 << math.ceil(math.log2(max(1, size))))
        free = self._free.get(num_values)
        slot = free.pop() if free else HostSlot(num_values)
        self._taken[-1].append(slot)
        return slot


def _keep_on_host(memory: Int32Array) -> None:
    """Tell the driver that ``memory`` stays with the host, and the GPU only looks at it."""
    try:
        advise = ctypes.CDLL("libcuda.so.1").cuMemAdvise
    except (OSError, AttributeError) as error:
        logger.debug("managed memory will move to and fro: %s", error)
        return
    advise.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    for advice, device in ((_SET_PREFERRED_LOCATION, _CPU), (_SET_ACCESSED_BY, _FIRST_GPU)):
        code = advise(memory.ctypes.data, memory.nbytes, advice, device)
        if code:
            logger.debug("managed memory will move to and fro: cuMemAdvise returned %d", code)
            return
